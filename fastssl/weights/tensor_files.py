"""Files of tensors, whoever wrote them, opened without running anything that they hold.

torch's files are pickles, and a pickle can hold code. Only tensors and plain values are read from one, and a script's
options left out; a file that needs more is refused, or where the user says so converted in a process of its own.
"""

from __future__ import annotations

import os
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fastssl.errors import FastsslError

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"  # torch's files since version 1.6, and before
# What torch.load raises where bytes are lost or changed.
_DAMAGED = (RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, struct.error)


class _Options:
    """What an `argparse.Namespace` is read as: training scripts keep their options beside the weights. Drops them."""

    def __setstate__(self, state: object) -> None:
        pass


class WeightsError(FastsslError):
    """Weights that cannot be read, or that do not fit."""


def read_tensors(path: Path, unsafe_pickle: bool = False) -> tuple[dict[str, Any], dict[str, str]]:
    """What the file `path` holds, on the CPU, and its metadata, which only safetensors have.

    Of torch's files: the dict that was saved, tensors and plain values. With `unsafe_pickle`, a file that needs more
    is converted by `weights.unpickle`, in a process of its own, and only its tensors come back. Raises WeightsError.
    """
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise WeightsError(f"{path} is not there" if isinstance(error, FileNotFoundError) else f"{error}") from error
    if head.startswith((_ZIP, _PICKLE)):
        return _read_torch(path, unsafe_pickle), {}
    if head[8:] == b"{":  # eight bytes of length, then JSON
        return _read_safetensors(path)
    raise WeightsError(f"{path} is no file of weights: neither torch's nor safetensors")


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is damaged, or no safetensors file ({error})") from error


def _read_torch(path: Path, unsafe_pickle: bool) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals([(_Options, "argparse.Namespace")]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        needs = re.search(r"GLOBAL (\S+)", str(error))
        if needs is None:
            raise WeightsError(f"{path} is damaged, or a pickle of another kind than torch's") from error
        if not unsafe_pickle:
            raise WeightsError(
                f"{path} holds more than tensors and plain values ({needs[1]}), which can run code: refused. If you "
                "trust whoever made it, --unsafe-pickle converts it in a process of its own"
            ) from error
        state = _converted(path)
    except _DAMAGED as error:
        raise WeightsError(f"{path} is damaged, or no file of torch's") from error
    if not isinstance(state, dict):
        raise WeightsError(f"{path} holds a {type(state).__name__}, not tensors by name")
    return state


def _converted(path: Path) -> dict[str, Any]:
    """The tensors in a pickle that another process has opened.

    Code in the pickle runs there with this user's rights: it can read and change the user's files and use the network.
    What it does not get is this process's environment, where keys and tokens may stand, nor this process's memory.
    """
    with TemporaryDirectory(prefix="fastssl-unpickle-") as folder:
        target = Path(folder) / "converted.safetensors"
        done = subprocess.run(
            # isolated: neither PYTHONPATH nor what lies in the working directory
            [sys.executable, "-I", str(Path(__file__).with_name("unpickle.py")), str(path.resolve()), str(target)],
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode or not target.is_file():
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise WeightsError(f"{path} cannot be converted: {last}")
        return _nested(_read_safetensors(target)[0])


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """{"encoder/conv1.weight": tensor} -> {"encoder": {"conv1.weight": tensor}}."""
    nested: dict[str, Any] = {}
    for path, tensor in flat.items():
        *folders, name = path.split("/")
        place = nested
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = tensor
    return nested
