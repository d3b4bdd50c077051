"""What is foreground in each image of a set: saliency masks, one bit a pixel, in a file of their own.

Masks come from outside: from whatever network a user trusts, or from `python -m tools.saliency`, which needs none. A
file of masks belongs to one source, which it names by its fingerprint, and is complete: one mask an image, of the
image's size. It says what made the masks, and whether that had seen labels: a method that learns from few labels must
not look at many through a mask.

Layout, little-endian::

    magic      16 bytes
    header     4 bytes of length, then JSON: of, source, num_masks, made_by, saw_labels
    masks      of each image in order: a record (below), then its bits by rows, eight a byte, deflated
    table      all records once more, to the end of the file

While masks are still being made, the file has another name and no table: it is only ever appended to, and what is
sound at its beginning stays when it is continued.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np

from loaders.errors import StoreError
from loaders.files import partial_of, put
from loaders.store.open_file import OpenFile
from loaders.store.source import Concatenated, Source, digest, joined_name

_MAGIC = b"fastssl masks 1\n"
_RECORD = np.dtype([("ptr", "<u8"), ("size", "<u4"), ("height", "<u4"), ("width", "<u4"), ("foreground", "<u4")])
_HEADER_BYTES = 1 << 16  # at most


class Masks(Protocol):
    """The masks of a source's images 0..N-1: those of a file, or whatever else a program has."""

    @property
    def name(self) -> str:
        """What messages call them."""

    @property
    def about(self) -> str:
        """What made them, and whether it had seen labels."""

    @property
    def foreground(self) -> np.ndarray:
        """float64 [N], the share of each image that is foreground."""

    def mask(self, i: int) -> np.ndarray:
        """bool [H, W], true where image `i` shows foreground. Safe to call from several threads."""

    def fingerprint(self) -> str:
        """sha256 over what identifies the masks."""


def mask_of(masks: Masks, source: Source, i: int) -> np.ndarray:
    """The mask of image `i` of `source`. Raises StoreError where it is not of the image's size: renderers read pixels
    by address."""
    mask = masks.mask(i)
    if mask.dtype != bool or mask.ndim != 2:
        raise StoreError(f"{masks.name}: the mask of image {i} is {mask.dtype} {list(mask.shape)}, not bool [H, W]")
    if mask.shape != tuple(source.sizes[i].tolist()):
        raise _of_another_size(masks.name, source, i, *mask.shape)
    return mask


class MaskFile(OpenFile):
    """An open file of masks; tables are checked against the file's length before anything trusts them. Raises
    StoreError."""

    def __len__(self) -> int:
        return len(self._table)

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def about(self) -> str:
        return f"{self._header.made_by}, which saw {'labels' if self._header.saw_labels else 'no labels'}"

    @property
    def of(self) -> str:
        """The fingerprint of the source that they belong to."""
        return self._header.of

    @property
    def source_name(self) -> str:
        """What that source was called when they were made."""
        return self._header.source

    def mask(self, i: int) -> np.ndarray:
        record = self._table[i]
        try:
            return _unpacked(self._pread(int(record["ptr"]), int(record["size"])), *self.sizes[i].tolist())
        except ValueError:
            raise self._damaged(f"mask {i} is not what was written") from None

    def fingerprint(self) -> str:
        return digest([self._header], self._table)

    def _read_tables(self) -> None:
        length = os.fstat(self._fd).st_size
        start = self._pread(0, min(length, _HEADER_BYTES))
        if start[: len(_MAGIC)] != _MAGIC:
            raise StoreError(f"{self.path}: not a file of masks: python -m tools.saliency makes them")
        found = _Header.read(start)
        if found is None:
            raise self._damaged("its header cannot be read")
        self._header, begin = found
        num_bytes = self._header.num_masks * _RECORD.itemsize
        if begin + 2 * num_bytes > length:
            raise self._damaged(f"{length} bytes cannot hold {self._header.num_masks} masks")
        self._table = table = np.frombuffer(self._pread(length - num_bytes, num_bytes), _RECORD)
        begins = table["ptr"].astype(np.int64)
        ends = begins + table["size"]
        pixels = table["height"].astype(np.int64) * table["width"]
        wrong = begins != np.append(begin, ends[:-1]) + _RECORD.itemsize
        wrong |= (table["foreground"] > pixels) | (pixels == 0)
        if wrong.any() or ends[-1] != length - num_bytes:
            raise self._damaged("its table does not fit its masks")
        self.sizes = np.stack([table["height"], table["width"]], axis=1).astype(np.int32)
        self.foreground = table["foreground"] / pixels

    def _pread(self, start: int, size: int) -> bytes:
        try:
            data = self._read(start, size)
        except OSError as e:
            raise StoreError(f"{self.path}: cannot be read: {e.strerror}") from e
        if len(data) < size:
            raise self._damaged(f"{size} bytes from {start} on are gone")
        return data

    def _damaged(self, how: str) -> StoreError:
        return StoreError(f"{self.path}: damaged or cut short: {how}; make it again")


class JoinedMasks:
    """The masks of several sources, one after the other."""

    def __init__(self, parts: Sequence[Masks]):
        self.parts = tuple(parts)
        self.name = " + ".join(part.name for part in parts)
        self.about = "; ".join(dict.fromkeys(part.about for part in parts))
        self.foreground = np.concatenate([part.foreground for part in parts])
        self._ends = np.cumsum([len(part.foreground) for part in parts])

    def mask(self, i: int) -> np.ndarray:
        k = int(np.searchsorted(self._ends, i, side="right"))
        return self.parts[k].mask(i - int(self._ends[k]) + len(self.parts[k].foreground))

    def fingerprint(self) -> str:
        return digest([part.fingerprint() for part in self.parts])


class PickedMasks:
    """The masks of some of a source's images, `ids` int64 [M]."""

    def __init__(self, masks: Masks, ids: np.ndarray):
        self.masks, self.ids, self.name, self.about = masks, ids, masks.name, masks.about
        self.foreground = masks.foreground[ids]

    def mask(self, i: int) -> np.ndarray:
        return self.masks.mask(int(self.ids[i]))

    def fingerprint(self) -> str:
        return digest([self.masks.fingerprint()], self.ids)


def masks_by_key(sources: dict[str, Source], files: Sequence[MaskFile]) -> dict[str, Masks]:
    """Of each key whose source, or all of whose parts, one of `files` belongs to: the masks. Raises StoreError where a
    file belongs to none of the sources, does not fit its own, or belongs to a part of a source that has parts without.
    """
    used: list[MaskFile] = []

    def matching(source: Source) -> Masks | None:
        fingerprint = source.fingerprint()
        own = [file for file in files if file.of == fingerprint]
        if len(own) > 1:
            raise StoreError(f"{own[0].name} and {own[1].name} are both masks of {source.name}: give one of them")
        if own:
            _check_fit(own[0], source)
            used.append(own[0])
            return own[0]
        if not isinstance(source, Concatenated):
            return None
        parts = [(part, matching(part)) for part in source.sources]
        there = [masks for _, masks in parts if masks is not None]
        if there and len(there) < len(parts):
            without = ", ".join(part.name for part, masks in parts if masks is None)
            raise StoreError(f"{without}: no masks, but {there[0].name} is of images beside them; give masks of all")
        return JoinedMasks(there) if there else None

    found = {key: matching(source) for key, source in sources.items()} if files else {}
    for file in files:
        if file not in used:
            given = joined_name(sources.values()) or "nothing"
            raise StoreError(
                f"{file.name}: masks of the {len(file):,} images of {file.source_name}; the data given, {given}, is "
                "another set, or has changed since: make its own with python -m tools.saliency"
            )
    return {key: masks for key, masks in found.items() if masks is not None}


def check_count(masks: Masks, source: Source) -> None:
    """Raise StoreError where there is not a mask for each image."""
    if len(masks.foreground) != len(source):
        raise StoreError(f"{masks.name}: {len(masks.foreground):,} masks, but {source.name} has {len(source):,} images")


def _check_fit(file: MaskFile, source: Source) -> None:
    check_count(file, source)
    wrong = (file.sizes != source.sizes).any(axis=1)
    if wrong.any():
        raise _of_another_size(file.name, source, int(wrong.argmax()), *file.sizes[wrong.argmax()].tolist())


def _of_another_size(name: str, source: Source, i: int, height: int, width: int) -> StoreError:
    rows, columns = source.sizes[i].tolist()
    return StoreError(
        f"{name}: the mask of image {i} ({source.name_of(i)}) of {source.name} is {width} x {height}, the image "
        f"{columns} x {rows}"
    )


@dataclass(frozen=True)
class Packed:
    """A mask as it is stored."""

    height: int
    width: int
    foreground: int  # pixels
    bits: bytes


def packed(mask: np.ndarray) -> Packed:
    """bool [H, W] -> what `MaskWriter.add` takes. Apart from it, so that threads can do it."""
    assert mask.dtype == bool
    height, width = mask.shape
    return Packed(height, width, int(np.count_nonzero(mask)), zlib.compress(np.packbits(mask).tobytes()))


def _unpacked(bits: bytes, height: int, width: int) -> np.ndarray:
    """bool [H, W]. Raises ValueError where these are not the bits of such a mask."""
    try:
        data = np.frombuffer(zlib.decompress(bits), np.uint8)
    except zlib.error as e:
        raise ValueError(str(e)) from e
    if len(data) != -(-height * width // 8):
        raise ValueError(f"{len(data)} bytes")
    return np.unpackbits(data, count=height * width).view(bool).reshape(height, width)


@dataclass(frozen=True)
class _Header:
    of: str
    source: str
    num_masks: int
    made_by: str
    saw_labels: bool

    def written(self) -> bytes:
        text = json.dumps(vars(self)).encode()
        return _MAGIC + len(text).to_bytes(4, "little") + text

    @classmethod
    def read(cls, start: bytes) -> tuple[_Header, int] | None:
        """The header of a file that begins with `start`, and where it ends; None where it is damaged."""
        begin = len(_MAGIC) + 4
        end = begin + int.from_bytes(start[len(_MAGIC) : begin], "little")
        try:
            header = cls(**json.loads(start[begin:end]))
        except (ValueError, TypeError):
            return None
        return (header, end) if isinstance(header.num_masks, int) and header.num_masks > 0 else None


class MaskWriter:
    """Writes the masks of `source` in order; the file appears under its name when the `with` block ends well. What a
    block that ended badly has written is kept, and the next writer of the same masks continues it.

    with MaskWriter(path, source, made_by="a network called such", saw_labels=False) as writer:
        for i in range(writer.num_done, len(source)):
            writer.add(packed(mask_of(i)))
    """

    def __init__(self, path: str | Path, source: Source, *, made_by: str, saw_labels: bool):
        self.path, self.source = Path(path), source
        self._partial = partial_of(self.path)
        self._header = _Header(source.fingerprint(), source.name, len(source), made_by, saw_labels)
        self._table = np.zeros(len(source), _RECORD)
        self.num_done = 0  # masks that are in the file

    def __enter__(self) -> MaskWriter:
        """Raises StoreError where the file cannot be written, or somebody else is writing it."""
        try:
            self._file = open(self._partial, "a+b")  # noqa: SIM115 - closed in __exit__
        except OSError as e:
            raise StoreError(f"{self.path}: cannot write there: {e.strerror}") from e
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise StoreError(f"{self.path}: another process is writing it") from None
        self._continue()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is not None:
                return
            if self.num_done < len(self.source):
                raise StoreError(f"{self.path}: {self.num_done} of {len(self.source)} masks were written")
            self._file.write(self._table.tobytes())
            self._file.flush()
            put(self._partial, self.path)

    def add(self, mask: Packed) -> None:
        """Append the mask of image `num_done`. Raises StoreError where it has not the image's size."""
        assert self.num_done < len(self.source)
        if (mask.height, mask.width) != tuple(self.source.sizes[self.num_done].tolist()):
            raise _of_another_size(str(self.path), self.source, self.num_done, mask.height, mask.width)
        ptr = self._end + _RECORD.itemsize
        record = np.array((ptr, len(mask.bits), mask.height, mask.width, mask.foreground), _RECORD)
        self._file.write(record.tobytes() + mask.bits)
        self._note(record)

    def _note(self, record: np.ndarray) -> None:
        """The record of the next mask, which lies in the file."""
        self._table[self.num_done] = record
        self.num_done += 1
        self._end = int(record["ptr"]) + int(record["size"])

    def _continue(self) -> None:
        """Take up the sound masks at the file's beginning, and drop what follows them."""
        header = self._header.written()
        self._file.seek(0)
        if self._file.read(len(header)) != header:
            self._file.truncate(0)
            self._file.write(header)
        self._end = len(header)
        while self.num_done < len(self.source) and (record := self._sound_record()) is not None:
            self._note(record)
        self._file.truncate(self._end)

    def _sound_record(self) -> np.ndarray | None:
        """Read on by a record and its mask; None where a kill or a power cut tore one of them."""
        head = self._file.read(_RECORD.itemsize)
        if len(head) < _RECORD.itemsize:
            return None
        record = np.frombuffer(head, _RECORD).reshape(())
        try:
            _unpacked(self._file.read(int(record["size"])), int(record["height"]), int(record["width"]))
        except ValueError:
            return None
        return record if record["ptr"] == self._end + _RECORD.itemsize else None
