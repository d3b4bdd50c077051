"""What a person sees of `convert-imagenet`: what it will do, how far it is, and what came of it."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fastssl.errors import ConfigError
from loaders.convert.conversion import Conversion
from loaders.convert.judge import Reencode
from loaders.files import Progress as Report

PLAIN_EVERY_S = 10.0
DEFAULT_QUALITY = 90  # FFCV's
MAX_SHOWN = 25  # odd files; the manifest has all


def reencoded(max_side: int | None, quality: int | None) -> Reencode | None:
    """What --max-side and --quality ask for. Raises ConfigError."""
    if max_side is None and quality is not None:
        raise ConfigError(f"--quality {quality} is that of images that are written anew: give --max-side too")
    return None if max_side is None else Reencode(quality or DEFAULT_QUALITY, max_side)


def described(plan: Conversion, out: Path) -> str:
    """What would be converted, and whether there is room for it."""
    lines = list(plan.said)
    for name, split in plan.splits.items():
        lines.append(f"{name}: {len(split):,} images, {len(split.class_names):,} classes, from {split.path}")
        if split.ignored.count:
            lines.append(f"  ignored: {split.ignored.count:,} other things there, first {split.ignored.listed[0][0]}")
    if plan.options.reencode:
        lines.append(f"pixels change: {plan.options.reencode.said}")
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    needed, free = sum(map(plan.bytes_needed, plan.splits)), shutil.disk_usage(existing).free
    verdict = "" if needed <= free else f": {(needed - free) / 2**30:.2f} GiB too little"
    lines.append(f"needs {needed / 2**30:.2f} GiB in {out}, {free / 2**30:.2f} GiB are free{verdict}")
    return "\n".join(lines)


def summary(manifest: dict[str, Any], wall_s: float) -> str:
    lines = []
    for name, split in manifest["splits"].items():
        counts = [c["images"] for c in split["classes"].values()]
        spread = f"{min(counts)} to {max(counts)} in each of {len(counts):,} classes"
        lines.append(f"{name}: {split['images']:,} images, {spread}")
        lines.append(f"  sha256 of the images {split['images_sha256']}, of the tables {split['tables_sha256']}")
        for key, title in (("odd", "written anew"), ("quarantined", "quarantined, NOT in the set")):
            rows = split[key]
            lines += [f"  {title}: {len(rows):,}"] if rows else []
            lines += [f"    {row['file']}: {row['what']}" for row in rows[:MAX_SHOWN]]
            lines += [f"    ... and {len(rows) - MAX_SHOWN:,} more, see manifest.json"] if len(rows) > MAX_SHOWN else []
        if split["ignored"]["count"]:
            first, why = split["ignored"]["first"][0]
            lines.append(f"  ignored: {split['ignored']['count']:,}, first {first} ({why})")
    return "\n".join([*lines, f"{wall_s:.1f} s"])


@contextlib.contextmanager
def reporting() -> Iterator[Report]:
    """A bar with rate and time left on a terminal, else a line every PLAIN_EVERY_S."""
    if not sys.stderr.isatty():
        yield _plain_lines()
        return
    name = TextColumn("{task.description}", markup=False)
    rate = TextColumn("{task.fields[rate]}", markup=False)
    console = Console(stderr=True, markup=False, emoji=False)
    with Progress(name, BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn(), console=console) as bar:
        tasks: dict[str, TaskID] = {}
        starts: dict[str, tuple[float, int]] = {}

        def report(what: str, num_done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total, completed=num_done, rate="")
            rate = _rate(starts, what, num_done)
            bar.update(tasks[what], completed=num_done, rate=f"{rate:,.0f}/s")

        yield report


def _plain_lines() -> Report:
    starts: dict[str, tuple[float, int]] = {}
    shown_s = time.monotonic()

    def report(what: str, num_done: int, total: int) -> None:
        nonlocal shown_s
        rate = _rate(starts, what, num_done)
        if num_done == total or time.monotonic() - shown_s >= PLAIN_EVERY_S:
            shown_s = time.monotonic()
            left = f", {(total - num_done) / rate:,.0f} s left" if rate and num_done < total else ""
            print(f"{what}: {num_done:,} of {total:,}, {rate:,.0f}/s{left}", file=sys.stderr, flush=True)

    return report


def _rate(starts: dict[str, tuple[float, int]], what: str, num_done: int) -> float:
    """Images a second since the first report of `what`."""
    start_s, before = starts.setdefault(what, (time.monotonic(), num_done))
    elapsed_s = time.monotonic() - start_s
    return (num_done - before) / elapsed_s if elapsed_s > 0 else 0.0
