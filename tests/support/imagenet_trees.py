"""Synthetic ImageNets for tests of the conversion: a folder, and the same images as official archives."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

TRAIN_TAR, VAL_TAR, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"


def encoded(seed: int, height: int = 24, width: int = 32, mode: str = "RGB", form: str = "JPEG", **options) -> bytes:
    """A smooth image, different for each seed."""
    rng = np.random.default_rng(seed)
    shape = (3, 4) if mode == "L" else (3, 4, len(mode))
    image = Image.fromarray(rng.integers(0, 256, shape, np.uint8), mode)
    buffer = io.BytesIO()
    image.resize((width, height), Image.Resampling.BICUBIC).save(buffer, form, **options)
    return buffer.getvalue()


def wnids(num_classes: int) -> list[str]:
    return [f"n{7 * c + 1440764:08d}" for c in range(num_classes)]


def folder_tree(root: Path, num_classes: int, per_class: int = 2, val_per_class: int = 1) -> Path:
    """`train/<wnid>/<wnid>_<k>.JPEG` and `val/<wnid>/ILSVRC2012_val_<k>.JPEG`; validation images of mixed classes."""
    order = np.random.default_rng(1).permutation(num_classes * val_per_class) + 1
    for c, wnid in enumerate(wnids(num_classes)):
        train, val = root / "train" / wnid, root / "val" / wnid
        train.mkdir(parents=True)
        val.mkdir(parents=True)
        for k in range(per_class):
            (train / f"{wnid}_{9 + k}.JPEG").write_bytes(encoded(1000 * c + k, height=20 + c % 7))
        for k in range(val_per_class):
            number = order[c * val_per_class + k]
            (val / f"ILSVRC2012_val_{number:08d}.JPEG").write_bytes(encoded(1000 * c + 500 + k))
    return root


def add(tar: tarfile.TarFile, name: str, data: bytes, **fields) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in files.items():
            add(tar, name, data)
    return buffer.getvalue()


def devkit(ids: dict[str, int], truth: list[int], compress: bool = True) -> bytes:
    """meta.mat as SciPy writes it, an independent author; and the ground truth. `ids`: wnid -> ILSVRC2012_ID."""
    fields = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("num_children", "f8"), ("children", "O")]
    inner = [(1000 + len(ids) + k, f"n9{k:07d}", "an inner node", 2, np.array([1, 2])) for k in range(3)]
    rows = [(number, wnid, "a thing, a sort", 0, np.zeros(0)) for wnid, number in ids.items()] + inner
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": np.array(rows, fields)[:, None]}, do_compression=compress)
    data = "ILSVRC2012_devkit_t12/data/"
    text = "".join(f"{k}\n" for k in truth).encode()
    files = {data + "meta.mat": meta.getvalue(), data + "ILSVRC2012_validation_ground_truth.txt": text}
    return tar_of({"ILSVRC2012_devkit_t12/readme.txt": b"hello", **files}, "w:gz")


def official_tree(root: Path, folders: Path) -> Path:
    """The images of `folders`, a folder_tree, as ImageNet ships them: in no order, development kit ids shuffled."""
    rng = np.random.default_rng(2)
    root.mkdir(parents=True)
    classes = sorted(p.name for p in (folders / "train").iterdir())
    shuffled = [classes[k] for k in rng.permutation(len(classes))]
    inner = {}
    for wnid in shuffled:
        files = sorted((folders / "train" / wnid).iterdir(), reverse=True)
        inner[f"{wnid}.tar"] = tar_of({f.name: f.read_bytes() for f in files})
    (root / TRAIN_TAR).write_bytes(tar_of(inner))
    val = {f.name: f for f in (folders / "val").glob("*/*")}
    (root / VAL_TAR).write_bytes(tar_of({name: val[name].read_bytes() for name in sorted(val)}))
    ids = {wnid: k + 1 for k, wnid in enumerate(shuffled)}
    (root / DEVKIT).write_bytes(devkit(ids, [ids[val[name].parent.name] for name in sorted(val)]))
    return root
