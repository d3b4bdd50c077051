"""`fastssl data`: counts that are right, all that is left out, a command that runs as it is printed."""

import json
import shlex

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import loaders.store.data
from fastssl.commands import contents
from fastssl.commands.main import main
from loaders.store.openers import open_path


@pytest.fixture
def photos(tmp_path):
    """Three uneven classes of photographs, some odd, beside what is no image."""
    for name, count in (("ant", 12), ("bee", 130), ("cow", 5)):
        for k in range(count):
            path = tmp_path / "photos" / name / f"{k}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(1000 * count + k).integers(0, 256, (40 + k, 60, 3), np.uint8)
            exif = Image.Exif()
            if (name, k) == ("bee", 3):
                exif[0x0112] = 6
            Image.fromarray(pixels).save(path, "PNG" if (name, k) == ("bee", 4) else "JPEG", exif=exif)
    folder = tmp_path / "photos"
    (folder / "ant" / "notes.txt").write_text("none")
    (folder / "ant" / "2.jpg").write_bytes(b"no image")
    (folder / "bee" / "5.jpg").write_bytes((folder / "bee" / "5.jpg").read_bytes()[:-900])
    (folder / "empty").mkdir()
    return folder


def said(*arguments):
    result = CliRunner().invoke(main, ["data", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_every_number_is_right(photos):
    """Would catch counts of one split given for both, and files that are left out without a word."""
    found = json.loads(said(photos, "--json"))
    train, validation = found["splits"]["train"], found["splits"]["validation"]
    assert train["images"] + validation["images"] == 147 and validation["images"] == 15
    assert (train["least"], train["least_class"], train["most"], train["most_class"]) == (4, "cow", 117, "bee")
    assert train["median"] == 11 and train["classes"] == 3 and train["unlabelled"] == 0
    both = {form: train["formats"].get(form, 0) + validation["formats"].get(form, 0) for form in ("JPEG", "PNG", "")}
    assert both == {"JPEG": 145, "PNG": 1, "": 1}
    assert train["turned"] + validation["turned"] == 1
    assert dict(found["left_out"]["first"]) == {
        "ant/notes.txt": "not named as an image",
        "empty/": "a folder without images, so no class",
    }
    assert [name for name, _ in train["unreadable"] + validation["unreadable"]] == ["ant/2.jpg"]
    assert [name for name, _ in train["damaged"] + validation["damaged"]] == ["bee/5.jpg"]
    assert any("held out" in line for line in found["said"])


def test_a_person_reads_it_and_runs_the_command(photos, tmp_path):
    """Would catch a command that train refuses."""
    (photos / "ant" / "2.jpg").unlink()
    shown = said(photos, "--contact-sheet", tmp_path / "crops.html")
    for text in ("4 (cow) to 117 (bee)", "notes.txt", "JPEG 1", "1, shown upright", "do not decode, of", "held out"):
        assert text in shown, text
    (line,) = (line for line in shown.splitlines() if "fastssl train" in line)
    words = shlex.split(line[line.index("fastssl train") :])
    assert words == ["fastssl", "train", "paws.mine", "--data", str(photos)]
    dry = CliRunner().invoke(main, [*words[1:], "--dry-run"])
    assert dry.exit_code == 0 and "support      12 images a step" in dry.output and "warning" not in dry.output
    assert (tmp_path / "crops.html").read_text().count("<img") > 20


def test_photos_without_classes_are_told_of_labelled_ones_beside_them(photos):
    *_, train, beside = said(photos / "bee").rstrip().splitlines()
    assert train.endswith(f"fastssl train simclrv2.mine --data {photos / 'bee'}")
    assert beside.endswith(f"fastssl train paws.mine --data unlabelled={photos / 'bee'} --data labelled=FOLDER")


def test_a_path_is_opened_once(photos, monkeypatch):
    """Would catch every header of a large set read twice: to look, and to advise."""
    opened = []

    def counted(path, *arguments):
        opened.append(path)
        return open_path(path, *arguments)

    monkeypatch.setattr(loaders.store.data, "open_path", counted)
    (photos / "ant" / "2.jpg").unlink()
    assert contents.look(str(photos)).command
    assert opened == [str(photos)]


def test_what_cannot_be_trained_on_is_said(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    assert "no recipe for it: 1 images to learn from are too few" in " ".join(said(tmp_path).split())
    refused = CliRunner().invoke(main, ["data", str(tmp_path / "nowhere")])
    assert refused.exit_code == 1 and "no such file or folder" in refused.output
