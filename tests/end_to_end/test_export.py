"""`fastssl export`: what plain PyTorch makes of the folder, what `--init-from` makes of it, and how it can fail."""

import json
import os
import re
import resource
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from safetensors import safe_open

from fastssl.commands.main import main
from fastssl.config.plain import to_plain
from fastssl.engine.reopen import open_run
from fastssl.export.architecture import architecture
from fastssl.methods.base import About, Facts, Stage, Steps
from fastssl.methods.supervised import SupervisedConfig
from fastssl.nn.encoders.resnet import ByolResNet, ResNet, S4lResNet, SimclrResNet
from fastssl.nn.encoders.wide_resnet import WideResNet
from fastssl.run_dir.checkpoint import Checkpoints
from fastssl.weights import tensor_files
from fastssl.weights.read import read_weights
from loaders.files import sha256_of
from loaders.plan.views import Centre, Pixels, View
from tests.end_to_end import command
from tests.support import plain_resnet

SHORT = (*command.CHANGES, "--set", "length=6steps", "--set", "evaluate=knn", "--set", "checkpoint_every=3steps")
PAGE = (command.ROOT / "docs/weights.md").read_text()
FILES = {"backbone.safetensors", "heads.safetensors", "config.json", "README.md"}


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(*arguments):
    """The one line of a command that must fail."""
    result = invoke(*arguments)
    assert isinstance(result.exception, SystemExit) and result.exit_code == 1, repr(result.exception)
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert line == result.output.splitlines()[-1]
    return line


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of paws.digits, and its export."""
    folder = tmp_path_factory.mktemp("exported") / "run"
    result = invoke("train", "--out", folder, *SHORT)
    assert result.exit_code == 0, result.output
    result = invoke("export", folder)
    assert (result.exit_code, result.output) == (0, f"{folder / 'export'}\n")
    return folder


def randomised(encoder, channels):
    """Its trunk in eval mode, with weights and statistics of which no two are alike."""
    with torch.device("meta"):
        trunk = encoder.build(channels)
    trunk.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(1)
    for tensor in trunk.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape, generator=generator) / 4 + 0.1)
    return trunk.eval()


# ---------------------------------------------------------------------------------------------------- in plain PyTorch


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_pages_ten_lines_give_bitwise_the_same_features(run, layout):
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "F.conv2d" in code]
    assert set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)) == {"torch", "safetensors"}
    path = "runs/paws.digits-seed0/export/backbone.safetensors"
    assert path in code
    names: dict = {}
    exec(code.replace(path, str(run / "export" / "backbone.safetensors")), names)
    subject, _ = open_run(run, ())
    trunk = subject.nets.online.trunk.to("cpu").to(memory_format=layout).eval()
    names["w"].update({k: t.to(memory_format=layout) for k, t in names["w"].items() if t.ndim == 4})
    x = torch.rand(16, 1, 8, 8).to(memory_format=layout)
    with torch.no_grad():
        assert names["features"](x).equal(trunk(x))


@pytest.mark.parametrize(
    ("encoder", "channels", "num_differences"),
    [
        (ResNet(50), 3, 0),
        (ResNet(10, stem="cifar"), 1, 3),
        (ResNet(18), 1, 1),
        (ByolResNet(18), 3, 2),
        (SimclrResNet(50), 3, 1),
    ],
    ids=str,
)
def test_the_cards_lines_make_torchvisions_resnet_into_the_trunk(encoder, channels, num_differences):
    """Catches a difference that the card does not tell: a max-pool that pads at one end, a shortcut's projection."""
    trunk = randomised(encoder, channels)
    found = architecture(encoder, channels, trunk.state_dict(), "RUN")
    names = {"torch": torch, "torchvision": plain_resnet.TORCHVISION}
    exec("\n".join(found["torchvision"]), names)
    names["model"].load_state_dict(trunk.state_dict())
    x = torch.rand(2, channels, 32, 32)
    with torch.no_grad():
        assert names["model"].eval()(x).equal(trunk(x))
    assert len(found["differs_from_torchvision"]) == num_differences
    assert found["timm"] == (None if num_differences else "resnet50")


@pytest.mark.parametrize(
    ("encoder", "says", "name"),
    [
        (ResNet(18, width=2, base_width=8), "16 channels after the first convolution", "ResNet-18 2x with 8 channels"),
        (ByolResNet(50, selective_kernel=True, base_width=16), "SKNet's, in 32", "ResNet-50 with selective kernels"),
        (SimclrResNet(50, selective_kernel=True, base_width=8), "ResNet-D's", "ResNet-50 with selective kernels"),
        (S4lResNet(50, base_width=8), "padded by zeros, which count", "ResNet-v2-50 with 8 channels for 64"),
        (WideResNet(10, 1), "convolutions with biases", "WRN-10-1"),
    ],
    ids=str,
)
def test_what_torchvision_cannot_be_is_said(encoder, says, name):
    found = architecture(encoder, 3, randomised(encoder, 3).state_dict(), "RUN")
    assert found["torchvision"] == [] and found["timm"] is None
    assert says in "; ".join(found["differs_from_torchvision"]) and encoder.name.startswith(name)


# ------------------------------------------------------------------------------------------------------ what is in it


def test_the_folder_says_what_it_is_and_from_where(run):
    folder, result = run / "export", json.loads((run / "result.json").read_text())
    assert {path.name for path in folder.iterdir()} == FILES
    config, card = json.loads((folder / "config.json").read_text()), (folder / "README.md").read_text()
    assert config["network"] == "online" and config["architecture"]["encoder"]["base_width"] == 4
    assert config["input"] | {"crop": 0, "value": 0} == {
        "channels": 1, "size": 8, "resize": None, "crop": 0, "interpolation": "bilinear", "mean": [0.0], "std": [1.0],
        "value": 0,
    }  # fmt: skip
    assert config["accuracy"]["scores"]["knn_top1"] == result["knn_top1"]
    assert f"| knn | {100 * result['knn_top1']:.1f} [" in card and "| knn_top1_k10" not in card
    checkpoint = run / "checkpoints" / "step-00000006" / "state.pt"
    of = config["provenance"]
    assert (of["recipe"], of["seed"], of["step"]) == ("paws.digits", 0, 6)
    assert of["checkpoint_sha256"] == sha256_of(checkpoint)
    assert of["changes"] == [change for change in SHORT if change != "--set"]
    assert "fastssl train paws.digits --set encoder.base_width=4 --set " in card
    assert of["data"] == json.loads((run / "resolved.json").read_text())["data"]
    assert of["versions"]["commit"] in card and of["checkpoint_sha256"] in card
    for name in ("backbone.safetensors", "heads.safetensors"):
        assert config["files"][name] == sha256_of(folder / name) and config["files"][name] in card
    assert str(Path.home()) not in card and str(run) not in card + json.dumps(config)
    with safe_open(folder / "backbone.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "layout": "fastssl export"}
    trunk = torch.load(checkpoint, weights_only=True)["nets"]["online"]
    theirs = safetensors.torch.load_file(folder / "backbone.safetensors")
    assert theirs.keys() == {key.removeprefix("trunk.") for key in trunk if key.startswith("trunk.")}


def test_an_earlier_step_replaces_the_export_and_has_no_accuracy(run, tmp_path):
    """Catches final accuracies beside the weights of another step."""
    run = shutil.copytree(run, tmp_path / "run")
    before = (run / "export" / "backbone.safetensors").read_bytes()
    assert invoke("export", run, "--checkpoint", "4").exit_code == 0
    assert (run / "export" / "backbone.safetensors").read_bytes() != before
    assert json.loads((run / "export" / "config.json").read_text())["accuracy"] == {}
    assert "Not measured at this step." in (run / "export" / "README.md").read_text()
    assert not list(run.glob(".export*"))


def made_by_hand(folder, encoder, **nets):
    """A run directory of one checkpoint, as training would leave it."""
    view = View("eval", 224, Centre(256), pixels=Pixels((0.5,), (0.25,)))
    config = SupervisedConfig("imagenet", view, encoder=encoder)
    about = to_plain(About("Made", config, Facts(10, 3, 0)))
    Checkpoints(folder / "checkpoints").save(7, {"step": 7, "about": about, "nets": nets, "optimizer": {}})
    stages = to_plain((Stage("train", config, Steps(7)),))
    resolved = {"recipe": "made.by_hand", "seed": 0, "stages": stages, "data": {"train": "abc"}}
    resolved["run"] = {"changes": [], "data": [], "init_from": None}
    resolved["versions"] = {"commit": "unknown", "torch": "2"}
    (folder / "resolved.json").write_text(json.dumps(resolved))
    return folder


def test_which_of_two_networks_is_exported_is_said(tmp_path):
    encoder = ByolResNet(18, base_width=4)
    state = {f"trunk.{key}": t for key, t in encoder.build(3).state_dict().items()}
    average = {key: torch.full_like(t, 2) for key, t in state.items()}
    run = made_by_hand(tmp_path / "run", encoder, online=state | {"fc.weight": torch.ones(2, 2)}, target=average)
    assert invoke("export", run).exit_code == 0
    card = (run / "export" / "README.md").read_text()
    assert "The online network of a run" in card and "The run also has a target network, which is not here." in card
    assert "3 x 224 x 224, shorter side scaled to 256" in card and "a max-pool that pads even sides at the" in card
    assert json.loads((run / "export" / "config.json").read_text())["input"]["mean"] == [0.5, 0.5, 0.5]
    assert invoke("export", run, "--network", "target", "--out", tmp_path / "average").exit_code == 0
    tensors = safetensors.torch.load_file(tmp_path / "average" / "backbone.safetensors")
    assert all((t == 2).all() for t in tensors.values()) and not (tmp_path / "average" / "heads.safetensors").exists()


# -------------------------------------------------------------------------------------------------------- taken back


def test_an_export_is_the_run_to_init_from(run, tmp_path):
    for source in (run / "export", run / "export" / "backbone.safetensors", run / "export" / "heads.safetensors"):
        again, original = read_weights(source), read_weights(run / "checkpoints" / "step-00000006" / "state.pt")
        assert again.layout == "fastssl export" and again.about == json.loads(json.dumps(original.about))
        assert again.nets["online"].keys() == original.nets["online"].keys()
        assert all(t.equal(original.nets["online"][key]) for key, t in again.nets["online"].items())
    short = (*SHORT, "--set", "length=1steps", "--set", "evaluate=")
    result = invoke("train", "--out", tmp_path / "a", "--init-from", run / "export", *short)
    assert result.exit_code == 0 and f"weights from {run / 'export'}: fastssl export\n" in result.output
    assert "as they were drawn" not in result.output
    assert invoke("train", "--out", tmp_path / "b", "--init-from", run, *short).exit_code == 0
    assert command.metrics(tmp_path / "a")[0]["loss"] == command.metrics(tmp_path / "b")[0]["loss"]


def test_a_backbone_without_its_heads_starts_a_trunk(run, tmp_path):
    folder = shutil.copytree(run / "export", tmp_path / "export")
    (folder / "heads.safetensors").unlink()
    result = invoke("train", "--out", tmp_path / "a", "--init-from", folder, *SHORT, "--set", "length=1steps")
    assert result.exit_code == 0, result.output
    assert "taken: trunk; as they were drawn: projection; left out: none\n" in result.output


def test_a_pickle_with_code_is_refused_unless_the_user_says_so(run, tmp_path, monkeypatch):
    nets = torch.load(run / "checkpoints" / "step-00000006" / "state.pt", weights_only=True)["nets"]
    torch.save({"nets": nets, "code": os.system}, tmp_path / "evil.pth")
    arguments = ("train", "--out", tmp_path / "run", "--init-from", tmp_path / "evil.pth", *SHORT)
    line = refused(*arguments)
    assert "(posix.system), which can run code: refused" in line and "--unsafe-pickle" in line
    monkeypatch.setattr(tensor_files, "_converted", lambda path: {"nets": nets})
    result = invoke(*arguments, "--unsafe-pickle")
    assert result.exit_code == 0 and f"weights from {tmp_path / 'evil.pth'}: fastssl checkpoint" in result.output
    assert json.loads((tmp_path / "run" / "resolved.json").read_text())["run"]["unsafe_pickle"] is True


# --------------------------------------------------------------------------------------------------------- bad input


def lose_config(folder):
    (folder / "config.json").unlink()


def damage_config(folder):
    (folder / "config.json").write_text('{"files": {}}')


def swap_backbone(folder):
    path = folder / "backbone.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lose_config, "config.json, which says what is beside it, is not there or damaged: export again"),
        (damage_config, "config.json, which says what is beside it, is not there or damaged: export again"),
        (swap_backbone, "backbone.safetensors is not the file that config.json describes: export again"),
    ],
)
def test_a_damaged_export_is_named(run, tmp_path, damage, says):
    folder = shutil.copytree(run / "export", tmp_path / "export")
    damage(folder)
    assert says in refused("train", "--out", tmp_path / "run", "--init-from", folder, *SHORT)


def test_runs_that_cannot_be_exported(run, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty is no run directory: it has no resolved.json" in refused("export", tmp_path / "empty")
    assert "has no checkpoint of step 5; it has 4, 6" in refused("export", run, "--checkpoint", "5")
    assert "has no target network; it has online" in refused("export", run, "--network", "target")
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints")
    assert "run has no checkpoint yet" in refused("export", copy)
    no_trunk = made_by_hand(tmp_path / "by_hand", ResNet(10, base_width=4), online={"body.weight": torch.ones(1)})
    assert "does not say what its trunk is, so there is nothing to export" in refused("export", no_trunk)
    other = made_by_hand(tmp_path / "other", ResNet(10, base_width=4), online={"trunk.weight": torch.ones(1)})
    assert "tensors do not fit (bn1.bias is missing; " in refused("export", other)


def test_a_place_that_is_taken_or_cannot_be_written_stays_as_it_was(run, tmp_path):
    """Catches a folder that is emptied because an export would go there."""
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("years")
    assert "holds other files than an export's: choose another folder" in refused("export", run, "--out", taken)
    assert (taken / "thesis.tex").read_text() == "years"
    assert "cannot be written: Not a directory" in refused("export", run, "--out", taken / "thesis.tex" / "export")


@contextmanager
def full_disk():
    """No file may grow beyond a page."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_export_before_whole(run, tmp_path):
    folder = shutil.copytree(run / "export", tmp_path / "export")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with full_disk():
        line = refused("export", run, "--checkpoint", "4", "--out", folder)
    assert line == f"Error: --out {folder} cannot be written: File too large"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
