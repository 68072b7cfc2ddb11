"""Cases that run in one test: each of them, and each failure is told."""

import pytest

from tests.cases import every


def test_every_case_runs_and_every_failure_is_named(tmp_path):
    seen = []

    @every("letter", "ab")
    @every(("number", "square"), [(1, 1), (2, 5), (3, 9)])
    def check(letter, number, square, tmp_path):
        seen.append((letter, number, tmp_path))
        assert not list(tmp_path.iterdir())
        (tmp_path / "file").touch()
        if number == 1 and letter == "b":
            with pytest.raises(KeyError):
                pass
        assert number ** 2 == square

    with pytest.raises(ExceptionGroup, match="3 of 6 cases failed") as found:
        check(tmp_path)
    assert [seen[:2] for seen in seen] == [(letter, number) for letter in "ab" for number in (1, 2, 3)]
    assert [str(error) for error in found.value.exceptions] == [
        "letter = 'a', number = 2, square = 5", "letter = 'b', number = 1, square = 1",
        "letter = 'b', number = 2, square = 5"]
    assert all(error.__cause__ for error in found.value.exceptions)
