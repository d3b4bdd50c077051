"""Embeddings as files that any tool reads: three `.npy` arrays, a table of their rows, and a small JSON that says what
they are."""

from __future__ import annotations

import csv
import io
import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from torch import Tensor

from fastssl import dist
from fastssl.evaluation.shards import passing, totals, whole
from fastssl.evaluation.subject import Subject
from loaders.files import sha256_of, whole_file, write_file
from loaders.store.source import Source


def embed(subject: Subject, role: str, tap: str, out: Path) -> Path:
    """Write the embeddings of `role` at `tap` into the folder `out`; all ranks call it, the main one writes.

    `<role>.features.npy` float32 [N, D], `<role>.labels.npy` int64 [N] (-1: none), `<role>.ids.npy` int64 [N],
    `<role>.csv`, which says of each row its id, its file (the path from the data's folder; the id where images are not
    files) and its class (empty: none), and `<role>.json`, which holds the names of the labels' classes and the hashes
    of the others and is written last: where it stands, they are whole. Returns the path of the JSON.
    """
    features = subject.features(role, tap)
    about = out / f"{role}.json"
    if dist.is_main():
        out.mkdir(parents=True, exist_ok=True)
        about.unlink(missing_ok=True)
    arrays = {"features": features.values, "labels": features.labels, "ids": features.ids}
    paths = {name: out / f"{role}.{name}.npy" for name in arrays}
    for name, array in arrays.items():
        _save(paths[name], array)
    labels, ids = whole(features.labels), whole(features.ids)
    if dist.is_main():
        files = {name: {"file": path.name, "sha256": sha256_of(path)} for name, path in paths.items()}
        table = out / f"{role}.csv"
        write_file(table, _table(labels, ids, subject.source_of(role)))
        described = {"tap": tap, "role": role, **subject.provenance((role,))[role]}
        described["table"] = {"file": table.name, "sha256": sha256_of(table)}
        names = subject.source_of(role).class_names
        write_file(about, json.dumps({**described, "class_names": names, "files": files}, indent=2))
    dist.barrier()
    return about


def _save(path: Path, own_ND: Tensor) -> None:
    """Write the rows of all ranks as NumPy does. They pass by the one that writes: it need not have room for all."""
    (count,) = totals(len(own_ND))
    header = {"descr": own_ND.numpy().dtype.str, "fortran_order": False, "shape": (count, *own_ND.shape[1:])}
    with whole_file(path) if dist.is_main() else nullcontext() as file:
        if file is not None:
            np.lib.format.write_array_header_1_0(file, header)
        for (rows,) in passing(own_ND, device=dist.message_device()):
            if file is not None:
                file.write(rows.cpu().numpy().tobytes())


def _table(labels_N: Tensor, ids_N: Tensor, source: Source) -> str:
    """What each row is of, as CSV."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("row", "id", "file", "class"))
    names = (*source.class_names, "")  # -1 picks the last
    pairs = zip(ids_N.tolist(), labels_N.tolist(), strict=True)
    table.writerows((row, i, source.path_of(i), names[label]) for row, (i, label) in enumerate(pairs))
    return text.getvalue()
