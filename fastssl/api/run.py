"""A run, opened from its folder: its metrics, and what the commands do with it."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from contextlib import redirect_stderr
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastssl.api.arrays import images_of
from fastssl.engine.reopen import open_run as reopened
from fastssl.errors import ConfigError
from fastssl.evaluation import divide, load_protocol
from fastssl.evaluation.predict import Predictions, images_at, predict
from fastssl.evaluation.subject import Subject
from fastssl.export.folder import export as write_export
from fastssl.report.history import StageHistory, read_history
from fastssl.report.training import training_page
from fastssl.run_dir.written import Written, read_run
from loaders.plan.boxes import boxes
from loaders.plan.views import View
from loaders.renderers.pil import crop
from loaders.store.source import ArraySource, Source


class Run:
    """A run's folder. Its networks are those of the newest checkpoint when they are first asked for."""

    def __init__(self, path: str | Path):
        """Raises ConfigError where `path` is no run directory."""
        self.path = Path(path)
        self.written: Written = read_run(self.path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}: {self.written.recipe}, seed {self.written.seed})"

    @property
    def metrics(self) -> dict[str, np.ndarray]:
        """Logged numbers of the last stage, a column each: float64 [lines], NaN where a line lacks it. "step", "epoch",
        "loss" and its parts, "lr"."""
        return _columns(self._history.steps)

    @property
    def evaluations(self) -> dict[str, np.ndarray]:
        """The same of what was evaluated while training."""
        return _columns([{**each["evaluation"], "step": each["step"]} for each in self._history.evaluations])

    @property
    def result(self) -> dict[str, Any] | None:
        """What the run ended with; None while it has not ended."""
        return read_history(self.path).stages[-1].result

    def evaluate(
        self, *protocols: str, data: Mapping[str, str | Path] | None = None, labels: str | None = None
    ) -> dict[str, Any]:
        """Scores by the protocols named ("knn", "linear", ...), as a dict. `data`: paths by key, as `--data` has
        them; `labels`: the images to learn from. Raises FastsslError, LoaderError."""
        if not protocols:
            raise ConfigError("evaluate() needs a protocol: evaluate('knn')")
        chosen = [load_protocol(name) for name in protocols]
        own, sets = divide(tuple(f"{key}={path}" for key, path in (data or {}).items()), chosen)
        subject = _opened(self.path, own, sets, labels) if own or sets or labels else self._subject
        return {key: value for protocol in chosen for key, value in protocol.evaluate(subject).items()}

    def embed(self, images: str | Path | np.ndarray, tap: str | None = None) -> np.ndarray:
        """float32 [N, D]: features of the images of a folder, in the order of their paths, or of a uint8 array
        [N, H, W, C]; from `tap`, by default the backbone."""
        features = self._subject.features_of(_source(images), tap or self._subject.method.taps[0])
        values: np.ndarray = features.values.numpy()
        return values

    def predict(self, images: str | Path | np.ndarray) -> Predictions:
        """Classes and probabilities of the images of a folder, or of a uint8 array [N, H, W, C]."""
        return predict(self._subject, _source(images))

    def encoder(self) -> Encoder:
        """The backbone, in eval mode on the CPU, and how images become its input."""
        subject = _opened(self.path)
        view, channels = subject.method.config.eval_view, subject.method.facts.channels
        return Encoder(subject.nets.online.trunk.to("cpu"), Transform(view, channels))

    def export(self, out: str | Path | None = None, step: int | None = None, network: str = "online") -> Path:
        """Write the networks to the folder `out` (by default RUN/export), as `fastssl export` does; returns it."""
        return write_export(self.path, self.path / "export" if out is None else Path(out), step, network)

    def report(self) -> Page:
        """The run's page; a notebook shows it, `str()` of it is the HTML."""
        return Page(training_page(read_history(self.path), None, ()))

    @property
    def _history(self) -> StageHistory:
        return read_history(self.path).stages[-1]

    @cached_property
    def _subject(self) -> Subject:
        return _opened(self.path)


def open_run(path: str | Path) -> Run:
    """The run in the folder `path`. Raises ConfigError where there is none."""
    return Run(path)


def _opened(
    path: Path, data: tuple[str, ...] = (), sets: Mapping[str, Path] | None = None, labels: str | None = None
) -> Subject:
    """The run's networks beside `data`. What a command would say on stderr is dropped, but for warnings."""
    said = io.StringIO()
    with redirect_stderr(said):
        subject, _ = reopened(path, data, sets, labels)
    for line in said.getvalue().splitlines():
        if line.startswith("warning: "):
            warnings.warn(line.removeprefix("warning: "), stacklevel=4)
    return subject


class Encoder(nn.Module):
    """float32 [N, C, S, S], as `transform` makes it, -> float32 [N, num_features]."""

    def __init__(self, trunk: nn.Module, transform: Transform):
        super().__init__()
        self.trunk, self.transform = trunk, transform
        self.num_features = int(trunk.num_features)  # type: ignore[arg-type]
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.trunk(x)
        return features


class Transform:
    """An image, as it is evaluated: a PIL image or uint8 [H, W, C] -> float32 [C, S, S]."""

    def __init__(self, view: View, channels: int):
        self.view, self.channels = view, channels

    def __call__(self, image: Image.Image | np.ndarray) -> Tensor:
        whole = image
        if isinstance(whole, np.ndarray):
            whole = Image.fromarray(whole.squeeze(2) if whole.shape[2] == 1 else whole)
        whole = whole.convert("RGB" if self.channels == 3 else "L")
        box = boxes(self.view, np.array([[whole.height, whole.width]]), np.zeros(1, np.uint64))[0]
        pixels = np.array(crop(whole, box, self.view), np.float32).reshape(self.view.size, self.view.size, -1) / 255
        mean, std = (np.array(each, np.float32) for each in (self.view.pixels.mean, self.view.pixels.std))
        return torch.from_numpy(((pixels - mean) / std).transpose(2, 0, 1).copy())

    def __repr__(self) -> str:
        return f"Transform({self.view.crop}, {self.view.size} pixels)"


class Page(str):
    """An HTML page that a notebook shows."""

    def _repr_html_(self) -> str:
        """The page in a frame of its own: its style stays there, and its links inside it."""
        from html import escape

        return f'<iframe srcdoc="{escape(self)}" style="width:100%;height:40rem;border:0"></iframe>'

    def save(self, path: str | Path) -> Path:
        """Write it to `path`."""
        Path(path).write_text(self)
        return Path(path)


def _source(images: str | Path | np.ndarray) -> Source:
    if isinstance(images, str | Path):
        return images_at(str(images))
    array = images_of(images, "images")
    return ArraySource("images", array, np.full(len(array), -1, np.int64), ())


def _columns(records: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Numbers by name; what is nested stays in the file."""
    found: dict[str, list[float]] = {}
    for i, record in enumerate(records):
        for name, value in record.items():
            if value in ("inf", "-inf", "nan") or (isinstance(value, int | float) and not isinstance(value, bool)):
                found.setdefault(name, [float("nan")] * len(records))[i] = float(value)
    return {name: np.array(values) for name, values in found.items()}
