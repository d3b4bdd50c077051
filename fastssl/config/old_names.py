"""What earlier commits called types and fields, and what these are today: the table that reads old run directories.

Whoever renames or moves a type that a run directory holds adds a row to `TYPES`; whoever replaces fields adds a
function that turns the old ones into today's:

    @reads("fastssl.methods.paws:PawsConfig", lr_peak="rate.peak", lr_final="rate.final")
    def _paws(plain):
        rate = {"type": "fastssl.optim.rates:WarmupCosine", "peak": plain.pop("lr_peak"), ...}
        return plain | {"rate": rate}

Names are strings here and nothing is imported: what they name may be gone one day.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Plain = dict[str, Any]  # a dataclass's fields by name, without its type

_BASE = ("Epochs", "Facts", "Ref", "Stage", "Steps")
_ENCODERS = ("ByolResNet", "ResNet", "S4lResNet", "SimclrResNet", "WideResNet")
_OPS = ("Affine", "ColourJitter", "Equalize", "Flip", "GaussianBlur", "GaussianKernelBlur", "Grayscale", "HsvNoise",
        "Noise", "Solarise", "TfColourJitter")  # fmt: skip
_CROPS = ("Centre", "ClampedRrc", "DistortedBox", "FiveCrops", "Rrc", "Whole")

# Until commit 41f6bfd types were written without their modules: each of them, and where it is today.
TYPES: dict[str, str] = {
    **{name: f"fastssl.methods.base:{name}" for name in _BASE},
    **{name: f"fastssl.nn.encoders:{name}" for name in _ENCODERS},
    **{name: f"loaders.plan.ops:{name}" for name in _OPS},
    **{name: f"loaders.plan.views:{name}" for name in (*_CROPS, "Pixels", "SaliencyMask", "View")},
    "DistilConfig": "fastssl.methods.distil:DistilConfig",
    "PawsConfig": "fastssl.methods.paws:PawsConfig",
    **{name: f"fastssl.methods.s4l:{name}" for name in ("Exemplar", "LabelConfig", "Rotation", "S4lConfig", "Vat")},
    **{name: f"fastssl.losses.semppl:{name}" for name in ("Byol", "Relic", "SimClr")},
    "SempplConfig": "fastssl.methods.semppl:SempplConfig",
    **{name: f"fastssl.methods.simclrv2:{name}" for name in ("Memory", "Simclrv2Config")},
    "SuncetConfig": "fastssl.methods.suncet:SuncetConfig",
    **{
        name: f"fastssl.methods.supervised:{name}" for name in ("Cosine", "FirstLayer", "StepDecay", "SupervisedConfig")
    },
}

REPLACED: dict[str, dict[str, str]] = {}  # today's type -> {field that is gone: what to set in its place}
_READERS: dict[str, Callable[[Plain], Plain]] = {}


def reads(kind: str, **replaced: str) -> Callable[[Callable[[Plain], Plain]], Callable[[Plain], Plain]]:
    """Let the decorated function read the fields of `kind` wherever one of `replaced` is among them. It may change the
    dict that it is given, and need not bring what has a default."""

    def kept(reader: Callable[[Plain], Plain]) -> Callable[[Plain], Plain]:
        REPLACED[kind], _READERS[kind] = replaced, reader
        return reader

    return kept


def type_today(name: str) -> str:
    """The full name today of what was written as `name`."""
    return TYPES.get(name, name)


def todays(kind: str, plain: Plain) -> tuple[Plain, dict[str, str]]:
    """The fields of `kind` as they are called today, and of those that were not so, what is in their place."""
    old = {name: new for name, new in REPLACED.get(kind, {}).items() if name in plain}
    return (_READERS[kind](dict(plain)) if old else plain), old
