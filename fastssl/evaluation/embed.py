"""Embeddings as files that any tool reads: three `.npy` arrays and a small JSON that says what they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from fastssl import dist
from fastssl.evaluation.subject import Subject
from loaders.files import sha256_of, whole_file, write_file


def embed(subject: Subject, role: str, tap: str, out: Path) -> Path:
    """Write the embeddings of `role` at `tap` into the folder `out`; all ranks call it, the main one writes.

    `<role>.features.npy` float32 [N, D], `<role>.labels.npy` int64 [N] (-1: none), `<role>.ids.npy` int64 [N], and
    `<role>.json`, which holds the names of the labels' classes and the arrays' hashes and is written last: where it
    stands, they are whole. Returns the path of the JSON.
    """
    features = subject.features(role, tap)
    about = out / f"{role}.json"
    if dist.is_main():
        out.mkdir(parents=True, exist_ok=True)
        about.unlink(missing_ok=True)
        files = {}
        for name, array in (("features", features.values), ("labels", features.labels), ("ids", features.ids)):
            path = out / f"{role}.{name}.npy"
            with whole_file(path) as file:
                np.save(file, array.numpy(), allow_pickle=False)
            files[name] = {"file": path.name, "sha256": sha256_of(path)}
        described = {"tap": tap, "role": role, **subject.provenance((role,))[role]}
        names = subject.class_names_of(role)
        write_file(about, json.dumps({**described, "class_names": names, "files": files}, indent=2))
    dist.barrier()
    return about
