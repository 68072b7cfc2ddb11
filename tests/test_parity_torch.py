"""The recipe of docs/parity.md, as it stands there: it runs, and what it writes is what `mmjax parity` reads."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from mmjax import parity
from mmjax.convert import write
from mmjax.families import FAMILIES
from mmjax.families.base import NUMBER
from mmjax.inference.loaded import load
from tests import small

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def dump():
    page = (Path(__file__).parents[1] / "docs" / "parity.md").read_text(encoding="utf-8")
    code = next(code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def dump" in code)
    names: dict = {}
    exec(code, names)
    return names["dump"]


def test_a_llama_of_transformers(dump, tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = small.GOLDEN / "ckpt" / "llama_hf"
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=600, hidden_size=64, intermediate_size=96, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=128, pad_token_id=0)).eval()
    theirs.save_pretrained(tmp_path / "hf")
    for path in tokenizer.glob("*token*"):
        shutil.copy(path, tmp_path / "hf")
    tokens = torch.randint(3, 600, (2, 17))
    tokens[:, 0] = 1
    with torch.no_grad():
        loss = theirs(input_ids=tokens, labels=tokens).loss
        dump(theirs, tmp_path / "reference.npz", lambda: theirs(input_ids=tokens), tokens=tokens.numpy(),
             targets=tokens.numpy(), loss=loss.numpy())
    write.command("llama")(tmp_path / "hf", tmp_path / "checkpoint")
    m = load(tmp_path / "checkpoint", dtype="float32")
    rows = parity.parity(m, tmp_path / "reference.npz")
    assert [row.stage.name for row in rows] == [
        "llama_embed", *(f"llama_layer_{i}" for i in range(5)), "llama_norm", "logits", "loss"]
    assert parity.all_agree(rows), parity.verdict(rows)
    assert max(row.relative for row in rows) < 5e-6

    with torch.no_grad():
        theirs.model.layers[3].mlp.up_proj.weight *= 1.05
        dump(theirs, tmp_path / "other.npz", lambda: theirs(input_ids=tokens), tokens=tokens.numpy())
    rows = parity.parity(m, tmp_path / "other.npz")
    assert next(row.stage.name for row in rows if row.verdict == "parts") == "llama_layer_3"
    assert "model.layers.3" in parity.verdict(rows)


def test_names_of_the_originals(dump, tmp_path):
    """Modules named as in the originals, which give what they take; every stage that is written is one of ours."""
    import torch

    names = ["visual_encoder.patch_embed", "visual_encoder.blocks.0", "visual_encoder.blocks.1", "ln_vision",
             "Qformer.bert.encoder.layer.0", "llama_proj", "llama_model.base_model.model.model.layers.0",
             "llama_model.base_model.model.model.norm", "llama_model.base_model.model.lm_head",
             "image_bind.modality_trunks.vision.blocks.0", "image_bind.modality_heads.vision",
             "image_bind.modality_postprocessors.vision", "image_bind_proj"]
    root = torch.nn.Module()
    for name in names:
        *parents, last = name.split(".")
        node = root
        for parent in parents:
            if not hasattr(node, parent):
                node.add_module(parent, torch.nn.Module())
            node = getattr(node, parent)
        node.add_module(last, torch.nn.Identity())
    x = torch.arange(6.0).reshape(1, 2, 3)
    dump(root, tmp_path / "reference.npz", lambda: [root.get_submodule(name)(x) for name in names], images=x.numpy())
    held = dict(np.load(tmp_path / "reference.npz"))
    assert set(held) == {
        "images", "vit_patches", "vit_block_0", "vit_block_1", "ln_vision_out", "qformer_block_0", "proj_out",
        "llama_embed", "llama_layer_0", "llama_norm", "logits", "vision_block_0", "vision_head", "vision_out",
        "bind_proj"}
    patterns = [stage.name.replace(NUMBER, r"\d+") for family in FAMILIES.values() for stage in family.stages]
    for name, found in held.items():
        assert name == "images" or any(re.fullmatch(pattern, name) for pattern in patterns)
        assert found.shape == ((2, 1, 3) if name == "vision_block_0" else (1, 2, 3))
