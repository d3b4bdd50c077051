"""Plain values and back: what is written is read as the same object, and nothing is guessed."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Literal, Protocol

import pytest

from fastssl.config import old_names
from fastssl.config.plain import Notes, differences, from_plain, to_plain
from fastssl.errors import ConfigError
from fastssl.methods.base import Epochs, Facts, Span, Stage, Stages, Steps
from fastssl.nn.encoders.resnet import ByolResNet, ResNet
from fastssl.recipes.resolve import recipes, resolve
from loaders.plan.views import UNIT, View, Whole
from tests.support import fakes
from tools.other_commit import NoSuchCommit, tree_of
from tools.same_as import REFERENCE


class Colour(Enum):
    RED = "red"


class Shape(Protocol):
    def area(self) -> float: ...


@dataclass(frozen=True)
class Square:
    side: float

    def area(self) -> float:
        return self.side**2


@dataclass(frozen=True)
class Everything:
    count: int
    rate: float
    flag: bool = False
    name: str = "x"
    span: Span = Epochs(1)
    level: Literal["low", 3] = "low"
    colour: Colour = Colour.RED
    pair: tuple[int, float] = (1, 2.0)
    many: tuple[str, ...] = ()
    by_name: Mapping[str, int] = field(default_factory=dict)
    path: Path | None = None
    shape: Shape = Square(1.0)

    def __post_init__(self) -> None:
        if self.count == 13:
            raise ValueError("13 brings bad luck")


def through_json(value):
    return json.loads(json.dumps(to_plain(value)))


def back(kind, plain):
    """What is read, with nothing assumed and nothing replaced."""
    notes = Notes()
    value = from_plain(kind, plain, notes)
    assert notes == Notes()
    return value


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_is_read_as_it_was_written(name):
    stages = resolve(name)
    again = back(Stages, through_json(stages))
    assert again == stages and to_plain(again) == to_plain(stages)
    for stage in again:
        assert stage.config.build(Facts(10, 3, 0), {}).about().config == stage.config


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rate": float("inf"), "flag": True, "span": Steps(7), "level": 3, "many": ("a", "b")},
        {"by_name": {"type": 3, "b": 4}, "path": Path("a/b"), "pair": (2, 3)},
    ],
)
def test_every_kind_of_field_comes_back(changes):
    value = Everything(**{"count": 2, "rate": 0.1} | changes)
    assert back(Everything, through_json(value)) == value


def test_types_are_written_in_full():
    assert to_plain(ResNet(10))["type"] == "fastssl.nn.encoders.resnet:ResNet"
    assert to_plain(Square(1.0))["type"] == f"{__name__}:Square"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"count": "2"}, "count: '2' stands where a whole number is needed"),
        ({"count": True}, "count: True stands where a whole number is needed"),
        ({"count": 13}, "13 brings bad luck"),
        ({"rate": None}, "rate: None stands where a number is needed"),
        ({"flag": 1}, "flag: 1 stands where true or false is needed"),
        ({"level": "3"}, "level: '3' stands where one of low, 3 is needed"),
        ({"colour": "blue"}, "colour: 'blue' is not a valid Colour"),
        ({"pair": [1]}, "pair: [1] stands where a list of 2 is needed"),
        ({"many": "ab"}, "many: 'ab' stands where a list is needed"),
        ({"many": ["a", 1]}, "many.1: 1 stands where a text is needed"),
        ({"by_name": {"a": "b"}}, "by_name.a: 'b' stands where a whole number is needed"),
        ({"by_name": [1]}, "by_name: [1] stands where values by name is needed"),
        ({"path": 3}, "path: 3 stands where Path or nothing is needed"),
        ({"span": 3}, "span: 3 stands where Epochs or Steps is needed"),
        ({"span": {"count": 3}}, "span: {'count': 3} stands where Epochs or Steps is needed"),
        ({"span": to_plain(Whole())}, "span: 'Whole' stands where Epochs or Steps is needed"),
        ({"span": to_plain(Epochs(2)) | {"count": 0.5}}, "span.count: 0.5 stands where a whole number is needed"),
        ({"span": {"type": "Epoch", "count": 1}}, "span: there is no 'Epoch' in this fastssl"),
        ({"span": {"type": "fastssl.gone:Epochs"}}, "span: there is no 'fastssl.gone:Epochs' in this fastssl"),
        ({"span": {"type": "fastssl.methods.base:Span"}}, "span: there is no 'fastssl.methods.base:Span'"),
        ({"shape": to_plain(Whole())}, "shape: 'Whole' stands where Shape is needed"),
        ({"rates": 1.0}, "Everything has no 'rates'; did you mean 'rate'?"),
    ],
)
def test_what_does_not_fit_is_said_with_its_place(changes, says):
    with pytest.raises(ConfigError) as error:
        from_plain(Everything, through_json(Everything(2, 0.1)) | changes)
    assert str(error.value).startswith(says)


def test_a_field_without_default_must_be_there():
    plain = through_json(Everything(2, 0.1))
    del plain["count"]
    with pytest.raises(ConfigError, match="^Everything lacks 'count', which has no default$"):
        from_plain(Everything, plain)


def test_what_is_missing_is_assumed_and_named_once():
    """Two stages lack the same two fields: each is told of once, with its default."""
    plain = through_json((fakes.stages("paws")[0],) * 2)
    for stage in plain:
        del stage["gradients"], stage["config"]["family"]
    notes = Notes()
    assert from_plain(Stages, plain, notes) == (fakes.stages("paws")[0],) * 2
    assert notes.lines("runs/a") == [
        "runs/a does not say Stage.gradients (fp32 is assumed), TinyConfig.family (paws is assumed)"
    ]


def test_fields_of_earlier_commits_are_read_and_named_with_what_replaced_them(monkeypatch):
    for table in ("REPLACED", "_READERS", "TYPES"):
        monkeypatch.setattr(old_names, table, dict(getattr(old_names, table)))
    name = f"{__name__}:Everything"
    old_names.TYPES["Anything"] = name

    @old_names.reads(name, number="count", speed="rate")
    def _everything(plain):
        return {"count": plain.pop("number"), "rate": plain.pop("speed", 0.5)} | plain

    notes = Notes()
    assert from_plain(Everything, {"type": "Anything", "number": 4, "name": "y"}, notes).rate == 0.5
    assert notes.replaced == {"Everything.number": "count"} and "Everything.flag" in notes.assumed
    assert notes.lines("run")[1] == "run has settings of an earlier fastssl: Everything.number is now count"
    with pytest.raises(ConfigError, match="Everything has no 'numbers'"):
        from_plain(Everything, {"type": "Anything", "number": 4, "numbers": 4})
    assert back(Everything, through_json(Everything(2, 0.1))) == Everything(2, 0.1)


def test_reading_loads_no_module_of_others(tmp_path, monkeypatch):
    """A checkpoint from elsewhere must not run code by naming it."""
    (tmp_path / "named_in_a_file.py").write_text("raise RuntimeError('was run')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="it is of the module named_in_a_file, which is not loaded"):
        from_plain(object, {"type": "named_in_a_file:A"})


PRINT_RECIPES = """
import json
from fastssl.config import to_plain
from fastssl.methods.base import Facts
from fastssl.recipes import recipes
print(json.dumps({name: to_plain(recipe()) for name, recipe in recipes().items()}))
"""


# Recipes, and the fields in which they are meant to differ from those of that commit; further ones are new.
MEANT_TO_DIFFER = {
    r"(semppl|byol|relicv2)\.rn|semppl\.(byol|simclr)_": {"config.capacity", "config.rate.peak", "config.scaling"},
    r"simclrv2\.(distill|rn50_three)": {"config.rate", "config.scaling", "config.type"},
    r".*cifar10": {"config.labels"},
    r"simclrv2\.rn": {"config.rate.warmup"},
    r"supervised\.simclrv2_": {"config.rate.peak", "config.scaling", "config.type"},
    r"supervised\.semppl_": {"config.rate.peak", "config.head_peak", "config.scaling"},
}
NEW = {
    "PawsConfig": ("entropy", "label_targets", "me_max", "ropaws", "hidden_features", "activation"),
    "FirstLayer": ("layers",),
    "DistilConfig": ("images", "labelled_batch", "scaling"),
    "SempplConfig": ("scaling", "pseudo_labels"),
    "S4lConfig": ("class_on", "self_supervised_on", "trained"),
    "LabelConfig": ("class_on", "self_supervised_on", "trained", "least_confidence"),
    "Vat": ("divergence",),
    "SuncetConfig": ("hidden_features", "activation"),
    "SupervisedConfig": ("scaling",),
    "Simclrv2Config": ("hidden_features",),
    "View": ("policy",),
}


def unmeant(name, found):
    """Those of the differences that recipe `name` is not meant to have."""
    meant = tuple(field for pattern, fields in MEANT_TO_DIFFER.items() if re.match(pattern, name) for field in fields)
    return [each for each in found if not re.sub(r"^\d+\.", "", each).startswith(meant or ("none",))]


def test_recipes_of_an_earlier_commit_are_todays():
    """What its run directories say of their stages, of every recipe that it had. Catches a type that was moved or
    renamed, or a field that was replaced, without a row in the table. Needs the git history that holds the commit."""
    try:
        tree = tree_of(REFERENCE)
    except NoSuchCommit as error:
        pytest.skip(str(error))
    command = [sys.executable, "-c", PRINT_RECIPES]
    told = json.loads(subprocess.run(command, cwd=tree, capture_output=True, check=True, text=True).stdout)
    assert len(told) > 80
    for name, plain in told.items():
        notes = Notes()
        read = from_plain(Stages, plain, notes, name)
        assert unmeant(name, differences(to_plain(resolve(name)), to_plain(read))) == []
        assert set(notes.assumed) <= {f"{kind}.{field}" for kind, fields in NEW.items() for field in fields}


def test_an_encoder_is_any_that_there_is():
    stage = resolve("semppl.cifar10_small")[0]
    changed = replace(stage, config=replace(stage.config, encoder=ByolResNet(18, base_width=8)))
    assert back(Stage, through_json(changed)) == changed
    view = replace(stage.config.eval_view, pixels=UNIT)
    assert back(View, through_json(view)) == view
