"""Data without validation images: which are held out, that everybody leaves out the same ones, and what is said."""

import numpy as np
import pytest
from PIL import Image

from fastssl.engine.reopen import _data_of
from loaders.convert.conversion import Options, convert, prepare
from loaders.errors import StoreError
from loaders.loader import bind
from loaders.plan.plan import Plan
from loaders.plan.views import Listed, PerClass, Sequential, Stream, View, Whole
from loaders.store.data import NOTHING_HELD_OUT, open_data
from loaders.store.held_out import held_out
from loaders.store.masks import MaskFile, MaskWriter, packed
from loaders.store.source import ArraySource
from tests.unit.loaders.store.test_store import image_folder, save

COUNTS = {"ant": 1, "bee": 2, "cow": 25, "dog": 7}


@pytest.fixture
def folder(tmp_path):
    for name, count in COUNTS.items():
        for k in range(count):
            save(tmp_path / "set" / name / f"{name}_{k}.jpg", colour=(9 * k, 0, 0))
    return tmp_path / "set"


def paths_of(source):
    return [f"{source.class_names[source.labels[i]]}/{source.name_of(i)}" for i in range(len(source))]


def stream_of(ids, data):
    view = View("v", 8, Whole())
    return bind(Plan((Stream("s", "labelled", (view,), Sequential(), 1, ids=ids),), "s", 0), data)


def test_a_tenth_of_each_class_at_least_one_at_most_fifty(folder):
    """Would catch a class that loses its only image, and shares of all images in place of each class's."""
    data = open_data((str(folder),))
    learnt, held = data.get("train"), data.get("validation")
    assert np.bincount(held.labels, minlength=4).tolist() == [0, 1, 2, 1]
    assert sorted(paths_of(learnt) + paths_of(held)) == sorted(
        f"{c}/{c}_{k}.jpg" for c in COUNTS for k in range(COUNTS[c])
    )
    assert learnt.class_names == held.class_names == tuple(COUNTS)
    labels = np.repeat([0, 1], [2000, 30])
    many = ArraySource("many", np.zeros((2030, 1, 1, 1), np.uint8), labels, ("a", "b"))
    assert np.bincount(labels[held_out(many)]).tolist() == [50, 3]
    lines = [line for line in data.said if "held out" in line]
    assert len(lines) == 1 and "4 of its 35 are held out" in lines[0] and "validation=none trains on all" in lines[0]


def test_a_folder_its_beton_and_later_images_leave_out_the_same(folder, tmp_path):
    """Would catch a key of positions: one image more, or one damaged, would move all others across."""
    held = paths_of(open_data((str(folder),)).get("validation"))
    convert(prepare(folder, Options()), tmp_path / "out")
    assert paths_of(open_data((str(tmp_path / "out"),)).get("validation")) == held
    assert paths_of(open_data((str(tmp_path / "out" / "train.beton"),)).get("validation")) == held
    save(folder / "cow" / "cow_00.jpg")
    later = paths_of(open_data((str(folder),)).get("validation"))
    assert later == held or set(later) - set(held) == {"cow/cow_00.jpg"}


def test_pixels_sizes_and_what_is_damaged_stay_with_their_image(folder):
    (folder / "dog" / "dog_3.jpg").write_bytes(b"no image")
    save(folder / "dog" / "dog_9.jpg", height=10, width=30)
    whole, data = open_data((str(folder), NOTHING_HELD_OUT)), open_data((str(folder),))
    everything = {path: i for i, path in enumerate(paths_of(whole.get("train")))}
    found = {}
    for role in ("train", "validation"):
        source = data.get(role)
        for i, path in enumerate(paths_of(source)):
            j = everything[path]
            assert source.jpeg(i) == whole.get("train").jpeg(j) and source.tail(i, 9) == source.jpeg(i)[-9:]
            assert (source.sizes[i] == whole.get("train").sizes[j]).all() and source.num_bytes[i] == len(source.jpeg(i))
        found |= {source.path_of(i): why for i, why in source.unreadable.items()}
    assert list(found) == ["dog/dog_3.jpg"]
    assert whole.get("validation") is None and len(whole.get("train")) == len(everything)


def test_labels_are_drawn_among_what_is_left(folder, tmp_path):
    """Would catch a support image that is a validation image too, and indices that mean other images than before."""
    data = open_data((str(folder), f"validation={image_folder(tmp_path / 'v', classes=('ant',))}"))
    few = open_data((str(folder),))
    held, left = set(paths_of(few.get("validation"))), few.get("train")
    drawn = stream_of(PerClass(1), few).subsets["s"].ids
    assert not held & {paths_of(left)[i] for i in drawn}
    (tmp_path / "numbers.txt").write_text("0\n5\n30\n" if not held & {"ant/ant_0.jpg"} else "5\n")
    wanted = [paths_of(data.get("train"))[i] for i in (0, 5, 30)]
    listed = Listed(str(tmp_path / "numbers.txt"))
    if held & set(wanted):
        with pytest.raises(StoreError, match=r"of its 3 images are not in .*validation images of .*validation=none"):
            stream_of(listed, few)
    else:
        assert [paths_of(left)[i] for i in stream_of(listed, few).subsets["s"].ids] == wanted
    (tmp_path / "names.txt").write_text("\n".join(sorted(held)[:1]))
    with pytest.raises(StoreError, match=r"1 of its 1 images .*\(held out\); give others, .*--data validation=none"):
        stream_of(Listed(str(tmp_path / "names.txt")), few)


def test_masks_of_all_images_serve_those_that_are_left(folder, tmp_path):
    whole = open_data((str(folder), NOTHING_HELD_OUT)).get("train")
    with MaskWriter(tmp_path / "m.masks", whole, made_by="a test", saw_labels=False) as writer:
        for i, (height, width) in enumerate(whole.sizes.tolist()):
            writer.add(packed(np.arange(height * width).reshape(height, width) <= i))
    data = open_data((str(folder), f"masks={tmp_path / 'm.masks'}"))
    masks, source, at = data.masks_of("train"), data.get("train"), {p: i for i, p in enumerate(paths_of(whole))}
    assert [int(masks.mask(i).sum()) for i in range(len(source))] == [at[path] + 1 for path in paths_of(source)]
    assert len(MaskFile(tmp_path / "m.masks")) == len(whole) > len(source)


def test_labelled_images_bring_their_own_validation_images(tmp_path):
    image_folder(tmp_path / "few" / "train")
    image_folder(tmp_path / "few" / "val")
    save(tmp_path / "many" / "x.jpg")
    data = open_data((f"labelled={tmp_path / 'few'}", f"unlabelled={tmp_path / 'many'}"))
    assert data.get("validation").name.endswith("val") and not any("held out" in line for line in data.said)


def test_nothing_is_held_out_without_labels_or_where_images_for_it_are_given(folder, tmp_path):
    save(tmp_path / "flat" / "x.jpg")
    assert open_data((str(tmp_path / "flat"),)).get("validation") is None
    data = open_data((str(folder), f"validation={folder}"))
    assert len(data.get("train")) == len(data.get("validation")) == 35
    assert len(open_data((str(folder),), validation=False).get("train")) == 31  # a sweep leaves them alone as well


def test_a_run_that_was_begun_without_validation_images_has_none_later(folder):
    """Its encoder has learnt from all of them: a score on some would be no score."""

    class Written:
        held_out, data = None, (str(folder),)
        resolved = {"data": {"train": "a fingerprint"}}

    assert _data_of(Written, ()).get("validation") is None
    Written.resolved = {"data": {"train": "a fingerprint", "validation": "another"}}
    assert len(_data_of(Written, ()).get("validation")) == 4
    assert Image.open(folder / "ant" / "ant_0.jpg").size  # nothing was written to
