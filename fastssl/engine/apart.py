"""Whether validation images are among the others, asked once for all ranks."""

from __future__ import annotations

from fastssl import dist
from loaders.errors import StoreError
from loaders.store.apart import check_apart
from loaders.store.data import DataSets


def warnings_of(data: DataSets) -> list[str]:
    """What `check_apart` warns of. The first rank alone reads what it takes: 64 would ask a file system for the same
    bytes. Raises StoreError, on every rank, where too many validation images are labelled ones."""
    warnings, refused = dist.broadcast_object(_apart(data) if dist.is_main() else ([], None))
    if refused is not None:
        raise StoreError(refused)
    return warnings


def _apart(data: DataSets) -> tuple[list[str], str | None]:
    """`check_apart`, and why it refuses the data."""
    try:
        return check_apart(data), None
    except StoreError as error:
        return [], str(error)
