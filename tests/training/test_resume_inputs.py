"""Resuming after the files of a run have changed: refused with the difference, or continued where docs/data.md says so.

Nothing is trained: the card of a run is written, files are changed, and the run is asked whether it may resume.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from mmjax.checkpoints import converted
from mmjax.config import DataConfig, RunConfig, Source, WeightsConfig
from mmjax.data import pipeline
from mmjax.training import resume
from tests import small
from tests.data import layouts

ALLOWED = "Resuming with changed files, as allow_changed_inputs permits"


@pytest.fixture
def begun(tmp_path):
    """The config of a run on captions and a tar, whose card is written."""
    shutil.copytree(small.checkpoint(), tmp_path / "base")
    layouts.cc_sbu_align(tmp_path / "align")
    layouts.webdataset(tmp_path / "tars")
    mixture = Source("cc_sbu_align", str(tmp_path / "align")), Source("webdataset", str(tmp_path / "tars"))
    config = RunConfig(out=str(tmp_path / "run"), weights=WeightsConfig(str(tmp_path / "base")),
                       data=DataConfig(mixture=mixture))
    (tmp_path / "run").mkdir()
    card = {"format": converted.FORMAT, "config": dataclasses.asdict(config), "inputs": inputs(config)}
    (tmp_path / "run" / converted.RUN_CARD).write_text(json.dumps(card))
    return config


def inputs(config, stored=None):
    return resume.inputs(config, pipeline.read(config.data), stored)


def asked(config, stored=None, allowed=False):
    """What a run says that resumes with the files as they are now."""
    out = Path(config.out)
    return [resume.differences(config, out), *resume.changed_inputs(inputs(config, stored), out, allowed)]


def rows(change):
    def edit(folder):
        path = folder / "align" / "filter_cap.json"
        content = json.loads(path.read_text())
        change(content["annotations"])
        path.write_text(json.dumps(content))
    return edit


def image(folder):
    Image.new("RGB", (9, 9)).save(folder / "align" / "image" / "1.jpg")


def tokenizer(folder):
    path = folder / "base" / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | {"legacy": False}))


def architecture(folder):
    path = folder / "base" / "config.json"
    card = json.loads(path.read_text())
    card["architecture"]["llm"]["rope_theta"] = 5e5
    path.write_text(json.dumps(card))


def tar_caption(folder):
    """Of the same size, in place: only the time tells."""
    path = folder / "tars" / "00000.tar"
    path.write_bytes(path.read_bytes().replace(b"A dog.", b"A cat."))
    os.utime(path, ns=(1, 1))


def tar_member(folder):
    layouts.tar(folder / "tars" / "00000.tar", layouts.members()[:6])


REFUSED = {
    "caption": (rows(lambda rows: rows[0].update(caption="another")), r"data\.0/filter_cap\.json: SHA-256 .* -> SHA"),
    "order": (rows(lambda rows: rows.reverse()), r"data\.0/filter_cap\.json"),
    "row count": (rows(lambda rows: rows.pop()), r"data\.0/filter_cap\.json"),
    "tokenizer": (tokenizer, r"tokenizer/tokenizer_config\.json"),
    "architecture": (architecture, r"architecture\.llm\.rope_theta: .* -> 500000\.0"),
    "a caption in a tar": (tar_caption, r"data\.1/00000\.tar: \d+ bytes of \d.* -> \d+ bytes of 0\.000"),
    "members of a tar": (tar_member, r"data\.1/00000\.tar: .*headers \w+ -> .*headers"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_changed_files_are_refused_with_the_difference(change, begun, tmp_path):
    harm, difference = REFUSED[change]
    assert asked(begun) == [""]
    harm(tmp_path)
    with pytest.raises(ValueError, match=f"(?s)cannot resume: files that it reads have changed.*{difference}"):
        asked(begun)
    _, said = asked(begun, allowed=True)
    assert said.startswith(ALLOWED)


SETTINGS = {
    "prompts": dict(data=dict(prompts=("What?",))), "seed": dict(data=dict(seed=1)),
    "end symbol": dict(text=dict(end_sym="</s>")), "ratios": None}


@pytest.mark.parametrize("name", SETTINGS)
def test_changed_settings_are_refused(name, begun):
    first, second = begun.data.mixture
    changes = SETTINGS[name] or dict(data=dict(mixture=(dataclasses.replace(first, ratio=3.0), second)))
    now = dataclasses.replace(begun, **{part: dataclasses.replace(getattr(begun, part), **fields)
                                        for part, fields in changes.items()})
    with pytest.raises(ValueError, match="cannot resume with these changes"):
        asked(now)


def test_what_the_docs_allow_continues(begun, tmp_path):
    """An image that was replaced escapes, and data that moved are the same."""
    image(tmp_path)
    assert asked(begun) == [""]
    shutil.move(tmp_path / "align", tmp_path / "moved")
    first, second = begun.data.mixture
    moved = dataclasses.replace(begun, data=DataConfig(
        mixture=(dataclasses.replace(first, path=str(tmp_path / "moved")), second)))
    (said,) = asked(moved)
    assert said.startswith("Changed since it began: data.mixture.0.path")


class Stored:
    """Stands for `Features`, of which only the card is asked."""

    @dataclasses.dataclass
    class Card:
        encoder: dict
        folders: tuple = ()

    def __init__(self, encoder, *folders):
        self.card = self.Card({"vit": encoder}, folders)


def test_features_must_be_of_the_same_encoder(begun):
    path = Path(begun.out) / converted.RUN_CARD
    card = json.loads(path.read_text())
    path.write_text(json.dumps(card | {"inputs": inputs(begun, Stored("a"))}))
    assert asked(begun, Stored("a", "elsewhere")) == asked(begun) == [""]
    with pytest.raises(ValueError, match="features: "):
        asked(begun, Stored("b"))


def test_a_run_of_a_former_version_says_that_nothing_is_compared(begun):
    path = Path(begun.out) / converted.RUN_CARD
    card = json.loads(path.read_text())
    del card["inputs"]
    path.write_text(json.dumps(card))
    _, said = asked(begun)
    assert "cannot be compared" in said and resume.run_id(path.parent) != resume.run_id(path.parent)
    path.write_text(json.dumps(card | {"id": "a"}))
    assert resume.run_id(path.parent) == "a"
    assert resume.history(path.parent, 0, []) == [] and resume.history(path.parent, 3, ["", "x"]) == [
        {"step": 3, "changed": ["x"]}]
