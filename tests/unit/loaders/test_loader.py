"""The loader: order of steps, slots, threads, memory, errors; each renderer behind it."""

import gc
import os
import sys
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from loaders import loader as loader_module
from loaders.errors import RenderError, StoreError
from loaders.loader import Loader, bind
from loaders.plan.ops import ColourJitter, Flip, GaussianBlur
from loaders.plan.plan import Plan
from loaders.plan.views import UNIT, Balanced, Rrc, Sequential, Shuffled, Stream, View
from loaders.renderers.turbo import TurboRenderer
from loaders.store.data import DataSets
from loaders.store.folder import FolderSource
from loaders.store.source import ArraySource

RENDERERS = pytest.mark.parametrize("renderer", ["pil", "turbo", "ffcv", "dali"])
VIEWS = (
    View("global", 16, Rrc((0.3, 1.0)), (Flip(), ColourJitter(0.8, 0.4, 0.4, 0.4, 0.1), GaussianBlur()), copies=2),
    View("small", 8, Rrc((0.1, 0.3)), (Flip(),), turns=(0, 1)),
)


def require(renderer):
    """Skip, naming what is not installed."""
    if renderer in ("ffcv", "dali"):
        pytest.importorskip(f"loaders.renderers.{renderer}", exc_type=ImportError)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of twelve small JPEGs."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (root / label).mkdir()
        for i in range(12):
            small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
            small.resize((40, 32), Image.Resampling.BICUBIC).save(root / label / f"{i}.jpg", quality=95)
    return root


def plan_of(views=VIEWS, batch=8):
    streams = (
        Stream("unlabelled", "train", views, Shuffled(), batch),
        Stream("support", "train", views[:1], Balanced(2, 2), 4),
    )
    return Plan(streams, "unlabelled", seed=3)


def bound_to(source, plan=None):
    return bind(plan or plan_of(), DataSets({"train": source}))


@pytest.fixture
def bound(folder):
    return bound_to(FolderSource(folder))


@pytest.fixture(scope="module")
def array_bound():
    images = np.random.default_rng(1).integers(0, 256, (40, 8, 8, 1), np.uint8)
    source = ArraySource("noise", images, np.arange(40) % 4, tuple("abcd"))
    views = (View("view", 8, Rrc((0.3, 1.0)), (Flip(),), UNIT, copies=2),)
    return bound_to(source, Plan((Stream("s", "train", views, Shuffled(), 16),), "s", seed=0))


def copied(batch):
    """Everything a batch holds, kept apart from its slot."""
    return {
        (name, key): value.clone()
        for name, part in batch.parts.items()
        for key, value in {**part.x, "ids": part.ids, "labels": part.labels, "keys": part.keys}.items()
    }


def collect(loader, start, stop):
    found = []
    for batch in loader.batches(start, stop):
        assert batch.step.item() == start + len(found)
        found.append(copied(batch))
        batch.release()
    return found


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def rss_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def shared_memory():
    """Named shared memory of this process, by name or by mapping; others on the machine come and go."""
    mapped = Path("/proc/self/maps").read_text()
    return {name for name in os.listdir("/dev/shm") if str(os.getpid()) in name or f"/dev/shm/{name}" in mapped}


@RENDERERS
def test_any_step_comes_out_the_same_however_it_is_reached(bound, renderer):
    """Resume: a loader started at step 4, another thread count and prefetch, the same pixels."""
    require(renderer)
    with Loader(bound, renderer=renderer, prefetch=3) as loader:
        whole = collect(loader, 0, 6)
    with Loader(bound, renderer=renderer, threads=1, prefetch=1) as loader:
        resumed = collect(loader, 4, 6)
    assert all(same(a, b) for a, b in zip(whole[4:], resumed, strict=True))
    assert not same(whole[4], whole[5])


@RENDERERS
def test_two_ranks_make_the_batches_of_one(bound, renderer):
    require(renderer)
    with Loader(bound, renderer=renderer) as loader:
        whole = collect(loader, 0, 3)
    shares = []
    for rank in range(2):
        with Loader(bound, rank=rank, world=2, renderer=renderer) as loader:
            shares.append(collect(loader, 0, 3))
    copies = {"global": 2, "small": 2}  # two copies, two turns: both are major
    for one, first, second in zip(whole, *shares, strict=True):
        for key, expected in one.items():
            halves = [h[key].unflatten(0, (copies.get(key[1], 1), -1)) for h in (first, second)]
            assert torch.equal(torch.cat(halves, dim=1).flatten(0, 1), expected), key


@pytest.mark.parametrize("other", ["turbo", "ffcv"])
def test_renderers_make_the_same_batches(other, bound):
    """A run may be resumed under the other renderer."""
    require(other)
    results = []
    for renderer in ("pil", other):
        with Loader(bound, renderer=renderer) as loader:
            results.append(collect(loader, 0, 3))
    assert all(same(a, b) for a, b in zip(*results, strict=True))


def test_batches_held_at_once_do_not_alias(bound):
    """Three batches are kept while later ones are made; each must still hold its own pixels."""
    with Loader(bound) as loader:
        expected = collect(loader, 0, 8)
        held = []
        for batch in loader.batches(0, 8):
            held.append(batch)
            if len(held) > 3:
                held.pop(0).release()
            for kept in held:
                assert same(copied(kept), expected[kept.step.item()])


def test_a_batch_released_twice_is_not_lent_twice(bound):
    """Two later batches in one slot would show each other's pixels."""
    with Loader(bound) as loader:
        expected = collect(loader, 0, 6)
        with closing(loader.batches(0, 6)) as batches:
            first = next(batches)
            first.release()
            first.release()
            rest = list(batches)
            assert all(same(copied(batch), expected[batch.step.item()]) for batch in rest)


@RENDERERS
def test_leaving_early_and_starting_again_leaks_nothing(bound, renderer):
    """FFCV's loader keeps a thread and a batch for each iterator that is left early."""
    require(renderer)
    before = shared_memory()
    with Loader(bound, renderer=renderer) as loader:

        def leave_early(times):
            for k in range(times):
                with closing(loader.batches(k, 1000)) as batches:
                    next(batches)
                    if k % 2:
                        next(batches).release()

        leave_early(20)
        threads, memory = threading.active_count(), rss_mib()
        leave_early(100)
        assert threading.active_count() == threads
        assert rss_mib() - memory < 8
    assert shared_memory() == before


def test_an_interrupt_while_its_thread_begins_is_what_one_gets(bound, monkeypatch):
    """Catches an error about the thread, which never began, in the interrupt's place."""

    def interrupted(self):
        raise KeyboardInterrupt

    with Loader(bound, threads=1) as loader, monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(loader.batches(0, 1))


def test_a_loop_left_with_break_can_be_followed_by_another(bound):
    with Loader(bound) as loader:
        for _ in range(3):
            for _batch in loader.batches(0, 100):
                break


@RENDERERS
def test_loaders_opened_and_closed_leak_nothing(bound, renderer):
    require(renderer)

    def open_and_close(times):
        for _ in range(times):
            with Loader(bound, renderer=renderer) as loader:
                collect(loader, 0, 1)
        gc.collect()

    open_and_close(8)
    threads, tasks, memory = threading.active_count(), len(os.listdir("/proc/self/task")), rss_mib()
    open_and_close(16)
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/task")) <= tasks
    assert rss_mib() - memory < 16


@pytest.mark.parametrize("kind", ["memory", "pil", "turbo", "ffcv", "dali"])
def test_2000_steps_keep_memory_and_threads_flat(kind, folder, array_bound):
    """A slot, a buffer or a queue entry lost each step would be megabytes after two thousand."""
    require(kind)
    plan = Plan((Stream("s", "train", (View("view", 64, Rrc((0.3, 1.0)), (Flip(),)),), Shuffled(), 2),), "s", seed=0)
    bound = array_bound if kind == "memory" else bound_to(FolderSource(folder), plan)
    before = shared_memory()

    def state():
        gc.collect()
        return threading.active_count(), len(os.listdir("/proc/self/task")), rss_mib()

    with Loader(bound, renderer=kind) as loader, closing(loader.batches(0, 3000)) as batches:
        for step, batch in enumerate(batches):
            batch.release()
            if step == 300:
                threads, tasks, memory = state()
            if step == 2300:
                break
        assert state()[:2] == (threads, tasks)
        assert state()[2] - memory < 4
    assert shared_memory() == before


def test_threads_never_exceed_the_affinity(bound):
    """FFCV dies where it is asked for more workers than CPUs; we are asked for 64 and take what there is."""
    num_cpus = len(os.sched_getaffinity(0))
    before = threading.active_count()
    with Loader(bound, threads=64) as loader:
        assert loader.threads == num_cpus
        collect(loader, 0, 5)
        rendering = [t for t in threading.enumerate() if t.name.startswith("fastssl-render")]
        assert 1 <= len(rendering) <= num_cpus
    assert threading.active_count() == before
    with Loader(bound, threads=1) as loader:
        assert loader.threads == 1


def test_an_error_in_the_background_reaches_the_consumer(folder, tmp_path):
    """Batches before the damaged image arrive; then its error, not a hang; then the loader still closes."""
    for i, path in enumerate(sorted(folder.glob("*/*.jpg"))[:8]):
        (tmp_path / f"{i}.jpg").write_bytes(path.read_bytes())
    stream = Stream("s", "train", VIEWS[:1], Sequential(), 2)
    bound = bound_to(FolderSource(tmp_path), Plan((stream,), "s", seed=0))
    (tmp_path / "5.jpg").write_bytes((tmp_path / "5.jpg").read_bytes()[:-200])
    seen = 0
    before = threading.active_count()
    with Loader(bound) as loader, pytest.raises(RenderError, match=r"image 5 \(5\.jpg\)"):
        for batch in loader.batches(0, 4):
            seen += 1
            batch.release()
    assert seen == 2
    assert threading.active_count() == before


def test_a_renderer_that_is_not_installed_names_the_extra(bound, monkeypatch):
    for kind in ("ffcv", "dali"):
        monkeypatch.setitem(sys.modules, f"loaders.renderers.{kind}", None)
        with pytest.raises(StoreError, match=rf"--loader {kind} cannot start .*install the extra {kind}"):
            Loader(bound, renderer=kind)
    with Loader(bound, renderer="auto") as loader:  # needs neither
        assert len(collect(loader, 0, 1)) == 1


def test_a_renderer_that_does_not_fit_is_an_error(bound, array_bound):
    with pytest.raises(StoreError, match="--loader memory: .* encoded images; choose auto, turbo, ffcv, dali or pil"):
        Loader(bound, renderer="memory")
    with pytest.raises(StoreError, match="--loader ffcv: noise holds arrays; choose auto or memory"):
        Loader(array_bound, renderer="ffcv")


def test_auto_takes_turbo(bound):
    """What comes with pip alone is the fastest, beside an extra that is installed too."""
    with Loader(bound) as loader:
        assert all(isinstance(renderer, TurboRenderer) for renderer in loader._renderers.values())


def test_a_consumer_that_is_slow_waits_for_nothing(bound):
    """Prefetch: while the consumer is busy the next batches are made, so that asking for one takes no time."""
    import time

    with Loader(bound, prefetch=2) as loader, closing(loader.batches(0, 12)) as batches:
        next(batches).release()
        waits = []
        for _ in range(10):
            time.sleep(0.1)
            start = time.perf_counter()
            next(batches).release()
            waits.append(time.perf_counter() - start)
    assert sorted(waits)[len(waits) // 2] < 0.01


def test_the_next_step_is_rendered_while_one_is_finished(bound, monkeypatch):
    """Catches threads that idle until the last image of a step is finished, and buffers of more than three steps."""
    rendered, finish, seen = [threading.Event() for _ in range(8)], loader_module.numba_cpu.finish, []
    with Loader(bound, threads=2, prefetch=1) as loader:
        crops = loader._crops

        def noted(rows, room):
            found = crops(rows, room)
            rendered[rows.step].set()
            return found

        def looking_ahead(*arguments):
            if not seen:  # step 0 is about to be finished
                seen.append((rendered[2].wait(20), rendered[3].wait(0.2)))
            finish(*arguments)

        monkeypatch.setattr(loader, "_crops", noted)
        monkeypatch.setattr(loader_module.numba_cpu, "finish", looking_ahead)
        with closing(loader.batches(0, 8)) as batches:
            next(batches).release()
    assert seen == [(True, False)]


@pytest.mark.parametrize("unreadable_by_header", [True, False])
@pytest.mark.parametrize("kind", ["pil", "turbo", "ffcv", "dali"])
def test_a_damaged_image_is_replaced_by_the_next_of_its_label(kind, unreadable_by_header, tmp_path):
    """Catches a substitute of another class, one cropped with the damaged image's boxes, and a loop that never ends."""
    require(kind)
    rng = np.random.default_rng(0)
    for i in range(12):
        (tmp_path / str(i % 2)).mkdir(exist_ok=True)
        size = (40 + i, 60 - i)
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / str(i % 2) / f"{i:02}.jpg")
    source = FolderSource(tmp_path)
    view = View("view", 16, Rrc((0.3, 1.0)), pixels=UNIT)
    plan = Plan((Stream("s", "train", (view,), Balanced(2, 6), 12),), "s", seed=0)
    victim, following = 1, 2  # both of class 0: ids are ordered by class
    data = DataSets({"train": source})
    path = next(p for p in (tmp_path / "0").iterdir() if p.name == source.name_of(victim))
    if not unreadable_by_header:
        assert source.unreadable == {}  # looked at before it is damaged
    path.write_bytes(path.read_bytes()[:200] + b"\xff\xd9")
    assert unreadable_by_header == (victim in source.unreadable)

    error = StoreError if unreadable_by_header else RenderError
    with pytest.raises(error, match=source.name_of(victim)), Loader(bind(plan, data), renderer=kind) as loader:
        next(loader.batches(0, 1))
    with Loader(bind(plan, data), renderer=kind, replace_damaged=True) as loader:
        (batch,) = loader.batches(0, 1)
        assert loader.replaced == {"s": {victim: following}}
        part = batch.parts["s"]
        assert victim not in part.ids and (part.ids == following).sum() == 2
        assert (part.labels == torch.tensor(source.labels)[part.ids]).all()
        assert torch.isfinite(part.x["view"]).all()
