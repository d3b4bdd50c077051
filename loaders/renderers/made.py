"""The renderer that `--loader` names, over the images at hand."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from loaders.errors import StoreError
from loaders.renderers import Renderer
from loaders.renderers.memory import MemoryRenderer
from loaders.renderers.pil import PilRenderer
from loaders.renderers.turbo import TurboRenderer
from loaders.store.masks import Masks
from loaders.store.source import ArraySource, Source, is_encoded
from loaders.timing import PhaseTimes


def make_renderer(
    kind: str,
    source: Source,
    pool: ThreadPoolExecutor,
    threads: int,
    gpu: int | None = None,
    times: PhaseTimes | None = None,
    masks: Masks | None = None,
) -> Renderer:
    """The renderer named `kind` over `source`; `auto` takes `turbo`. DALI decodes on the GPU numbered `gpu`, if
    any, the others on the CPU. What it does is counted in `times`. `masks` are the source's, where a view has a mask.

    Raises StoreError where `kind` does not fit the source or the views, or is not installed.
    """
    if not is_encoded(source):
        assert isinstance(source, ArraySource)
        if kind not in ("auto", "memory"):
            raise StoreError(f"--loader {kind}: {source.name} holds arrays; choose auto or memory")
        return MemoryRenderer(source, pool, times, masks)
    match kind:
        case "turbo" | "auto":
            return TurboRenderer(source, pool, times, masks)
        case "pil":
            return PilRenderer(source, pool, times, masks)
        case "ffcv":
            try:
                from loaders.renderers.ffcv import FfcvRenderer
            except ImportError as e:
                raise _missing("ffcv", "ffcv", e) from e
            return FfcvRenderer(source, pool, times, masks)
        case "dali" if masks is not None:
            raise StoreError(
                "--loader dali: a view has a mask, which DALI's pipeline lacks; choose auto, turbo, ffcv or pil"
            )
        case "dali":
            try:
                from loaders.renderers.dali import DaliRenderer
            except ImportError as e:
                raise _missing("dali", "dali, or dali-cuda12 with CUDA 12", e) from e
            return DaliRenderer(source, pool, threads, gpu, times)
    raise StoreError(f"--loader {kind}: {source.name} holds encoded images; choose auto, turbo, ffcv, dali or pil")


def _missing(kind: str, extra: str, error: ImportError) -> StoreError:
    return StoreError(f"--loader {kind} cannot start ({error}): install the extra {extra} (see docs/data.md)")
