"""Published sets through the real command line: a small run, scored on renditions, and learnt from textures."""

import json

import pytest
from click.testing import CliRunner

from fastssl.commands.main import main
from tests.support.swatches import swatch

SMALLEST = ("encoder.base_width=4", "batch_global=4", "length=2steps", "precision=fp32", "log_every=1steps")
WNIDS = ("n01440764", "n01443537", "n01484850")


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three of ImageNet's classes, a run of two steps on them, renditions of two of them, and three textures."""
    folder = tmp_path_factory.mktemp("published")
    for k, wnid in enumerate(WNIDS):
        for i in range(4):
            swatch(folder / "imagenet" / wnid / f"{wnid}_{i}.JPEG", 4 * k, size=24)
        if k:
            swatch(folder / "imagenet-r" / wnid / "art_0.jpg", 4 * k, size=40)
    textures = ("banded", "dotted", "woven")
    for k, name in enumerate(textures):
        for i in range(4):
            swatch(folder / "dtd" / "images" / name / f"{name}_{i}.jpg", 4 * k, size=30)
    for split, ids in (("train", (0, 1)), ("val", (2,)), ("test", (3,))):
        lines = [f"{name}/{name}_{i}.jpg\n" for name in textures for i in ids]
        (folder / "dtd" / "labels").mkdir(exist_ok=True)
        (folder / "dtd" / "labels" / f"{split}1.txt").write_text("".join(lines))
    options = [part for change in SMALLEST for part in ("--set", change)]
    data = ("--data", folder / "imagenet", "--labels", "all", "--out", folder / "run")
    result = invoke("train", "supervised.cifar10_small", *data, *options)
    assert result.exit_code == 0, result.output
    return folder


def test_a_run_is_measured_on_published_sets_beside_its_own_data(folder):
    """Catches sets taken for training data, the run's own data forgotten where sets are given, and classes of one
    numbered as another's. The textures differ in colour, which any network keeps."""
    sets = ("--data", f"imagenet_r={folder / 'imagenet-r'}", "--data", f"dtd={folder}")
    result = invoke("evaluate", folder / "run", "--protocol", "robustness", "--protocol", "transfer", *sets)
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)
    details = scores["robustness"]["imagenet_r"]
    assert details["images"] == details["classes"] == 2 and details["partial"] == "2 of 30000 images"
    assert scores["imagenet_r_top1_unmasked"] in (0, 0.5, 1) and scores["imagenet_r_top1_masked"] in (0, 0.5, 1)
    assert scores["robustness"]["classifier"] == {"kind": "the run's own", "tap": "logits"}
    assert scores["dtd_top1"] == 1.0 and scores["transfer"]["dtd"]["validation"] == "published"
    assert scores["step"] == 2 and scores["provenance"]["labelled"]["count"] == 9  # one of each class is held out


def test_labels_of_an_evaluation_are_told_in_its_provenance(folder):
    """Catches a flag that goes nowhere: two images a class are learnt from, where the run had four."""
    labels = ("--labels", "per-class=2")
    data = ("--data", f"labelled={folder / 'imagenet'}")
    result = invoke("evaluate", folder / "run", "--protocol", "linear", *data, *labels)
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)
    assert scores["linear"]["labelled_images"] == scores["provenance"]["labelled"]["count"] == 6
    assert scores["provenance"]["labelled"]["split"] == "2-per-class-split-0"
    result = invoke("evaluate", folder / "run", "--protocol", "linear", "--labels", "per-class=ten")
    assert result.exit_code == 1 and "Error: --labels: 'per-class=ten': write per-class=COUNT" in result.output


def test_a_misspelt_set_is_put_right_before_anything_is_read(folder):
    result = invoke("evaluate", folder / "run", "--protocol", "transfer", "--data", "dtt=nowhere")
    assert result.exit_code == 1 and "no protocol asks for 'dtt'; did you mean 'dtd'?" in result.output
    result = invoke("evaluate", folder / "run", "--protocol", "transfer")
    assert result.exit_code == 1 and "give --data KEY=PATH with KEY one of food101, cifar10" in result.output
