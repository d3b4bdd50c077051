"""The page of a training run: `fastssl report`. What a run does not have, its page says in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from fastssl.config.plain import differences
from fastssl.engine.reopen import open_method, open_run
from fastssl.errors import ConfigError, FastsslError
from fastssl.html.charts import Line, Marked, line_chart
from fastssl.html.page import Html, element, facts, joined, number, numbers_behind, page, paragraph, section, table
from fastssl.record.recorder import duration
from fastssl.report import pictures
from fastssl.report.history import STALL_PACE, STALL_WAIT_SHARE, History, StageHistory, read_history
from loaders.errors import LoaderError
from loaders.files import write_file

CONTENTS = {
    "accuracy": "Accuracy",
    "loss": "Loss",
    "rate": "Learning rate",
    "throughput": "Throughput",
    "crops": "What a step sees",
    "classes": "Classes",
    "embeddings": "Embeddings",
    "confusion": "Confusion",
    "settings": "Settings",
}

Runs = list[tuple[str, StageHistory]]  # the stage of the run, and of the one beside it, each with its run's name


def write_report(run: Path, compare: Path | None, data: tuple[str, ...], out: Path) -> None:
    """Write the page of `run` to `out`, with the curves of `compare` beside its own. Raises ConfigError where either is
    no run directory, or `out` cannot be written."""
    html = training_page(read_history(run), None if compare is None else read_history(compare), data)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, html)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from error


def training_page(history: History, other: History | None, data: tuple[str, ...]) -> Html:
    """The page. `data` stands in for what the run was trained on, for its pictures."""
    stages = [_beside(stage, history, other) for stage in history.stages]
    tsne, confusion = _embeddings(history, data)
    opened = cache(lambda: open_method(history.path, data))
    return page(
        f"{history.resolved['recipe']}, seed {history.resolved['seed']}",
        _header(history, other),
        _curves("accuracy", stages, _accuracy),
        _curves("loss", stages, _losses),
        _curves("rate", stages, _rates),
        _curves("throughput", stages, _throughput),
        section("crops", CONTENTS["crops"], paragraph(
            "A few images of each stream: the image as it is evaluated, then the views that training makes of it.",
            quiet=True), _if_any(lambda: pictures.contact_sheet(*opened()), "No crops")),
        section("classes", CONTENTS["classes"],
                _if_any(lambda: pictures.class_histograms(*opened()), "No histograms")),
        section("embeddings", CONTENTS["embeddings"], tsne),
        section("confusion", CONTENTS["confusion"], confusion),
        section("settings", CONTENTS["settings"], _settings(history, other)),
        contents=CONTENTS,
    )  # fmt: skip


def _if_any(make: Callable[[], Html], lack: str) -> Html:
    """What `make` draws, or why it cannot."""
    try:
        return make()
    except (FastsslError, LoaderError) as error:
        return paragraph(f"{lack}: {error}.")


def _embeddings(history: History, data: tuple[str, ...]) -> tuple[Html, Html]:
    """The map and the matrix of the newest checkpoint, or why there are none."""
    try:
        subject, step = open_run(history.path, data)
        tsne, confusion = pictures.embedding_pictures(subject)
    except (FastsslError, LoaderError) as error:
        return paragraph(f"No embeddings: {error}."), paragraph(f"No confusion matrix: {error}.")
    of = paragraph(f"Of the networks after step {step:,}.", quiet=True)
    return of + tsne, of + confusion


# ------------------------------------------------------------------------------------------------------------ header


def _header(history: History, other: History | None) -> Html:
    resolved = history.resolved
    return element(
        "header",
        element("h1", f"{resolved['recipe']}, seed {resolved['seed']}"),
        paragraph(_progress(history), quiet=True),
        element("div", *_headlines(history), class_="figures"),
        None if other is None else _side_by_side(history, other),
        facts(_about(history)),
    )


def _progress(history: History) -> str:
    """Where the run stands, in a sentence."""
    stage = history.last
    total = f" of {stage.total_steps:,}" if stage.total_steps else ""
    which = f"Stage {stage.name}: step" if len(history.stages) > 1 else "Step"
    if history.result is not None:
        return f"Finished after {stage.step:,} steps, {_minutes(stage)} of training."
    if stage.written_s is None:
        return "Nothing is logged yet."
    when = datetime.fromtimestamp(stage.written_s).strftime("%-d %B %Y, %H:%M")
    return f"Not finished. {which} {stage.step:,}{total} when metrics.jsonl last changed, {when}."


def _minutes(stage: StageHistory) -> str:
    minutes = stage.minutes[-1] if stage.minutes else 0.0
    return duration(60 * minutes)


def _headlines(history: History) -> list[Html]:
    """Each accuracy, with what it was measured on."""
    scores = history.scores
    names = [name for name in scores if name.endswith("top1")]
    if not names:
        return [element("div", "No accuracy has been measured.")]
    behind = scores.get("provenance", {}).get("validation", {})
    found = []
    for name in names:
        about = scores.get(name.removesuffix("_top1"), {})
        on = f"{behind['data']}, split {behind['split']}" if behind else "the validation images"
        count = f", {about['images']:,} images" if "images" in about else ""
        low, high = about.get("top1_ci95", (None, None))
        interval = f"; 95 % interval {100 * low:.1f} to {100 * high:.1f}" if low is not None else ""
        text = f"{readable(name)} on {on}{count}{interval}"
        when = "" if history.result is not None else f", at step {history.last.evaluations[-1]['step']:,}"
        found.append(element("div", element("b", f"{100 * scores[name]:.1f} %"), text + when))
    return found


def _side_by_side(history: History, other: History) -> Html:
    """Both runs in a row each."""
    names = [n for n in dict.fromkeys((*history.scores, *other.scores)) if n.endswith("top1")]
    rows = [
        (element("code", h.path), drawn, h.resolved["recipe"], h.resolved["seed"], h.last.step,
         *(_percent(h.scores.get(n)) for n in names))
        for h, drawn in ((history, "solid"), (other, "dashed"))
    ]  # fmt: skip
    return table(("run", "drawn", "recipe", "seed", "step", *(f"{readable(n)}, %" for n in names)), rows)


def _about(history: History) -> dict[str, object]:
    resolved, run = history.resolved, history.resolved["run"]
    scores = history.scores
    labelled = scores.get("provenance", {}).get("labelled")
    rows: dict[str, object] = {"directory": element("code", history.path), "command": element("code", run["command"])}
    for i, each in enumerate(resolved.get("allowed", ()), 1):
        rows[f"change {i}"] = element("code", each["command"])
    if labelled:
        rows["labels"] = f"{labelled['split']}: {labelled['count']:,} images of {labelled['classes']} classes"
    rows["data"] = ", ".join(run["data"])
    rows["ranks"] = f"{run['world']} x {run['threads']} threads"
    rows["versions"] = ", ".join(f"{name} {value}" for name, value in resolved["versions"].items() if value)
    return rows


# ------------------------------------------------------------------------------------------------------------ curves


def _beside(stage: StageHistory, history: History, other: History | None) -> Runs:
    """The stage, and that of the other run that has its name; the only ones of two runs whatever they are called."""
    if other is None:
        return [(history.path.name, stage)]
    same = [s for s in other.stages if s.name == stage.name]
    if len(history.stages) == len(other.stages) == 1:
        same = other.stages
    names = (history.path.name, other.path.name)
    if names[0] == names[1]:
        names = (str(history.path), str(other.path))
    return [(names[0], stage), *((names[1], s) for s in same[:1])]


def _curves(name: str, stages: list[Runs], draw: Callable[[Runs], Html]) -> Html:
    body: list[object] = []
    for runs in stages:
        stage = runs[0][1]
        if len(stages) > 1:
            body.append(element("h3", f"Stage {stage.name}"))
        if stage.settings["do"] == "produce":
            body.append(paragraph("This stage trains nothing: it writes down what a network says of each image."))
        elif not stage.steps and len(runs) == 1:
            body.append(paragraph("Nothing is logged yet."))
        else:
            body.append(draw(runs))
        if stage.num_unreadable:
            text = f"Damaged lines of metrics.jsonl, which are passed over: {stage.num_unreadable}."
            body.append(paragraph(text, quiet=True))
    return section(name, CONTENTS[name], *body)


def _overlaid(runs: Runs, name: str, colour: int = 0) -> list[Line]:
    """`name` over epochs, of each run that has it."""
    return [
        Line(run, [r["epoch"] for r in stage.steps], stage.series(name), (colour + i) % 8, bool(i))
        for i, (run, stage) in enumerate(runs)
        if any(name in r for r in stage.steps)
    ]


def _both(runs: Runs, names: Callable[[StageHistory], list[str]]) -> list[str]:
    return list(dict.fromkeys(name for _, stage in runs for name in names(stage)))


def _losses(runs: Runs) -> Html:
    names = _both(runs, lambda stage: stage.parts)
    charts = [line_chart(readable(name), _overlaid(runs, name), x_name="epochs") for name in names]
    return element("div", *charts, class_="charts") + _behind_steps(runs, names)


def _rates(runs: Runs) -> Html:
    names = _both(runs, lambda stage: stage.rates)
    lines = [
        replace(line, name=f"{line.name}, {name}") if len(names) > 1 else line
        for i, name in enumerate(names)
        for line in _overlaid(runs, name, 2 * i)
    ]
    chart = line_chart("Learning rate" + (" of each parameter group" if len(names) > 1 else ""), lines,
                       x_name="epochs", from_zero=True, wide=True)  # fmt: skip
    return chart + _behind_steps(runs, names)


def _behind_steps(runs: Runs, names: list[str]) -> Html:
    return joined(
        numbers_behind(
            ("step", "epoch", *map(readable, names)),
            [(r["step"], round(r["epoch"], 3), *(r.get(n) for n in names)) for r in stage.steps],
            _whose("The numbers", run, runs),
        )
        for run, stage in runs
    )


def _whose(what: str, run: str, runs: Runs) -> str:
    return f"{what} of {run}" if len(runs) > 1 else what


def _accuracy(runs: Runs) -> Html:
    if not any(stage.evaluations for _, stage in runs):
        text = "Nothing has been evaluated: there are no validation images, or the first evaluation is still to come."
        return paragraph(text)
    names = _both(runs, lambda stage: stage.accuracies)
    several = len(runs) > 1
    lines = [
        Line(
            f"{readable(name)}, {run}" if several else readable(name),
            [e["epoch"] for e in stage.evaluations],
            [100 * v for v in stage.evaluated(name)],
            2 * i % 8,
            bool(k),
        )
        for i, name in enumerate(names)
        for k, (run, stage) in enumerate(runs)
        if name in stage.accuracies
    ]
    chart = line_chart("Validation accuracy in %", lines, x_name="epochs", wide=True, dots=True)
    others = [n for n in _both(runs, lambda stage: stage.scores) if n not in names]
    signs = [
        line_chart(
            readable(name),
            [
                Line(run, [e["epoch"] for e in stage.evaluations], stage.evaluated(name), i, bool(i))
                for i, (run, stage) in enumerate(runs)
                if name in stage.scores
            ],
            x_name="epochs",
            dots=True,
        )
        for name in others
    ]
    tables = [
        numbers_behind(
            ("step", "epoch", "minutes", *(f"{readable(n)}, %" for n in names), *map(readable, others)),
            [
                (
                    e["step"],
                    round(e["epoch"], 3),
                    round(_minutes_at(stage, e["step"]), 2),
                    *(_percent(e["evaluation"].get(n)) for n in names),
                    *(e["evaluation"].get(n) for n in others),
                )
                for e in stage.evaluations
            ],
            _whose("The numbers", run, runs),
        )
        for run, stage in runs
    ]
    return chart + element("div", *signs, class_="charts") + joined(tables)


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 2)


def _minutes_at(stage: StageHistory, step: int) -> float:
    """Of training when `step` steps were done, as far as is logged."""
    return max((m for m, r in zip(stage.minutes, stage.steps, strict=True) if r["step"] <= step), default=0.0)


def _throughput(runs: Runs) -> Html:
    def over_minutes(of: Callable[[dict[str, Any]], float]) -> list[Line]:
        return [
            Line(run, stage.minutes, [of(r) for r in stage.steps], i, bool(i)) for i, (run, stage) in enumerate(runs)
        ]

    stage = runs[0][1]
    restarts = stage.first_windows[1:]
    word = "restart " if len(restarts) < 6 else ""
    at = {stage.minutes[i - 1]: f"{word}{k}" for k, i in enumerate(restarts, 1)}
    marked = Marked(at, [stall.minutes for stall in stage.stalls])
    pace = line_chart(
        "Images a second over minutes of training", over_minutes(lambda r: r["time"]["images_per_s"]), x_name="min",
        from_zero=True, wide=True, marked=marked,
    )  # fmt: skip
    wait = line_chart(
        "Share of the time spent waiting for data, %", over_minutes(lambda r: 100 * r["time"]["wait_share"]),
        x_name="min", from_zero=True, wide=True, marked=Marked(at, marked.spans),
    )  # fmt: skip
    rows = []
    for r, minutes in zip(stage.steps, stage.minutes, strict=True):
        time = r["time"]
        wait_pc = round(100 * time["wait_share"], 1)
        rows.append((r["step"], round(minutes, 2), time["images_per_s"], wait_pc, time.get("step_s")))
    columns = ("step", "minutes", "images/s", "waiting, %", "s a step")
    return joined([
        paragraph(_restarts(stage), " ", _stalls(stage)),
        pace,
        wait,
        numbers_behind(columns, rows, _whose("The numbers", runs[0][0], runs)),
    ])  # fmt: skip


def _restarts(stage: StageHistory) -> str:
    steps = [stage.steps[i - 1]["step"] for i in stage.first_windows[1:]]
    if not steps:
        return "No restart is to be seen."
    after = ", ".join(f"{step:,}" for step in steps[:8]) + (", ..." if len(steps) > 8 else "")
    times = "once" if len(steps) == 1 else f"{len(steps):,} times"
    return f"Continued {times}, where step {after} is the last one logged before; what was done twice is drawn once."


def _stalls(stage: StageHistory) -> str:
    if not stage.stalls:
        return (
            f"No stall: no window waited for data more than {STALL_WAIT_SHARE:.0%} of its time or went at less than "
            f"{STALL_PACE:.0%} of the median pace."
        )
    waited = sum(stall.wait_share > STALL_WAIT_SHARE for stall in stage.stalls)
    steps = ", ".join(f"{stall.step:,}" for stall in stage.stalls[:8]) + (", ..." if len(stage.stalls) > 8 else "")
    count = "1 stall" if len(stage.stalls) == 1 else f"{len(stage.stalls):,} stalls"
    return (
        f"{count}, shaded, in the windows that end at step {steps}: {waited:,} waited for data more than "
        f"{STALL_WAIT_SHARE:.0%} of the time, {len(stage.stalls) - waited:,} went at less than {STALL_PACE:.0%} of the "
        "median pace for another reason."
    )


# ---------------------------------------------------------------------------------------------------------- settings


def _settings(history: History, other: History | None) -> Html:
    rows = [(path, value) for stage in history.resolved["stages"] for path, value in _flat(stage, stage["name"])]
    own = element("details", element("summary", f"All {len(rows)} settings"), table(("setting", "value"), rows))
    if other is None:
        return own
    keys = ("recipe", "seed", "stages", "data")
    mine, theirs = ({key: h.resolved.get(key) for key in keys} for h in (history, other))
    found = [tuple(part for part in change.partition(": ")[::2]) for change in differences(mine, theirs)]
    if not found:
        return paragraph("Both runs have the same recipe, seed, settings and data.") + own
    return paragraph(f"What differs, {history.path} -> {other.path}:") + table(("setting", "change"), found) + own


def _flat(value: object, path: str) -> list[tuple[str, str]]:
    """Leaves of a plain form by dotted path."""
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() if key != "type" for leaf in _flat(inner, f"{path}.{key}")]
    if isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
        return [leaf for i, inner in enumerate(value) for leaf in _flat(inner, f"{path}.{i}")]
    return [(path, number(value) if isinstance(value, float) else str(value))]


def readable(name: str) -> str:
    """`soft_nn_top1` -> `soft-NN top-1`: names of the file as words."""
    words = {"nn": "NN", "knn": "kNN", "top1": "top-1", "lr": "learning rate"}
    return " ".join(words.get(word, word) for word in name.split("_")).replace("soft NN", "soft-NN")
