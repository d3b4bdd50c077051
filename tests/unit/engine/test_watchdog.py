"""Whom the watchdog blames, on hand-set clocks."""

from dataclasses import replace

from fastssl.engine.watchdog import PAUSE_GRACE, Seen, Standing, _updated, verdict

LIMIT_S = 10.0


def seen(host, moved_s, collectives, doing="stepping", answered_s=100.0):
    return Seen(host, 7, Standing(4, doing, collectives), answered_s, moved_s)


def test_nobody_is_blamed_while_the_slowest_moves():
    """Catches impatience: the others have waited for longer than the limit for one that is at work."""
    assert verdict([seen("a", 80.0, 9), seen("b", 95.0, 8)], 100.0, LIMIT_S) == ""


def test_the_one_that_began_the_fewest_collectives_holds_the_others_up():
    """Catches blame for those that wait: they stand still for as long."""
    ranks = [seen("a", 85.0, 9), seen("b", 89.0, 8, "waiting for data"), seen("c", 85.0, 9)]
    words = "rank 1 on b has not moved for 11 s, waiting for data after step 4; the others wait for it"
    assert verdict(ranks, 100.0, LIMIT_S) == words


def test_one_that_does_not_answer_is_blamed_before_those_that_do():
    ranks = [seen("a", 85.0, 8), seen("b", 85.0, 9, answered_s=89.0)]
    words = "rank 1 on b has not answered for 11 s, last heard of stepping after step 4: it is stopped, dead or cut off"
    assert verdict(ranks, 100.0, LIMIT_S) == words


def test_ranks_in_one_collective_blame_the_network():
    ranks = [seen("a", 85.0, 9), seen("b", 89.0, 9)]
    assert verdict(ranks, 100.0, LIMIT_S) == "all ranks wait in one collective for 11 s after step 4: the network?"


def test_a_pause_has_more_time_but_not_for_ever():
    """Catches a compilation or an evaluation that is taken for a hang."""
    ranks = [seen("a", 50.0, 9, "pausing"), seen("b", 50.0, 9, "pausing")]
    assert verdict(ranks, 100.0, LIMIT_S) == ""
    ranks = [replace(rank, moved_s=100.0 - PAUSE_GRACE * LIMIT_S - 1) for rank in ranks]
    assert verdict(ranks, 100.0, LIMIT_S) == "all ranks wait in one collective for 61 s after step 4: the network?"


def test_what_counts_is_change_as_seen_here_not_the_clocks_of_others():
    """Catches hosts' clocks that differ by more than the limit."""
    told = {"host": "b", "beat": 1, "progress": {"step": 1, "doing": "stepping", "collectives": 3}}
    first = _updated([], [told], 100.0)
    assert (first[0].answered_s, first[0].moved_s) == (100.0, 100.0)
    alive = _updated(first, [told | {"beat": 2}], 105.0)
    assert (alive[0].answered_s, alive[0].moved_s) == (105.0, 100.0)
    moved = _updated(alive, [told | {"beat": 3, "progress": told["progress"] | {"collectives": 4}}], 110.0)
    assert (moved[0].answered_s, moved[0].moved_s) == (110.0, 110.0)
