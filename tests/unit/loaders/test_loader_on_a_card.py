"""The loader on a GPU that is not there (`tests.support.card`); DALI's renderer beside stand-ins for DALI's calls."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from loaders import loader as loader_module
from loaders.loader import Loader, bind
from loaders.plan.ops import Noise
from loaders.plan.plan import Plan
from loaders.plan.views import UNIT, Filter, Rrc, Shuffled, Stream, View
from loaders.store.data import DataSets
from loaders.store.folder import FolderSource
from loaders.store.source import ArraySource
from tests.support.card import Card, Event
from tests.unit.loaders.renderers.test_renderers import rows_for

VIEWS = (View("v", 8, Rrc((0.3, 1.0)), pixels=UNIT, copies=2), View("w", 8, Rrc((0.3, 1.0)), pixels=UNIT))


@pytest.fixture
def card(monkeypatch):
    with Card(monkeypatch) as card:
        for work in (Loader._prepare, Loader._rendered):  # of either thread

            def on_the_card(self, *args, work=work):
                with card.mode():
                    return work(self, *args)

            monkeypatch.setattr(Loader, work.__name__, on_the_card)
        monkeypatch.setattr(
            loader_module, "_finished_on_gpu", lambda rows, crops, out: out.fill_(float(crops[0, 0, 0, 0]))
        )
        yield card


def noise_bound():
    crops = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), np.uint8)
    source = ArraySource("noise", crops, np.zeros(64, int), ("a",))
    plan = Plan((Stream("s", "train", VIEWS, Shuffled(), 16),), "s", seed=0)
    return bind(plan, DataSets({"train": source}))


def test_a_gpu_without_a_number_is_the_current_one(card):
    """Catches `Loader(bound, device="cuda")`, `evaluate` and `embed` ending at the first batch in "Expected a
    torch.device with a specified index"."""
    with Loader(noise_bound(), device="cuda") as loader:
        assert loader.device == torch.device("cuda", 0)
        assert len([batch.parts["s"].x["v"] for batch in loader.batches(0, 3)]) == 3


def test_loaders_come_and_go_on_one_stream(card):
    """Catches a stream, and so a pool of memory that nobody else can use, left behind by each evaluation."""
    for _ in range(5):
        with Loader(noise_bound(), device="cuda:0") as loader:
            next(loader.batches(0, 1))
    assert len(card.streams) == 1


def test_where_triton_does_not_run_images_are_finished_before_they_leave(card, monkeypatch):
    """Catches a V100 that is handed kernels which its compiler does not know."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    monkeypatch.setattr(loader_module, "_finished_on_gpu", None)
    bound = noise_bound()
    with Loader(bound, device="cuda") as on_card, Loader(bound) as on_cpu:
        for there, here in zip(on_card.batches(0, 4), on_cpu.batches(0, 4), strict=True):
            for view in ("v", "w"):
                assert torch.equal(there.parts["s"].x[view], here.parts["s"].x[view])
            here.release()


# ------------------------------------------------------------------------------------------------------------- DALI


class OnGpu:
    """A TensorListGPU of uint8 as DALI 2.4 documents it, or one of its tensors."""

    def __init__(self, values: np.ndarray, copies: list):
        self.values, self.copies = np.ascontiguousarray(values), copies

    def __getitem__(self, k: int) -> OnGpu:
        return OnGpu(self.values[k], self.copies)

    def as_tensor(self) -> OnGpu:
        return self

    def copy_to_external(self, ptr, cuda_stream=None, non_blocking=False, use_copy_kernel=False):
        if not isinstance(ptr, ctypes.c_void_p) or not isinstance(cuda_stream, ctypes.c_void_p | None):
            raise TypeError("copy_to_external: expected ctypes.c_void_p")
        ctypes.memmove(ptr, self.values.ctypes.data, self.values.nbytes)
        self.copies.append((None if cuda_stream is None else cuda_stream.value, non_blocking))


class Pipeline:
    """Takes what ours is fed, and gives for each copy of each view images that say where they belong."""

    def __init__(self, views, batch, threads, device_id):
        self.views, self.max_batch_size, self.copies, self.fed = views, batch, [], {}

    def feed_input(self, name, value):
        self.fed[name] = value

    def run(self):
        num = len(self.fed["files"])
        outputs, number = [], 0
        for view in self.views:
            for _ in range(view.copies):
                marks = np.arange(number, number + num, dtype=np.uint8)
                number += num
                outputs.append(
                    OnGpu(np.broadcast_to(marks[:, None, None, None], (num, view.size, view.size, 3)), self.copies)
                )
        return outputs


def test_dalis_images_are_copied_on_the_stream_that_finishes_them(card, monkeypatch, tmp_path):
    """Catches a copy that DALI refuses (a number for an address), and one on a stream of DALI's own: its pixels could
    be written over those that an earlier batch still reads."""
    dali = pytest.importorskip("loaders.renderers.dali")
    from PIL import Image

    from tests.unit.loaders.renderers.test_renderers import smooth_images

    folder = tmp_path / "a"
    folder.mkdir()
    for i, image in enumerate(smooth_images()):
        Image.fromarray(image).save(folder / f"{i:02}.jpg")
    source, pipelines = FolderSource(tmp_path), []
    monkeypatch.setattr(dali, "_pipeline", lambda *args: pipelines.append(Pipeline(*args)) or pipelines[-1])
    views = (View("v", 8, Rrc((0.3, 1.0)), copies=2), View("w", 5, Rrc((0.3, 1.0)), filter=Filter.BICUBIC))
    rows, ahead = rows_for(source, views), torch.cuda.Stream("cuda:0")
    with ThreadPoolExecutor(1) as pool, torch.cuda.stream(ahead):
        renderer = dali.DaliRenderer(source, pool, 1, device_id=0)
        for broken in (False, True):
            if broken:  # image 3 of the batch goes another way, and leaves a gap
                monkeypatch.setattr(renderer, "_is_ours", lambda i, file, lost=int(rows.ids[3]): i != lost)
            out = {
                v.view.name: torch.zeros(len(v.boxes), v.view.size, v.view.size, 3, dtype=torch.uint8)
                for v in rows.views
            }
            Event.num_waits = 0
            renderer.render(rows, out)
            expected = np.delete(np.arange(9), 3) if broken else np.arange(9)
            found = np.concatenate([out["v"][:9, 0, 0, 0], out["v"][9:, 0, 0, 0], out["w"][:, 0, 0, 0]]).reshape(3, 9)
            assert np.array_equal(found[:, expected], np.arange(3 * len(expected)).reshape(3, -1))
            assert Event.num_waits == int(broken)  # for the copies before, from buffers that are written now
    assert set(pipelines[0].copies) == {(ahead.cuda_stream, True)}


# ------------------------------------------------------------------------------------------------- copied and finished


def test_what_is_kept_is_copied_and_not_rendered_again(card):
    """Catches a measurement of copies that also decodes, or that copies floats in place of bytes."""
    with Loader(noise_bound(), device="cuda") as loader:
        renderer, num = loader._renderers["s"], []
        render = renderer.render
        renderer.render = lambda rows, out: num.append(rows) or render(rows, out)
        loader.keep_rendered()
        for batch in loader.batches(0, 12):
            assert batch.parts["s"].x["v"].dtype == torch.float32
            batch.release()
    assert len(num) == loader_module.NUM_KEPT


def test_a_finish_takes_few_images_at_a_time(monkeypatch):
    """Catches float planes of a whole batch, that no model of memory knows, and rows that get another one's colours."""
    triton_finish = pytest.importorskip("loaders.finish.triton.finish")
    seen = []

    def finish(crops, ops, tables, pixels, out):
        seen.append(len(crops))
        assert all(len(table) == len(crops) for table in tables)
        out.copy_(crops.float() + torch.from_numpy(tables[0][:, :1, None, None] if len(tables[0].shape) == 2 else 0))

    monkeypatch.setattr(triton_finish, "finish", finish)
    monkeypatch.setattr(loader_module, "_PLANES_BYTES", 4 * 3 * 8 * 8 * 5)
    rows = rows_for(ArraySource("noise", np.zeros((16, 16, 16, 3), np.uint8), np.zeros(16, int), ("a",)),
                    (View("v", 8, Rrc((0.3, 1.0)), (Noise(),), UNIT),), batch=12).views[0]  # fmt: skip
    rows.tables[0][:, 0] = np.arange(12)
    out = torch.empty(1, 12, 8, 8, 3)
    loader_module._finished_on_gpu(rows, torch.zeros(12, 8, 8, 3, dtype=torch.uint8), out)
    assert seen == [5, 5, 2] and torch.equal(out[0, :, 0, 0, 0], torch.arange(12.0))
