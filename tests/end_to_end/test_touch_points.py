"""What must be touched to add a thing: each of `examples/` is laid into its room, and nothing else is done."""

import importlib
import shutil
import sys

import pytest
from click.testing import CliRunner

from fastssl.commands.train import train
from fastssl.costs.trace import trace_step
from fastssl.evaluation import load_protocol, protocol_names
from fastssl.methods.base import Facts
from fastssl.recipes.resolve import recipes, resolve
from tests.end_to_end import command

EXAMPLES = command.ROOT / "examples"


@pytest.fixture
def laid_into(tmp_path, monkeypatch):
    """Lay an example into a room of fastssl's, as `name`; forgotten at the end."""
    modules = set(sys.modules)

    def lay(example, room, name):
        folder = tmp_path / room
        folder.mkdir(exist_ok=True)
        shutil.copy(EXAMPLES / f"{example}.py", folder / f"{name}.py")
        package = importlib.import_module(room)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
        return folder / f"{name}.py"

    yield lay
    for name in set(sys.modules) - modules:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in sys.modules[name].__file__:
            room, _, module = name.rpartition(".")
            sys.modules.pop(name)
            if hasattr(sys.modules.get(room), module):
                delattr(sys.modules[room], module)


def test_an_encoder_is_a_file(laid_into):
    """It is named on the command line, trained with by any method, counted, and told of in an export."""
    laid_into("my_encoder", "fastssl.nn.encoders", "three_convs")
    (stage,) = resolve("paws.digits", ("encoder=three_convs(width=8)", "out_features=8"))
    encoder = stage.config.encoder
    assert (encoder.name, encoder.build(1).num_features) == ("ThreeConvs-8", 32)
    assert encoder.from_torchvision(1).differs == ("another network than its ResNets: ThreeConvs-8",)
    assert encoder.from_torchvision(1).lines == ()
    trace = trace_step(stage, Facts(10, 1, 0), world=2)
    assert trace.flops["convolutions"] > 0 and trace.norm_channels[:3] == (8, 16, 32)


def test_an_optimiser_is_a_file(laid_into):
    """Also for a method with two rates."""
    laid_into("my_optimiser", "fastssl.optim", "lion")
    for recipe, num_groups in (("paws.digits", 2), ("supervised.digits", 4)):
        (stage,) = resolve(recipe, ("optimizer=lion(weight_decay=.1)", "encoder.base_width=4"))
        method = stage.config.build(Facts(10, 1, 0), {})
        nets = method.nets()
        optimizer = method.optimizer(nets)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0] * (num_groups // 2)
        for group in optimizer.param_groups:
            group["lr"] = 0.5
        for p in nets.online.parameters():
            p.grad = p.new_full(p.shape, 2.0)
        norm = nets.online.trunk.bn1.weight
        before = norm.detach().clone()
        optimizer.step()
        assert (before - norm.detach()).eq(0.5).all()  # by the sign, whatever the size


def test_an_evaluation_protocol_is_a_file(laid_into):
    laid_into("my_protocol", "fastssl.evaluation", "my_protocol")
    assert "my-protocol" in protocol_names()
    assert callable(load_protocol("my-protocol").evaluate)


def test_a_method_is_a_file_and_a_file_of_recipes(laid_into, tmp_path, monkeypatch):
    """And with the files of the other tests it trains and is evaluated: nothing is registered anywhere."""
    laid_into("my_encoder", "fastssl.nn.encoders", "my_encoder")
    laid_into("my_optimiser", "fastssl.optim", "my_optimiser")
    laid_into("my_protocol", "fastssl.evaluation", "my_protocol")
    laid_into("my_method", "fastssl.methods", "my_method")
    file = laid_into("my_recipes", "fastssl.recipes", "my_method")
    rooms = {"my_encoder": "nn.encoders", "my_optimiser": "optim", "my_method": "methods"}
    text = file.read_text()
    for module, room in rooms.items():
        text = text.replace(f"from {module} import", f"from fastssl.{room}.{module} import")
    file.write_text(text)
    assert {name for name in recipes() if name.startswith("my_method.")} == {"my_method.simsiam", "my_method.wider"}
    monkeypatch.chdir(tmp_path)
    settings = ("steps=2", "evaluate=my-protocol", "evaluate_every=2steps")
    changes = [part for change in settings for part in ("--set", change)]
    result = CliRunner().invoke(train, ["my_method.simsiam", "--out", "run", *changes], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    scores = [line["evaluation"] for line in command.metrics(tmp_path / "run") if "evaluation" in line]
    assert len(scores) == 1 and -8.0 <= scores[0]["uniformity"] <= 0.0  # what t = 2 allows
