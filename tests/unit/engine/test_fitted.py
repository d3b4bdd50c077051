"""A recipe on data of fewer classes than it was written for."""

from pathlib import Path

import numpy as np
import pytest

from fastssl.engine.job import Job
from fastssl.engine.join import fitted, joined
from fastssl.recipes.resolve import resolve
from loaders.errors import PlanError
from loaders.store.data import DataSets
from loaders.store.source import ArraySource


def job(*changes, recipe="paws.cifar10_small"):
    changes = ("batch_global=16", "images_per_class=4", "labels=all", *changes)
    return Job(recipe, resolve(recipe, changes), changes, (), Path("run"), 0, "cpu", 1)


def classes(count):
    images = np.zeros((8 * count, 32, 32, 3), np.uint8)
    names = tuple(f"c{k}" for k in range(count))
    return DataSets({"train": ArraySource("small", images, np.arange(8 * count) % count, names)})


def test_classes_that_the_data_lacks_are_not_asked_for():
    """Would catch a batch of supports with more classes than there are, and a lowering that nobody is told of."""
    data = classes(3)
    few, said = fitted(job(), data)
    assert few.stages[0].config.classes_global == 3 and said == [
        "classes_global is 3 in place of 10: the data has 3 classes"
    ]
    _, bound = joined(few, few.stages[0], data, {})
    assert len(bound.plan.rows("support", 0).ids) == 12
    assert fitted(few, data)[1] == [] and fitted(job(), classes(12)) == (job(), [])


@pytest.mark.parametrize("change", ["classes_global=10", "pretrain.classes_global=10"])
def test_what_the_user_has_set_is_not_changed_but_refused(change):
    data = classes(3)
    same, said = fitted(job(change), data)
    assert same == job(change) and said == []
    with pytest.raises(PlanError, match="wants 10 classes a batch, the data has 3: lower classes_global"):
        joined(same, same.stages[0], data, {})
