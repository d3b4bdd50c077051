"""Label lists that papers publish: beside the data or from their public home, accepted with the pinned sha256 alone."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from loaders.errors import StoreError
from loaders.files import write_file

HOME = "https://raw.githubusercontent.com"
MAX_BYTES = 1 << 24  # the longest list has 2.6 MB
TIMEOUT_S = 20.0


@dataclass(frozen=True)
class PublishedList:
    """`repository` on GitHub and branch, `path` there; `alias`: a file name under which people keep the list. Where it
    is published as JSON, `as_lines` is the sha256 of its names one a line, which is the same list."""

    repository: str
    path: str
    alias: str
    sha256: str
    as_lines: str = ""

    @property
    def address(self) -> str:
        """Below HOME."""
        return f"{self.repository}/{self.path}"


_SIMCLR, _SUNCET = "google-research/simclr/master", "facebookresearch/suncet/main"
_S4L = "google-research/s4l/master"
PUBLISHED = {
    "simclr-1": PublishedList(
        _SIMCLR,
        "imagenet_subsets/1percent.txt",
        "simclr-1percent.txt",
        "71e82a48ba78252683ae334c4d019ebd5c6e855b9599c1389fbe83eb9549cf17",
    ),
    "simclr-10": PublishedList(
        _SIMCLR,
        "imagenet_subsets/10percent.txt",
        "simclr-10percent.txt",
        "6d09de11e7bdaf5b1f3b1f249b6183695f97310cdd20f0c03e7235b6b9392091",
    ),
    "paws-heldout": PublishedList(
        _SUNCET,
        "imagenet_subsets/val.txt",
        "paws-heldout-12-per-class.txt",
        "fde94a027633486479402248efb6c938763417979227555e4d541d36547a93a0",
    ),
    "s4l-1": PublishedList(
        _S4L,
        "label_map_count_13000_index_0",
        "s4l-1.txt",
        "18c3b29ae82707809a3509d039ce49d4f568be5af527c42414c8a18818a51acf",
        "c378a7ea97848539865f636f69f455381f729ddf5119c2c46882767e95782b92",
    ),
    "s4l-10": PublishedList(
        _S4L,
        "label_map_count_128000_index_0",
        "s4l-10.txt",
        "10b8703cf81452a852536fc5c7fd21c1abc3ac0997997dffaaec4a1a86087c17",
        "ef8ddc35e1fe376c51d4211625892507e90299a60a52a9715227c8ddb06271d9",
    ),
    **{
        f"paws-cifar10-4000-split-{seed}": PublishedList(
            _SUNCET, f"cifar10_subsets/spc.4000_split.{seed}.txt", f"paws-cifar10-4000-split-{seed}.txt", sha256
        )
        for seed, sha256 in {
            73: "05ce529e1f757519038a48224685b2a5a0e0849028ddb8cf700f723dd4fc4ba6",
            152: "1d8b8205e36137f750b6f762d5fb52329016de12a94015b8e5949beab4f57f8c",  # the authors' default
            91: "11914208239f272a2f1b71b5165015f91b80b4c4a51744ab68ec1bb5f8c326d8",
            321: "df1c1eecbecdc8e783eab52ff12f8825d6a445eacda59f321b332111795bf1cb",
            401: "737fd75cf37436bba00e1565a1667bc67e86a83207e1fe9895902d774ecc0fe5",
        }.items()
    },
}


def read_published(name: str, folders: Iterable[Path], home: str = HOME) -> tuple[Path, bytes]:
    """(where it lies, its bytes) of the list PUBLISHED[name].

    Looked for in `folders` under our name, its alias and its published name (a clone of its repository will do), then
    in the cache folder, then fetched from `home` into the cache. Raises StoreError where a file of our name has
    another content, and, with the address and a place to put the file, where it cannot be fetched.
    """
    folders, wanted = list(folders), PUBLISHED[name]
    for folder in [*folders, cache_folder()]:
        for file in (name, f"{name}.txt", wanted.alias):
            if (folder / file).is_file():
                return folder / file, _checked(name, read_file(folder / file), str(folder / file))
        for file in (wanted.path, Path(wanted.path).name):  # "val.txt" may well be somebody else's
            if (folder / file).is_file() and _sum(data := read_file(folder / file)) == wanted.sha256:
                return folder / file, data
    url = f"{home}/{wanted.address}"
    try:
        data = _checked(name, _fetch(url), url)
    except (OSError, http.client.HTTPException, ValueError) as e:
        if isinstance(e, StoreError):
            raise
        raise StoreError(
            f"label list {name} is neither beside the data nor could it be fetched from {url} ({e}): "
            f"fetch it elsewhere and save it as {(folders or [cache_folder()])[0] / wanted.alias}"
        ) from e
    return _keep(f"{name}.txt", data, url), data


def cache_folder() -> Path:
    """`lists` in $FASTSSL_CACHE, else in `fastssl` in the user's cache folder."""
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FASTSSL_CACHE") or Path(user) / "fastssl") / "lists"


def read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise StoreError(f"{path}: cannot be read: {e.strerror}") from e


def _fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
        data: bytes = answer.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise StoreError(f"{url}: more than {MAX_BYTES} bytes, not a label list")
    return data


def _checked(name: str, data: bytes, where: str) -> bytes:
    wanted, found = PUBLISHED[name], _sum(data)
    if found not in (wanted.sha256, wanted.as_lines):
        raise StoreError(f"{where}: not the published list {name}: its sha256 is {found}, not {wanted.sha256}")
    return data


def entries_of(data: bytes) -> list[str]:
    """The names on a list: one a line, or as S4L's authors publish theirs, JSON with the names under "values". Raises
    ValueError where it is neither."""
    if not data.lstrip().startswith(b"{"):
        return [line.strip() for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    values = json.loads(data).get("values")
    if not isinstance(values, list):
        raise ValueError('no names under "values"')
    return [str(value) for value in values]


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _keep(file: str, data: bytes, url: str) -> Path:
    """Put a fetched list into the cache, if that can be written; several processes may do so at once."""
    path = cache_folder() / file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, data)
    except OSError:  # a read-only home: fetched again next time
        return Path(url)
    return path
