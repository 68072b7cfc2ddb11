"""Files that are whole or not there."""

import os
import subprocess
import sys

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
        with files.exclusive_lock(tmp_path), pytest.raises(BlockingIOError, match=f"writing in {tmp_path}"), \
                files.exclusive_lock(tmp_path):
            pytest.fail("two are in it")
    assert list(tmp_path.iterdir()) == []


WAITS = "import sys; sys.stdin.read()"
FORKS = """
import os, sys
from pathlib import Path
from mmjax import files

with files.exclusive_lock(Path(sys.argv[1])):
    if not os.fork():  # outlives its parent
        sys.stdin.read()
        os._exit(0)
    try:
        with files.exclusive_lock(Path(sys.argv[1])):
            print("two are in it")
    except BlockingIOError:
        print("kept", flush=True)
    os._exit(0)
"""


def test_a_fork_that_outlives_the_process_does_not_keep_the_lock(tmp_path):
    with subprocess.Popen([sys.executable, "-c", FORKS, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as parent:
        assert parent.stdout.readline() == "kept\n"  # by the parent, whose fork has given it up
        assert parent.wait(60) == 0
        with files.exclusive_lock(tmp_path):
            parent.stdin.close()


@pytest.mark.parametrize("close_fds", [True, False])
def test_a_program_that_is_started_does_not_inherit_the_lock(tmp_path, close_fds):
    with files.exclusive_lock(tmp_path):
        other = subprocess.Popen([sys.executable, "-c", WAITS], stdin=subprocess.PIPE, close_fds=close_fds)
    with other, files.exclusive_lock(tmp_path):
        assert other.poll() is None
        other.stdin.close()


def test_a_fork_inside_the_lock_may_leave_it(tmp_path):
    """What it closes is not another file that has meanwhile got the same number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_locked", set(files._locked))
        with files.exclusive_lock(tmp_path):
            (number,) = files._locked
            files._close_locked()
            again = os.open(tmp_path, os.O_RDONLY)
            assert again == number
        os.fstat(again)
        os.close(again)
