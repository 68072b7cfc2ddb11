"""Random models by transformers, and mutated JSON files, through the conversion.

    python -m benchmarks.weights models                 300 tiny models; needs the extra `bench`, about an hour
    python -m benchmarks.weights models --count 20      a quick look
    python -m benchmarks.weights mutations              2,000 mutated files, a few minutes

`models` draws LLaMA-architecture models (grouped heads, tied, any head size, biases, odd vocabularies, rope bases,
mixed dtypes, padded or cut rows), saves each in one of transformers' forms, converts it, and compares logits (1e-5), 16
greedy tokens, and the export, which transformers reads back bit for bit. A table with fewer rows than tokens must be
refused.

`mutations` changes one config, params, index or tokenizer file at a time and converts in a process of its own. The
outcome is an error of our own or the unchanged weights; anything else, more than 1 GB or more than 10 s of computing
fails.

Both print counts by outcome and every failure with its number, which `--first` and `--count 1` repeat.
"""

import argparse
import collections
import contextlib
import copy
import io
import json
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import machine

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
SECONDS, BYTES = 10, 10**9  # limits of a mutated file
SHARE = 50  # files that are converted in one process
TOLERANCE, NEW_TOKENS = 1e-5, 16

# ---- mutated files ----

VALUES = (None, -1, 0, 1, 2, 3, 7, 600, 601, 10**6, 10**12, 10**400, -10**400, 2**31, 2**63, 0.5, -0.0, 1e-6, 1e308,
          float("nan"), float("inf"), True, False, "", "x", "1", "1e-6", "</s>", "<s>", "\ud800", "x" * 100_000, [],
          [1], [[]], {}, {"content": 5}, {"content": ""}, {"content": "<s>"}, [2, 600], ["model.bin"], "../model.bin")
TEXTS = ("", "null", "[]", "{}", "3", '"x"', "{", "[" * 100_000, '{"a":' * 50_000, "\x00", "{}{}", "9" * 10_000,
         "version https://git-lfs.github.com/spec/v1\n", "<!doctype html>")
JSON_NAMES = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
              "added_tokens.json", "tokenizer.json", "pytorch_model.bin.index.json", "params.json")


def sources(folder: Path) -> dict[str, Path]:
    """Writes the unchanged folders: transformers' with either tokenizer, and Meta's."""
    hf, meta = folder / "hf", folder / "meta"
    shutil.copytree(GOLDEN / "minigpt4" / "ckpt" / "llama_hf", hf)
    config = json.loads((hf / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"2": {"content": "</s>", "lstrip": False, "rstrip": False, "special": True}}
    (hf / "tokenizer_config.json").write_text(json.dumps(config))
    (hf / "added_tokens.json").write_text('{"[PAD]": 599}')
    shutil.copytree(hf, folder / "fast")
    (folder / "fast" / "tokenizer.model").unlink()
    (folder / "fast" / "added_tokens.json").unlink()
    (folder / "fast" / "tokenizer.json").write_text(json.dumps(word_level(600)))
    shutil.copytree(GOLDEN / "imagebind_llm" / "llama_meta", meta)
    shutil.copyfile(GOLDEN / "imagebind_llm" / "tokenizer.model", meta / "tokenizer.model")
    return {"hf": hf, "fast": folder / "fast", "meta": meta}


def word_level(size: int) -> dict[str, Any]:
    """Returns a tokenizer.json of `size` words."""
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, size))]
    added = [{"id": i, "content": words[i], "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for i in range(3)]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
            "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "<unk>"}}


def mutate(folder: Path, draw: random.Random) -> str:
    """Changes one file of a folder. Returns what was changed."""
    names = [name for name in JSON_NAMES if (folder / name).is_file()] + [
        name for name in ("tokenizer.model",) if (folder / name).is_file() and draw.random() < 0.3]
    path = folder / draw.choice(names)
    content = path.read_bytes()
    how = draw.random()
    if path.suffix != ".json" or how < 0.15:
        position = draw.randrange(len(content))
        content, what = draw.choice((
            (content[:position], f"cut at byte {position}"),
            (content[:position] + bytes([draw.randrange(256)]) + content[position + 1:], f"byte {position} changed"),
            (content[:position] + draw.randbytes(5) + content[position:], f"5 bytes inserted at {position}")))
        path.write_bytes(content)
        return f"{path.name}: {what}"
    if how < 0.2:
        text = draw.choice(TEXTS)
        path.write_text(text)
        return f"{path.name} is {text[:20]!r}"
    values = json.loads(content)
    holder, key = draw.choice([*places(values)])
    before = holder[key]
    if draw.random() < 0.15:
        del holder[key]
        what = "removed"
    else:
        holder[key] = copy.deepcopy(draw.choice(VALUES))
        what = f"{str(before)[:30]!r} becomes {repr(holder[key])[:30] if not big(holder[key]) else 'a large number'}"
    with unlimited_digits():
        path.write_text(json.dumps(values))
    return f"{path.name}: {str(key)[:40]}: {what}"


def big(value: Any) -> bool:
    return isinstance(value, int) and abs(value) > 10**30


@contextlib.contextmanager
def unlimited_digits() -> Iterator[None]:
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    yield
    sys.set_int_max_str_digits(before)


def places(values: Any, most: int = 40) -> Iterator[tuple[Any, Any]]:
    """Yields (container, key) of every value; of a large container, only of its first values."""
    items = list(values.items() if isinstance(values, dict) else enumerate(values))[:most]
    for key, value in items:
        yield values, key
        if isinstance(value, dict | list):
            yield from places(value, most)


def outcome(folder: Path, expected: dict[str, np.ndarray]) -> str:
    """Converts a folder without writing. Returns "refused: ..." or "converted"; raises what should not be raised."""
    from mmjax.convert import language_model, vocabulary
    from mmjax.convert.tables import ConversionError

    with contextlib.redirect_stderr(io.StringIO()):
        try:
            found = language_model.inspect(folder)
        except (ConversionError, ValueError, OSError) as error:
            if type(error) not in (ConversionError, ValueError, FileNotFoundError) or not str(error).strip():
                raise
            return f"refused: {str(error).splitlines()[-1].strip()}"
        values = {path: np.concatenate(list(each.slices())) for path, each in found.parameters.items()}
    assert values.keys() == expected.keys() and all(
        np.array_equal(values[path], each) for path, each in expected.items()), "other weights"
    ids, rows = found.generation, found.parts["llm"].vocab
    ends = ids["eos_token_id"] if isinstance(ids["eos_token_id"], list) else [ids["eos_token_id"]]
    assert all(0 <= token < rows for token in (ids["bos_token_id"], ids["pad_token_id"], *ends)), ids
    assert set(ids) == set(vocabulary.IDS)
    return "converted"


def results(numbers: range, run: Callable[[int], str]) -> Iterator[tuple[int, str, int, float]]:
    """Yields (number, result, peak bytes beyond those at the start, seconds of computing) of a function.

    Some numbers share a fork; if it dies, the others go on in another one.
    """
    left = list(numbers)
    while left:
        reading_end, writing_end = os.pipe()
        if not (child := os.fork()):
            os.close(reading_end)
            with os.fdopen(writing_end, "w") as pipe:
                for number in left[:SHARE]:
                    pipe.write(json.dumps((number, *measured(run, number))) + "\n")
                    pipe.flush()
            os._exit(0)
        os.close(writing_end)
        share = left[:SHARE]
        with os.fdopen(reading_end) as pipe:
            for line in pipe:
                number, result, peak, seconds = json.loads(line)
                share.remove(number)
                yield number, result, peak, seconds
        _, status = os.waitpid(child, 0)
        left = left[SHARE:]
        if share:
            yield share[0], f"FAILED: the process died with status {status}", 0, 0.0
            left = share[1:] + left


def measured(run: Callable[[int], str], number: int) -> tuple[str, int, float]:
    """Returns (result, peak bytes beyond those at the start, seconds of computing); a process that hangs is killed."""
    machine.forget_peak()
    start, begun = machine.peak(), time.process_time()
    resource.setrlimit(resource.RLIMIT_CPU, (int(begun) + 3 * SECONDS, resource.RLIM_INFINITY))
    try:
        result = run(number)
    except Exception:
        result = f"FAILED: {traceback.format_exc()[-2_000:]}"
    return result[:10_000], machine.peak() - start, time.process_time() - begun


def mutations(first: int, count: int, verbose: bool) -> None:
    from transformers import PreTrainedTokenizerFast  # noqa: F401 - imported before the processes fork

    from mmjax.convert import language_model

    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        whole = sources(Path(folder) / "whole")
        with contextlib.redirect_stderr(io.StringIO()):
            found = {name: language_model.inspect(path).parameters for name, path in whole.items()}
        expected = {name: {path: np.concatenate(list(each.slices())) for path, each in held.items()}
                    for name, held in found.items()}

        def run(number: int) -> str:
            draw, changed = random.Random(number), Path(folder) / f"changed{number}"
            name = draw.choice([*whole])
            shutil.copytree(whole[name], changed)
            try:
                what = mutate(changed, draw)
                return f"{outcome(changed, expected[name])} [{name}/{what}]"
            finally:
                shutil.rmtree(changed)

        for number, result, peak, seconds in results(range(first, first + count), run):
            kind = re.split(r"[: ]", result)[0]
            if seconds > SECONDS or peak > BYTES:
                kind = "FAILED"
            counts[kind] += 1
            if kind == "FAILED" or verbose:
                print(f"{number}: {result} ({peak / 1e6:.0f} MB, {seconds:.1f} s)", flush=True)
            if sum(counts.values()) % 200 == 0:
                print(f"{sum(counts.values())} files: {dict(counts)}", flush=True)
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    if counts["FAILED"]:
        sys.exit(1)


# ---- random models ----


def random_config(draw: random.Random, vocab: int) -> Any:
    from transformers import LlamaConfig

    kv_heads = draw.choice((1, 2, 3))
    heads = kv_heads * draw.choice((1, 2, 4))
    head_dim = draw.choice((4, 6, 8, 16))
    apart = draw.random() < 0.3
    return LlamaConfig(
        vocab_size=vocab, hidden_size=heads * (draw.choice((2, 5, 9)) if apart else head_dim),
        intermediate_size=draw.choice((8, 20, 33)), num_hidden_layers=draw.choice((1, 2, 3)),
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        tie_word_embeddings=draw.random() < 0.3, attention_bias=draw.random() < 0.25, mlp_bias=draw.random() < 0.25,
        rms_norm_eps=draw.choice((1e-6, 1e-5, 1e-3)), max_position_embeddings=draw.choice((64, 100, 4096)),
        rope_parameters={"rope_type": "default", "rope_theta": draw.choice((100.0, 1e4, 5e5, 12345.6, 1e6))},
        bos_token_id=1, eos_token_id=2, pad_token_id=draw.choice((None, 0)))


def random_model(draw: random.Random, config: Any) -> Any:
    """Returns a model with random weights, biases and norms, some layers of another dtype."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(draw.randrange(2**31))
    model = LlamaForCausalLM(config).eval()
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    dtype = draw.choice(dtypes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name else 0.0
            parameter.copy_(mean + 0.2 * torch.randn_like(parameter))
    model.to(dtype)
    if draw.random() < 0.3:
        for layer in model.model.layers:
            layer.to(draw.choice(dtypes))
    return model


def save(draw: random.Random, model: Any, folder: Path) -> str:
    """Saves a model in one of the forms of transformers; older versions wrote the .bin ones."""
    import torch

    form = draw.choice(("safetensors", "safetensors in shards", "bin", "bin in shards", "bin, module."))
    model.save_pretrained(folder, max_shard_size="8KB" if form == "safetensors in shards" else "5GB")
    if not form.startswith("bin"):
        return form
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        file.unlink()
    tensors = {key: tensor for key, tensor in model.state_dict().items()
               if not (model.config.tie_word_embeddings and key == "lm_head.weight" and draw.random() < 0.5)}
    if form == "bin in shards":
        half = len(tensors) // 2
        parts = [dict([*tensors.items()][:half]), dict([*tensors.items()][half:])]
        where = {}
        for number, part in enumerate(parts, 1):
            name = f"pytorch_model-{number:05}-of-00002.bin"
            torch.save(part, folder / name)
            where |= dict.fromkeys(part, name)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    else:
        prefix = "module." if form == "bin, module." else ""
        torch.save({prefix + key: tensor for key, tensor in tensors.items()}, folder / "pytorch_model.bin")
    return form


def check_model(number: int, folder: Path) -> str:
    """Draws a model and checks its way there and back. Returns "cut rows refused" or "equal"; raises AssertionError."""
    import torch

    from mmjax.convert import write
    from mmjax.convert.export import export
    from mmjax.convert.tables import ConversionError

    draw = random.Random(number)
    tokens = draw.choice((37, 64, 101, 129))
    rows = tokens + draw.choice((0, 0, 1, 7, 27, 64, -1, -5))
    model = random_model(draw, random_config(draw, rows))
    form = save(draw, model, folder / "hf")
    (folder / "hf" / "tokenizer.json").write_text(json.dumps(word_level(tokens)))
    (folder / "hf" / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}))
    if rows < tokens:
        with contextlib.suppress(ConversionError):
            write.command("llama")(folder / "hf", folder / "out")
            raise AssertionError("a token without a row was accepted")
        return "cut rows refused"
    write.command("llama")(folder / "hf", folder / "out")
    reference = type(model)(model.config).eval()  # `model.float()` would keep rotary frequencies rounded to its dtype
    reference.load_state_dict(model.state_dict())
    model = reference
    logits, generated = theirs(model, rows, tokens)
    our_logits, our_generated = ours(folder / "out", rows, tokens)
    difference = float(np.abs(logits - our_logits).max())
    assert difference < TOLERANCE * max(1.0, float(np.abs(logits).max())), f"{form}: logits differ by {difference}"
    assert generated == our_generated, f"{form}: {generated} and {our_generated}"
    export(folder / "out", "llm", folder / "back", format=draw.choice(("hf", "torch")))
    back = type(model).from_pretrained(folder / "back", dtype=torch.float32).state_dict()
    expected = model.state_dict()
    assert back.keys() == expected.keys() and all(torch.equal(back[key], expected[key]) for key in back), "export"
    return f"equal, {form}"


def prompts_of(tokens: int) -> list[list[int]]:
    """Returns two prompts of equal length, with BOS."""
    draw = random.Random(tokens)
    return [[1, *(draw.randrange(3, tokens) for _ in range(9))] for _ in range(2)]


def theirs(model: Any, rows: int, tokens: int) -> tuple[np.ndarray, list[list[int]]]:
    """Returns (logits, new tokens up to the end) by transformers."""
    import torch

    prompts = torch.tensor(prompts_of(tokens))
    with torch.no_grad():
        logits = model(prompts).logits.numpy()
        found = model.generate(
            prompts, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=2,
            suppress_tokens=[*range(tokens, rows)] or None)
    new = [row[prompts.shape[1]:].tolist() for row in found]
    return logits, [row[:row.index(2) + 1] if 2 in row else row for row in new]


def ours(folder: Path, rows: int, tokens: int) -> tuple[np.ndarray, list[list[int]]]:
    """Returns the same by mmjax."""
    import jax

    from mmjax.doctor.outputs import text_rows
    from mmjax.inference import generate, loaded

    model = loaded.load(folder, dtype="float32")
    bos, prompts = model.tokenizer.bos, prompts_of(tokens)
    batch = text_rows([row[1:] for row in prompts], bos)
    logits = np.asarray(jax.jit(model.module.apply)({"params": model.params}, batch))
    assert model.tokenizer.without_text(rows) == tuple(range(tokens, rows))
    config = generate.GenerateConfig(max_new_tokens=NEW_TOKENS, bos=1, eos=2, pad=0,
                                     suppress_tokens=model.tokenizer.without_text(rows))
    found = generate.generate(model.module, model.params, batch, config)
    jax.clear_caches()
    return logits, [row[1:length].tolist()
                    for row, length in zip(np.asarray(found.sequences), np.asarray(found.lengths), strict=True)]


def models(first: int, count: int) -> None:
    os.environ["XLA_FLAGS"] = ("--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
                               + os.environ.get("XLA_FLAGS", ""))
    import transformers

    transformers.logging.set_verbosity_error()
    counts: collections.Counter[str] = collections.Counter()
    for number in range(first, first + count):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            try:
                counts[check_model(number, Path(folder))] += 1
            except Exception as error:
                counts["FAILED"] += 1
                print(f"{number}: {type(error).__name__}: {error}", flush=True)
        if number % 20 == 19:
            print(f"after {number + 1}: {dict(counts)}", flush=True)
    print(", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())))
    if counts["FAILED"]:
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("models", "mutations"))
    parser.add_argument("--count", type=int, help="default: 300 models, 2000 mutations")
    parser.add_argument("--first", type=int, default=0, help="number of the first one, which seeds it")
    parser.add_argument("--verbose", action="store_true", help="print every mutation and its outcome")
    options = parser.parse_args()
    if options.what == "models":
        models(options.first, options.count or 300)
    else:
        mutations(options.first, options.count or 2_000, options.verbose)


if __name__ == "__main__":
    main()
