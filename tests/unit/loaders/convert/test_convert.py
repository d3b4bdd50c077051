"""The conversion: the right bytes and labels, odd files sorted out, damage and hostile archives survived."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import loaders.convert.conversion as conversion
from loaders.convert.conversion import Options, convert, prepare
from loaders.convert.judge import Reencode
from loaders.convert.manifest import verify
from loaders.errors import StoreError
from loaders.store.beton import PAGE_SIZE, BetonReader, place
from tests.support.conversions import (
    PHOTO,
    PNG16,
    contents,
    one_thread,  # noqa: F401  (every test here uses it)
    patched,
    run,
)
from tests.support.imagenet_trees import (
    encoded,
    folder_tree,
)

ROOT = Path(__file__).parents[4]


# Folders


@pytest.fixture
def odd_tree(tmp_path) -> Path:
    """Two classes with one file of each odd kind; in the first also things that are no images."""
    root = folder_tree(tmp_path / "src", 2, per_class=3)
    first = root / "train" / "n01440764"
    exif = Image.Exif()
    exif[0x0112] = 6
    odd = {"cmyk": encoded(1, mode="CMYK"), "png": encoded(2, form="PNG"), "turned": encoded(3, 20, 30, exif=exif)}
    bad = {"cut": PHOTO[:-9], "empty": b"", "gif": encoded(4, form="GIF"), "text": b"404", "deep": PNG16.getvalue()}
    for name, data in {**odd, **bad}.items():
        (first / f"{name}.JPEG").write_bytes(data)
    (first / "notes.txt").write_text("x")
    (first / "gone.JPEG").symlink_to("nowhere")
    return root


def test_folder_to_beton_passes_bytes_through_and_sorts_out_odd_files(odd_tree, tmp_path):
    before = {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in odd_tree.rglob("*.JPEG") if f.exists()}
    manifest = run(odd_tree, tmp_path / "out")
    reader = BetonReader(tmp_path / "out" / "train.beton")
    names = [reader.name(i) for i in range(len(reader))]
    assert names == [
        *("cmyk.JPEG", "deep.JPEG", "gif.JPEG", "n01440764_10.JPEG", "n01440764_11.JPEG", "n01440764_9.JPEG"),
        *("png.JPEG", "turned.JPEG"),
        *(f"n01440771_{k}.JPEG" for k in (10, 11, 9)),
    ]
    assert reader.labels.tolist() == [0] * 8 + [1] * 3 and reader.class_names == ("n01440764", "n01440771")
    for i, name in enumerate(names):
        data, folder = reader.jpeg(i), odd_tree / "train" / reader.class_names[reader.labels[i]]
        assert (data == (folder / name).read_bytes()) == name.startswith("n0")
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            assert (image.mode, image.height, image.width) == ("RGB", *reader.sizes[i])
    assert reader.sizes[7].tolist() == [30, 20]

    train = manifest["splits"]["train"]
    assert [(row["file"], row["what"].split(",")[0]) for row in train["odd"]] == [
        ("n01440764/cmyk.JPEG", "CMYK"),
        ("n01440764/deep.JPEG", "PNG"),
        ("n01440764/gif.JPEG", "WebP"),
        ("n01440764/png.JPEG", "PNG"),
        ("n01440764/turned.JPEG", "EXIF-rotated"),
    ]
    assert {row["file"][10:]: row["what"] for row in train["quarantined"]} == {
        "cut.JPEG": "truncated",
        "empty.JPEG": "no bytes",
        "text.JPEG": "not a JPEG, PNG, WebP, TIFF, BMP or GIF",
    }
    assert train["ignored"]["count"] == 2 and {name for name, _ in train["ignored"]["first"]} == {
        "n01440764/gone.JPEG",
        "n01440764/notes.txt",
    }
    assert {name: c["images"] for name, c in train["classes"].items()} == {"n01440764": 8, "n01440771": 3}
    assert len(BetonReader(tmp_path / "out" / "val.beton")) == 2 == manifest["splits"]["val"]["images"]
    assert sorted(os.listdir(tmp_path / "out")) == ["manifest.json", "train.beton", "val.beton"]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == json.loads(json.dumps(manifest))
    assert {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in before} == before


def test_real_jpegs_pass_through_byte_for_byte(test_data, tmp_path):
    manifest = run(test_data / "imagenet-sample", tmp_path / "out")
    reader = BetonReader(tmp_path / "out" / "train.beton")
    assert len(reader) == 250 and manifest["splits"]["train"]["quarantined"] == []
    for i in range(250):
        file = test_data / "imagenet-sample" / reader.class_names[reader.labels[i]] / reader.name(i)
        assert reader.jpeg(i) == file.read_bytes()
    verify(tmp_path / "out")


def test_classes_alone_and_images_alone_are_training_sets(tmp_path):
    root = folder_tree(tmp_path / "src", 3)
    assert list(run(root / "train", tmp_path / "a")["splits"]) == ["train"]
    run(root / "train" / "n01440764", tmp_path / "b")
    reader = BetonReader(tmp_path / "b" / "train.beton")
    assert reader.labels.tolist() == [-1, -1] and reader.class_names == ()


def test_validation_classes_are_numbered_as_in_training(tmp_path):
    root = folder_tree(tmp_path / "src", 3)
    for file in (root / "val" / "n01440764").iterdir():
        file.unlink()
    (root / "val" / "n01440764").rmdir()
    run(root, tmp_path / "out")
    assert BetonReader(tmp_path / "out" / "val.beton").labels.tolist() == [1, 2]
    (root / "val" / "n99999999").mkdir()
    (root / "val" / "n99999999" / "x.JPEG").write_bytes(PHOTO)
    with pytest.raises(StoreError, match="class 'n99999999' is not among"):
        prepare(root, Options())


def test_sources_that_cannot_be_converted_are_named(tmp_path):
    with pytest.raises(StoreError, match="no such f"):
        prepare(tmp_path / "none", Options())
    with pytest.raises(StoreError, match="no images; looked for"):
        prepare(tmp_path, Options())
    root = folder_tree(tmp_path / "src", 1)
    with pytest.raises(StoreError, match="lies among the images"):
        run(root, root / "train" / "out")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "a.JPEG").write_bytes(PHOTO[:-2])
    with pytest.raises(StoreError, match="none of its 1 images can be used"):
        run(tmp_path / "cut", tmp_path / "out")


def test_subset_takes_the_listed_training_images_and_all_validation_images(tmp_path):
    root = folder_tree(tmp_path / "src", 3, per_class=3)
    (tmp_path / "few.txt").write_text("n01440771_10.JPEG\nn01440764_9.JPEG\n")
    manifest = run(root, tmp_path / "out", subset=str(tmp_path / "few.txt"))
    reader = BetonReader(tmp_path / "out" / "train.beton")
    assert [reader.name(i) for i in range(len(reader))] == ["n01440764_9.JPEG", "n01440771_10.JPEG"]
    assert reader.labels.tolist() == [0, 1] and reader.num_classes == 3
    sha256 = hashlib.sha256((tmp_path / "few.txt").read_bytes()).hexdigest()
    assert manifest["options"]["subset"] == {"name": "few", "sha256": sha256, "count": 2}
    assert manifest["splits"]["val"]["images"] == 3
    (tmp_path / "few.txt").write_text("n01440771_99.JPEG\n")
    with pytest.raises(StoreError, match="1 of its 1 images are not in"):
        prepare(root, Options(subset=str(tmp_path / "few.txt")))


def test_reencoded_set(odd_tree, tmp_path):
    manifest = run(odd_tree, tmp_path / "out", reencode=Reencode(70, 16))
    reader = BetonReader(tmp_path / "out" / "train.beton")
    assert len(reader) == 11 and reader.sizes.max(axis=1).max() == 16
    assert manifest["options"]["reencode"] == {"quality": 70, "max_side": 16}
    odd = [row["file"][10:-5] for row in manifest["splits"]["train"]["odd"]]
    assert odd == ["cmyk", "deep", "gif", "png", "turned"]
    verify(tmp_path / "out")


# Interruptions


def test_again_is_nothing_and_another_conversion_is_refused(tmp_path):
    root = folder_tree(tmp_path / "src", 2)
    first = run(root, tmp_path / "out")
    stamps = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").iterdir()}
    assert run(root, tmp_path / "out") == json.loads(json.dumps(first))
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "out").iterdir()} == stamps
    with pytest.raises(StoreError, match="result of another conversion"):
        run(root, tmp_path / "out", decode_check=False)
    (tmp_path / "out" / "manifest.json").unlink()
    for _ in range(2):
        with pytest.raises(StoreError, match=r"train\.beton: is there, and not from this conversion"):
            run(root, tmp_path / "out")


MORTAL_RUN = """
import os, signal, sys
from pathlib import Path
import loaders.convert.conversion as c, loaders.convert.manifest as m
import loaders.convert.journal as j
c.COMMIT_S, m._CHUNK, m._num_threads = 0.0, 2, lambda: 2
src, out, reencode, left = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

def mortal(call):
    def called(*args, **options):
        global left
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **options)
    return called

os.pwrite, os.replace = mortal(os.pwrite), mortal(os.replace)
os.fdatasync = os.fsync = mortal(lambda fd: None)  # a kill loses no page that was written
Path.unlink = mortal(Path.unlink)
anew = c.Reencode(80, 20) if reencode == "reencode" else None
c.convert(c.prepare(src, c.Options(reencode=anew, raw=reencode == "raw")), out)
"""


@pytest.mark.parametrize("kind", ["folder", "reencode", "raw"])
def test_killed_at_random_and_run_again_gives_the_same_bytes(odd_tree, tmp_path, kind):
    """SIGKILL before the k-th write, sync, rename or removal, k drawn anew each time, until a run comes through."""
    for k in range(60):
        (odd_tree / "train" / "n01440771" / f"more_{k}.JPEG").write_bytes(encoded(k, 8, 8))
    anew = Reencode(80, 20) if kind == "reencode" else None
    run(odd_tree, tmp_path / "whole", reencode=anew, raw=kind == "raw")
    out, kills, continued = tmp_path / "out", 0, 0
    rng = random.Random(kind)
    while True:
        journal = out / ".train.journal"
        continued += journal.exists() and journal.stat().st_size > 64
        left = rng.randrange(15, 45) if kills < 8 else 1 << 30
        command = [sys.executable, "-c", MORTAL_RUN, str(odd_tree), str(out), kind, str(left)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()
        if done.returncode == 0:
            break
        kills += 1
    assert kills >= 2 and continued >= 1
    assert contents(out) == contents(tmp_path / "whole")


def test_torn_or_changed_journal_is_not_trusted(tmp_path):
    """A torn record is dropped; a source or options that changed start afresh rather than mix two conversions."""
    root = folder_tree(tmp_path / "src", 2, per_class=20)
    run(root, tmp_path / "whole")
    out = tmp_path / "out"

    def stop(what, num_done, total):
        if num_done >= 16:
            raise KeyboardInterrupt

    def interrupted(tree):
        with pytest.raises(KeyboardInterrupt):
            convert(prepare(tree, Options()), out, stop)

    interrupted(root)
    journal = out / ".train.journal"
    journal.write_bytes(journal.read_bytes() + os.urandom(100))
    run(root, out)
    assert contents(out) == contents(tmp_path / "whole")
    for file in out.iterdir():
        file.unlink()
    interrupted(root)
    (root / "train" / "n01440764" / "n01440764_9.JPEG").write_bytes(encoded(77, 90, 90))
    run(root, out)
    run(root, tmp_path / "changed")
    assert contents(out) == contents(tmp_path / "changed") != contents(tmp_path / "whole")


def test_two_conversions_at_once_are_refused(tmp_path):
    root = folder_tree(tmp_path / "src", 1)
    seen = []

    def again(what, num_done, total):
        if not seen:
            with pytest.raises(StoreError, match="another conversion is writing there"):
                run(root, tmp_path / "out")
            seen.append(what)

    convert(prepare(root, Options()), tmp_path / "out", again)
    assert seen == ["train"]


def test_full_disk_is_an_error_in_words_and_the_same_command_continues(tmp_path):
    root = folder_tree(tmp_path / "src", 2, per_class=40)
    run(root, tmp_path / "whole")
    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE_SIZE + 20_000, hard))
    try:
        with pytest.raises(StoreError, match="File too large; put that right and run the same command: it continues"):
            run(root, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (out / "train.beton").exists()
    run(root, out)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("raw", [False, True])
def test_too_small_a_disk_is_told_before_anything_is_written(raw, tmp_path, monkeypatch):
    root = folder_tree(tmp_path / "src", 1)
    needed = sum(map(prepare(root, Options(raw=raw)).bytes_needed, ("train", "val")))
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: type("", (), {"free": 1000}))
    said = f"{needed:,} bytes are needed, 1,000 are free: {needed - 1000:,} are missing"
    with pytest.raises(StoreError, match=said):
        run(root, tmp_path / "out", raw=raw)
    assert os.listdir(tmp_path / "out") == []


def test_verify_names_what_is_damaged(odd_tree, tmp_path):
    out = tmp_path / "out"
    run(odd_tree, out)
    verify(out)
    good = (out / "train.beton").read_bytes()
    at = good.index((odd_tree / "train" / "n01440771" / "n01440771_9.JPEG").read_bytes())
    (out / "train.beton").write_bytes(patched(good, at + 300, bytes([good[at + 300] ^ 1])))
    with pytest.raises(StoreError, match=r"1 of 11 images are damaged, first n01440771/n01440771_9\.JPEG \(id 10\)"):
        verify(out)
    label = good.index(b"n01440764_10.JPEG")
    (out / "train.beton").write_bytes(patched(good, label, b"n01440764_99"))
    with pytest.raises(StoreError, match="its tables are not those of the manifest"):
        verify(out)
    (out / "train.beton").write_bytes(good[:-5])
    with pytest.raises(StoreError, match="damaged or cut short"):
        verify(out)
    (out / "manifest.json").write_text("{}")
    with pytest.raises(StoreError, match="not the manifest of a conversion"):
        verify(out)


# Layout and memory


def test_places_never_straddle_a_page_and_waste_no_room():
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 900, 3000)
    places, end = place(sizes, 5 * 1024 + 100, 1024)
    at = 5 * 1024 + 100
    for size, found in zip(sizes.tolist(), places.tolist(), strict=True):
        if at % 1024 + size > 1024:
            at += -at % 1024
        assert not size or found == at
        at += size
    assert end == at


MEMORY = """
import sys
from pathlib import Path
import loaders.convert.conversion as c, loaders.convert.manifest as m
m._num_threads = lambda: 2
c.convert(c.prepare(Path(sys.argv[1]), c.Options(decode_check=False)), Path(sys.argv[2]))
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])  # ru_maxrss would count the parent's
"""


def test_memory_hardly_grows_with_the_number_of_images(tmp_path):
    """At most 0.64 KB an image: 64 MB at 100,000."""
    (tmp_path / "one.JPEG").write_bytes(encoded(0))
    peaks = []
    for count in (1000, 21_000):
        root = tmp_path / str(count)
        for k in range(count):
            if k % 1000 == 0:
                folder = root / f"n{k:08d}"
                folder.mkdir(parents=True)
            os.link(tmp_path / "one.JPEG", folder / f"n00000000_{k}.JPEG")
        command = [sys.executable, "-c", MEMORY, str(root), str(tmp_path / f"out{count}")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 0.64 * 20_000
