"""Data named relative to the working directory, as users and the shipped configurations name them."""

import os

import pytest

from mmjax.data import images
from mmjax.data.formats import FORMATS, rows
from tests.data import layouts


@pytest.mark.parametrize("name", FORMATS)
def test_relative_paths(name, tmp_path, monkeypatch):
    write = getattr(layouts, name.removeprefix("inv"))
    path = os.path.relpath(write(tmp_path / "data" / "set"), tmp_path)
    monkeypatch.chdir(tmp_path)
    records = list(FORMATS[name](path))
    assert records and all(record.problem is None for record in records)
    shown = [record.image for record in records if record.image is not None]
    assert shown
    for image in shown:
        assert images.load(image, 4).shape == (4, 4, 3)


def test_dots_behind_a_link_lead_where_the_system_says(tmp_path):
    (tmp_path / "real" / "inside").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real/inside")
    root = f"{tmp_path}/link/../images"
    assert rows.image_path(root, "0.jpg") == f"{root}/0.jpg"
    with pytest.raises(ValueError, match="not below"):
        rows.image_path(root, f"{tmp_path}/images/0.jpg")
