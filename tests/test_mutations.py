"""A few hundred of the mutated files of `benchmarks/mutations.py`, over all readers."""

import pytest

from benchmarks import mutations
from tests import small

COUNT = 10  # of each reader
pytestmark = pytest.mark.extended


@pytest.fixture(scope="module")
def readers():
    mutations.watch()
    return mutations.readers(small.checkpoint())


def test_mutated_files_are_read_or_refused(readers, tmp_path, monkeypatch):
    monkeypatch.setenv("MMJAX_TAR_INDEX", "off")
    found = []
    for name, reader in readers.items():
        for number in range(COUNT):
            folder = tmp_path / f"{name}-{number}"
            folder.mkdir()
            found.append(mutations.attempt(reader, name, number, folder))
    assert [outcome for outcome in found if outcome.kind not in ("read", "refused")] == []
    assert {"read", "refused"} == {outcome.kind for outcome in found} and len(found) >= 300


def test_what_a_reader_must_not_do_is_noticed(tmp_path):
    mutations.watch()
    for number, (harm, kind) in enumerate((
            (lambda folder: {}["a"], "traceback"), (lambda folder: eval("1 + 1"), "executed"),
            (lambda folder: open(folder / "b", "w").close(), "executed"), (lambda folder: None, "read"))):
        reader = mutations.Reader({"a.json": b"{}"}, harm)
        (tmp_path / str(number)).mkdir()
        assert mutations.attempt(reader, "harm", number, tmp_path / str(number)).kind == kind
