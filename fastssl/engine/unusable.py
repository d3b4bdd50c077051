"""Images that cannot be used, by their headers: found before the first step, and listed all at once in a file of the
run."""

from __future__ import annotations

import csv
import io

import numpy as np

from fastssl import dist
from fastssl.engine.job import Job
from fastssl.engine.join import bounds_of
from loaders.errors import StoreError
from loaders.files import write_file
from loaders.loader import Bound
from loaders.store.data import DataSets
from loaders.store.source import is_encoded

LIST = "damaged.tsv"
_MAX_SAID = 3


def refuse_or_list(job: Job, data: DataSets) -> None:
    """Write `damaged.tsv` of the job's directory: which of the images that its stages and their evaluations draw cannot
    be used, and why. Raises, on every rank alike, StoreError where there are some and none may stand in for them, which
    names the first; and as `joined` does."""
    found = unusable([bound for stage in job.stages for bound in bounds_of(job, stage, data)])
    path = job.out / LIST
    if dist.is_main():
        if found:
            write_file(path, _table(found))
        else:
            path.unlink(missing_ok=True)
    if found and job.damaged == "stop":
        raise StoreError(
            f"{said(found)}; all are listed in {path}: mend or remove them, or let others of their label stand in with "
            "--damaged replace"
        )
    if found and dist.is_main():
        print(f"warning: {said(found)}; others of their label stand in; all are listed in {path}", flush=True)


def unusable(bounds: list[Bound]) -> dict[tuple[str, str], str]:
    """{(data, file): why} of the images that `bounds` draw from and that cannot be used."""
    found = {}
    for bound in bounds:
        for stream, source in bound.sources.items():
            unreadable, ids = source.unreadable if is_encoded(source) else {}, bound.subsets[stream].ids
            drawn = unreadable if ids is None else np.intersect1d(ids, list(unreadable)).tolist()
            found.update({(source.name, source.path_of(i)): unreadable[i] for i in drawn})
    return dict(sorted(found.items()))


def said(found: dict[tuple[str, str], str]) -> str:
    """How many, and the first of them."""
    named = [f"{file} ({why})" for (_, file), why in list(found.items())[:_MAX_SAID]]
    more = ", ..." if len(found) > _MAX_SAID else ""
    return f"{len(found):,} {'image' if len(found) == 1 else 'images'} cannot be used: {', '.join(named)}{more}"


def _table(found: dict[tuple[str, str], str]) -> str:
    text = io.StringIO()
    table = csv.writer(text, delimiter="\t", lineterminator="\n")
    table.writerow(("data", "file", "why"))
    table.writerows((data, file, why) for (data, file), why in found.items())
    return text.getvalue()
