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

_BASE = ("Facts", "Ref", "Stage")
_ENCODERS = ("ByolResNet", "ResNet", "S4lResNet", "SimclrResNet")
_OPS = ("Affine", "ColourJitter", "Equalize", "Flip", "GaussianBlur", "GaussianKernelBlur", "Grayscale", "HsvNoise",
        "Noise", "Solarise", "TfColourJitter")  # fmt: skip
_CROPS = ("Centre", "ClampedRrc", "DistortedBox", "FiveCrops", "Rrc", "Whole")

# Until commit 41f6bfd types were written without their modules: each of them, and where it is today.
TYPES: dict[str, str] = {
    **{name: f"fastssl.methods.base:{name}" for name in _BASE},
    **{name: f"fastssl.nn.encoders.resnet:{name}" for name in _ENCODERS},
    "WideResNet": "fastssl.nn.encoders.wide_resnet:WideResNet",
    **{name: f"fastssl.optim.horizon:{name}" for name in ("Epochs", "Steps")},
    **{name: f"loaders.plan.ops:{name}" for name in _OPS},
    **{name: f"loaders.plan.views:{name}" for name in (*_CROPS, "Pixels", "SaliencyMask", "View")},
    "DistilConfig": "fastssl.methods.distil:DistilConfig",
    "PawsConfig": "fastssl.methods.paws:PawsConfig",
    **{name: f"fastssl.methods.s4l:{name}" for name in ("Exemplar", "LabelConfig", "Rotation", "S4lConfig", "Vat")},
    **{name: f"fastssl.losses.semppl:{name}" for name in ("Byol", "Relic", "SimClr")},
    "SempplConfig": "fastssl.methods.semppl:SempplConfig",
    **{name: f"fastssl.methods.simclrv2:{name}" for name in ("Memory", "Simclrv2Config")},
    "SuncetConfig": "fastssl.methods.suncet:SuncetConfig",
    **{name: f"fastssl.methods.supervised:{name}" for name in ("FirstLayer", "SupervisedConfig")},
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


@reads("fastssl.methods.base:Stage", method="config")
def _stage(plain: Plain) -> Plain:
    """Before 0.2.0 a stage called the settings of its method so."""
    return plain | {"config": plain.pop("method")}


# Until commit 41f6bfd a method's settings had the rate and the optimiser in flat fields.

_PEAK = {"lr_peak": "rate.peak", "warmup": "rate.warmup", "weight_decay": "optimizer.weight_decay"}


def _cosine(plain: Plain, start: float = 0.0, final: float = 0.0) -> Plain:
    return {
        "type": "fastssl.optim.rates:WarmupCosine",
        "peak": plain.pop("lr_peak"),
        "warmup": plain.pop("warmup", {"type": "Epochs", "count": 0}),
        "start": start,
        "final": final,
    }


def _stairs(plain: Plain, falls: list[Plain], factor: float) -> Plain:
    kind, warmup = "fastssl.optim.rates:WarmupStairs", plain.pop("warmup")
    return {"type": kind, "peak": plain.pop("lr_peak"), "warmup": warmup, "falls": falls, "factor": factor}


def _lars(form: str, rule: str, weight_decay: float, momentum: float = 0.9) -> Plain:
    settings = {"form": form, "rule": rule, "weight_decay": weight_decay, "momentum": momentum}
    return {"type": "fastssl.optim.lars:Lars", **settings, "trust_coefficient": 0.001, "eps": 1e-8}


def _sgd(plain: Plain, nesterov: bool) -> Plain:
    momentum, decay = plain.pop("momentum"), plain.pop("weight_decay")
    return {"type": "fastssl.optim.sgd:Sgd", "momentum": momentum, "nesterov": nesterov, "weight_decay": decay}


@reads(
    "fastssl.methods.paws:PawsConfig", **_PEAK, lr_start="rate.start", lr_final="rate.final", lars_rule="optimizer.rule"
)
def _paws(plain: Plain) -> Plain:
    rate = _cosine(plain, plain.pop("lr_start"), plain.pop("lr_final"))
    return plain | {"rate": rate, "optimizer": _lars("paws", plain.pop("lars_rule"), plain.pop("weight_decay"))}


@reads("fastssl.methods.suncet:SuncetConfig", lr_peak="rate.peak", lr_final="rate.final", lars_rule="optimizer.rule")
def _suncet(plain: Plain) -> Plain:
    rate = _cosine(plain, final=plain.pop("lr_final"))
    return plain | {"rate": rate, "optimizer": _lars("paws", plain.pop("lars_rule"), 0.0)}


@reads("fastssl.methods.semppl:SempplConfig", **_PEAK)
def _semppl(plain: Plain) -> Plain:
    return plain | {"rate": _cosine(plain), "optimizer": _lars("byol", "paper", plain.pop("weight_decay"))}


@reads("fastssl.methods.distil:DistilConfig", **_PEAK)
def _distil(plain: Plain) -> Plain:
    return plain | {"rate": _cosine(plain), "optimizer": _lars("simclr", "paper", plain.pop("weight_decay"))}


@reads("fastssl.methods.simclrv2:Simclrv2Config", **_PEAK, lr_base="rate.peak", lr_rule="scaling")
def _simclrv2(plain: Plain) -> Plain:
    plain["lr_peak"], plain["scaling"] = plain.pop("lr_base"), plain.pop("lr_rule")
    return plain | {"rate": _cosine(plain), "optimizer": _lars("simclr", "paper", plain.pop("weight_decay"))}


@reads("fastssl.methods.s4l:LabelConfig", **_PEAK, decays="rate.falls", momentum="optimizer.momentum")
@reads("fastssl.methods.s4l:S4lConfig", **_PEAK, decays="rate.falls", momentum="optimizer.momentum")
def _s4l(plain: Plain) -> Plain:
    return plain | {"rate": _stairs(plain, plain.pop("decays"), 0.1), "optimizer": _sgd(plain, nesterov=False)}


@reads(
    "fastssl.methods.supervised:SupervisedConfig",
    **_PEAK,
    lr_head="head_peak",
    schedule="rate",
    momentum="optimizer.momentum",
)
def _supervised(plain: Plain) -> Plain:
    schedule, head = plain.pop("schedule"), plain.pop("lr_head")
    falls = schedule["type"] == "StepDecay"
    rate = _stairs(plain, schedule["at"], schedule["factor"]) if falls else _cosine(plain)
    if plain.pop("optimizer") == "lars":
        optimizer = _lars("simclr", "paper", plain.pop("weight_decay"), plain.pop("momentum"))
    else:
        optimizer = _sgd(plain, nesterov=True)
    return plain | {"rate": rate, "optimizer": optimizer, "head_peak": head}
