"""Our resampler against Pillow's, and against boxes whose answer is known without either.

The promise is 1/255; held to the byte, because a difference of one hides a wrong weight."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loaders.plan.views import Filter
from loaders.renderers.resample import CODES, resize_box

PILLOW = {Filter.BILINEAR: Image.Resampling.BILINEAR, Filter.BICUBIC: Image.Resampling.BICUBIC}
FILTERS = pytest.mark.parametrize("filter", list(PILLOW), ids=lambda f: f.value)
EVERY_FILTER = pytest.mark.parametrize("filter", list(Filter), ids=lambda f: f.value)


def ours(image, box, size, filter, clip=None):
    clip = (0, 0, image.shape[1], image.shape[0]) if clip is None else clip
    out = np.empty((size, size, image.shape[2]), np.uint8)
    resize_box(image, tuple(map(float, box)), tuple(map(int, clip)), size, CODES[filter], out)
    return out


def as_pillow(image):
    return Image.fromarray(image if image.shape[2] == 3 else image[..., 0])


def cropped(image, box, size, filter):
    """Pillow's crop, then resize."""
    return np.asarray(as_pillow(image).crop(box).resize((size, size), PILLOW[filter])).reshape(size, size, -1)


def boxed(image, box, size, filter):
    """Pillow's resize of a part."""
    return np.asarray(as_pillow(image).resize((size, size), PILLOW[filter], box=box)).reshape(size, size, -1)


def difference(a, b):
    return int(np.abs(a.astype(int) - b).max())


def random_boxes(rng, height, width, count):
    for _ in range(count):
        x0, y0 = rng.integers(0, width), rng.integers(0, height)
        yield x0, y0, x0 + 1 + rng.integers(0, width - x0), y0 + 1 + rng.integers(0, height - y0)


@FILTERS
@pytest.mark.parametrize("channels", [1, 3])
def test_noise_crops_match_pillow(filter, channels):
    """Noise shows every wrong weight; boxes from one pixel up, shrunk and enlarged, square and thin."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (150, 130, channels), np.uint8)
    boxes = [*random_boxes(rng, 150, 130, 20), (0, 0, 130, 150), (5, 7, 6, 8), (129, 0, 130, 150), (0, 149, 130, 150)]
    for box in boxes:
        for size in (1, 8, 32, 96):
            assert difference(ours(image, box, size, filter, clip=box), cropped(image, box, size, filter)) == 0, box


@FILTERS
def test_fractional_boxes_match_pillows_box_argument(filter):
    """The evaluation crop: fractional corners, and the filter sees pixels beyond the box."""
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (140, 170, 3), np.uint8)
    for _ in range(20):
        x0, y0, w, h = rng.random(4) * (60, 50, 100, 80) + (0, 0, 8, 8)
        box = (x0, y0, x0 + w, y0 + h)
        for size in (24, 90):
            assert difference(ours(image, box, size, filter), boxed(image, box, size, filter)) == 0, box


@FILTERS
def test_photographs_match_pillow(filter):
    folder = os.environ.get("FASTSSL_TEST_DATA")
    if not folder:
        pytest.skip("FASTSSL_TEST_DATA is not set: no real JPEGs (imagenet-sample/)")
    files = sorted((Path(folder) / "imagenet-sample").glob("*/*.JPEG"))[:60:10]
    assert files, f"no JPEGs in {folder}/imagenet-sample"
    rng = np.random.default_rng(2)
    for file in files:
        image = np.array(Image.open(file).convert("RGB"))
        height, width = image.shape[:2]
        for box in [*random_boxes(rng, height, width, 3), (0, 0, width, height)]:
            for size in (96, 224):
                ref = cropped(image, box, size, filter)
                assert difference(ours(image, box, size, filter, clip=box), ref) == 0, (file, box)


def cubic_matrix(start, end, low, high, size):
    """TensorFlow's law, float64 [size, high]: four taps of Keys' cubic (a = -0.5) round each centre, whatever the
    scale; those outside low..high left out and the rest scaled up to one."""
    matrix = np.zeros((size, high))
    for o in range(size):
        centre = start + (o + 0.5) * (end - start) / size - 0.5
        for x in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            d = abs(x - centre)
            near, far = (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2
            if low <= x < high:
                matrix[o, x] = near if d < 1 else far if d < 2 else 0
    return matrix / matrix.sum(axis=1, keepdims=True)


def test_cubic_without_antialias_matches_its_definition():
    rng = np.random.default_rng(5)
    image = rng.integers(0, 256, (60, 50, 3), np.uint8)
    for x0, y0, x1, y1 in [(0, 0, 50, 60), (3, 5, 44, 59), (10, 10, 20, 20), (48, 58, 50, 60)]:
        for size in (5, 16, 40):
            along_x, along_y = cubic_matrix(x0, x1, x0, x1, size), cubic_matrix(y0, y1, y0, y1, size)
            part = image[:y1, :x1].astype(float)
            exact = np.einsum("py,qx,yxc->pqc", along_y, along_x, part).clip(0, 255)
            out = ours(image, (x0, y0, x1, y1), size, Filter.BICUBIC_ALIASED, clip=(x0, y0, x1, y1))
            # the pass along the first axis clips to bytes, as Pillow's does; noise at an edge shows it
            assert np.median(np.abs(out - exact)) <= 0.5 and np.abs(out - exact).mean() <= 1


@EVERY_FILTER
def test_ramps_keep_their_place_and_direction(filter):
    """On value = x (and = y) a pixel centre reads off its own coordinate: catches half-pixel shifts, flips and
    exchanged axes, which would pass on symmetric images."""
    x, y = np.meshgrid(np.arange(200), np.arange(120))
    image = np.stack([x, y, 199 - x], axis=2).astype(np.uint8)
    for x0, y0, x1, y1, size in ((40, 20, 140, 60, 20), (30.5, 16.25, 110.5, 96.25, 16), (50, 30, 60, 40, 40)):
        out = ours(image, (x0, y0, x1, y1), size, filter)
        at_x = x0 + (np.arange(size) + 0.5) * (x1 - x0) / size - 0.5
        at_y = y0 + (np.arange(size) + 0.5) * (y1 - y0) / size - 0.5
        assert np.abs(out[:, :, 0] - at_x).max() <= 1
        assert np.abs(out[:, :, 1] - at_y[:, None]).max() <= 1
        assert np.abs(out[:, :, 2] - (199 - at_x)).max() <= 1


@FILTERS
def test_clip_decides_whether_the_surroundings_bleed_in(filter):
    """A black box in a white image: cut first it is all black; as a part of the whole its border is not."""
    image = np.full((60, 60, 3), 255, np.uint8)
    box = (20, 20, 40, 40)
    image[20:40, 20:40] = 0
    assert ours(image, box, 10, filter, clip=box).max() == 0
    bled = ours(image, box, 10, filter)
    assert bled[0].min() > 10 and bled[:, -1].min() > 10 and bled[4:6, 4:6].max() == 0


@EVERY_FILTER
def test_same_size_is_a_copy(filter):
    image = np.random.default_rng(3).integers(0, 256, (40, 50, 3), np.uint8)
    for box in ((0, 0, 32, 32), (7, 5, 39, 37)):
        x0, y0, x1, y1 = box
        assert (ours(image, box, 32, filter) == image[y0:y1, x0:x1]).all()
        assert (ours(image, box, 32, filter, clip=box) == image[y0:y1, x0:x1]).all()


@pytest.mark.parametrize("box", [(-1, 0, 9, 9), (0, 0, 51, 9), (0, 0, 9, 41), (5, 5, 5, 9), (0, 0, float("nan"), 9)])
def test_boxes_outside_are_errors_not_stray_reads(box):
    with pytest.raises(ValueError, match="box is not inside"):
        ours(np.zeros((40, 50, 3), np.uint8), box, 8, Filter.BILINEAR)


def test_clip_outside_is_an_error():
    with pytest.raises(ValueError, match="clip is not inside"):
        ours(np.zeros((40, 50, 3), np.uint8), (0, 0, 8, 8), 8, Filter.BILINEAR, clip=(0, 0, 51, 40))


CHECKED = """
import numpy as np
from loaders.renderers.resample import resize_boxes
rng = np.random.default_rng(4)
image = rng.integers(0, 256, (1, 97, 120, 3), np.uint8)
for size in (3, 8, 20):
    corner = np.floor(rng.random((200, 2)) * (60, 50))
    far = corner + 1 + np.floor(rng.random((200, 2)) * ((120, 97) - corner))
    boxes = np.concatenate([corner, far], axis=1)
    for cut_first in (False, True):
        for filter in (0, 1, 2):
            out = np.empty((len(boxes), size, size, 3), np.uint8)
            resize_boxes(image, np.zeros(len(boxes), np.int64), boxes, cut_first, filter, out)
"""


def test_nothing_is_read_or_written_outside_the_arrays(tmp_path):
    """Compiled code does not check its indices: taps of weight zero beyond the last row once crashed, at times."""
    environment = os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", CHECKED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
