"""The real command that converts archives, killed by the system's signal at random moments and given again."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loaders.convert.conversion import Options, convert, prepare
from loaders.store.data import NOTHING_HELD_OUT, open_data
from tests.support.imagenet_trees import folder_tree
from tests.support.layouts import LAYOUTS, images

ROOT = Path(__file__).parents[2]
KILLS = 3
# The command as it is, but that it commits often, and takes a hundredth of a second an image, so that there is a while
# in which it can be killed.
COMMAND = """
import sys, time
import loaders.convert.conversion as conversion
from fastssl.commands.main import main
judge, conversion.COMMIT_S = conversion.judge, 0.05
conversion.judge = lambda *arguments: (time.sleep(0.01), judge(*arguments))[1]
main(["convert-imagenet", *sys.argv[1:]])
"""


def started(source, out):
    command = [sys.executable, "-c", COMMAND, source, str(out)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def size_of(path):
    return path.stat().st_size if path.exists() else 0


@pytest.mark.parametrize("layout", ["webdataset", "datasets", "tfds"])
def test_archives_killed_at_random_and_given_again_give_the_same_bytes(layout, tmp_path):
    """Would catch an image of the interrupted run kept half-written, or the bytes of one given for another."""
    tree = folder_tree(tmp_path / "tree", 3, 60, 20)
    (tmp_path / "laid").mkdir()
    (source,) = LAYOUTS[layout](tree, tmp_path / "laid")
    convert(prepare(Path(source), Options()), tmp_path / "whole")
    out, rng, kills, continued = tmp_path / "out", random.Random(layout), 0, 0
    while kills < KILLS:
        journal = out / ".train.journal"
        before = size_of(journal)
        process = started(source, out)
        while process.poll() is None and size_of(journal) <= max(before, 64):  # 64: its header
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL, process.stdout.read().decode()
        kills, continued = kills + 1, continued + (before > 64)
    last = started(source, out)
    said, _ = last.communicate()
    assert last.returncode == 0, said.decode()
    assert kills >= 2 and continued >= 1
    assert sorted(os.listdir(out)) == ["manifest.json", "train.beton", "val.beton"]
    for name in os.listdir(out):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    data = open_data((str(out), NOTHING_HELD_OUT))
    for role, split in (("train", "train"), ("validation", "val")):
        found, kept = data.get(role), [(wnid, path.read_bytes()) for wnid, path in images(tree, split)]
        held = [(found.class_names[found.labels[i]], found.jpeg(i)) for i in range(len(found))]
        assert sorted(held) == sorted(kept)
