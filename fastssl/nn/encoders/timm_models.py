"""Any image backbone of timm's, with pooled features: `--set encoder=timm:resnet50` (the extra `timm`).

The network is timm's own, and its tensors keep their names; only its batch norms become ours, with the statistics of
all ranks. Each resolution goes through it in a pass of its own, so that ranks exchange statistics once a layer and a
resolution. It has no blocks that `--step eager-recompute` could compute again.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.errors import ConfigError
from fastssl.nn.encoders.encoder import Encoder, Likeness
from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm
from fastssl.nn.trunks.stem import Norm
from fastssl.nn.trunks.trunk import Trunk

_INSIDE = "model."  # of a trunk, timm's network: left out of the names of state dicts


@dataclass(frozen=True)
class Timm(Encoder):
    """timm's `model`, freshly drawn, without its classifier."""

    model: str

    @property
    def name(self) -> str:
        return f"timm's {self.model}"

    def build(self, in_channels: int = 3, norm: Norm = GlobalBatchNorm) -> TimmTrunk:
        num_features = _features(self.model, in_channels, None)
        return TimmTrunk(_drawn_or_shaped(self.model, in_channels), num_features, norm)

    def refused_size(self, size: int) -> str:
        """Also raises ConfigError where there is no such model, or timm is missing."""
        try:
            _features(self.model, 3, size)
        except ConfigError:
            raise
        except (AssertionError, RuntimeError, ValueError) as error:
            return str(error).splitlines()[0] if str(error) else type(error).__name__
        return ""

    def from_torchvision(self, channels: int) -> Likeness:
        return Likeness(
            (f"another network than its ResNets: {self.name}",), timm=self.model, resizes=_resizes(self.model)
        )


class TimmTrunk(Trunk):
    """`network` with our batch norms. Its state dict has timm's names."""

    def __init__(self, network: nn.Module, num_features: int, norm: Norm) -> None:
        super().__init__()
        self.model, self.num_features = network, num_features
        spared: Any = getattr(network, "no_weight_decay", set)
        self.undecayed = frozenset(f"{_INSIDE}{name}" for name in spared())
        _with_our_norms(network, norm)
        self.register_state_dict_post_hook(_outside)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_inside)  # type: ignore[no-untyped-call]

    def lockstep(self, xs: Sequence[Tensor]) -> list[Tensor]:
        return [self.model(x) for x in xs]


def _outside(trunk: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any]) -> None:
    for key in [key for key in state if key.startswith(prefix + _INSIDE)]:
        state[prefix + key.removeprefix(prefix + _INSIDE)] = state.pop(key)


def _inside(trunk: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    own = [prefix + _INSIDE + name for name in trunk.get_submodule(_INSIDE[:-1]).state_dict()]
    for key in own:
        if (outside := prefix + key.removeprefix(prefix + _INSIDE)) in state:
            state[key] = state.pop(outside)


# ----------------------------------------------------------------------------------------------------- what timm makes


def _created(model: str, channels: int) -> nn.Module:
    """Raises ConfigError where timm is missing or has no such model."""
    timm = _timm()
    if not timm.is_model(model):
        near = difflib.get_close_matches(model.partition(".")[0], timm.list_models(), n=3, cutoff=0.0)
        raise ConfigError(f"timm has no model {model!r}; the nearest are {', '.join(near)}")
    sizes = {"dynamic_img_size": True} if _resizes(model) else {}
    network: nn.Module = timm.create_model(model, pretrained=False, num_classes=0, in_chans=channels, **sizes)
    return network


@cache
def _resizes(model: str) -> bool:
    """Whether it is a transformer that interpolates its positions for other sizes, where timm is told so."""
    with unset_fake_temporarily(), torch.device("meta"):
        try:
            _timm().create_model(model, pretrained=False, dynamic_img_size=True)
        except TypeError:
            return False
    return True


def _drawn_or_shaped(model: str, channels: int) -> nn.Module:
    """The network with its first weights; among fake tensors, where timm's draws cannot be, its shapes alone."""
    with unset_fake_temporarily() as faked:
        if faked is None:
            return _created(model, channels)
        with torch.device("meta"):
            network = _created(model, channels)
    network._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))
    return network


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ConfigError(
            f"timm's models need timm, and torchvision of torch's version: install the extra `timm` ({error})"
        ) from None
    return timm


@cache
def _features(model: str, channels: int, size: int | None) -> int:
    """How many features it gives for an image of `size` pixels a side (None: of the size that it was made for); by
    shapes alone. Raises what timm raises where it takes no such image, and ConfigError where features are not one row
    an image."""
    with unset_fake_temporarily(), torch.device("meta"), torch.no_grad():
        network = _created(model, channels).eval()
        config: Any = getattr(network, "pretrained_cfg", {})
        side = size or config.get("input_size", (3, 224, 224))[-1]
        out = network(torch.empty(2, channels, side, side))
    if not isinstance(out, Tensor) or out.dim() != 2:
        what = f"gives {list(out.shape)}" if isinstance(out, Tensor) else "gives several tensors"
        raise ConfigError(f"timm's {model} {what} for two images: a trunk gives pooled features, one row an image")
    return out.shape[1]


# ------------------------------------------------------------------------------------------------------- batch norms


def _with_our_norms(network: nn.Module, norm: Norm) -> None:
    for name, layer in list(network.named_modules()):
        if isinstance(layer, _BatchNorm) and not isinstance(layer, GlobalBatchNorm):
            parent, _, own = name.rpartition(".")
            setattr(network.get_submodule(parent), own, _ours(layer, norm))


def _ours(theirs: _BatchNorm, norm: Norm) -> GlobalBatchNorm:
    """Our norm with the tensors of timm's and, where that has them, its activation and what it drops. timm's own eps
    and momentum stay unless `norm` brings others."""
    ours = norm(theirs.num_features)
    if norm is GlobalBatchNorm:
        assert theirs.momentum is not None
        ours.eps, ours.momentum = theirs.eps, theirs.momentum
    ours.weight, ours.bias = theirs.weight, theirs.bias
    ours.running_mean, ours.running_var = _buffer(theirs.running_mean), _buffer(theirs.running_var)
    children = dict(theirs.named_children())
    for name, child in children.items():
        ours.add_module(name, child)
    if children:
        ours.register_forward_hook(_drop_and_act)
    return ours


def _buffer(buffer: Tensor | None) -> Tensor:
    assert buffer is not None
    return buffer


def _drop_and_act(layer: nn.Module, args: Any, out: Tensor) -> Tensor:
    """What timm's BatchNormAct2d does behind the norm."""
    for name in ("drop", "act"):
        out = layer.get_submodule(name)(out)
    return out
