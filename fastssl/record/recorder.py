"""What a run leaves behind and what a person sees: metrics.jsonl, and the console.

The file is canonical: each record as it was given, one strict JSON object a line, floats such that reading them gives
the same bits, infinities and NaN as the strings "inf", "-inf" and "nan". The console is for people, and may leave
lines out; the file never does. Only the main rank writes or prints.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

from fastssl.errors import FastsslError
from fastssl.record.trackers import listeners, open_tracker
from loaders.files import write_file

PLAIN_EVERY_S = 10.0  # console only: a day of plain lines stays under 9,000
BAR_CELLS = 16
COLLAPSE_SIGNS = ("effective_rank", "mean_prediction_entropy_share")  # shown beside accuracies: a collapse must be seen


class Recorder:
    """Metrics file and console of one run.

    run_dir      holds metrics.jsonl; made where missing
    main         whether this rank writes and prints; on others every method does nothing
    resume_step  number of steps that the loaded checkpoint has behind it. Lines of later steps, which will be done
                 again, are dropped, and so is a last line that a kill tore; at 0 the file starts empty. A step's line
                 must therefore be written before that step's checkpoint; its evaluation comes after, and may be
                 missing: `evaluated_step`, None where there is none, is the step of the last one that is there.
    log_to       trackers that get every record too, by name
    plain        one line at a time for logs (True) or one line that is rewritten, for terminals (False); None: look

    Raises FastsslError where metrics.jsonl is damaged elsewhere than in its last line.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        main: bool,
        resume_step: int = 0,
        log_to: tuple[str, ...] = (),
        plain: bool | None = None,
    ):
        self.path = run_dir / "metrics.jsonl"
        self._main = main
        self.evaluated_step: int | None = None
        if not main:
            return
        if plain is None:
            plain = not sys.stdout.isatty() or os.environ.get("TERM") in ("dumb", "unknown")
        self._plain = plain
        self._console = Console(
            highlight=False, markup=False, emoji=False, soft_wrap=True, force_terminal=not plain, no_color=plain or None
        )
        self._total_steps: int | None = None
        self._shown_s = -math.inf
        self._unfinished_line = False
        run_dir.mkdir(parents=True, exist_ok=True)
        self.evaluated_step = _truncate(self.path, resume_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._trackers = [*(open_tracker(name, run_dir, resume_step) for name in log_to), *listeners()]

    def announce(self, title: str, table: Mapping[str, object], *, total_steps: int | None = None) -> None:
        """First thing seen: what will be done, a row for each entry. total_steps: the last step's number."""
        if not self._main:
            return
        self._total_steps = total_steps
        for line in (Text(title, "bold"), *_table(table)):
            self._print(line)

    def log(self, record: Mapping[str, Any]) -> None:
        """{"step", "epoch", "loss", each part by its name, "lr" ("lr_1", ... where groups differ), "time": {...}}.

        The console reads images_per_s, wait_share and eta_s from `time` where they are there.
        """
        if not self._main:
            return
        self._write(record)
        if not self._plain:
            self._progress(record)
        elif time.monotonic() - self._shown_s >= PLAIN_EVERY_S or record["step"] == self._total_steps:
            self._shown_s = time.monotonic()
            self._print(Text("  ".join(self._columns(record))))

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """{"step", "epoch", "evaluation": {...}, "time": {...}}; the console shows the headlines of `evaluation`."""
        if not self._main:
            return
        self._write(record)
        scores = (f"{name} {value}" for name, value in _numbers(_headlines(record["evaluation"])))
        self._print(Text("  ".join([*self._place(record), "evaluation", *scores]), "green"))

    def warn(self, text: str) -> None:
        """Something odd that does not stop the run."""
        if self._main:
            self._print(Text(f"warning: {text}", "yellow"))

    def trained_s(self) -> float:
        """Seconds of training as the clock counted them, over all pieces of the run; 0 where this rank does not write.
        Evaluations, checkpoints and start-up are not among them."""
        if not self._main:
            return 0.0
        records = map(json.loads, self.path.read_text().splitlines())
        return sum(float(record["time"]["elapsed_s"]) for record in records if "evaluation" not in record)

    def finish(self, result: Mapping[str, Any], next_commands: Sequence[str]) -> None:
        """Last thing seen: the headlines of the result, and what one would type next."""
        if not self._main:
            return
        for line in result_lines(result, next_commands):
            self._print(line)
        self.close()

    def close(self) -> None:
        """Ends the open line and the file; may be called twice."""
        if not self._main:
            return
        if self._unfinished_line:
            self._console.print()
            self._unfinished_line = False
        self._file.close()
        while self._trackers:
            self._trackers.pop().close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(_strict(record), allow_nan=False) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.log(record)

    def _print(self, text: Text) -> None:
        """A line that stays, in place of an unfinished one."""
        if self._unfinished_line:
            self._erase()
        self._console.print(text)

    def _erase(self) -> None:
        self._console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))
        self._unfinished_line = False

    def _progress(self, record: Mapping[str, Any]) -> None:
        """Rewrites the terminal's last line; where that is narrow the loss parts, in the middle, give way."""
        step, epoch, loss, *parts, tail = self._columns(record)
        if self._total_steps:
            full = round(BAR_CELLS * record["step"] / self._total_steps)
            step = f"{'━' * full}{'─' * (BAR_CELLS - full)} {step}"
        head = f"  {epoch}  {loss}"
        width = self._console.width - 1  # a full last column would wrap
        middle = Text("  ".join(parts), "dim")
        middle.truncate(max(0, width - cell_len(f"{step}{head}    {tail}")), overflow="ellipsis")
        line = Text.assemble((step, "cyan"), head, "  ", middle, "  " if middle else "", tail)
        line.truncate(width)
        if self._unfinished_line:
            self._erase()
        self._console.print(line, end="")
        self._unfinished_line = True

    def _place(self, record: Mapping[str, Any]) -> tuple[str, str]:
        of = f"/{self._total_steps}" if self._total_steps else ""
        return f"step {record['step']}{of}", f"epoch {record['epoch']:.1f}"

    def _columns(self, record: Mapping[str, Any]) -> list[str]:
        """Step, epoch, loss, then each part, last the rates as one."""
        clock = record.get("time", {})
        rates = {name: value for name, value in record.items() if name == "lr" or name.startswith("lr_")}
        tail = [f"{name} {value}" for name, value in _numbers(rates)]
        if "images_per_s" in clock:
            tail.append(f"{clock['images_per_s']:,.0f} images/s")
        if "wait_share" in clock:
            tail.append(f"wait {clock['wait_share']:.0%}")
        if clock.get("eta_s") is not None:
            tail.append(f"eta {duration(clock['eta_s'])}")
        others = {"step", "epoch", "loss", "time", *rates}
        parts = [f"{name} {value}" for name, value in _numbers({k: v for k, v in record.items() if k not in others})]
        return [*self._place(record), f"loss {_number(record['loss'])}", *parts, "  ".join(tail)]


def result_lines(result: Mapping[str, Any], next_commands: Sequence[str]) -> list[Text]:
    """The headlines of a result, and what one would type next."""
    lines = [Text("result", "bold"), *_table(dict(_numbers(_headlines(result))))]
    if next_commands:
        lines += [Text("next", "bold"), *(Text(f"  {command}") for command in next_commands)]
    return lines


def _table(rows: Mapping[str, object]) -> list[Text]:
    width = max((cell_len(name) for name in rows), default=0)
    return [Text.assemble("  ", (f"{name:<{width}}", "cyan"), f"  {value}") for name, value in rows.items()]


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 05 min`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours:
        return f"{hours} h {m:02d} min"
    return f"{m} min {s:02d} s" if m else f"{s} s"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:#.4g}".removesuffix(".")


def _numbers(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The numbers of a record by name, as a person reads them; what is nested is for the file."""
    return [
        (name, _number(value))
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]


def _headlines(scores: Mapping[str, Any]) -> dict[str, Any]:
    """The accuracies (`..._top1`) and the signs of a collapse; a protocol's further numbers are for the file."""
    return {name: value for name, value in scores.items() if name.endswith("top1") or name in COLLAPSE_SIGNS}


def _strict(value: Any) -> Any:
    """The same value with what JSON has no number for written as a string."""
    if isinstance(value, Mapping):
        return {name: _strict(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    return value


def _truncate(path: Path, resume_step: int) -> int | None:
    """Keeps the lines of the steps up to `resume_step`, byte for byte; the file is replaced whole or not at all. The
    step of the last evaluation that is kept."""
    if not path.exists():
        return None
    lines = path.read_bytes().splitlines(keepends=True)
    kept, evaluated_step = [], None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line) if line.endswith(b"\n") else {"step": None}
            step = record["step"]
        except (ValueError, KeyError, TypeError):
            step = None
        if step is None and number < len(lines):
            raise FastsslError(f"{path}: line {number} is damaged; repair it or move the file away")
        if step is not None and resume_step > 0 and step <= resume_step:
            kept.append(line)
            evaluated_step = step if "evaluation" in record else evaluated_step
    if len(kept) < len(lines):
        write_file(path, b"".join(kept))
    return evaluated_step
