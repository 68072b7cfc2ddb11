"""Weights as they come: re-saved, padded, partial, wrapped, trained by the originals, given in the wrong slot.

The first table is `../shared/cases/weights`, made anew in small; every other test is of a kind of its own.
"""

import base64
import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from mmjax.convert import language_model, minigpt4, safetensors, state_dict, torch_file, write
from mmjax.convert.export import merged
from mmjax.convert.tables import ConversionError, Problems
from mmjax.models.llama import LlamaConfig
from mmjax.tokenizer import UNKNOWN, Tokenizer
from tests.convert.released import (
    ADAPTER_V2,
    CKPT,
    IMAGEBIND,
    MINIGPT4,
    NO_QFORMER,
    V2,
    llama_folder,
    llama_tensors,
    meta_folder,
    tensors,
    whole,
)
from tests.convert.test_torch_file import archive, plain, tensor

GROW = ("model.embed_tokens.weight", "lm_head.weight")


def rows(count):
    """The golden language model with another number of embedding rows."""
    held = llama_tensors()
    return held | {key: np.concatenate([held[key], held[key]])[:count] for key in GROW}


def said(capsys) -> str:
    return capsys.readouterr().err


def problem(function, *arguments, **more) -> str:
    with pytest.raises(ConversionError) as error:
        function(*arguments, **more)
    return str(error.value)


def index(folder, name, keys, shard):
    (folder / name).write_text(json.dumps({"weight_map": dict.fromkeys(keys, shard)}))


# ---- the cases: a function that makes the folder, and what is said; "!" marks a refusal ----


def ids_0_1_minus1(folder):
    llama_folder(folder, llama_tensors(), bos_token_id=0, eos_token_id=1, pad_token_id=-1)
    (folder / "generation_config.json").write_text(json.dumps({"_from_model_config": True, "pad_token_id": 0}))


def stale_index_beside_one_file(folder):
    llama_folder(folder, llama_tensors())
    safetensors.save(folder / "model.safetensors", llama_tensors())
    (folder / "pytorch_model.bin").unlink()
    index(folder, "model.safetensors.index.json", llama_tensors(), "model-00001-of-00001.safetensors")


def stale_index_beside_bins(folder):
    llama_folder(folder, llama_tensors())
    index(folder, "model.safetensors.index.json", llama_tensors(), "model-00001-of-00001.safetensors")


def padded(folder, count=608):
    llama_folder(folder, rows(count), vocab_size=count)
    (folder / "added_tokens.json").write_text('{"<pad>": 600}')


def pad_token_beyond_rows(folder):
    llama_folder(folder, llama_tensors())
    (folder / "added_tokens.json").write_text('{"<pad>": 600}')


def mistral(folder):
    meta_folder(folder, head_dim=8, hidden_dim=96, multiple_of=None)
    safetensors.save(folder / "consolidated.safetensors", torch_file.load(folder / "consolidated.00.pth"))
    (folder / "consolidated.00.pth").unlink()


def accessory(folder):
    meta_folder(folder)
    held = tensors(folder / "consolidated.00.pth")
    (folder / "consolidated.00.pth").unlink()
    torch_file.save(folder / "consolidated.00-of-01.model.pth",
                    {"model": {f"llma.{key}": value for key, value in held.items()}})


def tiktoken(folder):
    meta_folder(folder)
    lines = [base64.b64encode(bytes([i % 256])) + b" %d\n" % i for i in range(600)]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))


def tiktoken_and_json(folder):
    tiktoken(folder)
    shutil.copyfile(IMAGEBIND / "llama_meta" / "params.json", folder / "params.json")
    from benchmarks.weights import word_level

    (folder / "tokenizer.json").write_text(json.dumps(word_level(600)).replace("w10", "<0x0A>"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}))


def split_by_rows(folder, norm=1.0):
    meta_folder(folder, vocab_size=600)
    held = tensors(folder / "consolidated.00.pth")
    axes = {"wo": 1, "w2": 1}
    for number in range(2):
        def part(key, value, number=number):
            if value.ndim == 1 or "rope" in key:
                return value if number == 0 else (value * np.float16(norm)).astype(value.dtype)
            axis = axes.get(key.split(".")[-2], 0)
            return np.split(value, 2, axis)[number]

        torch_file.save(folder / f"consolidated.0{number}.pth", {key: part(key, value) for key, value in held.items()})


def only_lm_head(folder):
    held = llama_tensors()
    held["lm_head.weight"] = held.pop("model.embed_tokens.weight")
    llama_folder(folder, held, tie_word_embeddings=True)


def dtypes_differ(folder):
    llama_folder(folder, {key: value.astype(np.float32 if "layers.1." in key else np.float16)
                          for key, value in llama_tensors().items()})


def tokenizer_json_alone(folder):
    tiktoken_and_json(folder)
    (folder / "tokenizer.model").unlink()


CASES = {
    "04": (ids_0_1_minus1, ["eos_token_id is 1 ('<s>') in config.json, but the tokenizer's is 2 ('</s>')",
                            "write 2 into config.json", "pad_token_id -1 of config.json"]),
    "05 single": (stale_index_beside_one_file, ["reading model.safetensors"]),
    "05 bins": (stale_index_beside_bins, ["!complete set: pytorch_model.bin. If it is the one you want, delete "
                                          "model.safetensors.index.json"]),
    "06": (padded, ["608 rows, the tokenizer has 601 tokens. The other 7 rows are padding"]),
    "06 632": (lambda folder: padded(folder, 632), ["The other 31 rows"]),
    "06 768": (lambda folder: padded(folder, 768), ["The other 167 rows"]),
    "07": (pad_token_beyond_rows, ["!Without a row is '<pad>' (600). If no prompt uses it, take it out of "
                                   "added_tokens.json"]),
    "12 mistral": (mistral, ["reading consolidated.safetensors"]),
    "12 accessory": (accessory, ["reading consolidated.00-of-01.model.pth"]),
    "13": (tiktoken, ["!Llama 3's vocabulary in tiktoken's format"]),
    "13 json": (tiktoken_and_json, ["reading consolidated.00.pth"]),
    "14": (split_by_rows, ["reading consolidated.*.pth (2 files)"]),
    "14 norms": (lambda folder: split_by_rows(folder, 1.002), ["differs a little between the shards"]),
    "15": (only_lm_head, ["lm_head.weight stands for model.embed_tokens.weight, too"]),
    "16": (dtypes_differ, ["have different dtypes (float16, float32); stored as float32"]),
    "17": (tokenizer_json_alone, ["copy tokenizer.model from the original folder"]),
}


@pytest.mark.parametrize("name", CASES)
def test_case(tmp_path, capsys, name):
    make, lines = CASES[name]
    make(tmp_path / "llm")
    if lines[0].startswith("!"):
        message = problem(language_model.inspect, tmp_path / "llm")
        assert lines[0][1:] in message and "ownload" not in message and "1 problem" in message
        return
    found = language_model.inspect(tmp_path / "llm")
    shown = said(capsys)
    assert all(line in shown for line in lines), shown
    original = CKPT / "llama_hf" if (tmp_path / "llm" / "config.json").is_file() else None
    expected = whole((language_model.inspect(original) if original else meta_original(tmp_path)).parameters)
    for path, array in whole(found.parameters).items():
        want = expected["llm/embedding" if name == "15" and path == "llm/head/w" else path]
        if path in ("llm/embedding", "llm/head/w"):
            array = array[:600] if path == "llm/embedding" else array[:, :600]
        np.testing.assert_array_equal(array, want, err_msg=path)


def meta_original(tmp_path):
    return language_model.inspect(meta_folder(tmp_path / "original"))


def test_advice_of_the_cases_is_true(tmp_path):
    pad_token_beyond_rows(tmp_path / "a")
    (tmp_path / "a" / "added_tokens.json").unlink()
    language_model.inspect(tmp_path / "a")
    stale_index_beside_bins(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors.index.json").unlink()
    language_model.inspect(tmp_path / "b")
    ids_0_1_minus1(tmp_path / "c")
    config = json.loads((tmp_path / "c" / "config.json").read_text()) | {"bos_token_id": 1, "eos_token_id": 2}
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    assert language_model.inspect(tmp_path / "c").generation["eos_token_id"] == 2


def test_a_tokenizer_of_another_model(tmp_path):
    held = llama_tensors()
    wide = {key: np.zeros((4000, 64), np.float16) for key in GROW}
    message = problem(language_model.inspect, llama_folder(tmp_path / "llm", held | wide, vocab_size=4000))
    assert "has only 600 tokens, including added ones: it belongs to another model" in message


# ---- two sets ----


@pytest.mark.parametrize("change, warned", [
    (lambda held: held, None),
    (lambda held: {key: value.astype(np.float32) for key, value in held.items()}, None),
    (lambda held: {key: value.astype(np.float32).astype(ml_dtypes.bfloat16) for key, value in held.items()}, None),
    (lambda held: held | {"model.layers.2.mlp.up_proj.weight": held["model.layers.2.mlp.up_proj.weight"] * 2},
     "the values of model.layers.2.mlp.up_proj.weight are others"),
    (lambda held: held | {"model.norm.weight": held["model.norm.weight"][:-1]}, "model.norm.weight has shape"),
    (lambda held: held | {"model.layers.3.mlp.up_proj.weight": held["model.norm.weight"]}, "only in the latter"),
])
def test_two_complete_sets(tmp_path, capsys, change, warned):
    folder = llama_folder(tmp_path / "llm", change(llama_tensors()))
    safetensors.save(folder / "model.safetensors", llama_tensors())
    language_model.inspect(folder)
    shown = said(capsys)
    assert ("holds two models" in shown) == (warned is not None) and (warned or "") in shown


# ---- wrappers, members, prefixes ----


OBJECTS = (b"}(" + plain("_content") + b"cpathlib\nPosixPath\n(" + plain("/a") + plain("b") + b"tR"
           + plain("sets") + b"c__builtin__\nset\n]" + plain("x") + b"a\x85Rub")


def with_objects(path, wrapper="model", member="config"):
    """A projector beside a config object, as LAVIS saves one that is no dict."""
    weights = (plain("llama_proj.weight") + tensor("0", 6, 0, (2, 3), (3, 1))
               + plain("llama_proj.bias") + tensor("1", 2, 0, (2,), (1,)))
    program = (b"}(" + plain(wrapper) + b"}(" + weights + b"u" + plain(member)
               + b"comegaconf.dictconfig\nDictConfig\n)\x81" + OBJECTS + plain("epoch") + plain(3) + b"u")
    return archive(path, program, [np.arange(6, dtype=np.float32).tobytes(), bytes(8)])


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict"])
@pytest.mark.parametrize("member", ["config", "optimizer", "args", "hyper_parameters", "ds_config"])
def test_objects_beside_the_weights_are_never_made(tmp_path, wrapper, member):
    problems = Problems()
    held = state_dict.read(with_objects(tmp_path / "p.pth", wrapper, member), problems)
    assert not problems
    np.testing.assert_array_equal(held["llama_proj.weight"].read(), np.arange(6).reshape(2, 3))


def test_objects_in_unknown_members_and_among_the_weights_are_refused(tmp_path):
    problems = Problems()
    assert state_dict.read(with_objects(tmp_path / "p.pth", member="ema"), problems) == {}
    assert "holds a Python object made by 'omegaconf.dictconfig.DictConfig' (near the key 'ema')" in problems[0]


@pytest.mark.parametrize("prefix", ["module.", "_forward_module.", "model.", "_orig_mod.module.", "state_dict."])
def test_prefixes(tmp_path, prefix):
    torch_file.save(tmp_path / "p.pth", {prefix + key: value for key, value in tensors(MINIGPT4["projector"]).items()}
                    | {"epoch": 3})
    assert read(tmp_path / "p.pth").keys() == tensors(MINIGPT4["projector"]).keys()
    folder = llama_folder(tmp_path / "llm", {prefix + key: value for key, value in llama_tensors().items()})
    language_model.inspect(folder)


def read(path):
    problems = Problems()
    held = state_dict.read(path, problems)
    assert not problems
    return held


def test_zero3_is_named(tmp_path):
    held = {"llama_proj.weight": np.zeros(0, np.float16)}
    torch_file.save(tmp_path / "p.pth", {"module": held, "ds_version": "0.14"})
    problems = Problems()
    state_dict.read(tmp_path / "p.pth", problems)
    assert "zero_to_fp32.py" in problems[0]


# ---- what the originals train ----


def inspected(**arguments):
    return whole(minigpt4.inspect(**arguments).parameters)


@pytest.fixture(scope="module")
def original():
    return inspected(**MINIGPT4)


def qformer_tensors(factor=1):
    held = tensors(MINIGPT4["qformer"])
    return {key: value * factor for key, value in held.items()
            if key.startswith(("Qformer.", "query_tokens", "ln_vision"))}


def test_a_trained_qformer_inside_the_projector_file_replaces_the_other(tmp_path, capsys, original):
    torch_file.save(tmp_path / "trained.pth", {
        "model": tensors(MINIGPT4["projector"]) | qformer_tensors(2), "optimizer": {}, "epoch": 1, "iters": 5})
    found = inspected(**MINIGPT4 | {"projector": tmp_path / "trained.pth"})
    assert "tensors of --qformer. They are taken, as the original does" in said(capsys)
    for path, array in original.items():
        np.testing.assert_array_equal(found[path], 2 * array if path.startswith(("qformer/", "ln_vision/")) else array)
    alone = inspected(**MINIGPT4 | {"projector": tmp_path / "trained.pth", "qformer": tmp_path / "trained.pth"})
    none = inspected(**MINIGPT4 | {"projector": tmp_path / "trained.pth", "qformer": None})
    for path, array in found.items():
        np.testing.assert_array_equal(alone[path], array)
        np.testing.assert_array_equal(none[path], array)


def test_a_projector_in_the_qformers_file_is_not_lost(tmp_path):
    torch_file.save(tmp_path / "trained.pth", {"model": tensors(MINIGPT4["projector"]) | qformer_tensors()})
    message = problem(minigpt4.inspect, **MINIGPT4 | {"qformer": tmp_path / "trained.pth", "projector": None})
    assert "trained.pth also holds a trained projector, which would be lost: give the same file as --proj" in message


@pytest.mark.parametrize("base", ["", "base_layer."])
def test_a_whole_minigpt_v2(tmp_path, capsys, base):
    """All of it replaces what the other files hold, as load_state_dict does; names of either peft."""
    expected = inspected(**V2)
    vit = {f"visual_encoder.{key}": 2 * value for key, value in tensors(V2["vit"]).items()}
    llm = {f"llama_model.base_model.model.{key}": 2 * value for key, value in llama_tensors().items()}
    llm = {key.replace("q_proj.weight", f"q_proj.{base}weight"): value for key, value in llm.items()}
    vision = {"ln_vision.weight": np.full(64, 3, np.float32), "ln_vision.bias": np.zeros(64, np.float32)}
    torch_file.save(tmp_path / "whole.pth", {"model": tensors(V2["lora"]) | vit | llm | vision})
    found = inspected(**V2 | {"projector": tmp_path / "whole.pth", "lora": tmp_path / "whole.pth"})
    shown = said(capsys)
    assert all(f"tensors of --{option}. They are taken" in shown for option in ("vit", "llm", "qformer"))
    assert (found["ln_vision/scale"] == 3).all()
    for path, array in expected.items():
        if not path.startswith("ln_vision"):
            trained = path.startswith("projector") or "lora" in path
            np.testing.assert_array_equal(found[path], array if trained else 2 * array, err_msg=path)


# ---- safetensors and LoRA ----


@pytest.mark.parametrize("part", ["vit", "qformer", "projector"])
def test_every_part_may_be_safetensors(tmp_path, original, part):
    safetensors.save(tmp_path / "part.bin", tensors(MINIGPT4[part]))  # whatever its name is
    for path, array in inspected(**MINIGPT4 | {part: tmp_path / "part.bin"}).items():
        np.testing.assert_array_equal(array, original[path])


def peft_folder(folder, held=None, name="adapter_model.safetensors", **config):
    folder.mkdir()
    if held is None:
        held = {key.removeprefix("llama_model."): value for key, value in tensors(V2["lora"]).items() if "lora_" in key}
    (safetensors if name.endswith("safetensors") else torch_file).save(folder / name, held)
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


ONLY_PROJECTOR = ("llama_proj.weight", "llama_proj.bias")


@pytest.fixture
def v2(tmp_path):
    torch_file.save(tmp_path / "v2_proj.pth",
                    {"model": {key: tensors(V2["projector"])[key] for key in ONLY_PROJECTOR}})
    return V2 | {"projector": tmp_path / "v2_proj.pth"}


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("as_folder", [True, False])
@pytest.mark.parametrize("rename", [
    lambda key: key, lambda key: f"llama_model.{key}", lambda key: key.replace(".weight", ".default.weight")])
def test_lora_as_peft_writes_it(tmp_path, v2, name, as_folder, rename):
    held = {rename(key.removeprefix("llama_model.")): value for key, value in tensors(V2["lora"]).items()
            if "lora_" in key}
    folder = peft_folder(tmp_path / "lora", held, name)
    found = minigpt4.inspect(**v2 | {"lora": folder if as_folder else folder / name})
    assert (found.parts["llm"].lora_rank, found.parts["llm"].lora_alpha) == (4, 32.0)
    assert [path.name for path in found.sources["lora"]] == [name]
    expected = inspected(**V2)
    for path, array in whole(found.parameters).items():
        np.testing.assert_array_equal(array, expected[path])


def test_lora_on_other_modules_and_scaled_by_the_root_of_the_rank(tmp_path, v2):
    key = "base_model.model.model.layers.{}.{}.lora_{}.weight"
    sizes = {"self_attn.o_proj": (64, 64), "mlp.down_proj": (172, 64)}
    rng = np.random.default_rng(0)
    held = {key.format(n, module, side): rng.normal(size=(4, size[0]) if side == "A" else (size[1], 4)).astype("f4")
            for n in range(3) for module, size in sizes.items() for side in "AB"}
    folder = peft_folder(tmp_path / "lora", held, use_rslora=True, target_modules=["o_proj", "down_proj"])
    found = minigpt4.inspect(**v2 | {"lora": folder})
    cfg = found.parts["llm"]
    assert set(cfg.lora_on) == {"o", "down"} and cfg.lora_alpha / cfg.lora_rank == 32 / 2
    a = whole(found.parameters)["llm/layers/mlp/down/lora_a"]
    np.testing.assert_array_equal(a[1], held[key.format(1, "mlp.down_proj", "A")].T)


@pytest.mark.parametrize("config, line", [
    ({"use_dora": True}, "use_dora is True; only False is supported"),
    ({"r": 8}, "adapter_config.json says r 8, but the LoRA file holds rank 4"),
    ({"r": "4"}, "r is '4', expected a whole number"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, "target_modules has embed_tokens"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is {'q_proj': 2}"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
])
def test_settings_of_peft_that_are_not_read(tmp_path, v2, config, line):
    message = problem(minigpt4.inspect, **v2 | {"lora": peft_folder(tmp_path / "lora", **config)})
    assert line in message and "1 problem" in message


def test_a_peft_file_without_its_settings(tmp_path, v2):
    folder = peft_folder(tmp_path / "lora")
    (folder / "adapter_config.json").unlink()
    shutil.copyfile(folder / "adapter_model.safetensors", folder / "lora.safetensors")
    message = problem(minigpt4.inspect, **v2 | {"lora": folder / "adapter_model.safetensors"})
    assert "has no adapter_config.json, which holds lora_alpha" in message
    minigpt4.inspect(**v2 | {"lora": folder / "lora.safetensors"})  # of MiniGPT-v2's own making: alpha 16, or --arch's


def test_merged_lora_is_what_the_model_computes():
    cfg = LlamaConfig(lora_rank=2, lora_alpha=8.0)
    rng = np.random.default_rng(0)
    w, a, b = (rng.normal(size=size).astype("f4") for size in ((2, 6, 3, 4), (2, 6, 2), (2, 2, 3, 4)))
    found = merged({"llm/q/w": w, "llm/q/lora_a": a, "llm/q/lora_b": b}, cfg)["llm/q/w"]
    assert found.shape == w.shape
    for layer in range(2):
        np.testing.assert_allclose(found[layer], w[layer] + 4 * np.einsum("dr,rnh->dnh", a[layer], b[layer]), rtol=1e-5,
                                   atol=1e-6)


# ---- tensors that no parameter can be ----


@pytest.mark.parametrize("name, value, line", [
    ("freqs_cis", np.ones(3, np.complex64), "freqs_cis is complex64; weights are float16, bfloat16, float32. No model"),
    ("llama_proj.bias", np.ones(64, ml_dtypes.float8_e4m3fn), "is float8_e4m3fn; weights are"),
    ("llama_proj.bias", np.ones(64, np.int8), "is int8; weights are"),
    ("llama_proj.bias", np.ones(64, np.float64), "v.to(torch.float32)"),
])
def test_tensors_of_other_dtypes_are_named(tmp_path, name, value, line):
    safetensors.save(tmp_path / "p.safetensors", tensors(MINIGPT4["projector"]) | {name: value})
    message = problem(minigpt4.inspect, **MINIGPT4 | {"projector": tmp_path / "p.safetensors"})
    assert line in message and "1 problem" in message


# ---- the wrong slot ----


@pytest.mark.parametrize("option, path, line", [
    ("vit", MINIGPT4["qformer"], "is a BLIP-2 file with a Q-Former; it was given as --vit. Give it as --qformer."),
    ("vit", ADAPTER_V2["clip"], "is CLIP; it was given as --vit. This conversion does not read it."),
    ("vit", IMAGEBIND / "imagebind.pth", "is ImageBind; it was given as --vit."),
    ("qformer", MINIGPT4["vit"], "is EVA's vision tower; it was given as --qformer. Give it as --vit."),
    ("projector", MINIGPT4["qformer"], "is a BLIP-2 file with a Q-Former; it was given as --projector."),
    ("projector", IMAGEBIND / "adapter.pth", "is an adapter of ImageBind-LLM; it was given as --projector."),
    ("projector", CKPT / "llama_hf" / "pytorch_model-00001-of-00002.bin",
     "is a language model as transformers saves it; it was given as --projector. Give it as --llm, with its folder."),
    ("lora", NO_QFORMER["projector"], "is a trained projector of MiniGPT-4; it was given as --lora."),
    ("llm", MINIGPT4["vit"], "is a file; --llm expects a folder"),
    ("llm", CKPT / "nowhere", "is not there; --llm expects a folder"),
])
def test_a_wrong_file_is_told_in_one_sentence(option, path, line):
    message = problem(minigpt4.inspect, **MINIGPT4 | {option: path})
    assert line in message and "1 problem" in message and len(message.splitlines()) == 2


def test_an_unknown_file_is_told_in_one_sentence(tmp_path):
    torch_file.save(tmp_path / "x.pth", {f"encoder.{i}.w": np.ones(3, np.float32) for i in range(400)})
    message = problem(minigpt4.inspect, **MINIGPT4 | {"projector": tmp_path / "x.pth"})
    assert "x.pth holds none of the 2 tensors that are expected, such as llama_proj.weight; its tensors are" in message
    assert len(message.splitlines()) == 2


# ---- what is decoded ----


def test_rows_and_gaps_without_a_token(tmp_path):
    padded(tmp_path / "llm")
    (tmp_path / "llm" / "added_tokens.json").write_text('{"<pad>": 603}')
    tokenizer = Tokenizer.from_folder(tmp_path / "llm")
    assert tokenizer.without_text(608) == (600, 601, 602, 604, 605, 606, 607)
    assert tokenizer.decode([603], skip_special=False) == "<pad>"
    with pytest.raises(ValueError, match=r"\[601\].*tokens 0 to 603, but not these"):
        tokenizer.decode([601])


def test_the_unknown_token_as_sentencepiece_decodes_it():
    tokenizer = Tokenizer.from_folder(CKPT / "llama_hf")
    tokens = [tokenizer.bos, *tokenizer.encode("a dog"), tokenizer.unk, *tokenizer.encode("man"), tokenizer.eos]
    assert tokenizer.decode(tokens) == "a dog man"
    assert tokenizer.decode(tokens, sentencepiece=True) == f"a dog{UNKNOWN} man"


# ---- the end of a conversion ----


def test_the_summary():
    found = minigpt4.inspect(**MINIGPT4 | {"projector": None})
    from mmjax.families import FAMILIES

    lines = "\n".join(write.summary(FAMILIES["minigpt4"], found, CKPT / "out", 1.5))
    assert lines.startswith("Converted minigpt4 in 1.5 s:\n  vit: 17 parameters, float16, 0.4 MB, from eva_vit.pth")
    assert "left out of blip2_pretrained.pth: 7 tensors (text branch's word head)" in lines
    assert "useless until it is trained: projector/w, projector/b (no --projector was given)" in lines
    assert lines.endswith(f"in {CKPT / 'out'}")


def test_a_replacement_that_was_killed(tmp_path, capsys, monkeypatch):
    """Between the two renames the old checkpoint has another name; the next conversion gives it its own again."""
    monkeypatch.setattr(write, "_alive", lambda process: process == 1)
    host = write.socket.gethostname()[:40]
    for name, content in {f".out.partial-{host}-77-old": "old", f".out.partial-{host}-77": "new",
                          f".out.partial-{host}-1": "alive", ".out.partial-elsewhere-77": "other"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    write.recover(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"out", f".out.partial-{host}-1", ".out.partial-elsewhere-77"}
    assert "The former checkpoint is there again" in said(capsys)


def test_moving_is_two_renames(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    partial = tmp_path / f".out.partial-{write.socket.gethostname()[:40]}-77"
    partial.mkdir()
    rename = type(partial).rename

    def killed(self, target):
        if target == tmp_path / "out":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(type(partial), "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        write._move(partial, tmp_path / "out", True)
    monkeypatch.undo()
    monkeypatch.setattr(write, "_alive", lambda process: False)
    write.recover(tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "x"]


# ---- random mutations: a sample of `python -m benchmarks.weights mutations` ----


def test_mutated_files(tmp_path):
    import random

    from benchmarks import weights

    whole_folders, outcomes = weights.sources(tmp_path / "whole"), []
    expected = {name: whole(language_model.inspect(path).parameters) for name, path in whole_folders.items()
                if name != "fast"}
    expected = {name: {path: np.asarray(array) for path, array in held.items()} for name, held in expected.items()}
    for number in range(5_000, 5_025):
        draw = random.Random(number)
        name = draw.choice([*expected])
        changed = tmp_path / "changed"
        shutil.copytree(whole_folders[name], changed)
        what = weights.mutate(changed, draw)
        try:
            outcomes.append(weights.outcome(changed, expected[name]))
        except BaseException as error:
            raise AssertionError(f"{number}: {name}/{what}") from error
        shutil.rmtree(changed)
    assert 2 < outcomes.count("converted") < 23
