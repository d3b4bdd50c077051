"""The profiler's parts: who is blamed for a slow loader, what-if against runs and clocks, the baseline. About 25 s."""

import time
from contextlib import closing
from dataclasses import replace
from itertools import islice
from statistics import median

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.costs import whatif
from fastssl.costs.cost import ours
from fastssl.costs.trace import trace_step
from fastssl.errors import FastsslError
from fastssl.methods.base import Facts
from fastssl.profiling import baseline
from fastssl.profiling.loading import ENDLESS, loader_window
from fastssl.profiling.probes import CoreProbe
from fastssl.profiling.workload import Cycled, Drawn, fitting, sized
from fastssl.recipes.resolve import resolve
from loaders.finish import numba_cpu
from loaders.loader import Loader, bind
from loaders.plan.ops import Flip
from loaders.plan.plan import Plan
from loaders.plan.views import UNIT, Rrc, Shuffled, Stream, View
from loaders.store import images
from loaders.store.data import DataSets
from loaders.store.folder import FolderSource
from loaders.timing import CROP, FINISH, PHASES, PLAN, PhaseTimes, Pool, Shares, now, stamp_s

BATCH, BATCHES = 8, 6
SLEEP_S = 0.004  # in every stage of every image: long beside the work itself, on a busy machine too
IMAGENET = Facts(num_classes=1000, channels=3, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixteen JPEGs so small that sleeping is all that takes time."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(16):
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(root / f"{i}.jpg")
    return FolderSource(root)


class Slow(Cycled):
    """A source that takes `pause_s` for each image."""

    pause_s = 0.0

    def jpeg(self, i):
        time.sleep(self.pause_s)
        return super().jpeg(i)


@pytest.fixture
def slow(folder, monkeypatch):
    """A loader of sleeps alone: (its bound plan, the seconds by stage, to be set)."""
    source = Slow(folder, 64, 2)
    pauses = dict.fromkeys(("fetch", "decode", "finish"), SLEEP_S)
    opened, drive = images.open_image, numba_cpu._driver()

    def open_slowly(file):
        time.sleep(pauses["decode"])
        return opened(file)

    def drive_slowly(*arguments):
        *_, num_images, _, _, _, _ = arguments
        time.sleep(pauses["finish"] * num_images)
        drive(*arguments)

    monkeypatch.setattr(images, "open_image", open_slowly)
    monkeypatch.setattr(numba_cpu, "_driver", lambda: drive_slowly)
    view = View("view", 8, Rrc((0.5, 1.0)), (Flip(),), UNIT)
    plan = Plan((Stream("images", "train", (view,), Shuffled(), BATCH),), "images", 0)
    return source, bind(plan, DataSets({"train": source})), pauses


def steps(bound, step_s):
    """(wall seconds a step, the profiler's window) of a loop whose step takes `step_s`."""
    with Loader(bound, renderer="pil", threads=2) as loader, closing(loader.batches(0, ENDLESS)) as batches:
        for _ in range(3):
            next(batches).release()
        begin = time.perf_counter()
        for batch in islice(batches, BATCHES):
            time.sleep(step_s)
            batch.release()
        return (time.perf_counter() - begin) / BATCHES, loader_window(loader, 3)


def blamed_and_true(slow, stage, sleep_s):
    """Five windows without and with a sleep in `stage`, in turns: the share of a step's wall time it took, and what
    the profiler adds to each stage as such a share."""
    source, bound, pauses = slow
    truths, blamed = [], {name: [] for name in PHASES}
    for _ in range(5):
        windows = []
        for extra_s in (0.0, 2 * sleep_s):
            for name in pauses:
                pauses[name] = sleep_s + extra_s * (name == stage)
            source.pause_s = pauses["fetch"]
            windows.append(steps(bound, 0.001))
        (short_s, short), (long_s, long) = windows
        truths.append((long_s - short_s) / long_s)
        for name in PHASES:
            before_s, after_s = (w.by_phase_s[name] / len(w.prepare_s) for w in (short, long))
            blamed[name].append((after_s - before_s) / long_s)
    return truths, blamed


@pytest.mark.parametrize("stage", ["fetch", "decode", "finish"])
def test_a_sleep_is_blamed_on_its_stage(slow, stage):
    """The truth is the wall time of the same steps with and without the sleep, in turns. Catches a stage measured in
    CPU seconds (a sleep has none), a stamp on the wrong side of a call, and seconds of two threads side by side counted
    like those of one that the others wait for. Where waking up takes long, on a busy machine, sleeps must be longer."""
    for sleep_s in (SLEEP_S, 4 * SLEEP_S):
        truths, blamed = blamed_and_true(slow, stage, sleep_s)
        spread = (max(truths) - min(truths)) / 2
        if spread < 0.05:
            break
    assert median(blamed[stage]) == pytest.approx(median(truths), abs=0.02 + spread)
    assert max(abs(median(blamed[name])) for name in PHASES if name != stage) < 0.02 + spread
    assert median(truths) > 0.3


def test_seconds_by_stage_add_up_to_what_batches_took(slow):
    """Catches a stage left out, and stages of several threads that add up to more than the clock's."""
    source, bound, _ = slow
    source.pause_s = SLEEP_S
    _, window = steps(bound, 0.0)
    assert sum(window.by_phase_s.values()) == pytest.approx(window.wall_s, rel=0.05)


def test_a_moment_is_divided_among_those_who_work_in_it():
    """Catches a last image, for which the other threads wait, that counts as little as those beside others."""
    times = PhaseTimes()

    def work(phase, seconds):
        start = now()
        time.sleep(seconds)
        times.add(phase, start)

    with Pool(2, "test", Shares([times])) as pool:
        for task in [pool.submit(work, phase, seconds) for phase, seconds in ((CROP, 0.2), (FINISH, 0.6))]:
            task.result()
    shares_s = times.totals()[:, 3]
    assert shares_s[CROP] == pytest.approx(0.1, abs=0.03) and shares_s[FINISH] == pytest.approx(0.5, abs=0.03)
    work(PLAN, 0.1)  # outside the pool, by whoever else works: whole
    assert times.totals()[PLAN, 3] == pytest.approx(0.1, abs=0.03)


def test_threads_count_for_themselves_and_nothing_is_lost():
    from concurrent.futures import ThreadPoolExecutor

    times = PhaseTimes()

    def work(_):
        for _ in range(500):
            times.add(2, now())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert times.totals()[2, 2] == 2000
    assert times.totals()[[0, 1, 3, 4]].sum() == 0


def test_stamps_cost_less_than_a_hundredth_of_an_image():
    """Four stamps for an image's 1.9 ms of CPU in the fastest renderer: under 1 %."""
    assert 4 * min(stamp_s() for _ in range(5)) < 0.01 * 1.9e-3


# ------------------------------------------------------------------------------------------------------- what if


def test_two_cores_prepare_twice_as_much_but_for_planning():
    cost = whatif.LoaderCost(cpu_s=0.011, serial_s=0.001, bytes_read=100e3)
    assert cost.images_per_s(1) == (pytest.approx(1 / 0.011), "loader")
    assert cost.images_per_s(2) == (pytest.approx(1 / 0.006), "loader")
    last_s = 0.01 / 64  # of each image, while the batch's last one is decoded
    assert cost.images_per_s(2, disk_bytes_s=1e6) == (pytest.approx(1 / (0.101 + last_s)), "disk")
    finishing = replace(cost, finish_s=0.004)  # nothing is read meanwhile
    last_s = 0.006 / 64
    assert finishing.images_per_s(2, disk_bytes_s=1e6) == (pytest.approx(1 / (0.001 + 0.1 + last_s + 0.002)), "disk")
    assert cost.cores_for(100) == 2 and cost.cores_for(1000) is None  # planning alone takes 1 ms


@pytest.mark.parametrize(("threads", "batch_ms"), [(1, 20), (2, 12), (4, 11)])
def test_threads_take_turns_at_the_disk(threads, batch_ms):
    """Four images, 2 ms to read and 3 to decode, by hand. One thread: 4 · 5. Two: read until 2 and 4, decoded at 5 and
    7, read again until 7 and 9, decoded at 10 and 12. Four: read until 2, 4, 6 and 8, the last decoded at 11."""
    assert whatif.render_s([0.002], 0.003, threads, 4, a_task=1) == pytest.approx(batch_ms / 4e3)


def test_a_cache_saves_decoding_and_reading():
    cost = whatif.LoaderCost(cpu_s=0.004, serial_s=0.0, bytes_read=260e3, decode_s=0.002, cached_bytes_read=160e3)
    assert cost.with_cache(0.5) == replace(cost, cpu_s=0.003, bytes_read=180e3)


def test_decoded_images_want_more_of_the_disk_and_fewer_cores():
    """By hand, with half an image of another stream beside each: 4 ms of CPU, of which 2.5 decode, and 110 KB an image;
    decoded 550 KB, and .4 ms more to fetch them. The step takes 500 images a second."""
    jpeg = whatif.LoaderCost(cpu_s=0.004, serial_s=0.0, bytes_read=165e3)
    stores = {
        "as stored": whatif.Store(110e3, jpeg),
        "decoded": whatif.Store(550e3, replace(jpeg, cpu_s=0.0019, bytes_read=825e3)),
    }
    as_stored, decoded = whatif.around(jpeg, 500.0, 1, 1.0, {}, {}, stores)["stores"]
    assert (as_stored["bytes_per_image"], decoded["bytes_per_image"]) == (110e3, 550e3)
    assert (as_stored["images_per_s"], as_stored["binding"]) == (pytest.approx(250), "loader")
    assert (decoded["images_per_s"], decoded["binding"]) == (500, "step")
    assert as_stored["disk_bytes_per_s"] == pytest.approx(500 * 165e3)
    assert decoded["disk_bytes_per_s"] == pytest.approx(500 * 825e3)
    assert (as_stored["cores"], decoded["cores"]) == (pytest.approx(2), pytest.approx(0.95))
    assert (as_stored["cores_saved"], decoded["cores_saved"]) == (0, pytest.approx(1.05))


def tick_by_tick(prepare_ms, consume_ms, depth, num):
    """Batches a second of a loader, a queue and a step, watched every millisecond."""
    ready = made = taken = busy_ms = now_ms = 0
    left_ms, holding, begun_ms = prepare_ms[0], False, []
    while taken < num:
        moved = True
        while moved:
            moved = False
            if holding and ready < depth:
                ready, made, holding, moved = ready + 1, made + 1, False, True
                left_ms = prepare_ms[made % len(prepare_ms)]
            if busy_ms == 0 and ready:
                ready, taken, busy_ms, moved = ready - 1, taken + 1, consume_ms, True
                begun_ms.append(now_ms)
        now_ms += 1
        busy_ms = max(0, busy_ms - 1)
        left_ms -= not holding
        holding = left_ms == 0
    return 1e3 * (num // 2) / (begun_ms[-1] - begun_ms[num - num // 2 - 1])


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_the_simulated_queue_is_one_watched_tick_by_tick(depth):
    """A bursty loader beside a steady step. Catches a queue that counts the batch in work; and the closed form, the
    slower of the means, is no substitute where the queue is short."""
    prepare_ms = [2] * 7 + [66]  # 10 ms on average
    watched = tick_by_tick(prepare_ms, 11, depth, 800)
    simulated = whatif.simulate([ms / 1e3 for ms in prepare_ms], [0.011], depth)
    assert simulated == pytest.approx(watched, rel=0.01)
    closed = 1e3 / max(sum(prepare_ms) / len(prepare_ms), 11)
    assert closed > {1: 1.3, 2: 1.2, 5: 1.0}[depth] * simulated * 0.99


@pytest.fixture(scope="module")
def headline():
    (stage,) = resolve(whatif.HEADLINE)
    return stage, ours(trace_step(stage, IMAGENET, 64))


def test_the_projection_is_that_of_the_64_gpu_job(headline):
    """Hours by the published rate: 31,200 steps of 19,426 image-equivalents at 1,040 a V100 are 2.53 h, and messages
    come on top. Catches traffic that is counted once for every rank, and epochs counted in other images."""
    _, cost = headline
    row = whatif.described(cost, whatif.CLUSTERS[0], None, 4096, 1_281_167)
    steps_a_run = 100 * (1_281_167 // 4096)
    assert row["compute_s"] * steps_a_run / 3600 == pytest.approx(2.53, rel=0.03)
    messages_s = 114 * 300e-6 + (83e6 + 0.1 * 301e6) / 11e9
    assert row["messages_s"] == pytest.approx(messages_s, rel=0.02)
    assert row["hours_low"] < row["hours_per_100_epochs"] < row["hours_high"]
    assert row["binding"] == "GPU memory traffic"


def test_a_slow_loader_binds_the_projection(headline):
    """Sixteen slow cores beside each H200."""
    _, cost = headline
    pil_like = whatif.LoaderCost(cpu_s=24e-3, serial_s=0.0, bytes_read=290e3)
    row = whatif.described(cost, whatif.CLUSTERS[3], pil_like, 4096, 1_281_167)
    assert row["binding"] == "loader"
    assert row["step_s"] == pytest.approx(4096 / 8 * 24e-3 / 16)
    assert row["loader_cores_needed_per_gpu"] > 16


def test_more_ranks_on_paper_are_faster_until_messages_bind(headline):
    _, cost = headline
    rows = whatif.over_ranks(cost, None, 4096, 1_281_167)
    assert [row["ranks"] for row in rows] == [8, 16, 32, 64, 128, 256, 512, 1024]
    hours = [row["hours_per_100_epochs"] for row in rows]
    assert hours == sorted(hours, reverse=True)
    assert hours[0] / hours[-1] < 128 / 1.5  # not in proportion


# ------------------------------------------------------------------------------------------------------- the shard


def test_a_shard_keeps_the_recipes_proportions():
    (stage,) = resolve(whatif.HEADLINE)
    sixtyfourth = sized(stage, 64, 1, False).config
    assert (sixtyfourth.batch_global, sixtyfourth.classes_global, sixtyfourth.images_per_class) == (64, 15, 7)
    on_two = sized(stage, 64, 2, False).config
    assert (on_two.batch_global, on_two.classes_global) == (128, 30)
    least = sized(stage, 2, 1, False).config
    assert (least.batch_global, least.classes_global, least.images_per_class) == (2, 3, 1)
    assert sized(stage, 2, 1, True).config.batch_global == 4096


def test_a_cpu_gets_a_step_of_about_a_second():
    (stage,) = resolve(whatif.HEADLINE)
    chosen, trace = fitting(stage, IMAGENET, 1, "cpu", "eager", False)
    assert sum(trace.flops.values()) <= 0.5e12
    (small,) = resolve("paws.digits")
    chosen, _ = fitting(small, Facts(10, 1, 0), 1, "cpu", "eager", False)
    assert chosen.config.batch_global == small.config.batch_global


def test_stand_ins_are_like_imagenets_files():
    """467 x 406 pixels and 108.6 KB on average."""
    drawn = Drawn()
    assert np.mean([len(drawn.jpeg(i)) for i in range(len(drawn))]) == pytest.approx(108.6e3, rel=0.15)


def test_any_folder_has_classes_enough(folder):
    cycled = Cycled(folder, 40, 5)
    assert np.bincount(cycled.labels).tolist() == [8] * 5
    assert cycled.jpeg(17) == folder.jpeg(1)


# ------------------------------------------------------------------------------------------------------- baseline


def noise(finish=1.0, scatter=0.02, seed=0):
    rng = np.random.default_rng(seed)

    def windows(level):
        return (level * (1 + np.abs(rng.normal(0, scatter, 5)))).tolist()  # load only ever adds

    return {
        "speed": windows(1e-3),
        "cpu": {"plan": windows(0.01), "decode": windows(2.0), "finish": windows(finish)},
        "wall": {"loader": windows(1.0 if seed == 0 else 3.0)},
        "counts": {"dispatches": 1964},
    }


def profile(**kept):
    return {
        "format": 1,
        "complete": True,
        "identity": {"recipe": "x"},
        "machine": {"quiet": False},
        "noise": noise(**kept),
    }


def test_fifteen_percent_is_caught_and_ten_repetitions_are_not():
    before = profile()
    for seed in range(1, 11):
        assert "no regression" in baseline.check(before, profile(seed=seed))
        with pytest.raises(baseline.Regression, match="CPU of finish"):
            baseline.check(before, profile(finish=1.15, seed=seed))


def test_scatter_that_was_measured_is_allowed_for():
    """A value whose windows lie 40 % apart says nothing of 15 %."""
    assert "no regression" in baseline.check(profile(scatter=0.4), profile(finish=1.15, scatter=0.4, seed=3))


def test_a_count_that_grew_is_a_regression():
    after = profile(seed=1)
    after["noise"]["counts"]["dispatches"] = 2100
    with pytest.raises(baseline.Regression, match="dispatches"):
        baseline.check(profile(), after)


def test_wall_times_of_a_busy_machine_are_not_compared():
    quiet = {**profile(), "machine": {"quiet": True}}
    slower = {**profile(seed=1), "machine": {"quiet": True}}
    with pytest.raises(baseline.Regression, match="wall time of loader"):
        baseline.check(quiet, slower)
    assert "no regression" in baseline.check(quiet, profile(seed=1))


def test_a_baseline_from_elsewhere_is_refused_with_the_difference():
    with pytest.raises(FastsslError, match="recipe: x -> y"):
        baseline.check_comparable(profile(), {"recipe": "y"})
    with pytest.raises(FastsslError, match="format 0"):
        baseline.check_comparable({**profile(), "format": 0}, {"recipe": "x"})
    with pytest.raises(FastsslError, match="interrupted"):
        baseline.check_comparable({**profile(), "complete": False}, {"recipe": "x"})


def test_the_core_probe_counts_its_own_cpu():
    speed = CoreProbe().run(2, 0.05)
    assert 0 < speed.cpu_s_per_call < 0.02 and 0 <= speed.waited_share < 1
    assert torch.get_num_threads() >= 1 and speed.calls_per_s > 0
