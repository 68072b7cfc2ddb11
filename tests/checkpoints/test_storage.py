"""Folders of Orbax checkpoints: any name that can be, and what was written is read back."""

import os

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mmjax.checkpoints import storage


@pytest.fixture
def written(tmp_path):
    """A checkpoint below a folder whose name is a pattern; one array has a file of its own."""
    place = storage.local(tmp_path / "exp [1]" / "a*?")
    with ocp.StandardCheckpointer() as writer:
        writer.save(place, {"a": {"w": jnp.arange(1000.0)}, "b": jnp.float32(1)})
    return place


def test_only_the_pattern_is_a_pattern(tmp_path):
    for name in ("[a]", "a"):
        (tmp_path / name / "inside").mkdir(parents=True)
        (tmp_path / name / "inside" / f"part_{name}").touch()
    place = storage.local(tmp_path) / "[a]"
    assert list(place.glob("inside/part_*")) == [place / "inside" / "part_[a]"]
    assert all(isinstance(each, storage.LocalPath) for each in (place, place.parent, *place.glob("*")))


def test_what_was_written_below_a_pattern_is_read_back(written):
    storage.read_back(written)
    np.testing.assert_array_equal(storage.arrays(written, ["a/w"])["a/w"].read().result(), np.arange(1000.0))


@pytest.mark.parametrize("lost", ["manifest.ocdbt", "_METADATA", "d"])
def test_what_cannot_be_read_is_told(written, lost):
    for path in [written / lost] if lost != "d" else (written / "ocdbt.process_0" / "d").iterdir():
        path.unlink()
    with pytest.raises(storage.WriteError, match="cannot be read back") as error:
        storage.read_back(written)
    assert "tensorstore_spec" not in str(error.value)


def test_links_and_dots_are_followed_as_the_system_does(tmp_path):
    (tmp_path / "real" / "inside").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real/inside")
    assert os.fspath(storage.local(tmp_path / "link" / ".." / "x")) == os.path.realpath(tmp_path / "real" / "x")


@pytest.mark.parametrize(("name", "words"), [
    ("a\\b", "backslash"), (os.fsdecode(b"\xff"), "not UTF-8"), ("gs:/b", "remote storage"), ("s3:", "remote storage"),
    ("/hf/models", "remote storage"), ("n" * 256, "more than 255 bytes"),
    ("/".join(["n" * 200] * 21), "bytes, and the"),
])
def test_what_cannot_be_is_refused(tmp_path, name, words):
    with pytest.raises(ValueError, match=f"{words}.*Name another folder"):
        storage.local(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["[1]", "a*?", "{x}", "100%", "a#b", "ü", "a\nb", "~", "gs", "gs:b", "/home/gs", "n" * 255])
def test_what_can_be_is_not(tmp_path, name):
    assert storage.problem(tmp_path / name) is None
