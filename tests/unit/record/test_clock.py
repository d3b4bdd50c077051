"""The clock, on a hand-set time."""

from __future__ import annotations

import pytest

from fastssl.record.clock import Clock


class Hands:
    """A time that moves only when told."""

    def __init__(self) -> None:
        self.t = 100.0

    def __call__(self) -> float:
        return self.t


def run(clock: Clock, hands: Hands, wait_s: float, step_s: float, num_images: int) -> None:
    with clock.waiting():
        hands.t += wait_s
    hands.t += step_s
    clock.step(num_images)


def test_a_window_splits_its_time_and_pauses_lower_no_rate():
    hands = Hands()
    clock = Clock(hands)
    run(clock, hands, 0.25, 0.75, 64)
    with clock.paused():
        hands.t += 1000.0
    run(clock, hands, 0.75, 0.25, 64)
    window = clock.window()
    assert window == {"images_per_s": 64.0, "wait_share": 0.5, "step_s": 1.0, "wait_s": 0.5, "elapsed_s": 2.0}


def test_the_next_window_starts_from_nothing():
    hands = Hands()
    clock = Clock(hands)
    run(clock, hands, 1.0, 1.0, 10)
    clock.window()
    run(clock, hands, 0.0, 4.0, 8)
    window = clock.window()
    assert window["wait_s"] == 0.0 and window["elapsed_s"] == 4.0 and window["images_per_s"] == 2.0


def test_time_counts_where_the_wait_or_the_pause_ends_in_an_error():
    hands = Hands()
    clock = Clock(hands)
    with pytest.raises(StopIteration), clock.waiting():
        hands.t += 3.0
        raise StopIteration
    with pytest.raises(OSError), clock.paused():
        hands.t += 5.0
        raise OSError
    window = clock.window()
    assert window["wait_s"] == 3.0 and window["elapsed_s"] == 3.0


def test_eta_counts_steps_not_windows_and_never_the_compilation_in_the_first():
    hands = Hands()
    clock = Clock(hands)
    clock.window()
    run(clock, hands, 0.0, 60.0, 1)
    clock.window()
    assert clock.eta_s(100) is None
    run(clock, hands, 0.0, 2.0, 1)
    clock.window()
    assert clock.eta_s(100) == 200.0
    for num_steps in range(1, 11):
        for _ in range(num_steps):
            run(clock, hands, 0.0, 0.5, 1)
        clock.window()
    assert clock.eta_s(100) == 50.0


def test_an_empty_window_does_not_divide_by_zero():
    clock = Clock(Hands())
    assert clock.window()["images_per_s"] == 0.0
    assert clock.eta_s(1) is None
