"""Whether the wheel stands alone: built from here, installed into a fresh environment, used in an empty folder.

    python -m tools.wheel FOLDER [--libraries PATH]

Builds FOLDER/*.whl, makes the environment FOLDER/venv, installs the wheel with the versions that constraints.txt pins,
and trains, evaluates and exports `paws.digits`, a few steps, in FOLDER/work, where nothing of the checkout is found.
`--libraries` takes the dependencies from a site-packages folder instead of the index. Ends with code 1 where a command
fails or something came from the checkout.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHORT = ("length=6steps", "encoder.base_width=4", "out_features=8", "batch_global=32", "images_per_class=4")
WHERE = "import fastssl, loaders; print(fastssl.__file__); print(loaders.__file__)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--libraries", type=Path)
    given = parser.parse_args()
    folder = given.folder.absolute()
    wheel = build(folder)
    python = environment(folder / "venv", wheel, given.libraries)
    return use(python, folder / "work", folder / "venv")


def build(folder: Path) -> Path:
    """The wheel of this checkout."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    _run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT], folder)
    (wheel,) = folder.glob("*.whl")
    print(f"{wheel.name}: {wheel.stat().st_size / 1024:,.0f} KiB")
    return wheel


def environment(place: Path, wheel: Path, libraries: Path | None) -> Path:
    """The Python of a fresh environment with the wheel."""
    venv.create(place, clear=True, with_pip=libraries is None)
    python = place / "bin" / "python"
    if libraries is None:
        _run([python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel], place)
        return python
    (packages,) = place.glob("lib/python*/site-packages")
    _run([sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel], place)
    (packages / "libraries.pth").write_text(f"{libraries.absolute()}\n")
    return python


def use(python: Path, work: Path, place: Path) -> int:
    """Exit code: 0 where all commands ran with what is in the environment alone."""
    work.mkdir(exist_ok=True)
    found = _run([python, "-c", WHERE], work).split()
    print("\n".join(found))
    if not all(Path(file).is_relative_to(place) for file in found):
        return 1
    command = python.parent / "fastssl"
    changes = [word for change in SHORT for word in ("--set", change)]
    _run([command, "train", "paws.digits", "--resume", "never", "--out", "run", *changes], work)
    print(_run([command, "evaluate", "run", "--protocol", "knn"], work).splitlines()[1].strip())
    print(_run([command, "export", "run"], work).strip())
    return 0


def _run(words: list[str | Path], folder: Path) -> str:
    """What the command prints. Ends this program with what it said where it fails."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in words], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
