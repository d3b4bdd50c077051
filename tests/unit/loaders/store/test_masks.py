"""Saliency masks: who is masked and with what grey, the file they come in, and what a run says of them."""

import json
from dataclasses import replace

import numpy as np
import pytest

from fastssl.engine import stages
from fastssl.engine.join import facts_of
from fastssl.errors import ConfigError
from fastssl.methods.base import Steps
from fastssl.profiling.workload import usable
from loaders.errors import PlanError, StoreError
from loaders.loader import Loader, bind
from loaders.plan.ops import Flip, GaussianBlur
from loaders.plan.plan import Plan, StreamFacts
from loaders.plan.views import Rrc, SaliencyMask, Shuffled, Stream, View
from loaders.store import data as data_module
from loaders.store import staging
from loaders.store.data import NOTHING_HELD_OUT, DataSets, open_data
from loaders.store.folder import FolderSource
from loaders.store.masks import MaskFile, MaskWriter, mask_of, packed
from loaders.store.openers import Splits
from loaders.store.source import ArraySource, Concatenated, concatenate
from tests.end_to_end.command import metrics
from tests.support import fakes
from tests.support.interrupted import run_in_pieces
from tests.unit.loaders.store.test_store import image_folder

VIEW = View("large", 8, Rrc((0.3, 1.0)), (Flip(), GaussianBlur()), copies=2, mask=SaliencyMask(p=0.1))


def bound_plan(view=VIEW, foreground=0.5, num=20_000, batch=None):
    sizes = np.full((num, 2), 32, np.int32)
    foreground = None if foreground is None else np.broadcast_to(foreground, num).astype(np.float64)
    facts = StreamFacts(None, np.zeros(num, np.int64), sizes, 1, foreground)
    return Plan((Stream("s", "train", (view,), Shuffled(), batch or num),), "s", seed=0).bind({"s": facts})


# Who is masked


@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
def test_each_copy_is_masked_by_itself_with_probability_p(p):
    """Catches one draw for all copies (the paper's listing overwrites the image, so one success masks all later views),
    a grey that never reaches an end of its range, and one that depends on whether there is a mask."""
    bound = bound_plan(replace(VIEW, mask=SaliencyMask(p=p)))
    (rows,) = bound.rows("s", 0).views
    first, second = masked = (rows.greys >= 0).reshape(2, -1)
    num = len(first)
    for one in masked:
        assert abs(one.mean() - p) <= 4 * (p * (1 - p) / num) ** 0.5
    assert abs((first & second).mean() - p * p) <= 4 * (p * p / num) ** 0.5
    assert bound.masked_share(0) == masked.mean()
    if p == 1:
        counts = np.bincount(rows.greys, minlength=256)
        expected = 2 * num / 256
        assert len(counts) == 256 and ((counts - expected) ** 2 / expected).sum() < 340  # chi-square at 0.03 %
        few = bound_plan().rows("s", 0).views[0].greys
        assert (few[few >= 0] == rows.greys[few >= 0]).all()


def test_foreground_under_a_fifth_is_never_masked():
    """At p = 1: 19.9 % never, 20 % and 20.1 % always."""
    shares = np.tile([0.199, 0.2, 0.201, 0.0, 1.0], 40)
    bound = bound_plan(replace(VIEW, mask=SaliencyMask(p=1.0)), shares, num=200)
    rows = bound.rows("s", 0)
    masked = rows.views[0].greys >= 0
    assert (masked == np.tile(shares[rows.ids] >= 0.2, 2)).all()
    assert [rows.is_masked(b) for b in range(200)] == (shares[rows.ids] >= 0.2).tolist()


def test_a_mask_changes_no_other_draw():
    """Catches draws taken in turn from one sequence: a run without masks would see other crops."""
    with_mask, without = bound_plan(), bound_plan(replace(VIEW, mask=None), foreground=None)
    (ours,), (theirs,) = with_mask.rows("s", 0).views, without.rows("s", 0).views
    assert (ours.boxes == theirs.boxes).all()
    assert all((a == b).all() for a, b in zip(ours.tables, theirs.tables, strict=True))
    assert theirs.greys is None and without.masked_share(0) is None


def test_ranks_share_the_greys_of_one():
    bound = bound_plan(replace(VIEW, mask=SaliencyMask(p=0.5)), num=512, batch=64)
    for step in (0, 3, 9):
        whole = bound.rows("s", step).views[0].greys.reshape(2, 64)
        halves = [bound.rows("s", step, rank, 2).views[0].greys.reshape(2, 32) for rank in (0, 1)]
        assert (np.concatenate(halves, axis=1) == whole).all()
        shares = [bound.masked_share(step, rank, 2) for rank in (0, 1)]
        assert sum(shares) / 2 == pytest.approx(bound.masked_share(step))


def test_what_cannot_be_masked_is_refused():
    with pytest.raises(PlanError, match="view 'large' has a mask, but nothing says what is foreground"):
        bound_plan(foreground=None)
    with pytest.raises(ValueError, match="from 0 to 1"):
        SaliencyMask(p=10)


# The file


def source_of(num=7, name="small", height=9, width=5):
    images = np.random.default_rng(num).integers(0, 256, (num, height, width, 3), np.uint8)
    return ArraySource(name, images, np.arange(num) % 2, ("a", "b"))


def masks_for(source, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.random(tuple(size)) < rng.random() for size in source.sizes.tolist()]


def write(path, source, masks=None, made_by="a test", saw_labels=False):
    with MaskWriter(path, source, made_by=made_by, saw_labels=saw_labels) as writer:
        for mask in (masks or masks_for(source))[writer.num_done :]:
            writer.add(packed(mask))
    return path


def test_masks_come_back_bit_for_bit(tmp_path):
    """Images of many sizes, most of them no multiple of eight pixels."""
    source = concatenate([image_folder_source(tmp_path / "images")])
    masks = masks_for(source)
    file = MaskFile(write(tmp_path / "x.masks", source, masks, saw_labels=True))
    assert len(file) == len(source) and file.about == "a test, which saw labels"
    assert (file.sizes == source.sizes).all() and file.of == source.fingerprint()
    assert file.foreground.tolist() == [mask.sum() / mask.size for mask in masks]
    for i, mask in enumerate(masks):
        assert file.mask(i).dtype == bool and (file.mask(i) == mask).all()


def image_folder_source(folder):
    return FolderSource(image_folder(folder, per_class=4))


def test_a_file_that_was_stopped_continues_wherever_it_was_torn(tmp_path):
    """Catches a torn record that is taken for a mask, masks written twice, and a file that shows before it is whole."""
    source, path = source_of(), tmp_path / "x.masks"
    whole = write(tmp_path / "whole.masks", source).read_bytes()
    partial = tmp_path / ".x.masks.partial"
    with pytest.raises(KeyboardInterrupt), MaskWriter(path, source, made_by="a test", saw_labels=False) as writer:
        for mask in masks_for(source)[:4]:
            writer.add(packed(mask))
        raise KeyboardInterrupt
    assert not path.exists()
    written = partial.read_bytes()
    assert whole.startswith(written)
    for length in range(0, len(written) + 1, 7):
        partial.write_bytes(written[:length] + bytes(length % 5))  # a power cut leaves zeros, too
        assert write(path, source).read_bytes() == whole
        assert not partial.exists()
    partial.write_bytes(written)
    write(path, source, made_by="another test")  # what the other had done is not taken over
    assert MaskFile(path).about == "another test, which saw no labels"


def test_a_writer_refuses_what_does_not_fit(tmp_path):
    source, path = source_of(), tmp_path / "x.masks"
    with pytest.raises(StoreError, match=r"the mask of image 1 \(1\) of small is 9 x 5, the image 5 x 9"):
        write(path, source, [np.ones((9, 5), bool), np.ones((5, 9), bool)])
    with pytest.raises(StoreError, match=r"x\.masks: 3 of 7 masks were written"):
        write(path, source, masks_for(source)[:3])
    assert not path.exists()
    with MaskWriter(path, source, made_by="a test", saw_labels=False) as writer:
        with pytest.raises(StoreError, match="another process is writing it"):
            write(path, source)
        for mask in masks_for(source)[writer.num_done :]:
            writer.add(packed(mask))
    with pytest.raises(StoreError, match=r"none/x\.masks: cannot write there: No such file"):
        write(tmp_path / "none" / "x.masks", source)


def test_damage_is_an_error_and_never_another_mask(tmp_path):
    """Every truncation, and every byte changed: what the table says of places and sizes, and every mask's bits."""
    source, path = source_of(2), tmp_path / "x.masks"
    masks, whole = masks_for(source), write(path, source).read_bytes()

    def outcome(data):
        path.write_bytes(data)
        try:
            file = MaskFile(path)
            return "sound" if all((file.mask(i) == mask).all() for i, mask in enumerate(masks)) else "other masks"
        except StoreError as error:
            assert str(path) in str(error)
            return "refused"

    assert outcome(whole) == "sound"
    places = [*range(20), *range(whole.index(b"}"), len(whole))]  # all but the text of the header
    assert {outcome(whole[:length]) for length in places} == {"refused"}
    changed = {at: outcome(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :]) for at in places}
    assert "other masks" not in changed.values()
    table = len(whole) - 2 * 24
    assert [at for at in range(table, len(whole)) if changed[at] == "sound" and (at - table) % 24 < 20] == []
    for i in range(2):
        ptr = int.from_bytes(whole[table + 24 * i :][:8], "little")
        size = int.from_bytes(whole[table + 24 * i + 8 :][:4], "little")
        assert {changed[at] for at in range(ptr, ptr + size)} == {"refused"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"PNG and more of it", r"not a file of masks: python -m tools\.saliency makes them"),
        (b"fastssl masks 1\n\x02\0\0\0{}", "damaged or cut short: its header cannot be read"),
    ],
)
def test_what_is_no_file_of_masks_is_refused(tmp_path, data, message):
    path = tmp_path / "x.masks"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(StoreError, match=rf"x\.masks: {message}"):
        open_data((f"masks={path}",))


# With the data


def test_masks_find_their_images_among_several_sets(tmp_path):
    """Two folders joined under one key, and a third relabelled: every image gets its own mask."""
    ours = [image_folder(tmp_path / name, 2, classes) for name, classes in (("one", ("ant", "bee")), ("two", "ab"))]
    other = image_folder(tmp_path / "three", per_class=1, classes=("bee",))
    files = {}
    for folder in (*ours, other):
        source = open_data((str(folder), NOTHING_HELD_OUT)).get("train")
        files[folder] = write(tmp_path / f"{folder.name}.masks", source, masks_for(source, seed=len(files)))
    specs = [f"labelled={folder}" for folder in ours] + [f"unlabelled={other}", NOTHING_HELD_OUT]
    data = open_data((*specs, *(f"masks={file}" for file in reversed(files.values()))))
    joined = data.masks_of("labelled")
    expected = [MaskFile(files[folder]).mask(i) for folder in ours for i in range(4)]
    assert all((joined.mask(i) == mask).all() for i, mask in enumerate(expected))
    assert joined.foreground.tolist() == [mask.mean() for mask in expected]
    assert isinstance(data.get("unlabelled"), Concatenated)  # for its classes are numbered anew
    assert (data.masks_of("unlabelled").mask(0) == MaskFile(files[other]).mask(0)).all()
    without = open_data(tuple(specs))
    assert data.fingerprints() == without.fingerprints() | {"masks": data.fingerprints()["masks"]}
    with pytest.raises(StoreError, match=r"no masks for the images of .*one .*two: make them with .*masks=off"):
        without.masks_of("labelled")
    with pytest.raises(StoreError, match=r"^[^,]*two[^,]*: no masks, but .*one.masks is of images beside them"):
        open_data((*specs, f"masks={files[ours[0]]}"))


def test_masks_of_other_data_are_refused(tmp_path):
    folder = image_folder(tmp_path / "one", per_class=2)
    source = open_data((str(folder), NOTHING_HELD_OUT)).get("train")
    first, second = (write(tmp_path / f"{n}.masks", source, masks_for(source, n)) for n in (1, 2))
    with pytest.raises(StoreError, match=r"1\.masks and .*2\.masks are both masks of .*one: give one of them"):
        open_data((str(folder), f"masks={first}", f"masks={second}"))
    with pytest.raises(StoreError, match=r"1\.masks: masks of the 4 images of .*one; the data given, digits.*another"):
        open_data(("digits", f"masks={first}"))
    (folder / "ant" / "ant_1.jpg").rename(folder / "ant" / "ant_2.jpg")
    with pytest.raises(StoreError, match="or has changed since"):
        open_data((str(folder), f"masks={first}"))


def test_a_file_of_the_wrong_sizes_is_refused(tmp_path, monkeypatch):
    """Written by somebody else's program, for this data: the fingerprint is right, a mask is not."""
    source, other = source_of(height=9, width=5), source_of(height=5, width=9)
    monkeypatch.setattr(ArraySource, "fingerprint", lambda self: "the same")
    file = write(tmp_path / "x.masks", other)
    monkeypatch.setattr(data_module, "open_path", lambda *_: Splits("a set", source, single=True))
    with pytest.raises(StoreError, match=r"mask of image 0 \(0\) of small is 9 x 5, the image 5 x 9"):
        open_data(("anything", f"masks={file}"))


def test_masks_are_staged_with_their_data(tmp_path):
    source = source_of()
    file = write(tmp_path / "x.masks", source)
    (copied,) = staging.stage((f"masks={file}",), tmp_path / "local", lambda *_: None)
    key, path = copied.key, copied.path
    assert key == "masks" and str(tmp_path / "local") in path
    assert (MaskFile(path).mask(3) == MaskFile(file).mask(3)).all()


# In a run


def test_a_run_logs_the_share_it_masked_and_refuses_other_masks(tmp_path, monkeypatch, capsys):
    """Catches a share that counts other steps than the line's, a continuation that does not repeat it, and one that
    goes on with other masks: the same command would then give other pixels."""
    monkeypatch.setattr(fakes, "VIEW", replace(fakes.VIEW, mask=SaliencyMask(p=0.5)))
    train = open_data(("digits",)).get("train")
    file = write(tmp_path / "digits.masks", train, [np.eye(8, dtype=bool) | (i % 4 > 0) for i in range(len(train))])
    (stage,) = fakes.stages("paws")
    chain = (replace(stage, length=Steps(4), log_every=Steps(1), checkpoint_every=Steps(1), evaluate=()),)
    job = fakes.job(chain, tmp_path / "run", data=("digits", f"masks={file}"))
    run_in_pieces(job, every=3)
    assert f"{file}: a test, which saw no labels" in capsys.readouterr().out
    data = open_data(job.data)
    bound = bind(chain[0].config.build(facts_of(data, 0), {}).plan(), data).plan
    shares = [line["masked_share"] for line in metrics(job.out)]
    assert shares == [bound.masked_share(step) for step in range(4)]
    assert len(set(shares)) > 1 and 0.25 < sum(shares) / 4 < 0.5  # three quarters have enough foreground
    assert json.loads((job.out / "resolved.json").read_text())["data"]["masks"] == data.fingerprints()["masks"]

    file.unlink()
    write(file, train)
    with pytest.raises(ConfigError, match=r"holds another run \(data\.masks: "):
        stages.run(job)
    with pytest.raises(StoreError, match=r"no masks for the images of digits \(train\)"):
        stages.run(replace(job, data=("digits",), out=tmp_path / "other"))


def test_a_profile_has_masks_for_views_that_want_them():
    """Of a recipe with masks, on stand-ins or on images without masks: time is what counts."""
    source = source_of(7, height=90, width=60)
    view = replace(VIEW, mask=SaliencyMask(1.0))
    plan = Plan((Stream("s", "unlabelled", (view,), Shuffled(), 16),), "s", 0)
    bound = bind(plan, usable({"train": source}, [plan]))
    assert bound.plan.masked_share(0) == 1
    assert bound.masks["s"].mask(9).shape == (90, 60)
    assert bound.masks["s"].mask(9).mean() == pytest.approx(bound.masks["s"].foreground[9], abs=0.02)


class LeftHalf:
    """Masks that a program brings: any object with these members will do."""

    name, about = "left", "the left half, which saw no labels"

    def __init__(self, count=6, side=8):
        self.foreground, self.side = np.full(count, 0.5), side

    def mask(self, i):
        return np.repeat([True, False], self.side // 2)[None].repeat(self.side, 0)

    def fingerprint(self):
        return "left"


def bound_to(masks, source):
    plan = Plan((Stream("s", "train", (replace(VIEW, mask=SaliencyMask(1.0)),), Shuffled(), 6),), "s", 0)
    return bind(plan, DataSets({"train": source}, masks={"train": masks}))


def test_a_program_may_bring_its_own_masks():
    source = ArraySource("six", np.zeros((6, 8, 8, 1), np.uint8), np.zeros(6, np.int64), ("a",))
    bound = bound_to(LeftHalf(), source)
    assert bound.plan.masked_share(0) == 1 and bound.masks["s"].about.startswith("the left half")


def test_masks_of_a_program_must_fit_too():
    """One for every image, at the door; each of its image's size, before a renderer reads pixels by address."""
    source = ArraySource("six", np.zeros((6, 8, 8, 1), np.uint8), np.zeros(6, np.int64), ("a",))
    with pytest.raises(StoreError, match="left: 5 masks, but six has 6 images"):
        bound_to(LeftHalf(count=5), source)
    for side in (6, 10):
        with (
            Loader(bound_to(LeftHalf(side=side), source), threads=1) as loader,
            pytest.raises(StoreError, match=rf"left: the mask of image \d .* is {side} x {side}, the image 8 x 8"),
        ):
            next(iter(loader.batches(0, 1)))
    numbers = LeftHalf()
    numbers.mask = lambda i: np.zeros((8, 8), np.uint8)
    with pytest.raises(StoreError, match="uint8 .*, not bool"):
        mask_of(numbers, source, 0)
