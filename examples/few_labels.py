"""Few labels on one's own photos, from folders to predictions:

    python examples/few_labels.py /data/sorted /data/photos --labels per-class=5

/data/sorted has a folder for each class; /data/photos are the photos to be told apart. Pre-trains on the sorted ones,
of which only a few show their label, fine-tunes on those, and writes photos.csv.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import fastssl


def few_labels(sorted_: Path, photos: Path, labels: str, out: Path, set: dict[str, object] | None = None) -> Path:
    """Train in `out` and write `out/photos.csv`, whose path is returned. `set` changes both recipes."""
    pretrained = fastssl.train("paws.mine", data=sorted_, labels=labels, out=out / "pretrained", set=set)
    tuned = fastssl.train(
        "supervised.mine", data=sorted_, labels=labels, out=out / "tuned", init_from=pretrained, set=set
    )
    found = tuned.predict(photos)
    lines = [
        f"{file},{name},{p:.3f}" for file, name, p in zip(found.files, found.classes, found.probability, strict=True)
    ]
    table = out / "photos.csv"
    table.write_text("\n".join(["file,class,probability", *lines]) + "\n")
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sorted", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--labels", default="per-class=5")
    parser.add_argument("--out", type=Path, default=Path("runs/few_labels"))
    given = parser.parse_args()
    print(few_labels(given.sorted, given.photos, given.labels, given.out))
