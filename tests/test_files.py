"""Files that are whole or not there."""

import os

import pytest

from mmjax import files


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "card"
    for content in ("first", "second ü"):
        files.replace(path, content)
        assert path.read_text(encoding="utf-8") == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_what_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch, fails):
    path = tmp_path / "card"
    files.replace(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match=r"No space left on device: .*card'"):
        files.replace(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_one_at_a_time_is_in_a_folder(tmp_path):
    for _ in range(2):
        with files.alone(tmp_path), pytest.raises(BlockingIOError, match=f"at work in {tmp_path}"), \
                files.alone(tmp_path):
            pytest.fail("two are in it")
    assert list(tmp_path.iterdir()) == []
