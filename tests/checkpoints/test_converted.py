"""Descriptions of checkpoints and runs: what is wrong with them is named."""

import json

import pytest

import mmjax
from tests import small


def test_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a converted checkpoint"):
        mmjax.load(tmp_path)
    with pytest.raises(ValueError, match="as transformers saves it, not a converted checkpoint. Convert it first"):
        mmjax.load(small.GOLDEN / "ckpt" / "llama_hf")


@pytest.mark.parametrize(("text", "message"), [
    ('{"format": 1, "fam', "config.json is damaged, it is not JSON"),
    ("[]", "config.json must hold a JSON object, not a list"),
    ('{"format": 1, "family": "llama"}', "config.json has no architecture, text, generation, fresh"),
])
def test_damaged_description_is_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        mmjax.load(tmp_path)


def test_run_whose_checkpoint_was_moved(tmp_path):
    card = {"checkpoint": "../gone", "architecture": {}, "config": {"text": {}}}
    (tmp_path / "run.json").write_text(json.dumps(card))
    with pytest.raises(FileNotFoundError, match=r"trained on the checkpoint .*gone, which is not there"):
        mmjax.load(tmp_path)
