"""What a conversion says of one file: kept, put right, or left out with the reason."""

from __future__ import annotations

import contextlib
import io
import random

import numpy as np
import pytest
from PIL import Image, ImageOps

from loaders.convert.judge import SAID, Outcome, Reencode, judge
from tests.support.conversions import PHOTO, PNG16, patched
from tests.support.imagenet_trees import (
    encoded,
)

FRAME = PHOTO.index(b"\xff\xc0") + 4  # bits, height, width


@pytest.mark.parametrize(
    ("data", "outcome"),
    [
        (PHOTO, Outcome.KEPT),
        (encoded(1, mode="L"), Outcome.KEPT),
        (encoded(1, progressive=True), Outcome.KEPT),
        (PHOTO + bytes(100), Outcome.KEPT),
        (encoded(1, mode="CMYK"), Outcome.WAS_CMYK),
        (encoded(1, form="PNG"), Outcome.WAS_PNG),
        (encoded(1, mode="RGBA", form="PNG"), Outcome.WAS_PNG),
        (b"", Outcome.EMPTY),
        (encoded(1, form="GIF"), Outcome.WAS_OTHER),
        (encoded(1, form="BMP"), Outcome.WAS_OTHER),
        (b"<html>not found</html>", Outcome.NOT_AN_IMAGE),
        (PNG16.getvalue(), Outcome.WAS_PNG),
        (patched(PHOTO, FRAME, b"\x0c"), Outcome.DEEP),
        (patched(PHOTO, FRAME + 1, b"\xf0\x00\xf0\x00"), Outcome.BOMB),
        (encoded(1, 9000, 9000, mode="L", form="PNG"), Outcome.BOMB),
        (PHOTO[:-2], Outcome.TRUNCATED),
        (PHOTO[: len(PHOTO) // 2], Outcome.TRUNCATED),
        (PHOTO[: FRAME - 2], Outcome.TRUNCATED),
        (PHOTO[:2], Outcome.TRUNCATED),
        (encoded(1, form="PNG")[:-30], Outcome.DAMAGED),
        (PHOTO[:FRAME] + b"\xff\xd9", Outcome.DAMAGED),
        (patched(PHOTO, PHOTO.index(b"\xff\xc4") + 5, b"\xff" * 16), Outcome.DAMAGED),
    ],
)
def test_verdicts(data, outcome):
    verdict = judge(data)
    assert verdict.outcome is outcome and outcome in SAID
    assert (verdict.height > 0) == outcome.in_set and (verdict.anew is not None) == (2 <= outcome <= 6)


def test_a_file_without_its_end_is_truncated_where_pillow_takes_it(test_data):
    """Why the end marker is looked for: Pillow decodes some files that lack it without a word."""
    taken = 0
    for file in sorted((test_data / "imagenet-sample").glob("*/*"))[:60]:
        data = file.read_bytes()[:-2]
        assert judge(data, decode_check=False).outcome is Outcome.TRUNCATED
        with contextlib.suppress(OSError), Image.open(io.BytesIO(data)) as image:
            image.load()
            taken += 1
    assert 0 < taken < 60


def test_damage_that_only_decoding_shows_needs_the_check():
    damaged = patched(PHOTO, PHOTO.index(b"\xff\xc4") + 5, b"\xff" * 16)
    assert judge(damaged).outcome is Outcome.DAMAGED
    assert judge(damaged, decode_check=False).outcome is Outcome.KEPT


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotated_images_become_upright(orientation):
    """Each of the seven turns against Pillow's own; a missed one gives a rotated image or swapped sides."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(3, 40, 64, exif=exif, quality=95)
    verdict = judge(data, decode_check=False)
    assert verdict.outcome is (Outcome.KEPT if orientation == 1 else Outcome.WAS_ROTATED)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert (verdict.width, verdict.height) == upright.size
    stored = Image.open(io.BytesIO(verdict.anew or data))
    assert stored.mode == "RGB" and stored.getexif().get(0x0112, 1) == 1
    assert np.abs(np.asarray(stored, int) - np.asarray(upright, int)).mean() < 2


def test_odd_images_keep_their_colours():
    for mode, form in (("CMYK", "JPEG"), ("RGB", "PNG")):
        data = encoded(5, 40, 64, mode=mode, form=form)
        stored = Image.open(io.BytesIO(judge(data).anew))
        original = Image.open(io.BytesIO(data)).convert("RGB")
        assert stored.mode == "RGB" and stored.size == (64, 40)
        assert np.abs(np.asarray(stored, int) - np.asarray(original, int)).mean() < 4


def test_reencoding_limits_the_longer_side_and_never_enlarges():
    small = judge(encoded(1, 100, 301), reencode=Reencode(80, 150))
    assert (small.outcome, small.height, small.width) == (Outcome.REENCODED, 50, 150)
    same = judge(encoded(1, 100, 301, mode="L"), reencode=Reencode(80, 400))
    assert (same.height, same.width) == (100, 301) and Image.open(io.BytesIO(same.anew)).mode == "L"


def test_mutated_images_have_a_verdict():
    """600 files with bytes changed, cut or doubled: a verdict, and what is kept is an image that decodes."""
    rng = random.Random(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    seeds = [PHOTO, encoded(1, form="PNG"), encoded(2, mode="CMYK"), encoded(3, exif=exif)]
    seeds.append(encoded(4, progressive=True))
    found = set()
    for k in range(600):
        data = bytearray(seeds[k % len(seeds)])
        for _ in range(rng.choice((1, 3, 30))):
            data[rng.randrange(len(data) if k % 2 else 200)] = rng.randrange(256)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        verdict = judge(bytes(data), reencode=Reencode(50, 20) if k % 7 == 0 else None)
        found.add(verdict.outcome)
        if verdict.outcome.in_set:
            with Image.open(io.BytesIO(verdict.anew or data), formats=("JPEG",)) as image:
                image.load()
                assert image.size == (verdict.width, verdict.height)
    assert {Outcome.KEPT, Outcome.WAS_PNG, Outcome.WAS_CMYK, Outcome.DAMAGED, Outcome.TRUNCATED} <= found
