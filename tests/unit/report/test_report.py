"""The page of a training run: what it shows, what it escapes, what it says where a run lacks something."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastssl.engine import reopen
from fastssl.engine.join import facts_of
from fastssl.engine.stages import run
from fastssl.errors import ConfigError
from fastssl.evaluation.subject import Subject
from fastssl.html.charts import Bar, Line, bar_chart, line_chart, scatter, thinned, ticks
from fastssl.html.page import element, number, numbers_behind, table
from fastssl.recipes.resolve import resolve
from fastssl.report import pictures, training
from fastssl.report.history import read_history
from loaders.store import openers
from loaders.store.data import open_data
from loaders.store.digits import open_digits
from tests.support import fakes
from tests.support.interrupted import run_in_pieces

HOSTILE = '<script>alert("x")</script>'
ELEMENTS = {
    *("html", "head", "meta", "link", "title", "style", "body", "main", "nav", "a", "header", "section", "h1", "h2"),
    *("h3", "p", "div", "span", "b", "code", "dl", "dt", "dd", "table", "thead", "tbody", "tr", "th", "td", "details"),
    *("summary", "figure", "figcaption", "svg", "g", "line", "path", "circle", "rect", "text", "img"),
}


class Page(HTMLParser):
    """What a browser would make of a page: its elements, their ids, what they refer to, its text."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: set[str] = set()
        self.ids: set[str] = set()
        self.references: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert self._open == [], "elements that are never closed"

    def handle_starttag(self, tag, attrs):
        self.elements.add(tag)
        if tag not in ("meta", "link", "img"):
            self._open.append(tag)
        for name, value in attrs:
            self.ids |= {value} if name == "id" else set()
            self.references += [value] if name in ("src", "href", "xlink:href", "action", "srcset") else []
            self.handlers += [name] if name.startswith("on") else []

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, "elements that overlap"

    def handle_data(self, data):
        if "style" not in self._open:
            self.text += data


def checked(html: str) -> Page:
    """The page, which stands alone, is small, and has every section and no script."""
    page = Page(html)
    assert page.elements <= ELEMENTS and page.handlers == []
    assert [r for r in page.references if not r.startswith(("#", "data:image/", "data:,"))] == []
    assert not re.search(r"url\(|@import|https?:", html)
    assert len(html.encode()) < 3_000_000
    assert set(training.CONTENTS) <= page.ids
    return page


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(pictures, "TSNE_IMAGES", 60)


@pytest.fixture
def trained(tmp_path):
    """A run of the fake PAWS, six steps."""
    run(fakes.job(fakes.stages("paws"), tmp_path / "run"))
    return tmp_path / "run"


def report(folder: Path, compare: Path | None = None, data: tuple[str, ...] = ()) -> Page:
    out = folder / "report.html"
    training.write_report(folder, compare, data, out)
    return checked(out.read_text())


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------ a page


def test_a_whole_run_has_every_picture(trained):
    page = report(trained)
    result = json.loads((trained / "result.json").read_text())
    assert f"{100 * result['soft_nn_top1']:.1f}\u00a0%" in page.text
    assert "on digits (held out), split all, 355 images" in page.text
    assert "Finished after 6 steps" in page.text and "60 validation images, embedded at 'backbone'" in page.text
    # two streams, five images each: one as evaluated and the two copies of the only view
    assert sum(r.startswith("data:image/png") for r in page.references) == 2 * 5 * 3
    assert "No restart" in page.text


def test_the_matrix_counts_what_the_evaluation_counted(trained):
    """Another bank, tap or row order than the evaluation's would show another accuracy."""
    subject = reopen.open_run(trained, ())[0]
    _, confusion = pictures.embedding_pictures(subject)
    result = json.loads((trained / "result.json").read_text())
    hits = [int(n) for n in re.findall(r'class="right"[^>]*>(\d+)<', confusion)]
    assert sum(hits) == round(355 * result["soft_nn_top1"])
    cells = [int(n) for n in re.findall(r"<td[^>]*--v:\d+[^>]*>(\d+)<", confusion)]
    assert sum(cells) == 355


def test_names_are_escaped_wherever_they_appear(trained, monkeypatch):
    """A class, recipe or command called <script> that would run."""
    names = tuple(f"{HOSTILE}{i}" for i in range(10))
    monkeypatch.setattr(
        openers, "open_digits", lambda: [replace(source, class_names=names) for source in open_digits()]
    )
    resolved = json.loads((trained / "resolved.json").read_text())
    resolved |= {"recipe": HOSTILE, "run": resolved["run"] | {"command": HOSTILE}}
    (trained / "resolved.json").write_text(json.dumps(resolved))
    page = report(trained)
    assert page.text.count(f"{HOSTILE}3") >= 5  # histograms, map, matrix
    assert f"{HOSTILE}, seed 0" in page.text and f"command{HOSTILE}" in page.text


def test_a_run_beside_another_shows_both_and_what_differs(trained, tmp_path):
    run(fakes.job(fakes.stages("paws", steps=4), tmp_path / "other", seed=7))
    page = report(trained, tmp_path / "other")
    assert "seed" in page.text and "0 -> 7" in page.text and "6 -> 4" in page.text
    assert "The numbers of other" in page.text
    html = (trained / "report.html").read_text()
    assert html.count('class="line s1 dashed"') > 3


# ----------------------------------------------------------------------------------------------------- what is lacking


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"is no run directory: it has no resolved.json"):
        report(tmp_path)


def test_a_run_that_has_just_begun(trained):
    for name in ("checkpoints", "metrics.jsonl", "result.json"):
        path = trained / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = report(trained)
    assert "Nothing is logged yet" in page.text and "has no checkpoint yet" in page.text
    assert "No accuracy has been measured" in page.text
    assert len(page.references) > 30  # crops need no checkpoint


def test_a_run_that_is_still_going_shows_how_far_it_is(trained):
    """A line that is being written is no damage."""
    (trained / "result.json").unlink()
    lines = (trained / "metrics.jsonl").read_text().splitlines(keepends=True)
    (trained / "metrics.jsonl").write_text("".join(lines[:4]) + lines[4][:30])
    page = report(trained)
    assert "Not finished. Step 4 of 6 when metrics.jsonl last changed" in page.text and "damaged" not in page.text


def test_a_damaged_line_is_passed_over_and_said(trained):
    lines = (trained / "metrics.jsonl").read_text().splitlines(keepends=True)
    (trained / "metrics.jsonl").write_text("".join([*lines[:2], "{torn\n", '{"step": 3}\n', *lines[3:]]))
    assert "Damaged lines of metrics.jsonl, which are passed over: 2" in report(trained).text


def test_data_that_is_gone_and_a_method_that_is_gone_are_sentences(trained):
    page = report(trained, data=("/nowhere",))
    assert page.text.count("/nowhere: no such file or folder") == 4 and "Finished after 6 steps" in page.text
    resolved = json.loads((trained / "resolved.json").read_text())
    resolved["run"]["modules"] = {"my_recipes": "/nowhere/my_recipes.py"}
    (trained / "resolved.json").write_text(json.dumps(resolved))
    page = report(trained)
    assert page.text.count("needs the module my_recipes, which was /nowhere/my_recipes.py: it is not there") == 4
    assert "Finished after 6 steps" in page.text


def test_no_validation_images(trained, monkeypatch):
    (training_set, _) = open_digits()
    monkeypatch.setattr(openers, "open_digits", lambda: (training_set, None))
    page = report(trained)
    assert "no validation images, so nothing can be confused" in page.text
    assert "60 labelled training images" in page.text


@pytest.mark.parametrize("family", ["simclrv2", "s4l"])
def test_every_stage_has_its_curves(tmp_path, family):
    """Stages that train nothing, teachers, quarter turns, exemplar copies."""
    stages = tuple(replace(stage, evaluate=()) for stage in fakes.stages(family, steps=2))
    run(fakes.job(stages, tmp_path))
    page = report(tmp_path)
    for stage in stages:
        assert page.text.count(f"Stage {stage.name}") >= 4
    assert ("This stage trains nothing" in page.text) == (family == "s4l")
    assert "Nothing has been evaluated" in page.text and "Classified by" in page.text


def test_embeddings_that_are_not_finite_are_a_sentence(trained, monkeypatch):
    monkeypatch.setattr(fakes.TinyPaws, "embed", lambda self, nets, x, tap: x.flatten(1) * math.nan)
    assert report(trained).text.count("the training has diverged") == 2


# ------------------------------------------------------------------------------------------------- restarts and stalls


def test_a_restart_is_seen_where_it_was(tmp_path):
    """That the first window after a start is told by `eta_s`, which the clock decides, and no other window is."""
    stops = run_in_pieces(fakes.job(fakes.stages("paws", steps=12), tmp_path), every=5)
    (stage,) = read_history(tmp_path).stages
    assert [record["step"] for record in stage.steps] == list(range(1, 13))
    # killed after five more logged steps each time, before the checkpoint: continued from steps 3, 6, ...
    begun = [stage.steps[i]["step"] for i in stage.first_windows]
    assert begun == [1, 4, 7, 10][: stops + 1] and stops >= 2
    assert stage.minutes[-1] == pytest.approx(sum(r["time"]["elapsed_s"] for r in stage.steps) / 60)


def test_a_stall_is_a_window_that_waits_or_crawls(trained):
    """The first window of a start, which compiles, is none; its neighbours are none."""
    even = {"images_per_s": 1000.0, "wait_share": 0.01, "elapsed_s": 6.0, "eta_s": 1.0}
    rows = [{"step": s, "epoch": s / 10, "loss": 1.0, "lr": 0.1, "time": dict(even)} for s in range(1, 11)]
    rows[0]["time"] |= {"images_per_s": 10.0, "wait_share": 0.9, "eta_s": None}
    rows[4]["time"] |= {"wait_share": 0.3}
    rows[7]["time"] |= {"images_per_s": 400.0}
    (trained / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (stage,) = read_history(trained).stages
    assert [(s.step, s.minutes) for s in stage.stalls] == [
        (5, pytest.approx((0.4, 0.5))), (8, pytest.approx((0.7, 0.8)))]  # fmt: skip
    page = report(trained)
    assert "2 stalls, shaded, in the windows that end at step 5, 8: 1 waited for data" in page.text
    assert (trained / "report.html").read_text().count('class="span"') == 4  # two charts


def test_values_that_json_has_no_number_for_are_gaps(trained):
    rows = [json.dumps(r | {"loss": "nan"} if r["step"] == 3 and "loss" in r else r) for r in records(trained)]
    (trained / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    (stage,) = read_history(trained).stages
    assert [math.isnan(v) for v in stage.series("loss")] == [False, False, True, False, False, False]
    report(trained)


# ------------------------------------------------------------------------------------------------------------- charts


def test_text_is_escaped_and_markup_is_not():
    inner = element("b", HOSTILE, title='"><i>')
    assert inner == '<b title="&quot;&gt;&lt;i&gt;">&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;</b>'
    assert inner + "<i>" == f"{inner}&lt;i&gt;" and element("p", inner, None, class_=None) == f"<p>{inner}</p>"


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0, 1, [0, 0.5, 1]),
        (-2.3, -2.2, [-2.3, -2.25, -2.2]),
        (3, 3, [0, 2, 4, 6]),
        (0, 0, [-0.5, 0, 0.5]),
        (1e-13, 3e-13, [1e-13, 2e-13, 3e-13]),
        (5_000, 59_000, [0, 20_000, 40_000, 60_000]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low, high, expected):
    found = ticks(low, high, about=3)
    assert found == pytest.approx(expected) and len(set(found)) == len(found)


def test_thinning_loses_no_spike_and_no_gap():
    ys = [0.0] * 50_000
    ys[12_345], ys[33_333], ys[40_000] = 9.0, -9.0, math.nan
    xs, kept = thinned(list(range(50_000)), ys)
    assert len(xs) <= 1010 and xs == sorted(xs) and {0, 12_345, 33_333, 40_000, 49_999} <= set(xs)
    assert {9.0, -9.0} <= set(kept)


def test_a_line_breaks_where_it_is_not_finite():
    chart = line_chart("t", [Line("a", [0, 1, 2, 3, 4], [1.0, 2.0, math.nan, 2.0, 1.0])], x_name="epochs")
    (d,) = re.findall(r'<path d="([^"]*)"', chart)
    assert d == "M0 1000 250 0 M750 0 1000 1000"
    assert "no value to show" in line_chart("t", [Line("a", [1], [math.inf])], x_name="epochs")


def test_bars_are_as_long_as_their_values_and_many_lose_their_names():
    few = bar_chart("t", [Bar("a", 5), Bar("b", 20)])
    assert re.findall(r'width="([\d.]+)%" height', few) == ["25.00", "100.00"]
    many = bar_chart("t", [Bar(f"class {i}", i) for i in range(1000)])
    assert many.count("M") == 1000 and "class 500" not in many and "class 999" in many


def test_every_point_is_drawn_and_twenty_groups_look_different():
    rng = np.random.default_rng(0)
    groups = [i % 20 for i in range(200)]
    drawn = scatter(rng.normal(size=(200, 2)).tolist(), groups, [f"c{i}" for i in range(20)], "map")
    assert len(re.findall(r"<(?:circle|rect) ", drawn)) == 200 + 20  # and one each in the key
    looks = re.findall(r'<span><svg[^>]*><(\w+) [^>]*?class="([^"]*)"', drawn)
    assert len(set(looks)) == 20
    far = [float(v) for v in re.findall(r'c?[xy]="([\d.-]+)%"', drawn)]
    assert min(far) >= 3 and max(far) <= 97


def test_a_long_table_keeps_its_ends():
    shown = numbers_behind(("step",), [(i,) for i in range(1000)])
    cells = re.findall(r'<td class="num">([\d,]+)</td>', shown)
    assert len(cells) == 24 and (cells[0], cells[-1]) == ("0", "999") and "24 of 1,000 rows" in shown
    assert numbers_behind(("step",), []) == "" and "<th>a</th>" in table(("a",), [("x",)])


def test_numbers_read_well():
    assert [number(v) for v in (None, 12345, -0.5, 1 / 3, 123456.7, 1e-7, math.nan)] == [
        "–", "12,345", "−0.5", "0.3333", "123,457", "1 · 10^-7".replace("-", "−"), "nan"]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ pictures


def test_many_classes_and_images_as_files(tmp_path):
    """A matrix or histogram of a thousand names; labels that the matrix takes for others; a class without images."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for k in range(24):
            folder = tmp_path / split / f"class{k:02}"
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (36, 40, 3), np.uint8)).save(folder / f"{i}.png")
    (stage,) = resolve("paws.cifar10_small", ("labels=all", "images_per_class=2", "batch_global=16", "precision=fp32"))
    data = open_data((str(tmp_path),))
    method = stage.config.build(facts_of(data, 0), {})
    sheet = Page(pictures.contact_sheet(method, data))
    assert len(sheet.references) == 5 * (1 + 2) + 5 * (1 + 1) and "Stream support" in sheet.text
    histograms = Page(pictures.class_histograms(method, data))
    assert "Validation: 48" in histograms.text and histograms.text.count("class23") == 3 * 2
    tsne, confusion = pictures.embedding_pictures(Subject(method, method.nets(), data, threads=1))
    shown = Page(tsne)
    assert "40 validation images of 20 of 24 classes" in shown.text and "class00" in shown.text
    matrix = Page(confusion)
    assert "of 48 validation images right" in matrix.text and "taken for" in matrix.text and "class=" in confusion
    assert "confusion" not in confusion  # a table of pairs


def test_large_crops_become_small_files():
    crop = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    (source,) = Page(pictures._image(crop, "crop")).references
    picture = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,"))))
    assert picture.size == (128, 128) and len(source) < 20_000


def test_a_sample_is_the_same_every_time_and_of_few_classes():
    ids = np.arange(0, 50_000, 2)
    first = pictures.sample(ids, 100)
    assert len(first) == 100 and (first == pictures.sample(ids, 100)).all() and (np.diff(first) > 0).all()
    assert (pictures.sample(ids[:5], 100) == ids[:5]).all()


def test_rows_of_a_part_belong_to_their_ids(trained):
    """Labels that stand beside other images' embeddings would colour the map at random."""
    subject: Subject = reopen.open_run(trained, ())[0]
    source = subject.data.get("validation")
    ids = np.arange(3, 300, 2)
    seen = pictures.embedded(subject, source, ids, ("backbone",))
    every = subject.features("validation", "backbone")
    assert (seen.labels == every.labels.numpy()[ids]).all()
    assert np.allclose(seen.values["backbone"].numpy(), every.values.numpy()[ids], atol=1e-5)
    few = pictures._only(seen, np.array([5, 9]))
    assert np.allclose(few.values["backbone"].numpy(), every.values.numpy()[[5, 9]], atol=1e-5)
