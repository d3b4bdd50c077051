"""Names the rank that holds all others up, and ends the run: ranks that wait for one that hangs would wait for hours.

Every rank tells of its progress through the store at which the ranks met, from a thread of its own, and looks at that
of the others. The rank to blame is one that no longer answers, or the one that began the fewest collectives: the others
wait for it in the next. Then every rank writes the stacks of its threads to `stacks/` in the run directory and exits
with EXIT_HUNG; one of them prints who it was. The last checkpoint counts.

A hang is named within the limit and four beats of at most BEAT_S: by default within 320 s. Pauses, which compile,
evaluate and save, may take PAUSE_GRACE times the limit.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from fastssl import dist
from fastssl.errors import EXIT_HUNG

PAUSE_GRACE = 6.0
BEAT_S = 5.0
INTERVALS_AFTER = 2  # in which the other ranks learn of the verdict and write their stacks
STACKS = "stacks"
_VERDICT = "verdict"


@dataclass(frozen=True)
class Standing:
    """How far a rank is."""

    step: int  # optimiser steps done
    doing: str  # stepping, waiting for data, or pausing
    collectives: int = 0  # begun


@dataclass(frozen=True)
class Seen:
    """A rank as another sees it, by that one's clock."""

    host: str
    beat: int
    progress: Standing
    answered_s: float  # when its beat last changed
    moved_s: float  # when its progress last changed


def verdict(ranks: list[Seen], now_s: float, limit_s: float) -> str:
    """Who holds the others up and since when, or nothing."""
    for rank, seen in enumerate(ranks):
        if now_s - seen.answered_s > limit_s:
            silent = f"rank {rank} on {seen.host} has not answered for {now_s - seen.answered_s:.0f} s"
            last_heard = f"{seen.progress.doing} after step {seen.progress.step}"
            return f"{silent}, last heard of {last_heard}: it is stopped, dead or cut off"
    fewest = min(seen.progress.collectives for seen in ranks)
    behind = [rank for rank, seen in enumerate(ranks) if seen.progress.collectives == fewest]
    last = max(behind, key=lambda rank: ranks[rank].moved_s)
    seen, still_s = ranks[last], now_s - ranks[last].moved_s
    if still_s <= limit_s * (PAUSE_GRACE if seen.progress.doing == "pausing" else 1):
        return ""
    if len(behind) == len(ranks):
        return f"all ranks wait in one collective for {still_s:.0f} s after step {seen.progress.step}: the network?"
    return (
        f"rank {last} on {seen.host} has not moved for {still_s:.0f} s, {seen.progress.doing} after step "
        f"{seen.progress.step}; the others wait for it"
    )


class Watchdog:
    """Watches within its context, where there are several ranks and `limit_s` is not 0. `progress` is asked from
    another thread, and need not count collectives."""

    def __init__(self, run_dir: Path, limit_s: float, progress: Callable[[], Standing]):
        self.run_dir, self.limit_s, self.progress = run_dir, limit_s, progress
        self.beat_s = min(BEAT_S, limit_s / 8)
        self._done = threading.Event()
        self._arming = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._heard_s = time.monotonic()  # when the store last answered

    def __enter__(self) -> Watchdog:
        store = dist.own_store() if self.limit_s else None
        if store is not None:
            store.set_timeout(timedelta(seconds=self.limit_s))
            # Two threads: a store whose host hangs may never answer the first.
            for target in (lambda: self._listen(store), self._look_at_the_time):
                self._threads.append(threading.Thread(target=target, name="fastssl-watchdog", daemon=True))
                self._threads[-1].start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._arming:
            self._done.set()
            if self._threads:
                faulthandler.cancel_dump_traceback_later()

    def _listen(self, store: Any) -> None:
        """Tell and hear, beat after beat; end the process where there is a verdict."""
        host, keys = socket.gethostname(), [f"beat {rank}" for rank in range(dist.world_size())]
        ranks: list[Seen] = []
        beat = 0
        while not self._done.wait(self.beat_s if beat else 0):
            beat += 1
            try:
                own = replace(self.progress(), collectives=dist.num_collectives())
                store.set(keys[dist.rank()], json.dumps({"host": host, "beat": beat, "progress": asdict(own)}))
                ranks = _updated(ranks, [json.loads(text) for text in store.multi_get(keys)], time.monotonic())
                if store.check([_VERDICT]):
                    self._end()
                if (words := verdict(ranks, time.monotonic(), self.limit_s)) and store.add("to judge", 1) == 1:
                    store.set(_VERDICT, words)
                    self._end(words)
            except RuntimeError:  # the store is gone: with a run that has ended, else the other thread will say so
                return
            self._heard_s = time.monotonic()
            self._arm()

    def _arm(self) -> None:
        """Should code of ours keep the interpreter's lock, no thread of ours can tell where; C code of Python's can."""
        with self._arming:
            if not self._done.is_set():
                faulthandler.dump_traceback_later(2 * self.limit_s, exit=True)

    def _look_at_the_time(self) -> None:
        """End the process where the store does not answer, which lives on the first rank's host."""
        while not self._done.wait(self.beat_s):
            silent_s = time.monotonic() - self._heard_s
            if silent_s > self.limit_s + INTERVALS_AFTER * self.beat_s:
                speaks = dist.local_rank() == 0 or dist.rank() == 1
                self._end(f"the first rank's host has not answered for {silent_s:.0f} s" if speaks else "")

    def _end(self, words: str = "") -> None:
        """Write this rank's stacks; where it is the one to speak, say so when the others have written theirs."""
        folder = self.run_dir / STACKS
        try:
            folder.mkdir(exist_ok=True)
            with (folder / f"rank-{dist.rank():05d}.txt").open("w") as file:
                faulthandler.dump_traceback(file)
            if (collectives := dist.recorded_collectives()) is not None:
                (folder / f"rank-{dist.rank():05d}-collectives.json").write_bytes(collectives)
        except OSError:  # the disk may be what hangs
            faulthandler.dump_traceback(sys.stderr)
        time.sleep(INTERVALS_AFTER * self.beat_s)
        if words:
            print(f"watchdog: {words}; stacks of all ranks that answer: {folder}", file=sys.stderr)
            for path in sorted(folder.glob("rank-*.txt")):
                print(f"{path.stem}:\n{_main_thread(path.read_text())}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_HUNG)


def _updated(before: list[Seen], heard: list[dict[str, Any]], now_s: float) -> list[Seen]:
    """What is now known of the ranks: clocks of other hosts are not trusted, only that something has changed."""
    found = []
    for rank, told in enumerate(heard):
        progress = Standing(**told["progress"])
        was = before[rank] if before else Seen(told["host"], -1, progress, now_s, now_s)
        answered_s = now_s if told["beat"] != was.beat else was.answered_s
        moved_s = now_s if progress != was.progress else was.moved_s
        found.append(Seen(told["host"], told["beat"], progress, answered_s, moved_s))
    return found


def _main_thread(stacks: str) -> str:
    """The part of what faulthandler wrote that is about the main thread, its last."""
    return stacks.rpartition("\n\n")[2].rstrip()
