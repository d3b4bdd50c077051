"""Weights from elsewhere: layouts recognised, misfits listed, nothing half loaded, no code run."""

import argparse
import json
import os
import pickle
from collections import OrderedDict
from datetime import date
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fastssl.methods.base import Facts, Nets
from fastssl.methods.paws import Paws, PawsNet
from fastssl.nn.encoders.resnet import ResNet
from fastssl.nn.encoders.wide_resnet import WideResNet
from fastssl.recipes.resolve import resolve
from fastssl.weights import layouts
from fastssl.weights.layouts import CHECKPOINT, PAWS, TORCHVISION
from fastssl.weights.read import Weights, WeightsError, load_whole, read_weights
from tests.support import plain_resnet

TINY = ("encoder.base_width=4", "encoder.stem=imagenet", "out_features=8", "prediction=true", "precision=fp32")
X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def randomised(module: nn.Module) -> nn.Module:
    """In eval mode, with weights and statistics of which no two are alike."""
    generator = torch.Generator().manual_seed(1)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) / 4 + 0.1)
    return module.eval()


def paws() -> tuple[Paws, Nets]:
    """A small PAWS on images of three channels, freshly initialised, in eval mode."""
    (stage,) = resolve("paws.digits", TINY)
    method = stage.config.build(Facts(num_classes=10, channels=3, seed=0), {})
    torch.manual_seed(0)
    nets = method.nets()
    nets.online.eval()
    return method, nets


def saved(tmp_path: Path, content: object, name: str = "weights.pth", **settings) -> Path:
    torch.save(content, tmp_path / name, **settings)
    return tmp_path / name


# --------------------------------------------------------------------------------------------------------- layouts


def as_zip(state, path):
    torch.save(state, path)


def as_before_2020(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


def as_before_2018(state, path):
    """Before batch norms counted."""
    torch.save(OrderedDict((key, t) for key, t in state.items() if "num_batches" not in key), path)


def as_safetensors(state, path):
    save_file(state, path)


@pytest.mark.parametrize("write", [as_zip, as_before_2020, as_before_2018, as_safetensors])
def test_torchvisions_resnet_gives_the_same_features_and_logits(tmp_path, write):
    theirs = randomised(plain_resnet.resnet(50, num_classes=7, width=4))
    write(theirs.state_dict(), tmp_path / "weights")
    weights = read_weights(tmp_path / "weights")
    assert (weights.layout, weights.about) == (TORCHVISION, {})
    ours = nn.ModuleDict({"trunk": ResNet(50, base_width=4).build(), "fc": nn.Linear(128, 7)}).eval()
    weights.load_whole(ours, "online")
    with torch.no_grad():
        assert ours["trunk"](X).equal(theirs.features(X))
        assert ours["fc"](ours["trunk"](X)).equal(theirs(X))


def optimizer_of(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(X).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def from_timm(net, average):
    """As `timm.utils.CheckpointSaver` writes it."""
    options = argparse.Namespace(model="resnet50", opt_betas=None, mean=(0.5, 0.5), model_kwargs={"a": 1})
    return {
        "epoch": 3, "arch": "resnet50", "state_dict": net.state_dict(), "optimizer": optimizer_of(net), "version": 2,
        "args": options, "amp_scaler": {"scale": 65536.0}, "state_dict_ema": average.state_dict(), "metric": 76.1,
    }  # fmt: skip


def from_torchvision(net, average):
    """As its `references/classification/train.py` writes it."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [30, 60])
    return {
        "model": net.state_dict(), "optimizer": optimizer_of(net), "lr_scheduler": scheduler.state_dict(), "epoch": 3,
        "args": argparse.Namespace(device="cuda", weights=None, data_path="/data"), "scaler": {"scale": 65536.0},
        "model_ema": AveragedModel(average).state_dict(),
    }  # fmt: skip


def from_examples(net, average):
    """As pytorch/examples' `imagenet/main.py` writes it, from several GPUs."""
    return {
        "epoch": 3, "arch": "resnet50", "state_dict": nn.DataParallel(average).state_dict(),
        "best_acc1": torch.tensor(76.1), "optimizer": optimizer_of(net), "scheduler": {"step_size": 30},
    }  # fmt: skip


def from_compiled(net, average):
    return torch.compile(average).state_dict()


def from_compiled_in_parts(net, average):
    """Wrapped twice, and a layer compiled by itself."""
    average.layer1 = torch.compile(average.layer1)
    state = nn.DataParallel(torch.compile(average)).state_dict()
    assert "module._orig_mod.layer1._orig_mod.0.conv1.weight" in state
    average.layer1 = average.layer1._orig_mod
    return {"model": state}


@pytest.mark.parametrize("unsafe_pickle", [False, True], ids=["plain values", "converted"])
@pytest.mark.parametrize(
    ("checkpoint", "entry", "left"),
    [
        (from_timm, "state_dict_ema", "epoch, arch, state_dict, optimizer, version, args, amp_scaler, metric"),
        (from_torchvision, "model_ema", "model, optimizer, lr_scheduler, epoch, args, scaler"),
        (from_examples, "state_dict", "epoch, arch, best_acc1, optimizer, scheduler"),
        (from_compiled, "", ""),
        (from_compiled_in_parts, "model", ""),
    ],
)
def test_training_checkpoints_give_the_same_features(tmp_path, checkpoint, entry, left, unsafe_pickle):
    """Catches options beside the weights that end in a refusal, a wrapper's prefix, and weights that are not the
    average; what is not taken is named."""
    theirs, other = (randomised(plain_resnet.resnet(50, num_classes=7, width=4)) for _ in range(2))
    with torch.no_grad():
        other.conv1.weight += 1
    state = checkpoint(other, theirs)
    if unsafe_pickle:  # something that asks for it
        state["day"] = date(2026, 11, 29)
        with pytest.raises(WeightsError, match=r"\(datetime.date\)"):
            read_weights(saved(tmp_path, state))
    weights = read_weights(saved(tmp_path, state), unsafe_pickle)
    ours = nn.ModuleDict({"trunk": ResNet(50, base_width=4).build(), "fc": nn.Linear(128, 7)}).eval()
    weights.load_whole(ours, "online")
    with torch.no_grad():
        assert ours["trunk"](X).equal(theirs.features(X))
        assert ours["fc"](ours["trunk"](X)).equal(theirs(X))
    if not unsafe_pickle:
        says = f"weights from {tmp_path / 'weights.pth'}: {TORCHVISION}"
        says += f", its `{entry}`" if entry else ""
        assert str(weights) == says + (f"; left alone: {left}" if left else "")


def test_real_timms_checkpoint_gives_the_same_features(tmp_path):
    timm = pytest.importorskip("timm")
    from timm.utils import CheckpointSaver, ModelEmaV3

    theirs = randomised(timm.create_model("resnet18", num_classes=7))
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    average = ModelEmaV3(theirs)
    options = argparse.Namespace(model="resnet18")
    CheckpointSaver(theirs, optimizer, options, average, checkpoint_dir=str(tmp_path)).save_checkpoint(0, 1.0)
    weights = read_weights(tmp_path / "last.pth.tar")
    ours = nn.ModuleDict({"trunk": ResNet(18).build(), "fc": nn.Linear(512, 7)}).eval()
    weights.load_whole(ours, "online")
    with torch.no_grad():
        features = theirs.forward_head(theirs.forward_features(X), pre_logits=True)
        assert torch.allclose(ours["trunk"](X), features, rtol=1e-5, atol=1e-5)


def test_options_in_a_pickle_are_dropped_whatever_they_hold(tmp_path):
    """Catches options that hand code to the reader as a method of theirs."""
    options = argparse.Namespace(__setstate__=torch.Size, lr=0.1)
    state = {"state_dict": randomised(plain_resnet.resnet(50, width=4)).state_dict(), "args": options}
    assert read_weights(saved(tmp_path, state)).left == ("args",)


def test_keys_and_shapes_of_resnet50_are_timms():
    """The list is timm's `resnet50().state_dict()` and torchvision's; 25,557,032 is their published size."""
    listed = json.loads((Path(__file__).parents[2] / "golden" / "timm_resnet50_keys.json").read_text())
    with torch.device("meta"):
        plain, ours = plain_resnet.resnet(50), ResNet(50).build()
    assert len(listed) == 320
    assert {key: list(t.shape) for key, t in plain.state_dict().items()} == listed
    assert sum(p.numel() for p in plain.parameters()) == 25_557_032
    trunk = {key: shape for key, shape in listed.items() if not key.startswith("fc.")}
    assert {key: list(t.shape) for key, t in ours.state_dict().items()} == trunk


def test_real_timm_takes_our_resnet50():
    timm = pytest.importorskip("timm")
    ours = randomised(ResNet(50).build())
    theirs = timm.create_model("resnet50", num_classes=0).eval()
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert torch.allclose(theirs(X), ours(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", ["module.", ""], ids=["several GPUs", "one GPU"])
def test_a_checkpoint_of_paws_authors_gives_the_same_output(tmp_path, prefix):
    theirs = randomised(plain_resnet.PawsAuthorsResNet([1, 1, 1, 1], width=4, out=8))
    state = {
        "encoder": {prefix + key: t for key, t in theirs.state_dict().items()},
        "opt": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 6.4}]},
        "epoch": 300, "unlabel_prob": 0.9, "loss": -1.2, "s_batch_size": 7, "u_batch_size": 64, "world_size": 64,
        "lr": 6.4, "temperature": 0.1, "amp": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 3},
    }  # fmt: skip
    weights = read_weights(saved(tmp_path, state))
    assert weights.layout == PAWS
    method, nets = paws()
    method.start_from(nets, weights)
    with torch.no_grad():
        assert method.embed(nets, X, "z").equal(theirs(X))


def test_a_fine_tuned_network_of_paws_authors_has_a_first_layer_and_a_classifier(tmp_path):
    """Catches a classifier that is taken for the second layer of a projection head."""
    theirs = randomised(plain_resnet.PawsAuthorsResNet([1, 1, 1, 1], width=4, out=8))
    theirs.pred = nn.Identity()
    theirs.fc = nn.Sequential(OrderedDict(fc1=theirs.fc.fc1, bn1=theirs.fc.bn1, relu1=nn.ReLU(), fc2=nn.Linear(32, 5)))
    weights = read_weights(saved(tmp_path, {"encoder": theirs.state_dict(), "epoch": 30}))
    assert weights.part("first").keys() == {f"fc1.{n}" for n in ("weight", "bias")} | {
        f"bn1.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    assert weights.part("fc")["weight"].equal(theirs.fc.fc2.weight) and weights.part("projection") == {}


def test_the_wide_resnet_of_paws_authors(tmp_path):
    trunk = randomised(WideResNet(10, 2).build())
    encoder = {f"module.{k.replace('.shortcut.', '.shortcut.0.')}": t for k, t in trunk.state_dict().items()}
    assert "module.layer1.0.shortcut.0.weight" in encoder
    weights = read_weights(saved(tmp_path, {"encoder": encoder}))
    ours = WideResNet(10, 2).build()
    load_whole(ours, weights.part("trunk"), weights.source)
    with torch.no_grad():
        assert ours.eval()(X).equal(trunk(X))


def test_a_checkpoint_of_ours_keeps_what_it_says_of_itself(tmp_path):
    nets = {"online": {"trunk.w": torch.ones(2)}, "target": {"trunk.w": torch.zeros(2)}}
    weights = read_weights(saved(tmp_path, {"step": 3, "about": {"method": "Paws"}, "nets": nets, "optimizer": {}}))
    assert (weights.layout, weights.about) == (CHECKPOINT, {"method": "Paws"})
    assert weights.nets["target"]["trunk.w"].tolist() == [0.0, 0.0]


def test_every_layout_is_recognised_by_itself_alone():
    """Catches two layouts that claim one file: which it gets would hang on their order."""
    trunk = {key: torch.ones(1) for key in ("conv1.weight", "bn1.weight", "layer1.0.conv1.weight")}
    files = {CHECKPOINT: {"nets": {"online": trunk}}, PAWS: {"encoder": trunk}, TORCHVISION: trunk}
    for layout, state in files.items():
        assert [name for name, fits in layouts._LAYOUTS.items() if fits(state) is not None] == [layout]


# --------------------------------------------------------------------------------------------------- what does not fit


def test_what_does_not_fit_is_listed_and_nothing_is_loaded():
    net = nn.ModuleDict({"trunk": nn.Linear(2, 2), "fc": nn.Linear(2, 3), "norm": nn.BatchNorm1d(3)})
    before = {key: t.clone() for key, t in net.state_dict().items()}
    theirs = {key: torch.full_like(t, 9) for key, t in before.items()}
    theirs |= {"fc.bias": torch.ones(7), "extra.a": torch.ones(1), "extra.b": torch.ones(1)}
    del theirs["trunk.weight"], theirs["norm.num_batches_tracked"]  # the latter is no misfit
    with pytest.raises(WeightsError) as error:
        load_whole(net, theirs, "FILE")
    assert str(error.value) == (
        "FILE: 4 tensors do not fit (extra.a is left over; extra.b is left over; fc.bias is [7], not [3]; ...); "
        "nothing loaded"
    )
    assert all(t.equal(before[key]) for key, t in net.state_dict().items())


def test_a_trunk_alone_leaves_the_heads_fresh_and_says_so(capsys):
    method, nets = paws()
    fresh = {key: t.clone() for key, t in nets.online.state_dict().items()}
    _, others = paws()
    randomised(others.online)
    trunk = {key: t for key, t in others.online.state_dict().items() if key.startswith("trunk.")}
    method.start_from(nets, Weights({"online": trunk | {"fc.weight": torch.ones(2, 2)}}, {}, "FILE"))
    for key, t in nets.online.state_dict().items():
        assert t.equal(trunk[key] if key in trunk else fresh[key]), key
    assert capsys.readouterr().out == "taken: trunk; as they were drawn: prediction, projection; left out: fc\n"


def test_a_part_that_lacks_a_tensor_is_refused_and_the_trunk_not_loaded():
    method, nets = paws()
    before = {key: t.clone() for key, t in nets.online.state_dict().items()}
    theirs = {key: torch.full_like(t, 3) for key, t in before.items() if key != "projection.fc2.bias"}
    with pytest.raises(WeightsError, match=r"1 tensors do not fit \(projection.fc2.bias is missing\); nothing loaded"):
        method.start_from(nets, Weights({"online": theirs}, {}, "FILE"))
    with pytest.raises(WeightsError, match="FILE has no part of this network: it has body, and this one prediction, p"):
        method.start_from(nets, Weights({"online": {"body.weight": torch.ones(1)}}, {}, "FILE"))
    assert all(t.equal(before[key]) for key, t in nets.online.state_dict().items())


@pytest.mark.parametrize("has_target", [True, False])
def test_a_target_starts_from_their_target_or_from_their_online(has_target):
    """Catches an average that stays random where only the online network was stored, and one loaded before the other
    network is known to fit."""
    method, nets = paws()
    target = PawsNet(method.config, 3)
    del target.prediction
    nets = Nets(nets.online, target)
    theirs = {"online": {key: torch.full_like(t, 3) for key, t in nets.online.state_dict().items()}}
    if has_target:
        theirs["target"] = {key: torch.full_like(t, 5) for key, t in target.state_dict().items()}
    broken = theirs | {"target": {"trunk.bn1.weight": torch.ones(99)}}
    with pytest.raises(WeightsError):
        method.start_from(nets, Weights(broken, {}, "FILE"))
    assert not any((t == 3).all() for t in nets.online.parameters())
    method.start_from(nets, Weights(theirs, {}, "FILE"))
    assert all((t == 3).all() for t in nets.online.parameters())
    assert all((t == (5 if has_target else 3)).all() for t in target.parameters())


# -------------------------------------------------------------------------------------------- what cannot be read


def truncated(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda t: b"epoch,loss\n1,2.0\n", "is no file of weights: neither torch's nor safetensors"),
        (lambda t: b"", "is no file of weights"),
        (lambda t: truncated(saved(t, {"w": torch.ones(999)}, "whole").read_bytes()), "is damaged, or no file"),
        (
            lambda t: truncated(
                saved(t, {"w": torch.ones(99)}, "whole", _use_new_zipfile_serialization=False).read_bytes()
            ),
            "is damaged, or ",
        ),
        (lambda t: pickle.dumps({"conv1.weight": [1.0]}), "is damaged, or a pickle of another kind than torch's"),
        (lambda t: (9).to_bytes(8, "little") + b'{"a": 1}}', "is damaged, or no safetensors file"),
        (lambda t: saved(t, torch.ones(3), "whole").read_bytes(), "holds a Tensor, not tensors by name"),
        (
            lambda t: saved(t, {"model": 1, "epoch": 2}, "whole").read_bytes(),
            "has no layout that is known; its first keys: model, epoch",
        ),
        (
            lambda t: saved(t, {"epoch": 2, "model": {"patch_embed.weight": torch.ones(1)}}, "whole").read_bytes(),
            "its first keys: epoch, model; those of its `model`, which is no ResNet: patch_embed.weight",
        ),
        (lambda t: saved(t, {"nets": 5}, "whole").read_bytes(), "has no layout that is known; its first keys: nets"),
    ],
    ids=[
        "text",
        "empty",
        "cut",
        "cut before 2020",
        "plain pickle",
        "no header",
        "a tensor",
        "unknown",
        "another net",
        "nets of none",
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
def test_what_is_no_weights_is_refused_in_one_line(tmp_path, content, says):
    path = tmp_path / "file"
    path.write_bytes(content(tmp_path))
    with pytest.raises(WeightsError) as error:
        read_weights(path)
    assert str(error.value).startswith(f"{path} ") and says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_truncated_safetensors_file_is_refused(tmp_path):
    save_file({"conv1.weight": torch.ones(999)}, tmp_path / "whole")
    (tmp_path / "cut").write_bytes(truncated((tmp_path / "whole").read_bytes()))
    with pytest.raises(WeightsError, match="cut is damaged, or no safetensors file"):
        read_weights(tmp_path / "cut")
    with pytest.raises(WeightsError, match="gone is not there"):
        read_weights(tmp_path / "gone")


class Evil:
    """Unpickled, it writes down which process did it and what that knows."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        code = "import os; open({!r}, 'w').write(f'{{os.getpid()}} {{sorted(os.environ)}} {{os.getcwd()}}')"
        return exec, (code.format(str(self.path)),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("settings", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}])
def test_code_in_a_pickle_does_not_run(tmp_path, settings):
    trap = tmp_path / "sprung"
    path = saved(tmp_path, {"conv1.weight": torch.ones(1), "evil": Evil(trap)}, **settings)
    with pytest.raises(WeightsError) as error:
        read_weights(path)
    assert not trap.exists()
    if not settings.get("pickle_protocol"):
        assert "more than tensors and plain values (exec), which can run code: refused" in str(error.value)
        assert "--unsafe-pickle" in str(error.value)


def test_unsafe_pickle_converts_in_a_process_that_knows_no_secrets(tmp_path, monkeypatch):
    """The same file without the flag, then with it: same tensors; its code ran elsewhere, without our environment."""
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    theirs = randomised(plain_resnet.PawsAuthorsResNet([1, 1, 1, 1], width=4, out=8))
    state = {"encoder": theirs.to(memory_format=torch.channels_last).state_dict(), "day": date(2026, 11, 29)}
    with pytest.raises(WeightsError, match=r"\(datetime.date\)"):
        read_weights(saved(tmp_path, state))
    trap = tmp_path / "sprung"
    weights = read_weights(saved(tmp_path, state | {"evil": Evil(trap)}), unsafe_pickle=True)
    assert weights.layout == PAWS
    for key, t in theirs.state_dict().items():
        if key.startswith("pred."):
            assert weights.nets["online"][key.replace("pred.", "prediction.")].equal(t)
    assert weights.part("trunk")["conv1.weight"].equal(theirs.conv1.weight)
    pid, known = trap.read_text().split(" ", 1)
    assert int(pid) != os.getpid() and "WANDB" not in known and str(Path.cwd()) not in known.split("]")[1]


def test_a_pickle_that_cannot_be_converted_says_why(tmp_path, monkeypatch):
    (tmp_path / "python").write_text("#!/bin/sh\necho here >&2\necho No module named x >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    path = saved(tmp_path, {"conv1.weight": torch.ones(1), "day": date(2026, 11, 29)})
    with pytest.raises(WeightsError, match="weights.pth cannot be converted: No module named x"):
        read_weights(path, unsafe_pickle=True)
