"""Every method through the same checks, once for each path of its code; every other recipe through a dry run.

Recipes are found by themselves; a method's paths are rows of `table`, on the embedded digits with networks that take no
time. The four fakes come along: through them the checks also see averages, queues, chains and teachers.
"""

import math
import re
from dataclasses import dataclass, replace

import pytest
import torch
from click.testing import CliRunner
from torch.nn.parallel import DistributedDataParallel

from fastssl import dist
from fastssl.commands import dry_run
from fastssl.commands.main import main
from fastssl.costs import memory_model
from fastssl.costs.trace import Untraceable
from fastssl.engine import claim, stages
from fastssl.engine.job import Job
from fastssl.engine.join import facts_of
from fastssl.engine.train import Trainer
from fastssl.losses.semppl import Relic
from fastssl.methods.base import Artefact, Epochs, Facts, Horizon, Ref, Stages, Steps
from fastssl.methods.paws import Ropaws
from fastssl.methods.s4l import Vat
from fastssl.methods.simclrv2 import Memory
from fastssl.methods.supervised import FirstLayer
from fastssl.nn.encoders.resnet import ByolResNet, ResNet, SimclrResNet
from fastssl.nn.encoders.vit import ViT
from fastssl.nn.encoders.wide_resnet import WideResNet
from fastssl.optim.adamw import AdamW
from fastssl.optim.lars import Lars
from fastssl.optim.rates import WarmupCosine, WarmupStairs
from fastssl.recipes.datasets import KNOWN_SETS
from fastssl.recipes.images import TYPICAL
from fastssl.recipes.resolve import recipes, resolve
from fastssl.recipes.supervised import finetune
from fastssl.record.clock import Clock
from fastssl.record.recorder import Recorder
from fastssl.run_dir.checkpoint import Checkpoints
from loaders.files import sha256_of
from loaders.loader import Loader, bind
from loaders.plan.views import UNIT, Rrc, View
from loaders.store.data import DataSets, open_data
from loaders.store.source import ArraySource
from tests.end_to_end.command import metrics
from tests.ranks.pool import run_ranks
from tests.support import fakes
from tests.support.interrupted import assert_same_stages, run_in_pieces

CPU = torch.device("cpu")
PAWS_RATE = WarmupCosine(0.8, Epochs(5), start=0.8, final=0.032)


def paws(**changes):
    (stage,) = resolve("paws.digits")
    tiny = {"encoder": ResNet(10, stem="cifar", base_width=4), "out_features": 8, "batch_global": 32}
    tiny |= {"images_per_class": 4, "precision": "fp32", "rate": PAWS_RATE}
    return (replace(stage, config=replace(stage.config, **tiny | changes)),)


def supervised(**changes):
    (stage,) = resolve("supervised.digits")
    tiny = {"encoder": ResNet(10, stem="cifar", base_width=4), "batch_global": 32, "precision": "fp32"}
    return (replace(stage, config=replace(stage.config, **tiny | changes)),)


def fine_tuning():
    """From PAWS's first projection layer, with all that the baseline has not."""
    (stage,) = supervised(head=FirstLayer(32, bias=True), optimizer=Lars("simclr", weight_decay=5e-4), head_peak=0.05)
    method = replace(stage.config, rate=WarmupStairs(2.0, (Steps(80),), 0.1), label_smoothing=0.0)
    return (*paws(), finetune(method, stage.length, Ref(stage="pretrain")))


def suncet():
    (pretrain,), (stage,) = paws(), resolve("suncet.cifar10_small")
    theirs = pretrain.config
    shared = {name: getattr(theirs, name) for name in ("dataset", "eval_view", "labels", "precision", "encoder")}
    view = replace(theirs.global_view, name="labelled")
    method = replace(
        stage.config, **shared, out_features=8, view=view, images_per_class=4, rate=WarmupCosine(0.8, final=0.01)
    )
    return (pretrain, replace(stage, config=method, needs={"init": Ref(stage="pretrain")}))


def s4l(recipe, **changes):
    tiny = {"dataset": "digits", "labels": "per-class=10", "precision": "fp32", "batch_global": 16} | changes
    tiny |= {"encoder": ResNet(10, stem="cifar", base_width=4)}

    def on_digits(method):
        sizes = {"view": 8, "eval_view": 8, "label_view": 6}
        known = vars(method)
        views = {name: replace(known[name], size=size, pixels=UNIT) for name, size in sizes.items() if name in known}
        return replace(method, **views, **tiny, rate=replace(method.rate, peak=0.1, falls=()))

    return tuple(replace(stage, config=on_digits(stage.config)) for stage in resolve(f"s4l.{recipe}_cifar10_small"))


def semppl(recipe="semppl.cifar10_small", **changes):
    (digits,), (stage,) = paws(), resolve(recipe)
    theirs, crop = digits.config, View("odd", 8, Rrc((0.9, 1.0)), pixels=UNIT)
    tiny = {name: getattr(theirs, name) for name in ("dataset", "eval_view", "labels", "precision", "batch_global")}
    tiny |= {"encoder": ByolResNet(10, stem="cifar", base_width=4), "hidden_features": 16, "out_features": 8}
    tiny |= {"odd_view": crop, "even_view": replace(crop, name="even"), "capacity": 64, "ema": 0.9}
    tiny["rate"] = replace(stage.config.rate, peak=8.0)
    if isinstance(stage.config.base, Relic):
        tiny["base"] = Relic(tau=0.5, num_negatives=5, contrast_weight=1.0, invariance_weight=1.0)
    return (replace(stage, config=replace(stage.config, **tiny | changes)),)


def simclrv2(**changes):
    (stage,) = resolve("simclrv2.cifar10_small")
    tiny = {"dataset": "digits", "eval_view": fakes.EVAL, "labels": "per-class=10", "view": fakes.VIEW}
    tiny |= {"encoder": SimclrResNet(10, stem="cifar", base_width=4), "out_features": 8, "batch_global": 32}
    tiny |= {"tau": 0.2, "rate": replace(stage.config.rate, peak=80.0)}
    return (replace(stage, config=replace(stage.config, precision="fp32", **tiny | changes)),)


def distil(**changes):
    """From the supervised baseline, some labels beside."""
    (teacher,), (stage,) = supervised(), resolve("distil.cifar10_small")
    tiny = {"dataset": "digits", "eval_view": fakes.EVAL, "labels": "per-class=50", "alpha": 0.5}
    tiny["rate"] = replace(stage.config.rate, peak=5.0)
    tiny |= {"view": replace(fakes.VIEW, copies=1), "encoder": SimclrResNet(10, stem="cifar", base_width=4)}
    method = replace(stage.config, batch_global=32, precision="fp32", **tiny | changes)
    return (teacher, replace(stage, config=method, needs={"teacher": Ref(stage=teacher.name)}))


def distil_features():
    """From the supervised baseline."""
    (teacher,), (stage,) = supervised(), resolve("distil_features.cifar10_small")
    tiny = {"dataset": "digits", "eval_view": fakes.EVAL, "labels": "per-class=50", "batch_global": 32}
    tiny |= {"view": replace(fakes.VIEW, copies=1), "encoder": ResNet(10, stem="cifar", base_width=4)}
    config = replace(stage.config, precision="fp32", **tiny, teacher_encoder=teacher.config.encoder)
    return (teacher, replace(stage, config=config, needs={"teacher": Ref(stage=teacher.name)}))


SMALL_CROPS = View("small", 6, Rrc((0.3, 0.6)), pixels=UNIT, copies=3)


@dataclass(frozen=True)
class Row:
    """One path of a method. On two classes of eight images its loss begins above `fitted` and comes below it within
    `steps`, at a rate of this `peak` (None: the path's own) after a warm-up of five steps, where it `warms` up."""

    stages: Stages
    fitted: float = math.nan
    steps: int = 100
    peak: float | None = None
    warms: bool = True


def table():
    """Name -> row; a name begins with its method's module. Labels are smoothed by 0.1, so what can be reached is PAWS's
    cross-entropy of 0.05 with a mean entropy of ln 2, -0.64, and the smoothed labels' own entropy, 0.20. What must be
    fitted leaves room for the roundings of other processors, which make other curves, as other seeds do."""
    three = replace(paws()[0].config.global_view, copies=3)
    small_odd = replace(SMALL_CROPS, name="small_odd", copies=1)
    simclr = semppl("semppl.simclr_rn50_300ep", labels="per-class=10", own_entry=False)
    by_differences = Vat(0.5, 0.5, "differences", normaliser="compat")
    vit = paws(
        encoder=ViT(8, 2, 16, 2, 2), small_view=SMALL_CROPS, prediction=True, hidden_features=12, activation="gelu",
        optimizer=AdamW(weight_decay=0.04, final_decay=0.4), rate=WarmupCosine(4e-3, final=1e-6),
    )  # fmt: skip
    every_part = paws(
        small_view=SMALL_CROPS, prediction=True, out_features=16, support_views=2, classes_global=4,
        encoder=WideResNet(10, 1), optimizer=Lars("paws", "paper", weight_decay=1e-6),
    )  # fmt: skip
    return {
        "paws": Row(paws(), -0.6, peak=1.6),
        "paws with every part": Row(every_part, -0.6, peak=1.6),
        "paws of three views, labels for targets": Row(
            paws(global_view=three, label_targets=True, entropy=0.1, me_max=0.5), -0.2, peak=1.6
        ),
        # At tau 0.1 neighbours without labels, which an untrained network finds everywhere, may keep targets even.
        "ropaws": Row(paws(ropaws=Ropaws(), tau=0.02), -0.6, peak=0.8),
        "paws on a vision transformer": Row(vit, -0.3, 150, peak=0.02),
        "supervised": Row(supervised(), 0.22),
        "supervised fine-tuning": Row(fine_tuning(), 0.1),
        "suncet": Row(suncet(), 0.2, warms=False),
        # Digits look alike when turned; exemplar's term, ln 2 while all copies are equally far, takes longer. All cost
        # more a step, but half the steps are enough.
        "s4l rotation": Row(s4l("rotation", core_images=4), 0.6, 50),
        "s4l rotation alone": Row(s4l("rotation", class_weight=0.0), 0.9, 50),
        "s4l exemplar": Row(s4l("exemplar", core_images=8), 0.9, 50),
        "s4l vat": Row(s4l("vat_entmin", vat=Vat(epsilon=0.5), core_images=8), 0.25, 50),
        "s4l vat by differences": Row(s4l("vat", vat=by_differences), 0.2, 50),
        "s4l pseudo-label": Row(s4l("pseudo_label"), 0.2, 50),
        "s4l moam": Row(s4l("moam"), 0.2, 50),
        # Where all images are one point, as at chance: ReLICv2's ln 6, which SemPPL has 1.6 times in 4 terms.
        # BYOL's is 0, and it begins at 4. SimCLR's contrast is then ln 31, and the total 1.37.
        "semppl": Row(semppl(small_odd_view=small_odd, own_entry=False), 0.67, 50),
        "semppl on SimCLR's base": Row(simclr, 1.15, 50),
        "relicv2": Row(semppl("relicv2.cifar10_small"), 1.5, 50),
        "byol": Row(semppl("byol.rn50_300ep"), 1.5, 50),
        # 2 ln 31 = 6.9 and 2 ln 91 = 9.0 where all rows are one
        "simclrv2": Row(simclrv2(), 6.2, 150, peak=10.0),
        "simclrv2 with memory": Row(simclrv2(memory=Memory(96, decay=0.5), head_layers=3), 8.3),
        "distil": Row(distil(), 0.3),
        "distil_features": Row(distil_features(), 0.2),
        **{f"fake {family}": Row(fakes.stages(family)) for family in ("paws", "semppl", "simclrv2", "s4l")},
    }


def paths():
    """Name -> stages."""
    return {name: row.stages for name, row in table().items()}


REAL = [name for name in table() if not name.startswith("fake")]
VIEWS = ("view", "global_view", "odd_view", "even_view")  # fields of configs


def short(path, **changes):
    """A path's stages, cut to four steps without evaluation."""
    settings = {"log_every": Steps(1), "checkpoint_every": Steps(2), "evaluate": ()} | changes
    return tuple(replace(stage, length=Steps(4), **settings) for stage in paths()[path])


def job(path, out, **changes):
    return Job(path, short(path, **changes), (), ("digits",), out, 0, "cpu", 1)


def folders(path, run_dir):
    """Where each stage that trains keeps its files."""
    chain = short(path)
    return [run_dir / stage.name if len(chain) > 1 else run_dir for stage in chain if stage.do == "train"]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Networks so small that two threads would wait for each other."""
    torch.set_num_threads(1)
    for module in (stages, claim):
        monkeypatch.setattr(module, "threads_per_rank", lambda: 1)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Run directories by path, each run once."""
    folder = tmp_path_factory.mktemp("ran")

    def run_dir(path):
        if not (folder / path).exists():
            stages.run(job(path, folder / path))
        return folder / path

    return run_dir


@pytest.fixture(params=paths())
def path(request):
    return request.param


# ------------------------------------------------------------------------------------------------ through the engine


def test_every_method_has_a_path():
    modules = {name.partition(".")[0] for name in recipes()}
    assert modules == {path.partition(" ")[0] for path in REAL}


def test_it_builds_and_its_steps_are_finite(path, ran):
    for folder in folders(path, ran(path)):
        lines = metrics(folder)
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert all(isinstance(value, int | float) for line in lines for value in line.values())  # "nan" is a string


@pytest.mark.parametrize("name", REAL)
def test_a_step_under_bf16_is_finite(name, tmp_path):
    """Catches an operation that autocast refuses, and a loss computed in half precision until it overflows."""
    changed = tuple(replace(stage, config=replace(stage.config, precision="bf16")) for stage in short(name))
    stages.run(replace(job(name, tmp_path), stages=changed))
    assert all(isinstance(line["loss"], float) for folder in folders(name, tmp_path) for line in metrics(folder))


def test_it_continues_bitwise(path, ran, tmp_path):
    """Catches state that a checkpoint lacks."""
    assert run_in_pieces(job(path, tmp_path), every=3) >= 1
    assert_same_stages(ran(path), tmp_path, short(path))


# --------------------------------------------------------------------------------------------------- stage by stage


def trained_stages(path, run_dir):
    """(stage, method) of every stage that trains, with what it needs of the earlier ones in `run_dir`."""
    facts = facts_of(open_data(("digits",)), 0)
    for stage in short(path):
        if stage.do == "train":
            inputs = {name: _made(run_dir / ref.stage) for name, ref in stage.needs.items()}
            torch.manual_seed(0)
            yield stage, stage.config.build(facts, inputs)


def _made(folder):
    path = folder / "produced.pt"
    if not path.exists():
        path = Checkpoints(folder / "checkpoints").newest() / "state.pt"
    return Artefact(path, sha256_of(path))


def load(method, num_steps):
    """The first batches of this rank."""
    bound = bind(method.plan(), open_data(("digits",)))
    with Loader(bound, rank=dist.rank(), world=dist.world_size(), threads=1) as loader:
        yield from loader.batches(0, num_steps)


def test_gradients_reach_every_weight_and_nothing_else(path, ran):
    """Catches a detached branch, a teacher or average that is trained, and a parameter that no optimiser holds."""
    for _, method in trained_stages(path, ran(path)):
        nets = method.nets()
        method.load_inputs(nets)
        optimizer = method.optimizer(nets)
        wanted = {name: p for name, p in nets.online.named_parameters() if p.requires_grad}
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in wanted.values()}
        if nets.frozen is not None:
            nets.frozen.eval()
        for step, batch in enumerate(load(method, 3)):
            optimizer.zero_grad()
            method.loss(nets, batch)["total"].backward()
            if step < 2:  # a layer that begins at zero lets nothing through in the first step
                for group, rate in zip(optimizer.param_groups, method.rates(step, Horizon(3, 3)), strict=True):
                    group["lr"] = rate
                optimizer.step()
        unreached = [name for name, p in wanted.items() if p.grad is None or not p.grad.any()]
        assert unreached == []
        assert all(p.grad.isfinite().all() for p in wanted.values())
        for name, module in nets.modules().items():
            if name != "online":
                assert all(p.grad is None and not p.requires_grad for p in module.parameters())


def test_two_ranks_equal_one_process(tmp_path, ran):
    """Loss, gradients and every buffer of the global batch, weights in float64. Catches a loss that sees its rank's
    rows only, a gradient scaled by the number of ranks, statistics or queues that differ between ranks."""
    run_dirs = {path: ran(path) for path in paths()}
    ranks = run_ranks(2, _all_first_steps, run_dirs, timeout_s=250.0)
    for path, run_dir in run_dirs.items():
        for stage, alone in enumerate(first_steps(path, run_dir)):
            together = [rank[path][stage] for rank in ranks]
            _assert_equal(path, together, alone)


def _assert_equal(path, together, alone):
    for name, value in alone["parts"].items():
        mean = sum(rank["parts"][name] for rank in together) / len(together)
        assert mean == pytest.approx(value, rel=1e-9, abs=1e-9), f"{path}: {name}"
    whole = torch.cat([g.flatten() for g in alone["gradients"].values()]).norm()
    for rank in together:
        assert rank["gradients"].keys() == alone["gradients"].keys()
        for name, g in alone["gradients"].items():
            # A bias before a batch norm has no gradient but rounding: its error counts beside the whole's norm.
            error = (rank["gradients"][name] - g).norm() / torch.maximum(g.norm(), whole * 1e-3)
            assert error < 1e-9, f"{path}: {name}"
        for name, buffer in alone["buffers"].items():
            assert torch.allclose(rank["buffers"][name].double(), buffer.double(), rtol=1e-9, atol=1e-12), (
                f"{path}: {name}"
            )


def _all_first_steps(run_dirs):
    return {path: first_steps(path, run_dir) for path, run_dir in run_dirs.items()}


def first_steps(path, run_dir):
    """Of every stage that trains: loss parts, gradients averaged over ranks, and buffers after the first backward."""
    torch.set_num_threads(1)
    found = []
    for _, method in trained_stages(path, run_dir):
        nets = method.nets()
        method.load_inputs(nets)
        for name, module in nets.modules().items():
            module.double().train(name != "frozen")
        trained = nets
        if dist.world_size() > 1:
            trained = replace(nets, online=DistributedDataParallel(nets.online, broadcast_buffers=False))
        for batch in load(method, 1):
            for part in batch.parts.values():
                part.x = {view: x.double() for view, x in part.x.items()}
            parts = method.loss(trained, batch)
            parts["total"].backward()
        found.append({
            "parts": {name: value.item() for name, value in parts.items()},
            "gradients": {name: p.grad for name, p in nets.online.named_parameters() if p.grad is not None},
            "buffers": {f"{n}.{b}": v for n, module in nets.saved().items() for b, v in module.named_buffers()},
        })  # fmt: skip
    return found


@pytest.mark.parametrize("path", REAL)
def test_it_overfits_sixteen_images(path, tmp_path):
    """Catches a sign, a target or a rate that keeps a network from learning what it could learn by heart."""
    digits = open_data(("digits",)).get("train")
    assert isinstance(digits, ArraySource)
    ids = torch.cat([torch.from_numpy(digits.labels == c).nonzero()[:8, 0] for c in (0, 1)]).numpy()
    sixteen = DataSets({"train": ArraySource("sixteen", digits.images[ids], digits.labels[ids], ("0", "1"))})
    *earlier, last = short(path)  # of a chain the last, as if nothing but its teacher had gone before
    teachers = [stage for stage in earlier if last.needs.get("teacher") == Ref(stage=stage.name)]
    row = table()[path]
    for stage in (*teachers, last):
        losses = _fit(stage, row, sixteen, tmp_path)
    assert losses[0] > row.fitted > sum(losses[-10:]) / 10


def _fit(stage, row, sixteen, run_dir):
    """The losses of the row's steps of `stage`, kept in a folder of its own."""
    known = vars(stage.config)
    settings = {"labels": "all", "batch_global": 16, "classes_global": 2, "images_per_class": 8}
    settings["pseudo_labels"] = False  # those of these images, all of which have labels, would be the labels
    settings = {name: value for name, value in settings.items() if name in known}
    settings |= {name: replace(known[name], ops=()) for name in VIEWS if name in known}
    if row.warms:
        settings["rate"] = replace(stage.config.rate, warmup=Steps(5), peak=row.peak or stage.config.rate.peak)
    length = Steps(row.steps)
    stage = replace(stage, config=replace(stage.config, **settings), length=length, checkpoint_every=length)
    inputs = {name: _made(run_dir / ref.stage) for name, ref in stage.needs.items() if name == "teacher"}
    torch.manual_seed(0)
    method, folder = stage.config.build(facts_of(sixteen, 0), inputs), run_dir / stage.name
    folder.mkdir()
    with Loader(bind(method.plan(), sixteen)) as loader, Recorder(folder, main=True) as recorder:
        Trainer(stage, method, loader, Checkpoints(folder / "checkpoints"), CPU).run(recorder, None, Clock())
    return [line["loss"] for line in metrics(folder)]


# ------------------------------------------------------------------------------------------------------- recipes


# Networks that are large, or that another recipe steps likewise.
LIKE_ANOTHER = re.compile(
    r"two_stages|rn(18|34|101|152|200)|rn50w|rn50_(sk|1pct)|smoothed|_finetune_(1|250|4000|all)|^(semppl|relicv2|byol).*rn50"
    r"|s4l.(?!supervised$|(?!vat_ent)\w+_cifar)"
)


def _not_traced(stage, facts, world):
    """Large networks are counted as smaller ones are, in up to half a minute each, and several recipes as another."""
    raise Untraceable("too large for a test")


@pytest.mark.parametrize("name", recipes())
def test_recipe_resolves_and_dry_runs_without_data_or_devices(name, tmp_path, monkeypatch):
    """Catches a recipe whose batches 64 ranks cannot share, and one that reads its data to say what it would do."""
    monkeypatch.chdir(tmp_path)
    if LIKE_ANOTHER.search(name):
        for module in (dry_run, memory_model):
            monkeypatch.setattr(module, "traced", _not_traced)
    assert recipes()[name].__doc__
    config = resolve(name)[0].config
    known = KNOWN_SETS[config.dataset]
    of_its_own = re.search(r"_(\d+)gpus?$", name)  # recipes made for few say for how many
    most = 64
    if name.startswith("s4l."):  # ranks share virtual cores, where there are any, else images
        most = min(64, config.batch_global // (config.core_images or 1))
    few = known.embedded or config.dataset == "mine"  # images that nobody has 64 GPUs for
    ranks = int(of_its_own[1]) if of_its_own else 2 if few else most
    result = CliRunner().invoke(main, ["train", name, "--dry-run", "--gpus", str(ranks)])
    assert result.exit_code == 0, result.output
    for stage in resolve(name, images=replace(TYPICAL, device="cuda")):
        assert f"stage        {stage.name}: " in result.output
        assumed = Facts(known.num_classes, known.channels, seed=0)
        for stream in stage.config.build(assumed, {}).plan().streams:
            assert f"{stream.batch_global:,} images a step, {stream.batch_global // ranks:,} a rank" in result.output
    assert f"runs/{name}-seed0" in result.output
    assert list(tmp_path.iterdir()) == []


def test_embedded_set_is_as_large_as_recipes_assume():
    assert len(open_data(("digits",)).get("train")) == KNOWN_SETS["digits"].num_images
