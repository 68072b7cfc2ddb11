"""Files of JSON lines that a killed run left as they were."""

import pytest

from mmjax.journal import Lines

WHOLE = '{"step": 0}\n{"step": 1}\n{"step": 2}\n'


def kept(path, below=9):
    lines = Lines(path, "step", below)
    return lines.kept, path.read_text()


@pytest.mark.parametrize("cut", range(len(WHOLE) - len('{"step": 2}\n'), len(WHOLE) + 1))
def test_a_line_that_was_being_written_goes(tmp_path, cut):
    (tmp_path / "a").write_text(WHOLE[:cut])
    count = 3 if cut >= len(WHOLE) - 1 else 2
    assert kept(tmp_path / "a") == (count, "".join(WHOLE.splitlines(True)[:count]))


def test_bytes_that_are_no_text_go_if_they_are_last(tmp_path):
    (tmp_path / "a").write_bytes(WHOLE.encode() + b"\x00\xff\x00")
    assert kept(tmp_path / "a", below=2) == (2, '{"step": 0}\n{"step": 1}\n')


def test_another_broken_line_is_named_and_stays(tmp_path):
    text = WHOLE.replace('1}', "")
    (tmp_path / "a").write_text(text)
    with pytest.raises(ValueError, match=r"a, line 2 is not JSON: .* Mend or remove that line"):
        kept(tmp_path / "a")
    assert (tmp_path / "a").read_text() == text


def test_lines_are_there_as_soon_as_they_are_written(tmp_path):
    with Lines(tmp_path / "a", "step", 0) as lines:
        lines.write({"step": 0})
        lines.sync()
        assert (tmp_path / "a").read_text() == '{"step": 0}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="folder"), Lines(tmp_path / "folder", "step", 0):
        pass
    with pytest.raises(OSError, match="No space left on device: .*full"), Lines(tmp_path / "full", "step", 0) as lines:
        lines._file.close()
        lines._file = open("/dev/full", "ab", buffering=0)
        lines.write({"step": 0})
