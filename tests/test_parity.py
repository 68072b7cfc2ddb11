"""`mmjax parity`: reference files made of the golden cases agree, and what is changed in a model is found."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import cli, parity
from mmjax.families.minigpt4 import MiniGPT4
from mmjax.parity import NO_TARGET
from tests.parity import golden, imagebind_golden
from tests.parity.imagebind_golden import changed
from tests.parity.model import model as minigpt4_model
from tests.parity.test_forward import batch_of

STACKED = {"vit_blocks": "vit_block", "qformer_layers": "qformer_block", "llama_layers": "llama_layer"}
RENAMED = {"vit_patch_embed": "vit_patches", "inputs_embeds": "llama_embed", "llama_final_norm": "llama_norm",
           "final_norm": "llama_norm", "visual_feats": "bind_out", "T_I": "bind_out"}
SAME = ("images", "vit_out", "ln_vision_out", "qformer_out", "proj_out", "logits", "loss", "tokens")


def stages_of(arrays):
    """A case's arrays under the names of a reference file."""
    found = {}
    for name, x in arrays.items():
        if name in STACKED:
            found |= {f"{STACKED[name]}_{i}": layer for i, layer in enumerate(x)}
        elif name in RENAMED or name in SAME:
            found[RENAMED.get(name, name)] = x
        elif name.startswith("hidden_"):
            number = int(name.removeprefix("hidden_"))
            found["llama_embed" if number == 0 else f"llama_layer_{number - 1}"] = x
    return found


def minigpt4_reference(name, path):
    """(model, file) of a MiniGPT-4 case."""
    case = golden.load(name)
    m = minigpt4_model(case)
    batch = batch_of(case, m)
    tokens = np.where(batch.soft_index >= 0, -1, batch.tokens)
    np.savez(path, **stages_of(case.arrays), tokens=tokens, valid=batch.valid,
             targets=np.where(batch.loss_mask, tokens, NO_TARGET))
    return m, path


def imagebind_llm_reference(name, path):
    """(model, file) of a case of ImageBind-LLM's language model."""
    case = imagebind_golden.load(name)
    a = case.arrays
    image = np.broadcast_to(a["image"], (len(a["tokens"]), *a["image"].shape[1:]))
    np.savez(path, **stages_of(a), targets=np.where(a["labels"] == 0, NO_TARGET, a["labels"]), media_image=image)
    return imagebind_golden.model(imagebind_golden.adapter(case)), path


def first_parted(rows):
    return next(row.stage.name for row in rows if row.verdict != "agrees")


@pytest.mark.parametrize(("make", "name", "least"), [
    (minigpt4_reference, "a_caption", 19), (minigpt4_reference, "h_no_qformer", 5),
    (imagebind_llm_reference, "lm_finetune", 9)])
def test_golden_cases_agree(make, name, least, tmp_path):
    rows = parity.parity(*make(name, tmp_path / "reference.npz"))
    assert [row.stage.name for row in rows if row.verdict != "agrees"] == []
    assert len(rows) >= least and rows[-1].stage.name == "loss"
    assert parity.verdict(rows) == f"All {len(rows)} stages agree."


@pytest.mark.extended
def test_one_sense_through_its_tower(tmp_path):
    case = imagebind_golden.load("imagebind_thermal")
    renamed = {"tokens": "thermal_tokens", "head": "thermal_head", "out": "thermal_out"}
    found = {renamed.get(name, f"thermal_{name}"): x for name, x in case.arrays.items()
             if name in renamed or name.startswith("block_")}
    np.savez(tmp_path / "reference.npz", media_thermal=case.arrays["input"], **found)
    rows = parity.parity(imagebind_golden.model(imagebind_golden.PRETRAINED), tmp_path / "reference.npz")
    assert [row.stage.name for row in rows] == ["thermal_tokens", "thermal_block_0", "thermal_block_1", "thermal_head",
                                                "thermal_out"]
    assert parity.all_agree(rows), parity.verdict(rows)


PLACES = [  # a parameter, the layer that is changed (None: all of it), where the two then first part
    ("vit/patch/b", None, "vit_patches"), ("vit/pos", None, "vit_block_0"),
    ("vit/blocks/mlp/fc1/w", 1, "vit_block_1"), ("ln_vision/scale", None, "ln_vision_out"),
    ("qformer/layer_2/cross/k/w", None, "qformer_block_2"), ("qformer/query_tokens", None, "qformer_block_0"),
    ("projector/w", None, "proj_out"), ("llm/embedding", None, "llama_embed"),
    ("llm/layers/attn/k/w", 2, "llama_layer_2"), ("llm/norm/scale", None, "llama_norm"),
    ("llm/head/w", None, "logits"),
]


@pytest.fixture(scope="module")
def caption(tmp_path_factory):
    return minigpt4_reference("a_caption", tmp_path_factory.mktemp("caption") / "reference.npz")


@pytest.mark.parametrize(("path", "layer", "where"), PLACES)
def test_what_was_changed_is_where_they_first_part(caption, path, layer, where):
    m, reference = caption

    def spoilt(leaf):
        part = leaf if layer is None else leaf[layer]
        noise = 1 + 0.02 * np.random.default_rng(0).normal(size=part.shape).astype(np.float32)
        return leaf * noise if layer is None else leaf.at[layer].multiply(noise)

    rows = parity.parity(changed(m, {path: spoilt}), reference)
    assert first_parted(rows) == where
    told = parity.verdict(rows)
    assert f"first stage that differs is {where}:" in told and path.split("/")[0] in told


def test_nan_is_told(caption):
    m, reference = caption
    rows = parity.parity(changed(m, {"llm/layers/mlp/up/w": lambda leaf: leaf.at[1, 0, 0].set(jnp.nan)}), reference)
    assert first_parted(rows) == "llama_layer_1"
    assert "ours has numbers that are not finite" in parity.verdict(rows)


def test_vectors_in_place_of_tokens(caption, tmp_path):
    """Then the language model is compared by itself, whatever is wrong before it."""
    m, reference = caption
    held = parity.read(reference)
    kept = {name: held[name] for name in ("llama_embed", "valid", "targets", "llama_layer_0", "logits", "loss")}
    np.savez(tmp_path / "reference.npz", **kept)
    rows = parity.parity(changed(m, {"llm/embedding": lambda leaf: leaf * 2}), tmp_path / "reference.npz")
    assert [row.stage.name for row in rows] == ["llama_layer_0", "logits", "loss"]
    assert parity.all_agree(rows), parity.verdict(rows)


def test_a_huge_value_does_not_hide_the_others():
    stage = parity.Stage("llama_norm", "", "", "")
    expected = np.random.default_rng(0).normal(size=(1, 4, 50)).astype(np.float32)
    expected[..., 0] = 1e5  # such as LLaMA's first token has
    row = parity.compare(stage, expected + 0.01, expected, np.ones((1, 4), bool), 1e-5)
    assert row.relative < 1e-6 and row.typical > 1e-3 and row.verdict == "parts"


def test_padding_is_not_compared(caption):
    m, reference = caption
    held = parity.read(reference)
    assert not held["valid"].all()
    stage, x = parity.known(m.family, m.config)["llama_layer_0"], held["llama_layer_0"]
    spoilt = np.where(held["valid"][..., None], x, 1e6)
    assert parity.compare(stage, spoilt, x, held["valid"], 1e-6).verdict == "agrees"
    assert parity.compare(stage, spoilt, x, np.ones_like(held["valid"]), 1e-6).verdict == "parts"


def test_other_shapes_are_told():
    stage = parity.Stage("llama_norm", "", "", "")
    row = parity.compare(stage, np.zeros((2, 3, 4)), np.zeros((2, 3, 5)), np.ones((2, 3), bool), 1e-5)
    assert row.verdict == "shape" and "(2, 3, 5), ours (2, 3, 4)" in row.words


def test_coarser_arrays_are_held_to_less(caption, tmp_path):
    m, reference = caption
    held = parity.read(reference)
    np.savez(tmp_path / "half.npz", tokens=held["tokens"], valid=held["valid"], images=held["images"],
             vit_out=held["vit_out"], llama_norm=held["llama_norm"].astype(np.float16))
    rows = parity.parity(m, tmp_path / "half.npz")
    assert [row.tolerance for row in rows] == [parity.TOLERANCES["float32"], parity.TOLERANCES["float16"]]
    assert parity.all_agree(rows) and rows[1].relative > 1e-4


@pytest.mark.parametrize(("change", "message"), [
    ({"llama_layer_3": "logits"}, "has llama_layer_3, which this model does not have. The model has the stages .*"
                                  "vit_block_0…2.*llama_layer_0…2.*and the inputs images, tokens"),
    ({"tokens": None}, "no inputs for .*loss|it is an input"),
    ({"images": None}, "has slots of soft tokens"),
    ({"valid": "logits"}, "`valid` has the shape"),
    ({"targets": "valid"}, "`targets` differ from `tokens`"),
])
def test_what_a_file_may_not_hold(caption, tmp_path, change, message):
    m, reference = caption
    held = parity.read(reference)
    held |= {name: held[of] for name, of in change.items() if of}
    if change == {"tokens": None}:
        held = {"llama_embed": held["llama_embed"]}
    np.savez(tmp_path / "reference.npz", **{name: x for name, x in held.items() if change.get(name, "") is not None})
    with pytest.raises(ValueError, match=message):
        parity.parity(m, tmp_path / "reference.npz")


def test_a_file_without_stages_or_of_something_else(caption, tmp_path):
    m, _ = caption
    np.savez(tmp_path / "inputs.npz", tokens=np.zeros((1, 2), int))
    with pytest.raises(ValueError, match="no stage to compare, only tokens"):
        parity.parity(m, tmp_path / "inputs.npz")
    (tmp_path / "words.npz").write_text("words")
    with pytest.raises(ValueError, match="not an npz file"):
        parity.parity(m, tmp_path / "words.npz")
    with pytest.raises(FileNotFoundError, match="recipe"):
        parity.parity(m, tmp_path / "nowhere.npz")


def test_stages_stand_in_order_and_are_all_reachable(caption):
    m, reference = caption
    names = list(parity.known(m.family, m.config))
    assert names.index("vit_patches") < names.index("vit_block_2") < names.index("qformer_block_0")
    assert names.index("proj_out") < names.index("llama_embed") < names.index("llama_layer_2") < names.index("logits")
    held = set(parity.read(reference))
    assert set(names) <= held


def test_command(caption, tmp_path, monkeypatch, capsys):
    m, reference = caption
    assert isinstance(m.module, MiniGPT4)
    spoilt = changed(m, {"projector/b": lambda leaf: leaf + 0.1})
    for found, status in ((m, 0), (spoilt, 1)):
        monkeypatch.setattr("mmjax.inference.loaded.load", lambda path, dtype, found=found: found)
        monkeypatch.setattr("sys.argv", ["mmjax", "parity", str(tmp_path), "--reference", str(reference), "--json",
                                         str(tmp_path / "out.json")])
        if status:
            with pytest.raises(SystemExit) as stopped:
                cli.main()
            assert stopped.value.code == 1
        else:
            cli.main()
        told, out = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
        assert ("first stage that differs is proj_out" in told["verdict"]) == bool(status)
        assert "proj_out" in out
        assert {row["verdict"] for row in told["stages"]} == ({"agrees", "parts"} if status else {"agrees"})
