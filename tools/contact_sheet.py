"""The views of a few images as each renderer makes them, side by side in one PNG: for a person to look at.

    python -m tools.contact_sheet [RECIPE] --data PATH [--images 4] [--step 0] [--out contact_sheet.png]

A block an image. In it a row a renderer: its crops after the finish, brought back to colours; then, for every
renderer but the first, how far its crops are from the first one's, eight times enlarged. All rows of a block come
from the same ids, boxes and parameters, so that a shift, a flip or another colour shows at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw

from fastssl.engine.join import facts_of
from fastssl.recipes.resolve import resolve
from fastssl.report.pictures import crops
from loaders.loader import Bound, bind
from loaders.plan.plan import Plan
from loaders.plan.views import Shuffled, Stream
from loaders.store.data import open_data

GAP, LABEL, ENLARGED, HEIGHT = 6, 60, 8, 128  # pixels; pixels; times; pixels of a crop in the sheet


def lines(by_renderer: dict[str, list[list[np.ndarray]]], i: int) -> Iterator[tuple[str, list[np.ndarray]]]:
    """The rows of image `i`'s block, with what stands before them."""
    first = next(iter(by_renderer))
    for name, images in by_renderer.items():
        yield name, images[i]
    for name, images in by_renderer.items():
        if name != first:
            pairs = zip(images[i], by_renderer[first][i], strict=True)
            apart = [np.abs(a.astype(int) - b) for a, b in pairs]
            mean = np.mean([a.mean() for a in apart])
            yield f"{name}\n- {first}\n{mean:.2f}/255", [(a * ENLARGED).clip(0, 255).astype(np.uint8) for a in apart]


def sheet(by_renderer: dict[str, list[list[np.ndarray]]], num_images: int) -> Image.Image:
    rows = [row for i in range(num_images) for row in lines(by_renderer, i)]
    width = LABEL + max(len(row) for _, row in rows) * (HEIGHT + GAP)
    page = Image.new("RGB", (width, len(rows) * (HEIGHT + GAP)), "white")
    draw = ImageDraw.Draw(page)
    for y, (name, row) in enumerate(rows):
        top = y * (HEIGHT + GAP)
        draw.text((GAP, top + GAP), name, fill="black")
        for x, crop in enumerate(row):
            shown = Image.fromarray(np.ascontiguousarray(crop)).resize((HEIGHT, HEIGHT), Image.Resampling.NEAREST)
            page.paste(shown, (LABEL + x * (HEIGHT + GAP), top))
    return page


def bound_to(recipe: str, changes: list[str], paths: list[str], stream: str | None, num_images: int) -> Bound:
    """The views of one of the recipe's streams, over a few images of the data."""
    data = open_data(tuple(paths))
    stage = resolve(recipe, tuple(changes))[0]
    plan = stage.config.build(facts_of(data, seed=0), {}).plan()
    chosen = plan.stream(stream or plan.epoch_of)
    few = Stream(chosen.name, chosen.source, chosen.views, Shuffled(), num_images)
    return bind(Plan((few,), few.name, plan.seed), data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="paws.rn50_100ep")
    parser.add_argument("--data", action="append", required=True, metavar="PATH")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes")
    parser.add_argument("--stream", help="default: the one that makes an epoch")
    parser.add_argument("--renderers", default="pil,turbo,ffcv,dali")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--step", type=int, default=0)
    parser.add_argument("--out", default="contact_sheet.png")
    arguments = parser.parse_args()
    bound = bound_to(arguments.recipe, arguments.changes, arguments.data, arguments.stream, arguments.images)
    stream = bound.plan.asked.epoch_of
    by_renderer = {
        renderer: [
            [crop for _, crop in image] for image in crops(bound, stream, arguments.step, renderer, arguments.images)
        ]
        for renderer in arguments.renderers.split(",")
    }
    sheet(by_renderer, arguments.images).save(arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
