"""A run's networks for use elsewhere: a folder that needs no fastssl, and that `--init-from` takes.

backbone.safetensors   the trunk, with torchvision's key names
backbone.onnx          the same for ONNX runtimes, where it was asked for
heads.safetensors      whatever else the network had: projection and prediction heads, a classifier
config.json            architecture, input, accuracies, provenance, hashes of the files
README.md              the same as a model card
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from fastssl.config.plain import to_plain
from fastssl.errors import ConfigError, FastsslError
from fastssl.evaluation.accuracies import accuracy_cell, mean_and_spread
from fastssl.export.architecture import architecture
from fastssl.export.onnx import INPUT, ONNX, as_onnx, refuse_without_onnx
from fastssl.methods.base import About, about_of
from fastssl.nn.encoders.encoder import Encoder
from fastssl.run_dir.checkpoint import STATE, Checkpoints, verified_sha256
from fastssl.run_dir.files import CHECKPOINTS, RESULT, read_json
from fastssl.run_dir.written import read_run
from fastssl.weights.layouts import EXPORT
from fastssl.weights.read import BACKBONE, CONFIG, HEADS, Weights, read_weights
from loaders.files import whole_folder
from loaders.plan.views import Centre, View

CARD = "README.md"
FILES = {BACKBONE, HEADS, CONFIG, CARD, ONNX}
Format = Literal["safetensors", "onnx"]
_SAYS_NOTHING = "{} does not say what its trunk is, so there is nothing to export"


class ExportError(FastsslError):
    """A run that cannot be exported, or a folder that cannot be written."""


def export(
    run: Path, out: Path, step: int | None = None, network: str = "online", form: Format = "safetensors"
) -> Path:
    """Write `network` ("online" or "target") of `run`'s last stage, as it was after `step` (None: the newest whole
    checkpoint), to the folder `out`; an export that is there is replaced. It appears whole or not at all. In the form
    "onnx" the trunk comes as that, too.

    Raises FastsslError where the run has no such checkpoint or network, or `out` cannot be written.
    """
    if form == "onnx":
        refuse_without_onnx()
    written = read_run(run)
    stage = written.stages[-1]
    folder = written.folder(stage)
    checkpoint = _checkpoint(folder, step)
    weights = read_weights(checkpoint / STATE)
    trunk, heads = _trunk_and_heads(weights, network)
    about = _about(weights)
    encoder: Encoder | None = getattr(about.config, "encoder", None)
    if encoder is None:
        raise ExportError(_SAYS_NOTHING.format(weights.source))
    described = {
        "layout": EXPORT,
        "network": network,
        "networks": sorted({"online", "target"} & weights.nets.keys()),
        "architecture": architecture(encoder, about.facts.channels, trunk, weights.source),
        "class_names": about.facts.class_names or written.class_names,  # as a classifier among the heads numbers them
        "input": _input(about.config.eval_view, about.facts.channels),
        "accuracy": _accuracy(folder, _step_of(checkpoint)),
        "provenance": {
            "recipe": written.recipe,
            "changes": written.changes,
            "stage": stage.name,
            "seed": written.seed,
            "step": _step_of(checkpoint),
            "checkpoint_sha256": verified_sha256(checkpoint),
            "data": written.resolved["data"],
            "versions": written.resolved["versions"],
        },
        "about": to_plain(about),
    }
    files = {BACKBONE: _serialised(trunk)} | ({HEADS: _serialised(heads)} if heads else {})
    if form == "onnx":
        module = encoder.build(about.facts.channels)
        module.load_state_dict(trunk)
        files[ONNX] = as_onnx(module, about.facts.channels, about.config.eval_view.size)
    described["files"] = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files[CONFIG] = (json.dumps(described, indent=2) + "\n").encode()
    files[CARD] = _card(described).encode()
    _write(out, files)
    return out


# ------------------------------------------------------------------------------------------------------- what is there


def _checkpoint(folder: Path, step: int | None) -> Path:
    checkpoints = Checkpoints(folder / CHECKPOINTS)
    there = checkpoints.steps()
    if not there:
        raise ExportError(f"{folder} has no checkpoint yet")
    if step is None:
        return checkpoints.newest_whole(lambda text: print(f"warning: {text}", file=sys.stderr))
    if step not in there:
        raise ExportError(f"{folder} has no checkpoint of step {step}; it has {', '.join(map(str, there))}")
    verified_sha256(checkpoints.path(step))
    return checkpoints.path(step)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _trunk_and_heads(weights: Weights, network: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    if network not in weights.nets:
        raise ExportError(f"{weights.source} has no {network} network; it has {', '.join(sorted(weights.nets))}")
    trunk = weights.part("trunk", network)
    if not trunk:
        raise ExportError(_SAYS_NOTHING.format(weights.source))
    return trunk, {key: t for key, t in weights.nets[network].items() if not key.startswith("trunk.")}


def _about(weights: Weights) -> About:
    if not weights.about:
        raise ExportError(_SAYS_NOTHING.format(weights.source))
    try:
        return about_of(weights.about)
    except ConfigError as error:
        raise ExportError(f"{weights.source}: {error}") from None


def _accuracy(folder: Path, step: int) -> dict[str, Any]:
    """The run's final accuracies, with the images behind them, where they were measured at `step`; else nothing."""
    result = read_json(folder / RESULT) if (folder / RESULT).exists() else {}
    if result.get("steps") != step:
        return {}
    scores = {name: value for name, value in result.items() if "_top1" in name and isinstance(value, float)}
    intervals = {
        f"{name}_top1": found["top1_ci95"]
        for name, found in result.items()
        if isinstance(found, dict) and "top1_ci95" in found
    }
    measured_on = {
        role: {key: value for key, value in found.items() if key != "data"}  # a path of this machine
        for role, found in result.get("provenance", {}).items()
    }
    return {"scores": scores, "ci95": intervals, "measured_on": measured_on} if scores else {}


def _input(view: View, channels: int) -> dict[str, Any]:
    """How an image becomes the network's input, from the view that evaluation used."""
    mean, std = (list(each) * (channels if len(each) == 1 else 1) for each in (view.pixels.mean, view.pixels.std))
    centre = view.crop if isinstance(view.crop, Centre) else None
    return {
        "channels": channels,
        "size": view.size,
        "resize": centre.resize if centre else None,  # the shorter side, before the central crop
        "crop": "centre" if centre else "none, the whole image is scaled",
        "interpolation": view.filter.value,
        "mean": mean,
        "std": std,
        "value": "(pixel / 255 - mean) / std",
    }


# ------------------------------------------------------------------------------------------------------------ files


def _serialised(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file. Training keeps weights channels-last, which the format cannot say."""
    own_memory = {key: t.clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}
    return save(own_memory, metadata={"format": "pt", "layout": EXPORT})


def _write(out: Path, files: Mapping[str, bytes]) -> None:
    """Write the folder, in the place of an earlier export. Raises ExportError."""
    try:
        if out.exists() and not (out.is_dir() and {path.name for path in out.iterdir()} <= FILES):
            raise ExportError(f"--out {out} holds other files than an export's: choose another folder")
        with whole_folder(out) as folder:
            for name, content in files.items():
                (folder / name).write_bytes(content)
    except OSError as error:
        raise ExportError(f"--out {out} cannot be written: {error.strerror}") from error


def _card(described: Mapping[str, Any]) -> str:
    """The model card."""
    what, of, given = described["architecture"], described["provenance"], described["input"]
    recipe = ["fastssl", "train", of["recipe"], *[word for change in of["changes"] for word in ("--set", change)]]
    others = [name for name in described["networks"] if name != described["network"]]
    lines = [
        f"# {what['name']}, {of['recipe']}",
        "",
        f"The {described['network']} network of a run of `{shlex.join(recipe)}`, seed {of['seed']}, after step "
        f"{of['step']:,} of its stage `{of['stage']}`."
        + (f" The run also has a {' and a '.join(others)} network, which is not here." if others else ""),
        f"The trunk has {what['num_parameters']:,} parameters and gives {what['num_features']:,} features.",
        "",
        "## Accuracy",
        "",
        *_accuracy_lines(described["accuracy"]),
        "",
        "## Use",
        "",
        *_use_lines(what),
        *(_onnx_lines() if ONNX in described["files"] else []),
        "",
        f"Input: {given['channels']} x {given['size']} x {given['size']}, "
        + (f"shorter side scaled to {given['resize']}, " if given["resize"] else "")
        + f"crop: {given['crop']}, interpolation: {given['interpolation']}; {given['value']} with mean {given['mean']} "
        f"and std {given['std']}.",
        "",
        "## Provenance",
        "",
        f"- recipe `{of['recipe']}`, seed {of['seed']}, step {of['step']:,}; commit `{of['versions']['commit']}`, "
        f"torch {of['versions']['torch']}",
        f"- checkpoint sha256 `{of['checkpoint_sha256']}`",
        *[f"- data, {role}: fingerprint `{fingerprint}`" for role, fingerprint in sorted(of["data"].items())],
        *[f"- `{name}` sha256 `{digest}`" for name, digest in described["files"].items()],
        "",
        f"`{CONFIG}` holds all of this and every setting. `fastssl train --init-from` takes this folder.",
    ]
    return "\n".join(lines) + "\n"


def _accuracy_lines(accuracy: Mapping[str, Any]) -> list[str]:
    if not accuracy:
        return ["Not measured at this step."]
    rows = [
        f"| {name.removesuffix('_top1')} | {accuracy_cell(mean_and_spread([value]), accuracy['ci95'].get(name))} |"
        for name, value in accuracy["scores"].items()
        if name.endswith("_top1")
    ]
    images = [
        f"{role}: {found['count']:,} images (`{found['split']}`, sha256 `{found['split_sha256']}`)"
        for role, found in accuracy["measured_on"].items()
    ]
    return ["| protocol | top-1, % |", "|---|---|", *rows, "", f"Measured with {'; '.join(images)}."]


def _onnx_lines() -> list[str]:
    lines = ["import onnxruntime", "", f'session = onnxruntime.InferenceSession("{ONNX}")',
             f'features, = session.run(None, {{"{INPUT}": images}})']  # fmt: skip
    return ["", f"As ONNX, for `images` of any number, float32, as the input is described below (`{ONNX}`):", "",
            "```python", *lines, "```"]  # fmt: skip


def _use_lines(what: Mapping[str, Any]) -> list[str]:
    lines = []
    if what["torchvision"]:
        load = f'model.load_state_dict(safetensors.torch.load_file("{BACKBONE}"))'
        imports = "import safetensors.torch, torch, torchvision"
        lines += ["```python", imports, "", *what["torchvision"], load, "```"]
    else:
        lines += ["torchvision's ResNet cannot be made into this one; the names of tensors follow it all the same."]
    if what["timm"]:
        load = f'model.load_state_dict(safetensors.torch.load_file("{BACKBONE}"))'
        settings = "".join(f", {name}={value}" for name, value in what["timm_settings"].items())
        make = f'model = timm.create_model("{what["timm"]}"{settings}).eval()'
        lines += ["", "With timm:", "", "```python", "import safetensors.torch, timm", "", make, load, "```"]
    if what["differs_from_torchvision"]:
        lines += ["", "What is not torchvision's:", "", *[f"- {each}" for each in what["differs_from_torchvision"]]]
    return lines
