"""The tool that says what is foreground: by itself, and from a network's masks."""

import numpy as np
import pytest
from PIL import Image

from loaders.store.data import open_data
from loaders.store.folder import FolderSource
from loaders.store.masks import MaskFile
from tests.unit.loaders.store.test_store import image_folder
from tools import saliency


def scene(height, width, seed=0):
    """A bright and a dark shape apart from the border of a noisy slope, and which pixels are theirs."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(seed).normal(0, 4, (height, width, 3))
    pixels = (np.stack([x / width, y / height, (x + y) / (height + width)], 2) * 60 + 90) + noise
    disc = (x - 0.4 * width) ** 2 + (y - 0.5 * height) ** 2 < (0.25 * height) ** 2
    block = (abs(x - 0.75 * width) < 0.1 * width) & (abs(y - 0.5 * height) < 0.2 * height)
    pixels[disc] = 235, 220, 40
    pixels[block] = 20, 10, 60
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), disc | block


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize(("height", "width"), [(300, 400), (400, 300), (90, 64), (32, 32)])
def test_shapes_that_stand_apart_are_foreground(height, width):
    """Catches exchanged axes, a mask of the background, a shift by the upsampling, and small images enlarged."""
    image, shapes = scene(height, width)
    found = saliency.foreground(image, height, width)
    assert found.shape == (height, width) and found.dtype == bool
    assert overlap(found, shapes) > 0.85
    assert (found == saliency.foreground(image, height, width)).all()
    grey = saliency.foreground(image.convert("L"), height, width)
    assert overlap(grey, shapes) > 0.7


def test_an_image_without_anything_has_no_foreground():
    for size in ((40, 50), (1, 1), (1, 300), (2, 2)):
        assert not saliency.foreground(Image.new("RGB", size, (90, 200, 10)), size[1], size[0]).any()


def test_barrier_distance_is_the_least_rise_and_fall_of_all_paths():
    """Against the definition, over every pair of levels that a path may stay between: sweeps are exact on a plane as
    simple as this one."""
    plane = np.full((9, 11), 10, np.float32)
    plane[2:7, 3:8] = 50
    plane[4, 5] = 30
    plane[4, 8:] = 20  # a corridor from the right edge
    border = np.ones((9, 11), bool)
    border[1:-1, 1:-1] = False
    expected = np.full((9, 11), np.inf)
    for low in (10, 20, 30, 50):
        for high in (10, 20, 30, 50):
            allowed = (plane >= low) & (plane <= high)
            reached = allowed & border
            while True:
                grown = reached.copy()
                grown[1:] |= reached[:-1]
                grown[:-1] |= reached[1:]
                grown[:, 1:] |= reached[:, :-1]
                grown[:, :-1] |= reached[:, 1:]
                grown &= allowed
                if (grown == reached).all():
                    break
                reached = grown
            expected[reached] = np.minimum(expected[reached], high - low)
    assert (saliency.barrier_distance(plane) == expected).all() and set(expected.ravel()) == {0, 30}


def test_otsu_parts_two_heaps_between_them():
    levels = np.concatenate([np.full(900, 20), np.full(50, 24), np.full(100, 200), np.full(10, 190)]).astype(np.uint8)
    assert 24 <= saliency.otsu(levels) < 190
    assert saliency.otsu(np.zeros(10, np.uint8)) == 0


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["saliency", *map(str, arguments)])
    saliency.main()


@pytest.fixture
def scenes(tmp_path):
    folder = tmp_path / "set"
    for i, (height, width) in enumerate([(80, 120), (120, 80), (100, 100)]):
        path = folder / f"class{i % 2}" / f"img_{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        scene(height, width, seed=i)[0].save(path, quality=95)
    return folder


def test_the_tool_writes_masks_that_training_accepts(scenes, monkeypatch, capsys):
    """Each image its own mask, of its own size, whatever the number of threads."""
    run(monkeypatch, scenes, "--threads", 2)
    path = scenes / "train.masks"
    assert f"--data {scenes} --data masks={path}" in capsys.readouterr().out
    source, masks = FolderSource(scenes), MaskFile(path)
    assert masks.about == f"{saliency.MADE_BY}, which saw no labels"
    for i in range(3):
        number = int(source.name_of(i)[4])
        height, width = source.sizes[i].tolist()
        assert overlap(masks.mask(i), scene(height, width, number)[1]) > 0.8
    assert open_data((str(scenes), f"masks={path}")).masks_of("train").name == str(path)
    with pytest.raises(SystemExit):
        run(monkeypatch, scenes)
    assert "train.masks is there already" in capsys.readouterr().err


def test_the_tool_goes_on_where_it_was_stopped(scenes, monkeypatch, capsys):
    """Catches work that is done again, and a second half that differs from an uninterrupted run's."""
    run(monkeypatch, scenes)
    whole = (scenes / "train.masks").read_bytes()
    (scenes / "train.masks").unlink()
    monkeypatch.setattr(saliency, "BLOCK", 1)
    asked, real = [], saliency.foreground

    def stopping(image, height, width):
        asked.append((height, width))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(image, height, width)

    monkeypatch.setattr(saliency, "foreground", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, scenes)
    assert not (scenes / "train.masks").exists()
    run(monkeypatch, scenes)
    assert len(asked) == 4 and (scenes / "train.masks").read_bytes() == whole


def test_a_damaged_image_is_named(scenes, monkeypatch):
    file = scenes / "class1" / "img_1.jpg"
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(SystemExit, match=r"image 2 \(img_1\.jpg\) of .*set: .*truncated"):
        run(monkeypatch, scenes)


def test_arrays_are_masked_too(tmp_path, monkeypatch, capsys):
    """Digits: one channel, eight pixels a side, no file names."""
    out = tmp_path / "digits.masks"
    run(monkeypatch, "digits", "--out", out)
    assert len(MaskFile(out)) == len(open_data(("digits", f"masks={out}")).masks_of("train").foreground) == 1442
    assert "can be masked" in capsys.readouterr().out


def test_masks_of_a_network_are_taken_from_a_folder(tmp_path, monkeypatch, capsys):
    """By name, not by order: names sort otherwise than images."""
    folder = image_folder(tmp_path / "set", per_class=2)
    source = FolderSource(folder)
    theirs = tmp_path / "theirs"
    masks = [np.random.default_rng(i).random(tuple(size)) < 0.6 for i, size in enumerate(source.sizes.tolist())]
    for i, mask in enumerate(masks):
        path = theirs / str(7 - i) / source.name_of(i).replace(".jpg", ".png")
        path.parent.mkdir(parents=True)
        Image.fromarray(mask.astype(np.uint8) * 255).save(path)
    said = ("--made-by", "a network", "--saw-labels", "yes")
    run(monkeypatch, folder, "--from", theirs, *said)
    found = MaskFile(folder / "train.masks")
    assert found.about == "a network, which saw labels"
    assert all((found.mask(i) == mask).all() for i, mask in enumerate(masks))
    (folder / "train.masks").unlink()

    with pytest.raises(SystemExit):
        run(monkeypatch, folder, "--from", theirs)
    assert "--from needs --made-by and --saw-labels" in capsys.readouterr().err
    first = theirs / "7" / source.name_of(0).replace(".jpg", ".png")
    Image.new("L", (3, 4)).save(first)
    with pytest.raises(SystemExit, match=rf"mask of image 0 \({source.name_of(0)}\) of .*set is 3 x 4, the image 8"):
        run(monkeypatch, folder, "--from", theirs, *said)
    first.unlink()
    with pytest.raises(SystemExit, match=rf"theirs: 1 of the 4 images have no mask, first {first.stem}"):
        run(monkeypatch, folder, "--from", theirs, *said)
