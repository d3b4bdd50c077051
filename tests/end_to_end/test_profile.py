"""`fastssl profile` as users type it. About 60 s."""

import json
import re
import time
from html.parser import HTMLParser

import numpy as np
import pytest

from loaders.store.beton import BetonReader
from tests.end_to_end.command import interrupt, run, run_here, running, wait_until
from tests.support.imagenet_trees import folder_tree

SHORT = ("profile", "paws.digits", "--seconds", "3", "--out", "p")
SMALL = ("--set", "encoder.base_width=4", "--set", "out_features=8")
TOP_LEVEL = {"unlabelled_images_per_s", "image_equivalents_per_s", "stall_share", "binding", "projection", "complete"}


class Loads(HTMLParser):
    """What a page would load from elsewhere, or run."""

    def __init__(self, text):
        super().__init__()
        self.found, self.sizes = [], len(text)
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag in ("script", "iframe", "object") or tag == "link" and given.get("href") != "data:,":
            self.found.append(tag)
        self.found += [v for k, v in attrs if k in ("src", "href") and not v.startswith(("data:", "#"))]


def test_without_data_and_gpu_it_says_what_binds(tmp_path):
    """A table, one sentence, JSON with the keys that others read, a page that needs no network; then compared with
    itself, and refused as a baseline for another recipe."""
    code, text = run(tmp_path, *SHORT, *SMALL)
    assert code == 0, text
    assert re.search(r"binds: the \w+", text)
    profile = json.loads((tmp_path / "p" / "profile.json").read_text())
    assert profile.keys() >= TOP_LEVEL and profile["complete"]
    assert profile["projection"]["recipe"] == "paws.rn50_100ep" and profile["projection"]["ranks"] == 64
    assert profile["step"]["host_syncs"] == 0 and profile["step"]["dispatches"] > 100
    assert profile["overhead_share"] < 0.01
    assert 0 <= profile["stall_share"] < 1
    parts = profile["stall"]
    assert abs(parts["prepare"] + parts["fetch"] + parts["copy"] - parts["share"]) < 1e-9
    page = (tmp_path / "p" / "profile.html").read_text()
    assert Loads(page).found == [] and len(page) < 3e6
    assert "url(" not in page and "prefers-color-scheme:dark" in page

    code, text = run(tmp_path, "profile", "paws.digits", "--baseline", "p/profile.json", "--out", "q")
    assert code == 1 and "cannot be compared" in text and "encoder.base_width=4" in text


def test_a_store_of_decoded_images_is_said_with_its_own_figures(tmp_path):
    """Catches images that are stored decoded and decoded all the same, and a store taken for one of JPEGs."""
    folder_tree(tmp_path / "tree", 2, 20)
    run_here(tmp_path, "convert-imagenet", "tree", "betons", "--pixels", "raw")
    words = ("--only", "loader", "--seconds", "1", "--data", "betons", "--out", "p")
    run_here(tmp_path, "profile", "paws.cifar10_small", *words)
    profile = json.loads((tmp_path / "p" / "profile.json").read_text())
    assert profile["loader"]["stages"]["decode"]["cpu_s_per_image"] == 0
    (own,) = profile["here"]["stores"]
    sizes = np.concatenate([BetonReader(tmp_path / "betons" / f"{split}.beton").sizes for split in ("train", "val")])
    assert own["what"] == "as stored, decoded" and own["cores_saved"] == 0
    assert own["bytes_per_image"] == pytest.approx(3 * sizes.prod(1).mean())
    assert own["disk_bytes_per_s"] > own["wanted_images_per_s"] * own["bytes_per_image"]


def test_an_interrupted_profile_keeps_what_it_has(tmp_path):
    with running(tmp_path, *SHORT[:2], "--seconds", "200", "--out", "p", *SMALL) as process:
        kept = tmp_path / "p" / "profile.json"
        wait_until(lambda: kept.exists() and json.loads(kept.read_text())["loader"])
        interrupt(process.pid)
        assert process.wait(timeout=60) == 1
    assert "interrupted" in (tmp_path / "log").read_text()
    profile = json.loads(kept.read_text())
    assert not profile["complete"] and profile["loader"]["images_per_s"]["median"] > 0


def test_bad_input_is_one_line(tmp_path):
    (tmp_path / "b.json").write_text("{}")
    code, text = run(tmp_path, *SHORT, "--baseline", "b.json")
    assert code == 1 and "cannot be read as a profile.json" in text and "Traceback" not in text
    (tmp_path / "damaged.beton").write_bytes(b"no images here")
    begin = time.monotonic()
    code, text = run(tmp_path, "profile", "--data", "damaged.beton")
    assert code == 1 and "damaged.beton" in text and "Traceback" not in text
    assert time.monotonic() - begin < 60


def test_two_ranks_show_their_messages(tmp_path):
    code, text = run(tmp_path, *SHORT, *SMALL, "--cpu-ranks", "2", "--only", "step", "--trace")
    assert code == 0, text
    profile = json.loads((tmp_path / "p" / "profile.json").read_text())
    found = profile["communication"]
    layers = found["statistics"]["messages"] // 2
    assert found["statistics"]["messages"] == 2 * layers > 0 and found["rows"]["messages"] > 0
    assert all(row["bytes"] > 0 and row["exposed_s"]["windows"] >= 1 for row in found.values())
    assert profile["loader"] is None and profile["stall_share"] is None
    events = {event.get("name") for event in json.loads((tmp_path / "p" / "trace.json").read_text())["traceEvents"]}
    assert {"fastssl: wait for batch", "fastssl: step", "fastssl: loss", "fastssl: update"} <= events
