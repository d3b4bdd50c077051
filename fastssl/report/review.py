"""A page of thumbnails, the least sure prediction first: by it a person chooses what to label next."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

from fastssl.evaluation.predict import Predictions
from fastssl.html.page import Html, element, page, paragraph
from loaders.errors import StoreError
from loaders.store.images import ImageError, decode
from loaders.store.source import ArraySource, Source, is_encoded

SIDE = 176  # pixels of a thumbnail, at most
MOST = 400  # thumbnails of a page: some megabytes


def review_page(run: Path, source: Source, found: Predictions) -> Html:
    """The page of what was predicted of `source`, at most MOST images of it."""
    doubt = np.argsort(found.margin, kind="stable")[:MOST].tolist()
    classes, seconds, sure = found.classes, found.runners_up, found.probability
    shown = f"the {len(doubt):,} least sure of {len(found):,}" if len(doubt) < len(found) else f"all {len(found):,}"
    cards = [_card(source, i, found.files[i], classes[i], float(sure[i]), seconds[i]) for i in doubt]
    return page(
        f"{run.name}: what to look at next",
        element("h1", "What to look at next"),
        paragraph(
            f"Images of {source.name} as ", element("code", run), f" sees them, {shown}, the least sure first: where "
            "the class is least ahead of the second. Those at the top teach most where a person labels them.",
            quiet=True,
        ),
        element("div", *cards, class_="thumbs"),
    )  # fmt: skip


def _card(source: Source, i: int, file: str, name: str, sure: float, second: str) -> Html:
    percent = f"{100 * sure:.0f} %"
    told = element("figcaption", element("b", name), f" {percent}", element("br"))
    other = element("span", f"or {second}", class_="quiet") if second else None
    return element("figure", _thumbnail(source, i, f"{file}: {name}, {percent}"), told, other, element("code", file))


def _thumbnail(source: Source, i: int, alt: str) -> Html:
    """The image inside a square of SIDE pixels; a sentence where it cannot be decoded."""
    try:
        image = _image(source, i)
    except (ImageError, StoreError) as error:
        return element("span", f"cannot be shown: {error}", class_="quiet")
    small = max(image.size) < SIDE // 4
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "PNG" if small else "JPEG", **({} if small else {"quality": 80}))
    kind = "png" if small else "jpeg"
    data = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
    return element("img", src=data, alt=alt, loading="lazy", class_="pixels" if small else None)


def _image(source: Source, i: int) -> Image.Image:
    if is_encoded(source):
        return decode(source.jpeg(i)).convert("RGB")
    assert isinstance(source, ArraySource)
    pixels = source.images[i]
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)).convert("RGB")
