"""The supervised baseline's door."""

import pytest

from fastssl.errors import ConfigError
from fastssl.methods.base import Facts
from fastssl.recipes.resolve import resolve


def test_images_without_any_label_are_refused_before_training():
    """Catches an out-of-range target deep in cross_entropy, on a GPU an assertion of the device."""
    (stage,) = resolve("supervised.digits", ("labels=all",))
    with pytest.raises(ConfigError, match="no image of the labelled data carries a label"):
        stage.config.build(Facts(num_classes=0, channels=3, seed=0), {})
