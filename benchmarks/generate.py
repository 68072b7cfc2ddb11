"""Speed of generation compared with `transformers`: tokens per second of the prefill and of the decoding steps.

    python benchmarks/generate.py                       a LLaMA of 134 million parameters, random, about two minutes
    python benchmarks/generate.py --llama smollm2       a folder of transformers, such as scripts/smollm2.py writes
    python benchmarks/generate.py --dtype bfloat16      both sides, from the same files
    python benchmarks/generate.py --json generate.json

Needs the extra `bench`. The weights are saved by transformers and converted, so both sides read the same files. Both
generate greedily with all cores. Before the timing their tokens are compared, in bfloat16 the logits after the
prompts. Then `Loaded.generate` and `LlamaForCausalLM.generate` (torch.inference_mode,
scaled_dot_product_attention, with its dynamic and its static cache, of which the faster counts) alternate in one
process; figures are medians. The prefill is a call for one new token, a step is the time of each further token.

Floor: a step reads every weight of the layers and of the head once. The floor is their bytes divided by the speed at
which this machine reads an array from memory, measured in the same run. The share of the floor is that time divided by
the measured time.
"""

import argparse
import dataclasses
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for `benchmarks`, when this file is run by its path

import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

import mmjax  # noqa: E402
from benchmarks import machine  # noqa: E402
from mmjax import trees  # noqa: E402
from mmjax.batch import Sample  # noqa: E402
from mmjax.convert import write  # noqa: E402
from mmjax.inference.generate import GenerateConfig, generate  # noqa: E402
from mmjax.tokenizer import Tokenizer  # noqa: E402

TOKENIZER = ROOT / "tests/golden/minigpt4/ckpt/llama_hf"
READ = 2**29  # bytes of the array that the reading speed is measured with
WORDS = ("the", "dog", "red", "table", "on", "with", "near", "people", "and", "street")


def make(folder: Path) -> None:
    """Writes a language model as transformers saves it, filled with noise."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=32_000, hidden_size=768, intermediate_size=2_048, num_hidden_layers=12,
                                      num_attention_heads=12)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    pieces = Tokenizer.from_folder(folder).vocab_size
    more = {f"[{number}]": number for number in range(pieces, config.vocab_size)}  # every token can be decoded
    (folder / "added_tokens.json").write_text(json.dumps(more))


def samples(loaded: mmjax.Loaded, rows: int, count: int) -> list[Sample]:
    """Returns different prompts of `count` tokens, or one or two fewer where no word fits."""
    random = np.random.default_rng(0)

    def longest(sample: Sample) -> Sample:
        for word in random.choice(WORDS, 2 * count):
            longer = Sample(prompt=f"{sample.prompt} {word}".strip())
            if loaded.batch([longer]).tokens.shape[1] <= count:
                sample = longer
        return sample

    return [longest(Sample(prompt="")) for _ in range(rows)]


def endless(folder: Path, dtype: str) -> mmjax.Loaded:
    """Returns the converted model without an end token."""
    loaded = mmjax.load(folder, dtype=dtype)
    return dataclasses.replace(loaded, generation=loaded.generation | {"eos_token_id": -1})


class Theirs:
    """The same model in transformers, with the same tokens."""

    def __init__(self, folder: Path, dtype: str):
        import torch
        import transformers

        self.torch = torch
        self.model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype),
                                                                   attn_implementation="sdpa").eval()
        self.model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)

    def generate(self, batch: Any, count: int, cache: str) -> np.ndarray:
        """Returns the new tokens [B,count]; prompts are padded on the left, as transformers requires."""
        prompts = [self.torch.from_numpy(row[valid].astype(np.int64))
                   for row, valid in zip(np.asarray(batch.tokens), np.asarray(batch.valid), strict=True)]
        pad = self.torch.nn.utils.rnn.pad_sequence
        tokens = pad(prompts, batch_first=True, padding_side="left")
        seen = pad([self.torch.ones_like(prompt) for prompt in prompts], batch_first=True, padding_side="left")
        with self.torch.inference_mode():
            sequences = self.model.generate(tokens, attention_mask=seen, max_new_tokens=count,
                                            cache_implementation=cache)
        return sequences[:, tokens.shape[1]:].numpy()

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Returns the logits of one row, int[T] -> float32[T,V]."""
        with self.torch.inference_mode():
            return self.model(self.torch.from_numpy(tokens[None].astype(np.int64))).logits[0].float().numpy()


def reading_speed() -> float:
    """Returns the bytes per second at which this machine reads an array from memory: the best of torch's sum and of
    XLA's product of a matrix and a vector."""
    import jax
    import jax.numpy as jnp
    import torch

    matrix, vector, array = jnp.ones((READ // 2**14, 2**12)), jnp.ones(2**12), torch.ones(READ // 4)
    product = jax.jit(lambda matrix, vector: matrix @ vector)
    found = machine.turns({"xla": lambda: product(matrix, vector).block_until_ready(), "torch": array.sum}, rounds=7)
    return READ / min(min(times) for times in found.values())


def read_bytes(loaded: mmjax.Loaded) -> int:
    """Returns the bytes of the weights that a step reads."""
    llm = loaded.params["llm"]
    size = sum(leaf.nbytes for leaf in trees.flatten(llm).values())
    return size if loaded.config.llm.tied else size - llm["embedding"].nbytes


def compare(loaded: mmjax.Loaded, theirs: Theirs, prompts: list[Sample], count: int) -> None:
    """Raises ValueError unless both sides generate the same tokens, and our text is that of the tokens."""
    batch = loaded.batch(prompts)
    expected = theirs.generate(batch, count, "dynamic")
    config = GenerateConfig(max_new_tokens=count, eos=-1)
    found = np.asarray(generate(loaded.module, loaded.params, batch, config).sequences)[:, 1:]
    text = loaded.generate(prompts, max_new_tokens=count)
    if (found != expected).any() or text != [loaded.tokenizer.decode(row.tolist()).strip() for row in expected]:
        raise ValueError(f"The two sides differ: {(found != expected).sum()} of {found.size} tokens. Nothing is timed.")


def compare_logits(loaded: mmjax.Loaded, theirs: Theirs, prompts: list[Sample]) -> None:
    """Raises ValueError unless the logits after the prompts agree within 1/20 of the largest.

    For bfloat16, where either of two tokens with nearly equal logits may be chosen.
    """
    import jax

    batch = loaded.batch(prompts)
    tokens, valid = np.asarray(batch.tokens), np.asarray(batch.valid)
    ours = np.asarray(jax.jit(loaded.module.apply)({"params": loaded.params}, batch))
    for row_logits, row, real in zip(ours, tokens, valid, strict=True):
        expected = theirs.logits(row[real])[-1]
        if (off := np.abs(row_logits[real][-1] - expected).max()) > 0.05 * np.abs(expected).max():
            raise ValueError(f"The two sides differ: logits by {off}. Nothing is timed.")


def measure(loaded: mmjax.Loaded, theirs: Theirs, rows: int, prompt: int, count: int, turns: int,
            speed: float) -> dict[str, Any]:
    """Returns the tokens per second of both sides, their ratios and shares of the floor, for one batch size."""
    prompts = samples(loaded, rows, prompt)
    if loaded.module.dtype == np.float32:
        compare(loaded, theirs, prompts, count)
    else:
        compare_logits(loaded, theirs, prompts)
    batch = loaded.batch(prompts)

    def both(new: int) -> dict[str, Callable[[], Any]]:
        return {"ours": lambda: loaded.generate(prompts, max_new_tokens=new),
                "dynamic": lambda: theirs.generate(batch, new, "dynamic"),
                "static": lambda: theirs.generate(batch, new, "static")}

    calls = {(side, new): call for new in (1, 1 + count) for side, call in both(new).items()}
    found = machine.turns(calls, turns)
    first = {side: statistics.median(found[side, 1]) for side, _ in calls}
    step = {side: statistics.median((long - short) / count for long, short in
                                    zip(found[side, 1 + count], found[side, 1], strict=True)) for side in first}
    best = {"prefill": min(first["dynamic"], first["static"]), "decode": min(step["dynamic"], step["static"])}
    floor = read_bytes(loaded) / speed
    return {
        "rows": rows, "prompt": batch.tokens.shape[1], "new": count, "floor_ms": 1e3 * floor,
        "prefill": {"ours": batch.valid.sum() / first["ours"], "theirs": batch.valid.sum() / best["prefill"],
                    "ratio": best["prefill"] / first["ours"]},
        "decode": {"ours": rows / step["ours"], "theirs": rows / best["decode"], "ratio": best["decode"] / step["ours"],
                   "ours_of_floor": floor / step["ours"], "theirs_of_floor": floor / best["decode"]},
        "milliseconds": {"prefill": {side: 1e3 * time for side, time in first.items()},
                         "step": {side: 1e3 * time for side, time in step.items()}},
    }


def table(results: list[dict[str, Any]]) -> Table:
    result_table = Table("rows", "phase", "mmjax", "transformers", "ratio", "mmjax / floor", "transformers / floor",
                         title="tokens per second")
    for result in results:
        for phase in ("prefill", "decode"):
            part = result[phase]
            shares = [f"{part[name]:.2f}" if name in part else "" for name in ("ours_of_floor", "theirs_of_floor")]
            result_table.add_row(str(result["rows"]), phase, f"{part['ours']:.1f}", f"{part['theirs']:.1f}",
                                 f"{part['ratio']:.2f}", *shares)
    return result_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", type=Path, help="a language model as transformers saves it (default: a random one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=32, help="steps that are timed")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the figures too")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as work:
        source, out = args.llama or Path(work) / "llama", Path(work) / "converted"
        if not args.llama:
            make(source)
        write.command("llama")(source, out)
        loaded, theirs = endless(out, args.dtype), Theirs(source, args.dtype)
        speed = reading_speed()
        results = [measure(loaded, theirs, rows, args.prompt, args.new, args.turns, speed) for rows in args.rows]

    print(f"A step reads {read_bytes(loaded) / 1e6:.0f} MB of weights. This machine reads {speed / 1e9:.1f} GB/s, so "
          f"the floor is {results[0]['floor_ms']:.1f} ms. Medians of {args.turns} turns.")
    Console().print(table(results))
    if args.json:
        args.json.write_text(json.dumps({"read_bytes_per_second": speed, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
