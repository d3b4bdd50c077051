"""Modules of others whose types a run uses: where their files are, and how they are loaded again from there."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from fastssl.errors import ConfigError

OURS = ("fastssl", "loaders")


def types_in(plain: Any) -> Iterator[str]:
    """The full names, `module:Qualname`, of all types in a plain form (`fastssl.config.plain`)."""
    if isinstance(plain, dict):
        if isinstance(plain.get("type"), str):
            yield plain["type"]
        plain = list(plain.values())
    for part in plain if isinstance(plain, list) else ():
        yield from types_in(part)


def modules_of(plain: Any) -> dict[str, str]:
    """Module name -> its file, of all types in a plain form that are not ours."""
    names = dict.fromkeys(kind.partition(":")[0] for kind in types_in(plain))
    files = {name: file_of(name) for name in names if name.partition(".")[0] not in OURS}
    return {name: file for name, file in files.items() if file is not None}


def file_of(module: str) -> str | None:
    """Where a loaded module is from; None where nothing of that name is loaded from a file."""
    file = getattr(sys.modules.get(module), "__file__", None)
    return None if file is None else str(Path(file).absolute())


def load_modules(files: dict[str, str], needed_by: object) -> None:
    """Load each module that is not loaded yet from its file: one of a package as part of it, with the folder that holds
    the package within reach. Raises ConfigError, which names the module, where the file is gone or cannot be imported,
    and where another file has been loaded under the name."""
    for name, file in files.items():
        there = getattr(sys.modules.get(name), "__file__", None)
        if there is None:
            _load(name, Path(file), needed_by)
        elif Path(there).absolute() != Path(file):
            raise ConfigError(f"{needed_by} needs the module {name} of {file}, but {there} is loaded under that name")


def _load(name: str, file: Path, needed_by: object) -> None:
    if not file.is_file():
        raise ConfigError(f"{needed_by} needs the module {name}, which was {file}: it is not there")
    try:
        if "." in name:
            levels = name.count(".") + (file.name == "__init__.py")
            reach_last(file.parents[levels])
            import_module(name)
        else:
            load_file(name, file)
    except Exception as error:
        raise ConfigError(f"{needed_by} needs the module {name}: {import_failure(error, file)}") from error


def load_file(name: str, file: Path) -> None:
    """Import `file` as the module `name`, the modules beside it within reach of its imports. Raises what it raises."""
    spec = spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    reach_last(file.parent)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def reach_last(folder: Path) -> None:
    """Let imports look into `folder`, after everywhere else. At the end of `sys.path` it would come before what an
    editable installation finds: ours, and a `loaders.py` that lies there would hide it."""
    if _Last(folder) not in sys.meta_path:
        sys.meta_path.append(_Last(folder))


@dataclass(frozen=True)
class _Last:
    """A finder of modules in a folder."""

    folder: Path

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(self.folder)]) if path is None else None


def import_failure(error: BaseException, file: Path) -> str:
    """Where the import of `file` failed, and how, in one line."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {error.msg}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    line = f", line {frames[-1].lineno}" if frames else ""
    return f"{file}{line}: {type(error).__name__}: {error}"
