"""The memory and pil renderers: the same pixels from the same rows, in the promised places, and errors with names."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from loaders.errors import RenderError
from loaders.plan.plan import Plan, StreamFacts
from loaders.plan.views import Centre, Filter, Rrc, Shuffled, Stream, View, Whole
from loaders.renderers.memory import MemoryRenderer
from loaders.renderers.pil import PilRenderer
from loaders.store.beton import BetonSource, BetonWriter
from loaders.store.folder import FolderSource
from loaders.store.source import ArraySource

NUM, HEIGHT, WIDTH, BATCH = 12, 40, 48, 9
VIEWS = (
    View("global", 24, Rrc((0.3, 1.0)), copies=2),
    View("local", 9, Rrc((0.05, 0.3)), copies=3, filter=Filter.BICUBIC),
    View("centre", 20, Centre(28)),
    View("whole", 16, Whole()),
)


@pytest.fixture(scope="module")
def pool():
    with ThreadPoolExecutor(2) as pool:
        yield pool


def smooth_images() -> np.ndarray:
    """uint8 [NUM, HEIGHT, WIDTH, 3], each a different enlarged noise."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (NUM, 5, 6, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(s).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)) for s in small])


def rows_for(source, views=VIEWS, batch=BATCH):
    sizes = np.array(source.sizes)
    labels = np.zeros(len(source), np.int64)
    plan = Plan((Stream("s", "train", views, Shuffled(), batch),), "s", seed=5)
    return plan.bind({"s": StreamFacts(None, labels, sizes, 1)}).rows("s", 0)


def render(renderer, rows, channels=3):
    out = {}
    for v in rows.views:
        shape = (v.view.copies * len(rows.ids), v.view.size, v.view.size, channels)
        out[v.view.name] = np.full(shape, 99, np.uint8)
    renderer.render(rows, out)
    return out


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def encode(image: np.ndarray, form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, form, **({"quality": 95} if form == "JPEG" else {}))
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_memory_and_pil_agree_on_every_view(tmp_path, pool, form):
    """One plan, two renderers: any shift, swapped copy, missing clip or wrong filter shows as a difference."""
    files = [encode(image, form) for image in smooth_images()]
    for i, data in enumerate(files):
        (tmp_path / f"{i:03}.{form.lower()}").write_bytes(data)
    folder = FolderSource(tmp_path)
    pixels = np.stack([decoded(data) for data in files])
    array = ArraySource("arrays", pixels, np.full(NUM, -1, np.int64), ())
    rows = rows_for(array)
    from_memory, from_files = render(MemoryRenderer(array, pool), rows), render(PilRenderer(folder, pool), rows)
    for name in from_memory:
        assert (from_memory[name] == from_files[name]).all(), name
        assert from_memory[name].std() > 20, name


def test_rows_are_copy_major_and_cut_from_their_own_image(pool):
    """Every image is one colour, so each row of the result says which image it came from."""
    images = np.arange(NUM, dtype=np.uint8)[:, None, None, None] * np.full((1, HEIGHT, WIDTH, 1), 20, np.uint8)
    source = ArraySource("flat", images, np.full(NUM, -1, np.int64), ())
    rows = rows_for(source)
    out = render(MemoryRenderer(source, pool), rows, channels=1)
    for v in rows.views:
        expected = np.tile(rows.ids * 20, v.view.copies)
        assert (out[v.view.name] == expected[:, None, None, None]).all(), v.view.name


def test_more_images_than_one_task_are_all_rendered(pool):
    """200 images are several tasks of the pool: a wrong stretch would leave rows untouched or written twice."""
    images = np.random.default_rng(1).integers(0, 256, (200, 8, 8, 1), np.uint8)
    source = ArraySource("noise", images, np.full(200, -1, np.int64), ())
    rows = rows_for(source, (View("whole", 8, Whole(), copies=2),), batch=200)
    out = render(MemoryRenderer(source, pool), rows, channels=1)["whole"]
    assert (out == images[np.tile(rows.ids, 2)]).all()


def test_grey_and_cmyk_files_become_rgb_and_what_lies_sideways_upright(tmp_path, pool):
    grey = np.asarray(Image.fromarray(smooth_images()[0]).convert("L"))
    Image.fromarray(grey).save(tmp_path / "0.jpg", quality=95)
    Image.fromarray(smooth_images()[1]).convert("CMYK").save(tmp_path / "1.jpg", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    Image.fromarray(smooth_images()[2]).save(tmp_path / "2.jpg", quality=95, exif=exif)
    source = FolderSource(tmp_path)
    assert source.sizes.tolist() == [[HEIGHT, WIDTH], [HEIGHT, WIDTH], [WIDTH, HEIGHT]]
    rows = rows_for(source, (View("whole", 40, Centre()),), batch=3)
    out = render(PilRenderer(source, pool), rows)["whole"]
    at = np.argsort(rows.ids)
    offset = (WIDTH - 40) // 2
    assert np.ptp(out[at[0]].astype(int), axis=2).max() == 0
    for i in range(3):
        whole = decoded(source.jpeg(i))
        if i == 2:
            whole = np.rot90(whole, -1)
        at_y, at_x = (0, offset) if i < 2 else (offset, 0)
        assert (out[at[i]] == whole[at_y : at_y + 40, at_x : at_x + 40]).all()


def beton_of(path, files):
    with BetonWriter(path, len(files), page_size=1 << 21) as writer:
        for i, data in enumerate(files):
            writer.add(data, 0, f"n01_{i}.JPEG")
    return BetonSource(path)


def test_corrupt_jpeg_names_id_and_file(tmp_path, pool):
    files = [encode(image, "JPEG") for image in smooth_images()]
    files[7] = files[7][: len(files[7]) // 2]  # header whole, pixels cut off
    source = beton_of(tmp_path / "set.beton", files)
    with pytest.raises(RenderError, match=r"image 7 \(n01_7\.JPEG\).*set\.beton.*truncated"):
        render(PilRenderer(source, pool), rows_for(source, batch=NUM))
    assert np.shape(PilRenderer(source, pool).decode(6)) == (HEIGHT, WIDTH, 3)


def test_image_of_another_size_than_its_source_says_is_an_error(tmp_path, pool):
    """Boxes are drawn from the table's sizes: a file replaced by a smaller one must not be cropped with them."""
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(encode(smooth_images()[i], "PNG"))
    source = FolderSource(tmp_path)
    assert source.sizes.tolist() == [[40, 48], [40, 48]]
    (tmp_path / "1.png").write_bytes(encode(smooth_images()[1][:20], "PNG"))
    with pytest.raises(RenderError, match=r"image 1 \(1\.png\).*it is 48 x 20, its source says 48 x 40"):
        PilRenderer(source, pool).decode(1)


def test_error_waits_for_the_other_tasks(pool):
    """A buffer that is still written to after the error would corrupt the next batch."""
    import threading

    from loaders.renderers.spread import spread

    done = []
    slow = threading.Event()

    def work(begin, end):
        if begin == 0:
            slow.set()
            raise ValueError("first")
        slow.wait()
        threading.Event().wait(0.05)
        done.append(begin)

    with pytest.raises(ValueError, match="first"):
        spread(pool, work, 5, 2)
    assert sorted(done) == [2, 4]
