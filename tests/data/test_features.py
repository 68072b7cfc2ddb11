"""Features on disk: written, found again, and refused where they are of something else."""

import dataclasses
import io
import json
import pickle
import shutil
import tarfile

import ml_dtypes
import numpy as np
import pytest
from array_record.python import array_record_module

from mmjax.batch import Sample
from mmjax.config import Source
from mmjax.data import features
from mmjax.data.features import Card, Features, ImageBytes, ImageNames, Writer
from mmjax.data.formats import FORMATS
from mmjax.data.formats.record import Member
from tests import small

CARD = Card({"files": {"vit": "ab"}, "dtypes": ["float32"] * 2}, {"size": 56, "cut": "squashed"}, crops=2, seed=1,
            dtype="float32", shape=(3, 4))


def vector(number, card=CARD):
    """The features of image `number`: no two numbers are alike."""
    size = card.crops * int(np.prod(card.shape))
    return (np.arange(size, dtype=np.float32) + number * size).reshape(card.crops, *card.shape)


@pytest.fixture
def image_folder(tmp_path):
    """The eight scenes, to be moved and changed."""
    folder = tmp_path / "images"
    shutil.copytree(small.images(), folder)
    return folder


def read(folder):
    return Source("cc_sbu_align", str(folder)), FORMATS["cc_sbu_align"](str(folder), None)


def fill(folder, image_folder, numbers=range(8), card=CARD):
    """Stores the features of some of the images, as `mmjax.training.encode_features` does."""
    source, records = read(image_folder)
    with Writer(folder, card) as writer:
        names = writer.names([source], [records])
        keys = np.stack([features.key(names(records[number].image)) for number in numbers])
        for place in features.missing(writer.keys, keys):
            number = numbers[place]
            content = features.content_hash(ImageBytes.of(records[number].image).content)
            writer.add(keys[place], content, vector(number, card))
    return folder


def opened(folder, image_folder):
    source, records = read(image_folder)
    return Features(folder).of([source], [records]), [record.image for record in records]


def test_what_is_stored_is_found(tmp_path, image_folder):
    found, images = opened(fill(tmp_path / "features", image_folder), image_folder)
    assert len(found.index) == 8
    for number, image in enumerate(images):
        for crop in range(2):
            np.testing.assert_array_equal(found.find(image, crop), vector(number)[crop])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(found)).find(images[3], 1), vector(3)[1])


def test_bfloat16_is_stored_rounded(tmp_path, image_folder):
    card = dataclasses.replace(CARD, dtype="bfloat16")
    found, images = opened(fill(tmp_path / "features", image_folder, card=card), image_folder)
    assert found.find(images[7]).dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.find(images[7]), vector(7)[0].astype(ml_dtypes.bfloat16))
    assert card.nbytes == CARD.nbytes // 2 == 24


def test_crop_is_drawn(tmp_path, image_folder):
    found, images = opened(fill(tmp_path / "features", image_folder), image_folder)
    np.testing.assert_array_equal(found.feature_of(images[0], None), vector(0)[0])
    drawn = [found.feature_of(images[0], np.random.default_rng(seed)).ravel()[0] for seed in range(20)]
    assert set(drawn) == {0, 12}
    assert drawn == [found.feature_of(images[0], np.random.default_rng(seed)).ravel()[0] for seed in range(20)]


@pytest.mark.parametrize(("image", "name"), [
    ("/data/cc/image/1.jpg", "0/image/1.jpg"),
    ("/data/cc/../cc/image//1.jpg", "0/image/1.jpg"),
    ("/data/cc/coco/1.jpg", "1/1.jpg"),
    ("/data/ccc/1.jpg", "/data/ccc/1.jpg"),
    (Member("/data/cc/0.tar", 512, 9), "0/0.tar, 9 bytes at 512"),
    (Member("gs://b/sbu/0.tar", 512, 9), "2/0.tar, 9 bytes at 512"),
    ("/data/cc, example 3", "0, example 3"),
    (None, ""),
])
def test_names(image, name):
    assert ImageNames({"/data/cc": 0, "/data/cc/coco": 1, "gs://b/sbu": 2})(image) == name


@pytest.mark.parametrize(("path", "root", "folder"), [
    ("{tmp}/data", None, "{tmp}/data"),
    ("{tmp}/data/captions.json", None, "{tmp}/data"),
    ("{tmp}/data/annotations/captions.json", None, "{tmp}/data"),
    ("{tmp}/data/captions.json", "{tmp}/coco/", "{tmp}/coco"),
    ("{tmp}/data/{{00..10}}.tar", None, "{tmp}/data"),
])
def test_folder_of_a_source(tmp_path, path, root, folder):
    (tmp_path / "data").mkdir()
    source = Source("any", path.format(tmp=tmp_path), root=root and root.format(tmp=tmp_path))
    assert features.folder_of(source) == folder.format(tmp=tmp_path)


def test_missing():
    def keys(*numbers):
        return np.array([[number // 10, number % 10] for number in numbers], np.uint64).reshape(-1, 2)

    found = features.missing(keys(31, 12), keys(12, 45, 11, 45, 31, 22, 11))
    np.testing.assert_array_equal(found, [1, 2, 5])
    np.testing.assert_array_equal(features.missing(keys(), keys(7)), [0])
    assert not len(features.missing(keys(7), keys()))


def test_keys_that_begin_alike_are_told_apart(tmp_path, image_folder, monkeypatch):
    real = features.key
    monkeypatch.setattr(features, "key", lambda name: np.array([7, real(name)[1]], np.uint64))
    found, images = opened(
        fill(tmp_path / "features", image_folder, range(7)), image_folder=images_but(image_folder, 7)
    )
    for number, image in enumerate(images[:7]):
        np.testing.assert_array_equal(found.find(image), vector(number)[0])
    with pytest.raises(ValueError, match="has no feature"):
        found.find(images[7])


def images_but(image_folder, number):
    """The same folder, one image no image any more, so that nobody misses its feature."""
    (image_folder / "image" / f"{number}.jpg").write_bytes(b"no image")
    return image_folder


class Killed(BaseException):
    pass


def test_killed_and_gone_on_with(tmp_path, image_folder, monkeypatch):
    """Shards that are finished stay, what was half written is written again."""
    monkeypatch.setattr(features, "SHARD", 3)
    folder, written = tmp_path / "features", []
    add = Writer.add

    def until_killed(self, key, content, found):
        if len(written) == 5:
            monkeypatch.setattr(Writer, "_close_shard", lambda self: None)  # no time for anything
            raise Killed
        written.append(content)
        add(self, key, content, found)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "add", until_killed)
        close = Writer._close_shard
        with pytest.raises(Killed):
            fill(folder, image_folder)
    monkeypatch.setattr(Writer, "_close_shard", close)
    assert sorted(path.name for path in folder.glob("0*")) == [
        "00000.array_record", "00000.npy", "00001.array_record.partial"]
    with pytest.raises(ValueError, match="are incomplete: `mmjax data features` with the same folder adds"):
        Features(folder)

    monkeypatch.setattr(Writer, "add", lambda self, *rest: (written.append(rest[1]), add(self, *rest)))
    found, images = opened(fill(folder, image_folder), image_folder)
    assert len(written) == 5 + 5 and len(set(written)) == 8
    for number, image in enumerate(images):
        np.testing.assert_array_equal(found.find(image, 1), vector(number)[1])


def test_interrupted_shard_is_kept(tmp_path, image_folder, monkeypatch):
    folder, add = tmp_path / "features", Writer.add

    def interrupted(self, key, content, found):
        if len(self._keys) == 5:
            raise KeyboardInterrupt
        add(self, key, content, found)

    monkeypatch.setattr(Writer, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill(folder, image_folder)
    monkeypatch.undo()
    assert not (folder / "index.npy").exists()
    with Writer(folder, CARD) as writer:
        assert len(writer.keys) == 5


def test_one_process_at_a_time(tmp_path, image_folder):
    folder = fill(tmp_path / "features", image_folder)
    with Writer(folder, CARD), pytest.raises(BlockingIOError, match=f"Another process is writing in {folder}"):
        Writer(folder, CARD)
    fill(folder, image_folder)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_shard(tmp_path, image_folder, damage):
    folder = fill(tmp_path / "features", image_folder)
    shard = folder / "00000.array_record"
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:200])
    found, images = opened(folder, image_folder)
    with pytest.raises(ValueError, match=r"00000\.array_record is damaged .*Delete it; `mmjax data features`"):
        found.find(images[0])
    found, images = opened(fill(folder, image_folder), image_folder)
    np.testing.assert_array_equal(found.find(images[6]), vector(6)[0])


def test_damaged_index_and_card(tmp_path, image_folder):
    folder = fill(tmp_path / "features", image_folder)
    index = (folder / "index.npy").read_bytes()
    for size in (0, 100, len(index) - 1):
        (folder / "index.npy").write_bytes(index[:size])
        with pytest.raises(ValueError, match=r"index\.npy is damaged"):
            Features(folder)
    for columns in (np.zeros((3, 8), np.uint64), np.zeros((4, 8)), np.zeros(4, np.uint64)):
        np.save(folder / "index.npy", columns)
        with pytest.raises(ValueError, match=r"index\.npy is damaged \(it must hold uint64\[4,n\], but holds"):
            Features(folder)
    card = json.loads((folder / "features.json").read_text())
    odd = {"crops": [0, "2", None, True], "seed": [-1, 1.5], "shape": [3, [[]], ["x", 3], [1e308, 3], [0], [2**40]],
           "dtype": [[], "int8"], "encoder": [None, []], "transform": ["x"], "folders": [None, [1]]}
    for content in ("", "[]", "{}", '{"format": 2}', '{"format": 1, "odd": 2}', "[" * 100_000,
                    *(json.dumps(card | {name: value}) for name, values in odd.items() for value in values)):
        (folder / "features.json").write_text(content)
        with pytest.raises(ValueError, match=r"features\.json cannot be used"):
            Features(folder)
    with pytest.raises(FileNotFoundError, match="Make them with `mmjax data features"):
        Features(tmp_path / "nowhere")


@pytest.mark.parametrize("columns", [np.zeros((4, 8), np.uint64), np.zeros((3, 8)), None])
def test_damaged_columns_of_a_shard(columns, tmp_path, image_folder):
    folder = fill(tmp_path / "features", image_folder)
    np.save(folder / "00000.npy", columns) if columns is not None else (folder / "00000.npy").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"00000\.npy is damaged .*Delete it and 00000\.array_record"):
        Writer(folder, CARD)
    for name in ("00000.npy", "00000.array_record"):
        (folder / name).unlink()
    found, images = opened(fill(folder, image_folder), image_folder)
    np.testing.assert_array_equal(found.find(images[6]), vector(6)[0])


def test_new_images_are_added(tmp_path, image_folder):
    folder = fill(tmp_path / "features", image_folder, range(5))
    with pytest.raises(ValueError, match=r"3 of 8 images of .*, such as .*/5\.jpg.*adds what is missing"):
        opened(folder, image_folder)
    before = (folder / "00000.array_record").read_bytes()
    found, images = opened(fill(folder, image_folder), image_folder)
    assert (folder / "00000.array_record").read_bytes() == before
    for number, image in enumerate(images):
        np.testing.assert_array_equal(found.find(image), vector(number)[0])


def test_other_features_are_refused(tmp_path, image_folder):
    folder = fill(tmp_path / "features", image_folder)
    stored = features.fingerprint(CARD.encoder)
    other = dataclasses.replace(CARD, encoder={"files": {"vit": "cd"}, "dtypes": ["float32"] * 2})
    message = rf"(?s){stored} -> {features.fingerprint(other.encoder)}.*encoder.files.vit: 'ab' -> 'cd'"
    with pytest.raises(ValueError, match=message):
        fill(folder, image_folder, card=other)
    with pytest.raises(ValueError, match=message):
        features.check(folder, Features(folder).card, other.encoder, other.transform)
    with pytest.raises(ValueError, match="transform.size: 56 -> 224"):
        features.check(folder, CARD, CARD.encoder, CARD.transform | {"size": 224})
    features.check(folder, CARD, CARD.encoder, CARD.transform)
    for changes, line in (({"crops": 1}, "crops: 2 -> 1"), ({"dtype": "bfloat16"}, "'float32' -> 'bfloat16'")):
        with pytest.raises(ValueError, match=rf"other features of these images:\n  .*{line}"):
            fill(folder, image_folder, card=dataclasses.replace(CARD, **changes))


def test_data_may_move(tmp_path, image_folder):
    folder = fill(tmp_path / "features", image_folder)
    moved = tmp_path / "elsewhere"
    image_folder.rename(moved)
    found, images = opened(folder, moved)
    np.testing.assert_array_equal(found.find(images[2]), vector(2)[0])
    fill(folder, moved)
    assert Features(folder).card.folders == (str(image_folder),)


def test_other_images_of_the_same_names_are_not_taken_for_the_same(tmp_path, image_folder):
    folder = fill(tmp_path / "features", image_folder)
    other = tmp_path / "other"
    shutil.copytree(image_folder, other)
    contents = [path.read_bytes() for path in sorted((image_folder / "image").iterdir())]
    for number in range(8):
        (other / "image" / f"{number}.jpg").write_bytes(contents[number - 1])
    with pytest.raises(ValueError, match=rf"8 of 8 images of {other}.*It has features of images of {image_folder};"):
        opened(folder, other)
    fill(folder, other)  # both may be in one folder
    assert len(Features(folder).index) == 16
    shutil.copytree(other, image_folder, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="has changed since its feature in .* was made"):
        opened(folder, image_folder)


def test_two_folders_in_one(tmp_path, image_folder):
    """A mixture: images of the same names each have a feature of their own, even if many of them are the same."""
    other = tmp_path / "other"
    shutil.copytree(image_folder, other)
    sources, records = zip(read(image_folder), read(other), strict=True)
    shown = [its[0].image for its in records]
    for known in (range(0), range(8)):
        folder = tmp_path / f"features{len(known)}"
        if known:
            fill(folder, image_folder, known)
        with Writer(folder, CARD) as writer:
            names = writer.names(sources, records)
            assert names.folders == {str(image_folder): 0, str(other): 1}
            for number, image in enumerate(shown):
                if not known or number:
                    content = features.content_hash(ImageBytes.of(image).content)
                    writer.add(features.key(names(image)), content, vector(number))
        found = Features(folder, names)
        for number, image in enumerate(shown):
            np.testing.assert_array_equal(found.find(image), vector(number)[0])


def test_members_of_an_archive(tmp_path, image_folder):
    """Known by the archive and their place in it, wherever that lies now."""
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as tar:
        for number in range(3):
            tar.add(image_folder / "image" / f"{number}.jpg", f"{number}.jpg")
            caption = tarfile.TarInfo(f"{number}.txt")
            caption.size = 5
            tar.addfile(caption, io.BytesIO(b"a dog"))
    source = Source("webdataset", str(tmp_path / "tars" / "{0..0}.tar"))
    records = FORMATS["webdataset"](source.path, None)
    with Writer(tmp_path / "features", CARD) as writer:
        names = writer.names([source], [records])
        for number, record in enumerate(records):
            content = features.content_hash(ImageBytes.of(record.image).content)
            writer.add(features.key(names(record.image)), content, vector(number))
    (tmp_path / "tars").rename(tmp_path / "moved")
    source = Source("webdataset", str(tmp_path / "moved"))
    records = FORMATS["webdataset"](source.path, None)
    found = Features(tmp_path / "features").of([source], [records])
    for number, record in enumerate(records):
        np.testing.assert_array_equal(found.find(record.image), vector(number)[0])


def test_full_disk(tmp_path, monkeypatch):
    class Full:
        def __init__(self, path, options):
            open(path, "w").close()

        def write(self, content):
            raise RuntimeError("No space left on device")

        def close(self):
            pass

    monkeypatch.setattr(array_record_module, "ArrayRecordWriter", Full)
    with pytest.raises(OSError, match=r"cannot be written .*No space left on device\. Complete shards are kept"):
        with Writer(tmp_path / "features", CARD) as writer:
            writer.add(features.key("a"), 0, vector(0))


def test_image_without_a_feature(tmp_path, image_folder):
    found, _ = opened(fill(tmp_path / "features", image_folder), image_folder)
    with pytest.raises(ValueError, match=r"image/9\.jpg has no feature in .*features: it could not be read"):
        found.find(str(image_folder / "image" / "9.jpg"))
    with pytest.raises(ValueError, match="The image of zeros has no feature"):
        found.find(None)


def test_shape_of_what_is_added(tmp_path):
    wrong = pytest.raises(ValueError, match=r"\[2, 3, 4\], got \[1, 3, 4\]")
    with Writer(tmp_path / "features", CARD) as writer, wrong:
        writer.add(features.key("a"), 0, np.zeros((1, 3, 4)))


def rows(images, *counts):
    """One sample a row with so many of the images each."""
    images = iter(images)
    return [[Sample(images=[next(images) for _ in range(count)])] for count in counts]


def test_stacked_among_words(tmp_path, image_folder):
    found, images = opened(fill(tmp_path / "features", image_folder), image_folder)
    shown = [found.feature_of(image, None) for image in images]
    stacked = found.stack(rows(shown, 1, 0, 2), in_slots=True)
    assert stacked.shape == (3, 2, 3, 4)
    np.testing.assert_array_equal(stacked[2], shown[1:3])
    np.testing.assert_array_equal(stacked[0, 0], shown[0])
    assert not stacked[0, 1].any() and not stacked[1].any()
    together = [[sample for row in rows(shown, 1, 2) for sample in row]]  # packed
    np.testing.assert_array_equal(found.stack(together, in_slots=True, most=4)[0, :3], shown[:3])
    assert found.stack(rows(shown, 0, 0), in_slots=True, most=4).shape == (2, 4, 3, 4)
    assert found.stack(rows(shown, 0, 0), in_slots=True) is None


def test_stacked_one_a_row(tmp_path, image_folder):
    folder = fill(tmp_path / "features", image_folder)
    with Writer(folder, CARD) as writer:
        writer.add(features.key(ImageNames({})(None)), 0, vector(100))
    found, images = opened(folder, image_folder)
    shown = [found.feature_of(image, None) for image in images]
    stacked = found.stack(rows(shown, 1, 0, 1), in_slots=False)
    np.testing.assert_array_equal(stacked, [shown[0], vector(100)[0], shown[1]])
    with pytest.raises(ValueError, match=r"Rows \[1\] have more than one image"):
        found.stack(rows(shown, 1, 2), in_slots=False)
