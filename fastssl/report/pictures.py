"""A run's images and embeddings as pictures: crops as the training sees them, classes, t-SNE, confusion.

Every function looks at no more images than a page needs, and says which.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fastssl.errors import FastsslError
from fastssl.evaluation.soft_nn import TAU, soft_nn
from fastssl.evaluation.subject import Subject, eval_mode
from fastssl.html.charts import Bar, bar_chart, scatter
from fastssl.html.page import Html, element, numbers_behind, paragraph, table
from fastssl.methods.base import Method
from loaders.labels.subsets import Resolved, resolve
from loaders.loader import Bound, Loader, bind
from loaders.plan.plan import Plan, StreamFacts
from loaders.plan.views import Balanced, Pixels, Sequential, Shuffled, Stream, parse_subset
from loaders.store.data import LABELLED, VALIDATION, DataSets
from loaders.store.source import Source

SHEET_IMAGES = 5  # of each stream
TILE = 128  # pixels of a crop; smaller ones stay as they are
TSNE_IMAGES, TSNE_CLASSES = 1000, 20
MANY_IMAGES, FEW_IMAGES = 10_000, 1000  # for the confusion matrix: where embedding is quick, and where it is not
QUICK_SIZE = 64  # pixels up to which a CPU embeds quickly
MATRIX_CLASSES = 20  # beyond, a table of what is confused most


# ----------------------------------------------------------------------------------------------------- contact sheet


def crops(bound: Bound, stream: str, step: int, renderer: str, num_images: int) -> list[list[tuple[str, np.ndarray]]]:
    """[image][crop] (view name, uint8 [S, S, 3]): every row of every view of the batch's first images, normalisation
    undone."""
    views = {view.name: view for view in bound.plan.asked.stream(stream).views}
    images: list[list[tuple[str, np.ndarray]]] = [[] for _ in range(num_images)]
    with Loader(bound, renderer=renderer) as loader, closing(loader.batches(step, step + 1)) as batches:
        part = next(batches).parts[stream]
        for name, x in part.x.items():
            rows = x.permute(0, 2, 3, 1).numpy().reshape(-1, len(part.ids), *x.shape[2:], x.shape[1])
            for row in rows:
                for i in range(num_images):
                    images[i].append((name, colours(row[i], views[name].pixels)))
    return images


def colours(x: np.ndarray, pixels: Pixels) -> np.ndarray:
    """Finished float [S, S, C] -> uint8 [S, S, 3]."""
    values = x * np.array(pixels.std, np.float32) + np.array(pixels.mean, np.float32)
    return np.broadcast_to((values * 255).round().clip(0, 255).astype(np.uint8), (*x.shape[:2], 3))


def contact_sheet(method: Method[Any, Any], data: DataSets) -> Html:
    """A few images of each stream: as they are evaluated, then every view that one training step makes of them."""
    plan = method.plan()
    return element("div", *(_sheet(stream, method, plan.seed, data) for stream in plan.streams), class_="sheets")


def _sheet(stream: Stream, method: Method[Any, Any], seed: int, data: DataSets) -> Html:
    source = data.get(stream.source)
    num_images = min(SHEET_IMAGES, resolve(stream.ids, source, data.search).count)
    as_evaluated = replace(method.config.eval_view, name="as evaluated")
    few = replace(stream, views=(as_evaluated, *stream.views), order=Shuffled(), batch_global=num_images)
    images = crops(bind(Plan((few,), few.name, seed), data), few.name, 0, "auto", num_images)
    heads = [
        element("span", name, style=f"grid-column:span {sum(view == name for view, _ in images[0])}")
        for name in dict.fromkeys(view for view, _ in images[0])
    ]
    tiles = [
        _image(crop, f"image {i + 1} of stream {stream.name}, {view}")
        for i, image in enumerate(images)
        for view, crop in image
    ]
    shape = f"grid-template-columns:repeat({len(images[0])},minmax(0,5.2rem))"
    sheet = element("div", *heads, *tiles, class_="crops", style=shape)
    return element("div", element("h3", f"Stream {stream.name}"), sheet)


def _image(crop: np.ndarray, alt: str) -> Html:
    """Small crops pixel for pixel, larger ones as JPEG of at most TILE pixels."""
    picture, small = Image.fromarray(np.ascontiguousarray(crop)), max(crop.shape[:2]) <= QUICK_SIZE
    file = io.BytesIO()
    if small:
        picture.save(file, "PNG", optimize=True)
    else:
        picture.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
        picture.save(file, "JPEG", quality=82)
    data = f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"
    return element("img", src=data, alt=alt, class_="pixels" if small else None)


# ----------------------------------------------------------------------------------------------------------- classes


def class_histograms(method: Method[Any, Any], data: DataSets) -> Html:
    """How many images of each class every stream draws from, and the validation images."""
    plan, sets = method.plan(), []
    for stream in plan.streams:
        source = data.get(stream.source)
        subset = resolve(stream.ids, source, data.search)
        how = f"each step {stream.batch_global:,} of {subset.count:,} ({subset.name})"
        if isinstance(stream.order, Balanced):
            how = (
                f"each step {stream.order.per_class} of each of {stream.order.classes_global} classes, from "
                f"{subset.count:,} ({subset.name})"
            )
        sets.append((f"Stream {stream.name}: {how}", source, subset.ids))
    if (validation := data.get(VALIDATION)) is not None:
        sets.append((f"Validation: {len(validation):,}", validation, None))
    return element("div", *(_histogram(*each) for each in sets), class_="charts")


def _histogram(title: str, source: Source, ids: np.ndarray | None) -> Html:
    labels = source.labels if ids is None else source.labels[ids]
    unlabelled = int((labels < 0).sum())
    if unlabelled == len(labels):
        return element("figure", element("figcaption", title), paragraph("No image carries a label.", quiet=True))
    counts = np.bincount(labels[labels >= 0], minlength=source.num_classes).tolist()
    rest = f"; {unlabelled:,} without a label" if unlabelled else ""
    chart = bar_chart(title + rest, [Bar(n, c) for n, c in zip(source.class_names, counts, strict=True)])
    if len(counts) <= MATRIX_CLASSES:
        return chart  # it has every number already
    rows = sorted(zip(source.class_names, counts, strict=True), key=lambda row: row[1])
    return element("div", chart, numbers_behind(("class", "images"), rows, "Classes by size"))


# -------------------------------------------------------------------------------------------------------- embeddings


@dataclass(frozen=True)
class Embedded:
    """Images of one source: ids and labels int64 [N], ascending by id, and float32 [N, D] by tap."""

    source: Source
    ids: np.ndarray
    labels: np.ndarray
    values: dict[str, Tensor]


def embedded(subject: Subject, source: Source, ids: np.ndarray, taps: Sequence[str]) -> Embedded:
    """The images `ids` (ascending) in the evaluation view at `taps`. Raises FastsslError where they are not finite."""
    view, name = subject.method.config.eval_view, "shown"
    stream = Stream(name, name, (view,), Sequential(), min(128, len(ids)))
    facts = StreamFacts(ids, source.labels, source.sizes, source.num_classes)
    shown = Resolved(ids, "shown in the report", "", len(ids))
    bound = Bound(Plan((stream,), name, 0).bind({name: facts}), {name: source}, {name: shown}, {name: shown})
    found: dict[str, list[Tensor]] = {tap: [] for tap in taps}
    with (
        Loader(bound, device=subject.device, threads=subject.threads) as loader,
        eval_mode(subject.nets),
        torch.no_grad(),
        closing(loader.batches(0, bound.plan.num_steps(name))) as batches,
    ):
        for batch in batches:
            for tap in taps:
                z_ND = subject.method.embed(subject.nets, batch.parts[name].x[view.name], tap)
                found[tap].append(z_ND.float().cpu())
            batch.release()
    values = {tap: torch.cat(rows) for tap, rows in found.items()}
    if not all(torch.isfinite(v).all() for v in values.values()):
        raise FastsslError("embeddings are not finite: the training has diverged")
    return Embedded(source, ids, source.labels[ids], values)


def sample(ids: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of `ids`, always the same ones, ascending."""
    return ids if len(ids) <= most else np.sort(np.random.default_rng(0).choice(ids, most, replace=False))


def embedding_pictures(subject: Subject) -> tuple[Html, Html]:
    """t-SNE of the backbone's embeddings, and the confusion matrix of what the method predicts."""
    taps = subject.method.taps
    validation = subject.data.get(VALIDATION)
    if validation is None:
        labelled, ids = _labelled(subject)
        seen = embedded(subject, labelled, _few_classes(labelled, ids), taps[:1])
        missing = paragraph("There are no validation images, so nothing can be confused: give --data validation=PATH.")
        return _tsne(seen, taps[0], "labelled training images, there being no validation images"), missing
    ids = np.flatnonzero(validation.labels >= 0)
    if not len(ids):
        missing = paragraph("The validation images carry no labels, so nothing can be confused.")
        seen = embedded(subject, validation, sample(np.arange(len(validation)), TSNE_IMAGES), taps[:1])
        return _tsne(seen, taps[0], "validation images"), missing
    for_tsne, for_matrix = _few_classes(validation, ids), sample(ids, _affordable(subject))
    both = embedded(subject, validation, np.union1d(for_tsne, for_matrix), (taps[0], taps[-1]))
    tsne = _tsne(_only(both, for_tsne), taps[0], "validation images")
    return tsne, _confusion(subject, _only(both, for_matrix), len(ids))


def _only(all_of: Embedded, ids: np.ndarray) -> Embedded:
    rows = np.searchsorted(all_of.ids, ids)
    values = {tap: v[torch.from_numpy(rows)] for tap, v in all_of.values.items()}
    return Embedded(all_of.source, ids, all_of.labels[rows], values)


def _labelled(subject: Subject) -> tuple[Source, np.ndarray]:
    """Where the images with labels come from, and those whose labels the method sees."""
    source = subject.data.get(LABELLED)
    ids = resolve(parse_subset(subject.method.config.labels), source, subject.data.search).ids
    ids = np.arange(len(source)) if ids is None else ids
    return source, ids[source.labels[ids] >= 0]


def _affordable(subject: Subject) -> int:
    quick = subject.device.type == "cuda" or subject.method.config.eval_view.size <= QUICK_SIZE
    return MANY_IMAGES if quick else FEW_IMAGES


def _few_classes(source: Source, ids: np.ndarray) -> np.ndarray:
    """A sample of TSNE_IMAGES from TSNE_CLASSES classes, evenly spaced where there are more."""
    classes = np.linspace(0, source.num_classes - 1, min(TSNE_CLASSES, source.num_classes)).round()
    return sample(ids[np.isin(source.labels[ids], classes)], TSNE_IMAGES)


def _tsne(seen: Embedded, tap: str, what: str) -> Html:
    from sklearn.manifold import TSNE

    count = len(seen.ids)
    if count < 5:
        return paragraph(f"{count} images are too few to map.")
    unit = F.normalize(seen.values[tap], dim=1).numpy()
    places = TSNE(perplexity=min(30.0, (count - 1) / 3), init="pca", random_state=0).fit_transform(unit)
    classes = sorted(set(seen.labels.tolist()))
    names = [seen.source.class_names[c] if c >= 0 else "without a label" for c in classes]
    shown = f"{len(classes)} of {seen.source.num_classes} classes" if len(classes) < seen.source.num_classes else ""
    alt = f"map of {count} embeddings coloured by class"
    said = paragraph(
        f"{count:,} {what}{f' of {shown}' if shown else ''}, embedded at {tap!r}, t-SNE of cosine distances. Near "
        "points are alike; distances between clusters and the axes mean nothing."
    )
    return said + scatter(places.tolist(), [classes.index(c) for c in seen.labels.tolist()], names, alt)


def _confusion(subject: Subject, seen: Embedded, num_validation: int) -> Html:
    tap = subject.method.taps[-1]
    if tap == "logits":
        predicted, how = seen.values[tap].argmax(dim=1), "its classifier"
    else:
        source, ids = _labelled(subject)
        bank = embedded(subject, source, sample(ids, _affordable(subject)), (tap,))
        predicted = soft_nn(
            seen.values[tap], bank.values[tap], torch.from_numpy(bank.labels), source.num_classes, device=subject.device
        ).argmax(dim=1)
        of = f"{len(bank.ids):,} of {len(ids):,}" if len(bank.ids) < len(ids) else f"{len(ids):,}"
        how = f"soft nearest neighbours (temperature {TAU}) among {of} labelled images"
    num_classes, names = seen.source.num_classes, seen.source.class_names
    pairs = np.bincount(seen.labels * num_classes + predicted.cpu().numpy(), minlength=num_classes**2)
    counts_KK = pairs.reshape(num_classes, num_classes)
    correct, total = int(np.trace(counts_KK)), len(seen.ids)
    of = f"{total:,} of {num_validation:,}" if total < num_validation else f"{total:,}"
    share = f"{100 * correct / total:.1f}\u00a0%"
    said = paragraph(f"Classified by {how}: {correct:,} of {of} validation images right, {share}.")
    off_KK = counts_KK - np.diag(np.diag(counts_KK))
    worst = [divmod(int(i), num_classes) for i in off_KK.ravel().argsort()[::-1][:12] if off_KK.ravel()[i]]
    rows = [(names[t], names[p], int(counts_KK[t, p]), int(counts_KK[t].sum())) for t, p in worst]
    most = numbers_behind(("class", "taken for", "images", "of"), rows, "What is confused most")
    if num_classes > MATRIX_CLASSES:
        return said + (table(("class", "taken for", "images", "of"), rows) if rows else Html())
    return said + _matrix(counts_KK, names) + most


def _matrix(counts_KK: np.ndarray, names: Sequence[str]) -> Html:
    """Rows are true classes, columns predictions; a cell's depth is its share of the row."""
    share_KK = 100 * counts_KK / counts_KK.sum(axis=1, keepdims=True).clip(min=1)
    head = element("tr", element("td"), *(element("th", element("span", name), scope="col") for name in names))
    body = []
    for t, name in enumerate(names):
        cells = [
            # the square root lets the few mistakes show beside the many hits
            element("td", int(count) or Html("&middot;"), class_="right" if p == t else None,
                    style=f"--v:{5.5 * share_KK[t, p] ** 0.5:.0f}")
            for p, count in enumerate(counts_KK[t])
        ]  # fmt: skip
        body.append(element("tr", element("th", name, scope="row"), *cells))
    grid = element("table", element("thead", head), element("tbody", *body), class_="confusion")
    return paragraph("Rows are true classes, columns what they are taken for.", quiet=True) + element(
        "div", grid, class_="scroll"
    )
