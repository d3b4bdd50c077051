"""Folders, CIFAR-10, digits, `--data` values and subsets: the right images and labels, or words that help."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loaders.errors import StoreError
from loaders.labels.published import PUBLISHED
from loaders.labels.subsets import resolve
from loaders.plan.views import All, Complement, Listed, PerClass
from loaders.store import digits
from loaders.store.beton import BetonWriter
from loaders.store.cifar import open_cifar10
from loaders.store.data import NOTHING_HELD_OUT, open_data
from loaders.store.digits import open_digits
from loaders.store.folder import FolderSource
from loaders.store.source import ArraySource, Concatenated, concatenate


def save(path: Path, height=6, width=8, colour=(10, 200, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).save(path)
    return path


def image_folder(root: Path, per_class=2, classes=("bee", "ant")) -> Path:
    for name in classes:
        for k in range(per_class):
            save(root / name / f"{name}_{k}.jpg", height=6 + k)
    return root


def small_beton(path: Path, labels, class_names=("ant", "bee"), stem="img") -> Path:
    data = save(path.parent / "one" / "x.jpg").read_bytes()
    with BetonWriter(path, len(labels), class_names, page_size=1 << 21) as writer:
        for i, label in enumerate(labels):
            writer.add(data, label, f"{stem}_{i}.JPEG")
    (path.parent / "one" / "x.jpg").unlink()
    (path.parent / "one").rmdir()
    return path


def arrays(labels, class_names=("a", "b"), name="arrays") -> ArraySource:
    labels = np.array(labels, np.int64)
    return ArraySource(name, np.zeros((len(labels), 4, 4, 1), np.uint8), labels, tuple(class_names))


# Folders


def test_folder_numbers_classes_by_sorted_name_and_reads_sizes(tmp_path):
    root = image_folder(tmp_path)
    save(root / "ant" / "tall.png", height=40, width=3)
    (root / "ant" / "notes.txt").write_text("not an image")
    (root / "ant" / ".hidden.jpg").write_text("not an image either")
    source = FolderSource(root)
    assert source.class_names == ("ant", "bee")
    assert [source.name_of(i) for i in range(5)] == ["ant_0.jpg", "ant_1.jpg", "tall.png", "bee_0.jpg", "bee_1.jpg"]
    assert source.labels.tolist() == [0, 0, 0, 1, 1] and source.labels.dtype == np.int64
    assert source.sizes.tolist() == [[6, 8], [7, 8], [40, 3], [6, 8], [7, 8]] and source.sizes.dtype == np.int32
    assert source.jpeg(2) == (root / "ant" / "tall.png").read_bytes()


def test_flat_folder_is_unlabelled(tmp_path):
    save(tmp_path / "b.JPEG")
    save(tmp_path / "a.png")
    source = FolderSource(tmp_path)
    assert source.labels.tolist() == [-1, -1] and source.num_classes == 0 and source.name_of(0) == "a.png"


def test_folder_errors_name_the_trouble(tmp_path):
    with pytest.raises(StoreError, match="No such file"):
        FolderSource(tmp_path / "none")
    with pytest.raises(StoreError, match="no images; looked for"):
        FolderSource(tmp_path)
    bad = image_folder(tmp_path) / "bee" / "bad.jpg"
    bad.write_bytes(b"GIF89a, really")
    assert FolderSource(tmp_path).unreadable == {2: "not a JPEG, PNG, WebP, TIFF, BMP or GIF"}
    bad.unlink()
    save(tmp_path / "stray.jpg")
    with pytest.raises(StoreError, match=r"beside and inside its folders, e\.g\. stray\.jpg"):
        FolderSource(tmp_path)


def test_enormous_image_is_an_error(tmp_path):
    """A decompression bomb is refused from its header."""
    Image.new("1", (10_000, 7_000)).save(tmp_path / "bomb.png")
    with pytest.raises(StoreError, match=r"bomb\.png: 10000 x 7000 pixels are more than"):
        _ = FolderSource(tmp_path).sizes


# CIFAR-10


def write_cifar(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for k, name in enumerate([*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]):
        records = np.zeros((10_000, 3073), np.uint8)
        records[:, 0] = np.arange(10_000) % 10
        records[:, 1] = k  # red of the first pixel
        records[0, 1 + 1024 + 32] = 77  # green of row 1, column 0 of the first image
        records.tofile(folder / name)
    return folder


def test_cifar_keeps_the_official_order_and_turns_planes_into_pixels(tmp_path):
    write_cifar(tmp_path / "cifar-10-batches-bin")
    for path in (tmp_path, tmp_path / "cifar-10-batches-bin"):
        train, test = open_cifar10(path)
        assert train.images.shape == (50_000, 32, 32, 3) and test.images.shape == (10_000, 32, 32, 3)
        assert train.images[::10_000, 0, 0, 0].tolist() == [0, 1, 2, 3, 4] and test.images[0, 0, 0, 0] == 5
        assert train.images[0, 1, 0].tolist() == [0, 77, 0]
        assert train.labels[:12].tolist() == [*range(10), 0, 1] and train.class_names[3] == "cat"


def test_cifar_file_of_wrong_length_is_named_with_both_lengths(tmp_path):
    folder = write_cifar(tmp_path / "cifar")
    with open(folder / "data_batch_3.bin", "r+b") as file:
        file.truncate(30_729_999)
    with pytest.raises(StoreError, match=r"data_batch_3\.bin.*30,730,000 bytes.*30,729,999"):
        open_cifar10(folder)
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(StoreError, match=r"data_batch_3\.bin: cannot be read: No such file"):
        open_cifar10(folder)


# Digits


def test_digits_split_is_stratified_complete_and_never_moves():
    from sklearn.datasets import load_digits

    train, held_out = open_digits()
    assert len(train) + len(held_out) == 1797 and train.images.shape[1:] == (8, 8, 1)
    totals = np.bincount(load_digits().target)
    assert np.bincount(held_out.labels).tolist() == (totals // 5).tolist()
    assert np.bincount(train.labels).tolist() == (totals - totals // 5).tolist()
    everything = np.concatenate([train.images, held_out.images]).reshape(1797, -1)
    official = np.rint(load_digits().data * 255 / 16)
    labelled = zip(map(bytes, everything), np.concatenate([train.labels, held_out.labels]), strict=True)
    assert sorted(labelled) == sorted(zip(map(bytes, official.astype(np.uint8)), load_digits().target, strict=True))
    assert everything.max() == 255
    assert hashlib.sha256(held_out.images.tobytes()).hexdigest()[:16] == "5d6ed12eee1f3936"


def test_digits_without_their_library_are_one_line(monkeypatch):
    monkeypatch.setattr(digits, "find_spec", lambda name: None)
    with pytest.raises(StoreError, match="^the digits come with scikit-learn, which is not installed here"):
        open_digits()


# Several sets as one


def test_concatenated_sources_keep_images_and_match_classes_by_name(tmp_path):
    """Joining by index would call the second set's ants bees."""
    first = FolderSource(image_folder(tmp_path / "1", classes=("bee", "cat")))
    second = FolderSource(image_folder(tmp_path / "2", classes=("ant", "bee")))
    both = concatenate([first, second])
    assert isinstance(both, Concatenated) and both.class_names == ("bee", "cat", "ant")
    assert both.labels.tolist() == [0, 0, 1, 1, 2, 2, 0, 0]
    names = ["bee_0", "bee_1", "cat_0", "cat_1", "ant_0", "ant_1", "bee_0", "bee_1"]
    assert [both.name_of(i) for i in range(8)] == [f"{n}.jpg" for n in names]
    assert both.sizes.tolist() == first.sizes.tolist() + second.sizes.tolist()
    for i, source, j in ((0, first, 0), (3, first, 3), (4, second, 0), (7, second, 3)):
        assert both.jpeg(i) == source.jpeg(j)
    assert both.fingerprint() != concatenate([second, first]).fingerprint()


def test_concatenated_arrays_are_one_array_and_shapes_must_agree():
    both = concatenate([arrays([0, 1]), arrays([1, -1])])
    assert isinstance(both, ArraySource) and both.labels.tolist() == [0, 1, 1, -1] and len(both.images) == 4
    other = ArraySource("wide", np.zeros((1, 4, 5, 1), np.uint8), np.zeros(1, np.int64), ("a", "b"))
    with pytest.raises(StoreError, match="shapes"):
        concatenate([arrays([0]), other])


# --data


def test_digits_data():
    data = open_data(("digits",))
    assert data.get("unlabelled") is data.get("labelled") is data.get("train")
    assert len(data.get("labelled")) == 1442 and len(data.get("validation")) == 355


def test_divided_image_folder(tmp_path):
    image_folder(tmp_path / "train")
    image_folder(tmp_path / "val", per_class=1, classes=("bee",))
    data = open_data((str(tmp_path),))
    assert len(data.get("unlabelled")) == 4 and data.search == (tmp_path,)
    val = data.get("validation")
    assert val.labels.tolist() == [1] and val.class_names == ("ant", "bee")  # not 0, its place in val/ alone


def test_one_split_and_undivided_folders_have_no_validation(tmp_path):
    image_folder(tmp_path / "a" / "train")
    image_folder(tmp_path / "b")
    image_folder(tmp_path / "c", classes=("train", "boat"))
    for name, classes in (("a", ("ant", "bee")), ("b", ("ant", "bee")), ("c", ("boat", "train"))):
        data = open_data((str(tmp_path / name), NOTHING_HELD_OUT))
        assert data.get("train").class_names == classes and data.get("validation") is None


def test_folder_of_betons(tmp_path):
    small_beton(tmp_path / "train.beton", [0, 1, 1])
    small_beton(tmp_path / "extra.beton", [0, -1])
    small_beton(tmp_path / "val.beton", [1])
    data = open_data((str(tmp_path),))
    assert data.get("train").labels.tolist() == [0, -1, 0, 1, 1]  # extra.beton, then train.beton
    assert data.get("validation").labels.tolist() == [1]
    assert open_data((str(tmp_path / "train.beton"), NOTHING_HELD_OUT)).get("validation") is None


def test_keys_give_streams_their_own_source(tmp_path):
    flat = save(tmp_path / "many" / "x.jpg").parent
    save(flat / "y.jpg")
    more = save(tmp_path / "more" / "z.jpg").parent
    few = image_folder(tmp_path / "few", per_class=1)
    val = small_beton(tmp_path / "val.beton", [1, 0], ("bee", "ant"))
    specs = (f"unlabelled={flat}", f"unlabelled={more}", f"labelled={few}", f"validation={val}")
    data = open_data(specs)
    assert [data.get("unlabelled").name_of(i) for i in range(3)] == ["x.jpg", "y.jpg", "z.jpg"]
    assert data.get("unlabelled").labels.tolist() == [-1, -1, -1]
    assert data.get("labelled").labels.tolist() == [0, 1]
    assert data.get("validation").labels.tolist() == [0, 1]  # numbered as in the labelled set
    with pytest.raises(StoreError, match="no data for 'other'.*given: labelled, unlabelled, validation"):
        data.get("other")


def test_data_errors_say_what_was_looked_for(tmp_path):
    with pytest.raises(StoreError, match="no such file or folder"):
        open_data((str(tmp_path / "none"),))
    with pytest.raises(StoreError, match=r"no images; looked for \*\.beton"):
        open_data((str(tmp_path),))
    image_folder(tmp_path / "a" / "train")
    with pytest.raises(StoreError, match="it has no val split"):
        open_data((f"validation={tmp_path / 'a'}",))
    image_folder(tmp_path / "a" / "val", classes=("wasp",))
    with pytest.raises(StoreError, match="its class 'wasp' is not among the classes of"):
        open_data((str(tmp_path / "a"),))
    with pytest.raises(StoreError, match="no data for 'labelled'.*given: none"):
        open_data(()).get("labelled")


# Subsets


def test_all_and_complement():
    source = arrays([0, 1, 0, 1, 1])
    everything = resolve(All(), source)
    assert everything.ids is None and everything.count == 5
    chosen = resolve(PerClass(1), source)
    rest = resolve(Complement(PerClass(1)), source)
    assert sorted([*chosen.ids, *rest.ids]) == [0, 1, 2, 3, 4] and rest.count == 3
    assert rest.sha256 == hashlib.sha256(rest.ids.astype("<i8").tobytes()).hexdigest() != chosen.sha256
    assert resolve(Complement(All()), source).count == 0


def test_per_class_is_balanced_sorted_and_keyed_by_split_seed_alone():
    labels = np.arange(1000) % 5
    chosen = resolve(PerClass(7, split_seed=3), arrays(labels, "abcde"))
    assert np.bincount(labels[chosen.ids]).tolist() == [7] * 5 and (np.diff(chosen.ids) > 0).all()
    assert chosen.ids.dtype == np.int64 and chosen.count == 35 and chosen.name == "7-per-class-split-3"
    again = resolve(PerClass(7, split_seed=3), arrays(labels, "abcde", name="elsewhere"))
    assert again.sha256 == chosen.sha256
    other = resolve(PerClass(7, split_seed=4), arrays(labels, "abcde"))
    assert len(np.intersect1d(other.ids, chosen.ids)) < 10
    more = resolve(PerClass(9, split_seed=3), arrays(labels, "abcde"))
    assert np.isin(chosen.ids, more.ids).all()


def test_per_class_splits_never_move():
    """A changed hash would silently make published numbers another split's."""
    ids = resolve(PerClass(2, split_seed=91), arrays(np.arange(100) % 2)).ids
    assert ids.tolist() == [33, 56, 66, 93]


def test_per_class_names_the_class_that_is_too_small():
    with pytest.raises(StoreError, match="class 'b' has 1 images, 2 were asked for"):
        resolve(PerClass(2), arrays([0, 0, 1]))
    with pytest.raises(StoreError, match="has no labels"):
        resolve(PerClass(1), arrays([-1, -1], ()))


@pytest.fixture
def beton_source(tmp_path):
    return open_data((str(small_beton(tmp_path / "set.beton", [0, 1, 0, 1], stem="n01")), NOTHING_HELD_OUT))


def test_listed_names_and_indices(tmp_path, monkeypatch, beton_source):
    source = beton_source.get("train")
    text = "n01_3.JPEG\nant/n01_0.JPEG\n"
    (tmp_path / "mine.txt").write_text(text)
    for name, search in ((str(tmp_path / "mine.txt"), ()), ("mine", beton_source.search), ("mine.txt", [tmp_path])):
        listed = resolve(Listed(name), source, search)
        assert listed.ids.tolist() == [0, 3] and listed.count == 2
        assert listed.sha256 == hashlib.sha256(text.encode()).hexdigest()
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "numbers.txt").write_text("2\n1\n")
    with pytest.raises(StoreError, match=f"'numbers' was not found.*{tmp_path}.*FASTSSL_LISTS"):
        resolve(Listed("numbers"), source, [tmp_path])
    monkeypatch.setenv("FASTSSL_LISTS", str(tmp_path / "lists"))
    assert resolve(Listed("numbers"), source).ids.tolist() == [1, 2]
    assert resolve(Complement(Listed("numbers")), source).ids.tolist() == [0, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n01_0.JPEG\nn02_9.JPEG\nn03_9.JPEG\n", r"2 of its 3 images are not in .*, first n02_9\.JPEG"),
        ("0\n4\n", "1 of its indices are beyond the 4 images of .*, first 4"),
        ("1\n2\n1\n", "1 of its 3 lines name an image twice"),
        ("\n", "the list is empty"),
        (b"\xff\xfe\x00", "not a text file"),
    ],
)
def test_bad_lists_are_refused(tmp_path, beton_source, text, message):
    (tmp_path / "bad.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(StoreError, match=message):
        resolve(Listed("bad"), beton_source.get("train"), [tmp_path])


def test_list_of_ambiguous_names_is_refused(tmp_path):
    save(tmp_path / "a" / "1.jpg")
    save(tmp_path / "b" / "1.jpg")
    (tmp_path / "list.txt").write_text("1.jpg\n")
    with pytest.raises(StoreError, match=r"several images called 1\.jpg"):
        resolve(Listed("list"), FolderSource(tmp_path), [tmp_path])


def test_published_list_must_be_the_published_one(tmp_path, beton_source):
    """An edited simclr-10 would give numbers that cannot be compared."""
    (tmp_path / PUBLISHED["simclr-10"].alias).write_text("n01_0.JPEG\n")
    with pytest.raises(StoreError, match="not the published list simclr-10"):
        resolve(Listed("simclr-10"), beton_source.get("train"), [tmp_path])
