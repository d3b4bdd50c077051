"""A run opened again, as `fastssl evaluate` and `fastssl embed` do."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from fastssl.config.modules import load_file
from fastssl.engine import reopen
from fastssl.engine.stages import run
from fastssl.errors import ConfigError
from fastssl.evaluation import load_protocol
from fastssl.recipes.resolve import resolve
from loaders.errors import StoreError
from loaders.store.data import DataSets, open_data
from loaders.store.source import ArraySource
from tests.support import fakes


def test_a_damaged_checkpoint_is_passed_over_and_named_on_stderr(tmp_path, capsys):
    """Catches numbers of an earlier step that pass for the last one's; stdout is JSON, so it is no place to say it."""
    run(fakes.job(fakes.stages("paws"), tmp_path))
    assert reopen.open_run(tmp_path, ())[1] == 6
    capsys.readouterr()
    newest = tmp_path / "checkpoints" / "step-00000006" / "state.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert reopen.open_run(tmp_path, ())[1] == 3
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"warning: checkpoint {newest.parent} is damaged") and "to step 3" in err


def test_an_evaluation_may_have_labels_of_its_own(tmp_path):
    """Catches labels that go nowhere, a provenance that tells the run's own, and a mistake found after hours."""
    run(fakes.job(fakes.stages("paws"), tmp_path))
    own, other = (reopen.open_run(tmp_path, (), labels=labels)[0] for labels in (None, "all"))
    assert own.provenance()["labelled"]["split"] == "10-per-class-split-0"
    all_of_them = len(other.data.get("labelled"))
    assert len(other.labelled("z").labels) == all_of_them > 1000
    assert other.provenance()["labelled"].items() >= {"split": "all", "count": all_of_them}.items()
    (tmp_path / "checkpoints").rename(tmp_path / "away")  # said before any network is read
    with pytest.raises(ConfigError, match="--labels: 'per-class=ten': write per-class=COUNT"):
        reopen.open_run(tmp_path, (), labels="per-class=ten")
    with pytest.raises(StoreError, match="label list 'nolist' was not found"):
        reopen.open_run(tmp_path, (), labels="nolist")
    with pytest.raises(StoreError, match="500 were asked for"):
        reopen.open_run(tmp_path, (), labels="per-class=500")


def test_images_that_a_sweep_holds_out_are_not_learnt_from(tmp_path):
    """Catches `--labels all` for a run that is scored on some of these images."""
    run(fakes.job(fakes.stages("paws"), tmp_path, held_out="per-class=12 of not:per-class=10"))
    assert load_protocol("knn").evaluate(reopen.open_run(tmp_path, ())[0])["knn_top1"] > 0
    learns_all = reopen.open_run(tmp_path, (), labels="all")[0]
    with pytest.raises(ConfigError, match=r"120 of 120 held-out images are among the \d+ labelled ones \(all\): give"):
        load_protocol("knn").evaluate(learns_all)
    apart = reopen.open_run(tmp_path, (), labels="not:per-class=12 of not:per-class=10")[0]
    load_protocol("knn").evaluate(apart)


def digits_of(count, channels=1):
    """The first `count` digits, of each split."""

    def chosen(source):
        rows = source.labels < count
        images = source.images[rows].repeat(channels, axis=3)
        return ArraySource(f"{count} digits", images, source.labels[rows], source.class_names[:count])

    digits = open_data(("digits",))
    return DataSets({key: chosen(digits.sources[key]) for key in ("train", "validation")})


def test_features_are_worth_something_on_other_classes(tmp_path, monkeypatch):
    """A second data set's linear probe, beside networks with a classifier of the first's ten classes. Catches networks
    that are built for the new data's classes, and a classifier that is scored on classes it never knew."""
    (stage,) = resolve("supervised.digits", ("epochs=1", "precision=fp32"))
    run(fakes.job((stage,), tmp_path, recipe="supervised.digits", changes=("epochs=1", "precision=fp32")))
    monkeypatch.setattr(reopen, "open_data", lambda data, **_: digits_of(4))
    subject, _ = reopen.open_run(tmp_path, ("four",), labels="per-class=50")
    assert load_protocol("linear").evaluate(subject)["linear_top1"] > 0.5
    with pytest.raises(ConfigError, match="has no turned-logits"):
        load_protocol("turned-classifier").evaluate(subject)
    own = replace(subject.method.facts, class_names=())  # as a run of before there were names says it
    monkeypatch.setattr(subject.method, "facts", own)
    with pytest.raises(ConfigError, match="knows 10 classes, this data has 4: --protocol linear"):
        load_protocol("classifier").evaluate(subject)
    monkeypatch.setattr(reopen, "open_data", lambda data, **_: digits_of(10, channels=3))
    with pytest.raises(ConfigError, match="learnt from images of 1 channels; these have 3"):
        reopen.open_run(tmp_path, ("coloured",))


def test_a_classifier_needs_no_images_but_those_it_is_scored_on(tmp_path, monkeypatch):
    """Nothing is learnt from the others. Catches a score that waits for labelled images of the new data, and a protocol
    that does learn from them and is not told that there are none."""
    (stage,) = resolve("supervised.digits", ("epochs=1", "precision=fp32"))
    run(fakes.job((stage,), tmp_path, recipe="supervised.digits", changes=("epochs=1", "precision=fp32")))
    classifier = load_protocol("classifier")
    own, _ = reopen.open_run(tmp_path, ())
    digits = open_data(("digits",)).sources
    without_labels = replace(digits["train"], labels=np.full(len(digits["train"]), -1))
    for others, why in (({}, "--data labelled=PATH"), ({"train": without_labels}, "has 0 images, 10 were asked for")):
        sources = DataSets({**others, "validation": digits["validation"]})
        monkeypatch.setattr(reopen, "open_data", lambda data, sources=sources, **_: sources)
        subject, _ = reopen.open_run(tmp_path, ("validation=others",))
        assert classifier.evaluate(subject) == classifier.evaluate(own)
        assert subject.looked_at == ("validation",)
        with pytest.raises((ConfigError, StoreError), match=why):
            load_protocol("knn").evaluate(subject)
    coloured = digits_of(10, channels=3).sources["validation"]
    monkeypatch.setattr(reopen, "open_data", lambda data, **_: DataSets({"validation": coloured}))
    with pytest.raises(ConfigError, match="learnt from images of 1 channels; these have 3"):
        reopen.open_run(tmp_path, ("validation=coloured",))


def test_a_classifier_counts_by_the_names_of_its_classes(tmp_path, monkeypatch):
    """Another copy of the data may number the same classes otherwise. Catches a score by numbers, and a classifier that
    is asked for classes it does not know."""
    (stage,) = resolve("supervised.digits", ("epochs=12", "precision=fp32"))
    run(fakes.job((stage,), tmp_path, recipe="supervised.digits"))
    classifier = load_protocol("classifier")
    scored = classifier.evaluate(reopen.open_run(tmp_path, ())[0])["classifier_top1"]
    assert scored > 0.2

    def numbered(names):
        """The digits, with their classes in the order of `names`."""
        digits = open_data(("digits",))
        number = np.array([names.index(name) for name in digits.get("train").class_names])

        def otherwise(source):
            return ArraySource(source.name, source.images, number[source.labels], names)

        return DataSets({key: otherwise(digits.sources[key]) for key in ("train", "validation")})

    backwards = tuple(reversed(open_data(("digits",)).get("train").class_names))
    monkeypatch.setattr(reopen, "open_data", lambda data, **_: numbered(backwards))
    assert classifier.evaluate(reopen.open_run(tmp_path, ("backwards",), labels="all")[0])["classifier_top1"] == scored
    six = numbered(backwards)  # of which the classifier knows four more
    few = {key: replace(each, class_names=backwards[:6], labels=np.where(each.labels < 6, each.labels, -1))
           for key, each in six.sources.items()}  # fmt: skip
    few["validation"] = replace(
        few["validation"],
        **{name: getattr(few["validation"], name)[few["validation"].labels >= 0] for name in ("images", "labels")},
    )
    monkeypatch.setattr(reopen, "open_data", lambda data, **_: DataSets(few))
    subject = reopen.open_run(tmp_path, ("six",), labels="all")[0]
    logits = subject.features("validation", "logits")
    right = 9 - logits.values.argmax(dim=1) == logits.labels
    assert classifier.evaluate(subject)["classifier_top1"] == right.double().mean()
    monkeypatch.setattr(reopen, "open_data", lambda data, **_: digits_called("abcdefghij"))
    with pytest.raises(ConfigError, match="the run's classifier knows no class 'a', which this data has: --protocol"):
        classifier.evaluate(reopen.open_run(tmp_path, ("letters",), labels="all")[0])


def digits_called(names):
    digits = open_data(("digits",))
    sources = {key: digits.sources[key] for key in ("train", "validation")}
    return DataSets({key: replace(source, class_names=tuple(names)) for key, source in sources.items()})


RECIPE = """
from dataclasses import dataclass, replace
from my_parts import SCALE
from fastssl.methods.base import Stages
from tests.support import fakes

@dataclass(frozen=True)
class Mine(fakes.TinyConfig):
    scale: float = SCALE

def mine() -> Stages:
    (stage,) = fakes.stages("paws")
    tiny = stage.config
    return (replace(stage, config=Mine(tiny.dataset, tiny.eval_view, tiny.labels, tiny.precision, family=tiny.family)),)
"""


@pytest.fixture
def forgotten():
    """Forget the modules and folders that a test has loaded, as another process would."""
    finders = list(sys.meta_path)

    def forget():
        sys.meta_path[:] = finders
        for name in ("my_recipes", "my_parts"):
            sys.modules.pop(name, None)

    yield forget
    forget()


def test_a_method_of_the_users_own_is_loaded_from_where_it_was(tmp_path, forgotten):
    """With what it imports from beside it. Where it is gone, the line says which module the run needs."""
    (tmp_path / "my_parts.py").write_text("SCALE = 2.0\n")
    file = tmp_path / "my_recipes.py"
    file.write_text(RECIPE)
    load_file("my_recipes", file)
    run(fakes.job(sys.modules["my_recipes"].mine(), tmp_path / "run"))
    forgotten()
    subject, step = reopen.open_run(tmp_path / "run", ())
    assert step == 6 and subject.method.config.scale == 2.0
    forgotten()
    file.write_text("import json\n\nraise RuntimeError('not today')\n")
    says = rf"run needs the module my_recipes: {file}, line 3: RuntimeError: not today"
    with pytest.raises(ConfigError, match=says):
        reopen.open_run(tmp_path / "run", ())
    file.write_text("def (:\n")
    with pytest.raises(ConfigError, match=rf"run needs the module my_recipes: {file}, line 1: invalid syntax"):
        reopen.open_run(tmp_path / "run", ())
    file.unlink()
    with pytest.raises(ConfigError, match=rf"run needs the module my_recipes, which was {file}: it is not there"):
        reopen.open_run(tmp_path / "run", ())
    load_file("my_recipes", tmp_path / "my_parts.py")
    with pytest.raises(ConfigError, match=rf"needs the module my_recipes of {file}, but .*my_parts.py is loaded under"):
        reopen.open_run(tmp_path / "run", ())
