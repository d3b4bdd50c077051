"""A profile as a table for a terminal and as a self-contained page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fastssl.html.charts import Bar, bar_chart
from fastssl.html.page import Html, element, facts, page, paragraph, section, table
from loaders.files import write_file

Profile = Mapping[str, Any]


def as_text(profile: Profile) -> Group:
    """The table and, last, the sentence that says what binds."""
    shown = Table(box=None, pad_edge=False, show_header=False)
    for name, value in rows(profile).items():
        shown.add_row(Text(name, "cyan"), Text(value))
    ahead = [] if profile["complete"] else [Text("partial: this profile was interrupted", "bold yellow")]
    return Group(*ahead, shown, Text(f"binds: {profile['binding']['sentence']}", "bold"))


def rows(profile: Profile) -> dict[str, str]:
    """What the terminal shows, a line each; what was not measured is left out."""
    found = {
        "unlabelled images/s": _rate(profile["unlabelled_images_per_s"]),
        "image-equivalents/s": _rate(profile["image_equivalents_per_s"]),
        **_step_rows(profile["step"]),
        **_stall_rows(profile["stall"]),
        **_loader_rows(profile["loader"]),
        **{f"messages, {name}": _messages(row) for name, row in (profile["communication"] or {}).items()},
        "memory": _memory(profile["memory"]),
        "overhead of profiling": _share(profile["overhead_share"]),
        "machine": _machine(profile["machine"]),
        **{f"images {row['what']}": _stored(row) for row in (profile["here"] or {}).get("stores", ())},
        "100 epochs here": _hours((profile["here"] or {}).get("hours_per_100_epochs")),
        **_projection_rows(profile["projection"]),
    }
    found |= {f"note {i + 1}": note for i, note in enumerate(profile["notes"])}
    return {name: value for name, value in found.items() if value}


def _step_rows(step: Mapping[str, Any] | None) -> dict[str, str]:
    if step is None:
        return {}
    times, roofline = step["percentiles_s"], step["share_of_memory_roofline"]
    spans = " / ".join(_seconds(times[p]) for p in ("p50", "p95", "p99"))
    counts = [
        f"{step[k]:,} {k.replace('_', ' ')}" for k in ("dispatches", "launches", "host_syncs") if step[k] is not None
    ]
    found = {
        "step, ready batch": f"{_seconds(step['synthetic_s'])}, {step['how']}, {step['batch_global']} images",
        "step, from the loader": _seconds(step["full_s"]) if step["full_s"] else "",
        "p50 / p95 / p99": f"{spans} of {step['num_steps_timed']}; ranks {step['straggler_spread']:.1%} apart",
        "of a step": ", ".join(counts),
    }
    if step["flop_s"]:
        traffic = f"{step['traffic_bytes_s'] / 1e9:,.1f} GB/s (modelled)"
        found["FLOP/s"] = f"{step['flop_s'] / 1e9:,.1f} G, {step['share_of_peak']:.0%} of the measured peak"
        found["memory traffic"] = f"{traffic}, {roofline:.0%} of what copying moves"
    return found


def _stall_rows(stall: Mapping[str, Any] | None) -> dict[str, str]:
    if stall is None:
        return {}
    parts = ", ".join(f"{name} {stall[name]:.1%}" for name in ("prepare", "fetch", "copy"))
    waited = f"; {stall['waited_share']:.1%} waited, the rest lost to sharing cores"
    return {"stall": f"{stall['share']:.1%} ± {stall['spread']:.1%}: {parts}{waited if stall['share'] else ''}"}


def _loader_rows(loader: Mapping[str, Any] | None) -> dict[str, str]:
    if loader is None:
        return {}
    cold = loader["cold_images_per_s"]
    found = {
        "loader, warm": f"{_range(loader['images_per_s'])} images/s, {loader['threads']} threads",
        "loader, one thread": f"{_range(loader['one_thread_images_per_s'])} images/s"
        if loader["one_thread_images_per_s"] else "",
        "loader, cold": f"{_range(cold)} images/s; {loader['cold']}" if cold else loader["cold"],
    }  # fmt: skip
    for stage, row in loader["stages"].items():
        if row["cpu_s_per_image"]:
            found[f"  {stage}"] = (
                f"{row['images_per_s_per_core']:,.0f} images/s a core; {1e3 * row['cpu_s_per_image']:.3f} ms of CPU, "
                f"{1e3 * row['wall_s_per_image']:.3f} ms of a thread"
            )
    return found


def _stored(row: Mapping[str, Any]) -> str:
    """What a way to store the images asks for."""
    an_image, fewer = f"{row['bytes_per_image'] / 1e3:,.0f} KB an image", row["cores_saved"]
    saved = f", {abs(fewer):.2f} {'fewer' if fewer > 0 else 'more'}" if fewer else ""
    wanted = f"{row['disk_bytes_per_s'] / 1e6:,.0f} MB/s from the disk and {row['cores']:.2f} cores{saved}"
    return f"{an_image}; {_rate(row['wanted_images_per_s'])} images/s want {wanted}"


def _messages(row: Mapping[str, Any]) -> str:
    counted = "" if row["messages"] is None else f"{row['messages']} a step, {row['bytes'] / 1e6:.2f} MB"
    exposed = row["exposed_s"]
    measured = (
        ""
        if exposed is None
        else f"; exposed {_seconds(exposed['median'])} ({_seconds(exposed['least'])} to {_seconds(exposed['most'])})"
    )
    return counted + measured


def _memory(memory: Mapping[str, Any]) -> str:
    parts = [f"{what} {memory[key] / 1e9:.2f} GB" for what, key in (("peak of tensors", "peak_bytes"),
             ("resident", "resident_bytes")) if memory[key]]  # fmt: skip
    return ", ".join(parts)


def _machine(machine: Mapping[str, Any]) -> str:
    share = machine["waited_for_core_share"]
    if share is None:
        return ""
    return f"threads waited for a core {share:.0%} of the time they could run" + (
        "" if machine["quiet"] else ": it is busy, trust CPU seconds and ratios, not wall times"
    )


def _projection_rows(projection: Mapping[str, Any]) -> dict[str, str]:
    found = {f"{projection['recipe']} on": "hours per 100 epochs (low to high); what binds; modelled, see the page"}
    for row in projection["machines"]:
        found[f"  {row['machine']}"] = (
            f"{row['hours_per_100_epochs']:.2f} ({row['hours_low']:.2f} to {row['hours_high']:.2f}); {row['binding']}"
        )
    return found


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _range(spread: Mapping[str, float]) -> str:
    return f"{_rate(spread['median'])} ({_rate(spread['least'])} to {_rate(spread['most'])})"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _hours(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f} h"


def _seconds(value: float) -> str:
    return f"{1e3 * value:,.1f} ms" if abs(value) < 1 else f"{value:.2f} s"


# ------------------------------------------------------------------------------------------------------- the page


def write_page(profile: Profile, path: Path) -> None:
    """One file, nothing loaded from elsewhere."""
    write_file(path, as_page(profile))


def as_page(profile: Profile) -> Html:
    recipe = profile["identity"]["recipe"]
    parts = {
        "Measured": section("measured", "What was measured", facts(rows(profile))),
        "Stall": _stall_section(profile["stall"]),
        "Loader": _loader_section(profile["loader"]),
        "What if": _here_section(profile["here"]),
        "64 GPUs": _projection_section(profile["projection"]),
        "Assumed": _assumed_section(profile),
    }
    shown = {title: part for title, part in parts.items() if part}
    return page(
        f"fastssl profile: {recipe}",
        element("h1", f"Profile of {recipe}"),
        None if profile["complete"] else paragraph("Partial: this profile was interrupted."),
        paragraph(element("b", "What binds: "), profile["binding"]["sentence"], "."),
        *shown.values(),
        contents={title.lower().replace(" ", "-"): title for title in shown},
    )


def _stall_section(stall: Mapping[str, Any] | None) -> Html | None:
    if stall is None:
        return None
    shares = {**stall["by_stage"], "copy": stall["copy"]}
    bars = [Bar(name, 100 * share, f"{share:.1%}") for name, share in shares.items()]
    how = "The step from the loader beside that on a ready batch; split as the loader's threads spent their time."
    return section(
        "stall", "Where a step waits", bar_chart("Share of the step's time", bars), paragraph(how, quiet=True)
    )


def _loader_section(loader: Mapping[str, Any] | None) -> Html | None:
    if loader is None:
        return None
    costs_ms = {name: 1e3 * row["cpu_s_per_image"] for name, row in loader["stages"].items()}
    bars = [Bar(name, ms, f"{ms:.3f} ms") for name, ms in costs_ms.items()]
    title = "CPU ms for an unlabelled image and its share of the others"
    return section("loader", "What an image costs the loader", bar_chart(title, bars, colour=2))


def _here_section(here: Mapping[str, Any] | None) -> Html | None:
    if here is None:
        return None
    columns = ["", "loader, images/s", "together, images/s", "binds"]
    found: list[Html] = []
    for name in ("cores", "loaders", "disks", "caches", "stores"):
        if here[name]:
            kept = [[r["what"], r["loader_images_per_s"], r["images_per_s"], r["binding"]] for r in here[name]]
            found += [element("h3", f"With other {name}"), table(columns, kept)]
    if here["stores"]:
        columns = ["", "KB an image", "for images/s", "MB/s of a disk", "cores busy", "saved"]
        found.append(table(columns, [_store_row(row) for row in here["stores"]]))
    return section("what-if", "What if this machine were another", *found)


def _store_row(row: Mapping[str, Any]) -> list[Any]:
    wanted, kb, mb_s = row["wanted_images_per_s"], row["bytes_per_image"] / 1e3, row["disk_bytes_per_s"] / 1e6
    return [row["what"], kb, wanted, mb_s, row["cores"], row["cores_saved"]]


def _projection_section(projection: Mapping[str, Any]) -> Html:
    columns = ["machine", "h / 100 epochs", "low", "high", "images/s", "compute, ms", "messages", "loader", "cores",
               "binds"]  # fmt: skip
    return section(
        "64-gpus",
        f"{projection['recipe']} elsewhere",
        table(columns, [_projected(row) for row in projection["machines"]]),
        element("h3", "From 8 to 1,024 ranks, on paper"),
        table(columns, [_projected(row) for row in projection["ranks_on_paper"]]),
        paragraph("Compute, messages, loader: ms of a step. Cores: a GPU's, that the loader would need.", quiet=True),
    )


def _assumed_section(profile: Profile) -> Html:
    projection = profile["projection"]
    how = {
        "measured": "; ".join(projection["measured"]) or "nothing of it",
        "modelled": "; ".join(projection["modelled"]),
    }
    columns = ["machine", "memory TB/s", "share of it: low", "middle", "high", "message µs", "bus GB/s", "cores a GPU"]
    clusters = [row["assumed"] for row in projection["machines"]]
    return section(
        "assumed",
        "What is measured and what is modelled",
        facts(how),
        table(columns, [_assumed(cluster) for cluster in clusters]),
        facts({cluster["name"]: cluster["source"] for cluster in clusters}),
        facts({name: str(value) for name, value in profile["identity"].items()}),
    )


def _projected(row: Mapping[str, Any]) -> list[Any]:
    hours = [round(row[key], 2) for key in ("hours_per_100_epochs", "hours_low", "hours_high")]
    ms = [None if row[key] is None else round(1e3 * row[key], 1) for key in ("compute_s", "messages_s", "loader_s")]
    cores = row["loader_cores_needed_per_gpu"]
    return [row["machine"], *hours, round(row["unlabelled_images_per_s"]), *ms, cores, row["binding"]]


def _assumed(cluster: Mapping[str, Any]) -> list[Any]:
    return [cluster["name"], cluster["bandwidth_bytes_s"] / 1e12, *cluster["roofline"], 1e6 * cluster["message_s"],
            cluster["bus_bytes_s"] / 1e9, cluster["cores"]]  # fmt: skip
