"""A profile's JSON, terminal table and page from fixed measurements, held to what they were."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from fastssl.costs.cost import StepCost
from fastssl.profiling import baseline
from fastssl.profiling.before import Before
from fastssl.profiling.presentation import as_page, rows
from fastssl.profiling.probes import Speed
from fastssl.profiling.summary import summarise
from fastssl.profiling.windows import (
    BESIDE_THE_STEP,
    CLASSES,
    COLD,
    COPIED,
    LOADED,
    ONE_THREAD,
    READY,
    WARM,
    Counts,
    Found,
    Probes,
    Spent,
    StepWindow,
    Window,
    rendered_by,
    without,
)
from loaders.timing import PHASES

GOLDEN = Path(__file__).parents[2] / "golden" / "profile.json"
COST = StepCost(
    world=2,
    flops={"online": 3_000_000_000, "head": 500_000_000},
    image_equivalents=96.5,
    num_parameters=25_000_000,
    gradient_bytes=100_000_000,
    statistics={"all_reduce": (106, 4_000_000)},
    rows={"all_gather_into_tensor": (2, 300_000), "reduce_scatter_tensor": (1, 100_000)},
    decodes=40,
    crops=120,
    traffic_bytes=6e9,
    activation_bytes=3_000_000_000,
)


def varied(base, k):
    return base * (1 + 0.01 * (k * 7 % 11))


def window(level, k, threads, probe=True):
    return Window(
        images=64,
        by_stream={"unlabelled": 64, "support": 24},
        prepare_s=[varied(level * 3.75, k + b) for b in range(4)],
        by_phase_s={phase: varied(level * (i + 1), k + i) for i, phase in enumerate(PHASES)},
        spent={
            stream: {
                phase: Spent(
                    varied(level * (i + 1) * (j + 1), k), varied(level * (i + 1) * (j + 1) * 0.9, k + 1), 64.0 + i
                )
                for i, phase in enumerate(PHASES)
            }
            for j, stream in enumerate(("unlabelled", "support"))
        },
        threads=threads,
        probe=Speed(900.0 + k, varied(1e-3, k), 0.01 * k) if probe else None,
    )


def step(level, k):
    times = range(k, k + 5)
    return StepWindow(
        [varied(level, b) for b in times], [varied(level / 50, b) for b in times], 5 * varied(level * 1.5, k)
    )


def found(rank, what):
    """What a rank found where `what` was measured: every later rank is slower."""
    slow = 1 + 0.1 * rank
    found = Found(notes=["a note"] if rank == 0 else [])
    if what in ("loader", "all"):
        found.loader[WARM] = [window(0.01 * slow, k, 2) for k in range(4)]
        found.loader[ONE_THREAD] = [window(0.018 * slow, k, 1) for k in range(4)]
        found.loader[COLD] = [window(0.02 * slow, k, 2) for k in range(4)]
        found.probes.still_cached = [0.25, 0.05] if what == "all" else [None]
    if what == "loader":
        found.loader[rendered_by("pil")] = [window(0.03 * slow, k, 2) for k in range(4)]
    if what in ("step", "all"):
        found.steps[READY] = [step(0.5 * slow, k) for k in range(4)]
        found.steps[COPIED] = [step(0.52 * slow, k) for k in range(4)]
        for i, messages in enumerate(CLASSES):
            found.steps[without(messages)] = [step(0.5 * slow - 0.02 * (i + 1), k) for k in range(4)]
        found.probes.flop_s, found.probes.copy_bytes_s = 8.5e10, 2.1e10
        found.counts = Counts("eager", 0.9, dispatches=1964, host_syncs=0, peak_bytes=700_000_000 + rank)
    if what == "all":
        found.steps[LOADED] = [step(0.6 * slow, k) for k in range(4)]
        found.loader[BESIDE_THE_STEP] = [window(0.015 * slow, k, 2, False) for k in range(4)]
    found.probes.stamp_s = 1.1e-6
    found.probes.rounds = [Speed(880.0, 1.05e-3, 0.02 * (k + 1)) for k in range(4)]
    found.counts.most_resident_bytes = 2_000_000_000 + rank
    return found


def before(what, world=2):
    return Before(
        identity={"dataset": "imagenet", "recipe": "x", "loader": "auto"},
        cost=COST if what != "loader" else None,
        headline=COST,
        device="cpu",
        world=world,
        epoch_of="unlabelled",
        batch_global=128,
        streams={"unlabelled": 4096, "support": 1536},
        recurring=("support",),
        files_bytes=[100_000, 110_000, 120_000],
        decoded_bytes=[400_000, 600_000, 650_000],
        in_memory=False,
        notes=("before",),
    )


def plain(value):
    """As it comes back from a file."""
    return json.loads(json.dumps(value))


def without_projection(profile):
    """What depends on measurements: the projection has tests of its own."""
    return {key: value for key, value in plain(profile).items() if key != "projection"}


@pytest.mark.parametrize("what", ["loader", "step", "all"])
def test_the_summary_of_fixed_measurements_is_what_it_was(what):
    """Would catch a key that changed its name, a mean in the place of a median, and a rank or a kind that is lost."""
    profile = summarise(before(what), [found(0, what), found(1, what)], True)
    assert without_projection(profile) == json.loads(GOLDEN.read_text())[what]


def test_what_if_the_images_were_stored_decoded():
    """By hand, of windows that all take the same: an unlabelled image and 1536 / 4096 of a support one. Decoded ones
    cost no decoding and five times the fetching; a store that holds them says its own figures, and only these."""
    spent = {"plan": 0.0, "fetch": 0.002, "decode": 0.02, "crop": 0.004, "finish": 0.006}
    one = found(0, "loader")
    per_stream = {phase: Spent(64 * s, 64 * s, 64.0) for phase, s in spent.items()}
    halved = {phase: Spent(24 * s, 24 * s, 24.0) for phase, s in spent.items()}
    alike = [replace(w, spent={"unlabelled": per_stream, "support": halved}) for w in one.loader[WARM]]
    one = replace(one, loader={WARM: alike})

    def stores(**changed):
        sizes = {"files_bytes": [90_000, 110_000], "decoded_bytes": [450_000, 550_000], **changed}
        return summarise(replace(before("loader", world=1), **sizes), [one], True)["here"]["stores"]

    as_stored, decoded = stores()
    images, cores = 1 + 1536 / 4096, 2
    assert (as_stored["bytes_per_image"], decoded["bytes_per_image"]) == (100e3, 500e3)
    assert as_stored["loader_images_per_s"] == pytest.approx(cores / images / 0.032)
    assert decoded["loader_images_per_s"] == pytest.approx(cores / images / (0.032 - 0.02 + 4 * 0.002))
    wanted = as_stored["loader_images_per_s"]  # there is no step to keep up with
    assert decoded["disk_bytes_per_s"] == pytest.approx(wanted * images * 500e3)
    assert (as_stored["cores"], decoded["cores"]) == (pytest.approx(2), pytest.approx(2 * 0.02 / 0.032))
    assert decoded["cores_saved"] == pytest.approx(2 - decoded["cores"])
    (own,) = stores(files_bytes=[450_000, 550_000])
    assert own["what"] == "as stored, decoded" and own["bytes_per_image"] == 500e3
    assert own["loader_images_per_s"] == as_stored["loader_images_per_s"]
    assert [row["what"] for row in stores(files_bytes=[], decoded_bytes=[])] == []


def test_a_profile_of_nothing_yet_is_whole():
    """As an interrupted one leaves it behind: every key is there, and it can be shown."""
    profile = summarise(before("all"), [Found(probes=Probes(stamp_s=1e-6))] * 2, False)
    assert profile.keys() == summarise(before("all"), [found(0, "all")], True).keys()
    assert profile["binding"]["sentence"] == "nothing was measured yet" and not profile["complete"]
    assert "partial" in as_page(profile).lower() and rows(profile)


def test_the_stall_is_the_share_by_which_the_slowest_rank_is_longer():
    """By hand, of steps that all take the same: 0.8 s from the loader, 0.5 s ready, 0.6 s copied."""
    took = ((READY, 0.5), (COPIED, 0.6), (LOADED, 0.8))
    one = replace(found(0, "all"), steps={kind: [StepWindow([s] * 3, [0.1] * 3, 1.0)] for kind, s in took})
    stall = summarise(before("all", world=1), [one], True)["stall"]
    assert stall["share"] == pytest.approx(3 / 8) and stall["copy"] == pytest.approx(1 / 8)
    assert stall["prepare"] + stall["fetch"] == pytest.approx(2 / 8)
    assert stall["waited_share"] == pytest.approx(0.1 / 0.8)


def test_ranks_in_another_order_are_compared_by_the_first():
    """The baseline's values are rank 0's, which is slower here by a tenth."""
    earlier = summarise(before("all"), [found(0, "all"), found(1, "all")], True)
    later = summarise(before("all"), [found(1, "all"), found(0, "all")], True)
    changes = {change.name: change.share for change in baseline.compare(plain(earlier), plain(later))}
    assert changes["CPU of the loader"] == pytest.approx(0.1) and changes["wall time of loader"] == pytest.approx(0.1)
    assert median(changes.values()) > 0
