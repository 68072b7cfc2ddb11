"""A model ready to use: module, parameters, tokenizer and settings, from a converted checkpoint or a finished run."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from mmjax import files, sharding
from mmjax.batch import Batch, Sample
from mmjax.checkpoints import converted
from mmjax.checkpoints.converted import ConvertedCheckpoint
from mmjax.checkpoints.restore import ModelSpec
from mmjax.config import MeshConfig, TextConfig
from mmjax.data.collate import collate
from mmjax.data.neighbours import Recall
from mmjax.data.text import Tokenized, tokenize
from mmjax.families import Family
from mmjax.inference.generate import GenerateConfig, Generation, row_keys
from mmjax.inference.layouts import unstack
from mmjax.inference.requests import is_text
from mmjax.models import bind
from mmjax.tokenizer import Tokenizer

BROKEN = "\ufffd"  # decoded from the bytes of an incomplete character
TRANSPOSED_BYTES = 4 * 2**30  # largest language model that is copied into a transposed layout for decoding on a CPU
STOP_INTERVAL = 16  # tokens between two searches of the text for a stop string
DECODING_OPTIONS = ("top_k", "top_p", "top_p_inclusive", "repetition_penalty", "length_penalty", "min_length",
                    "early_stopping", "dummy")


def default_dtype() -> str:
    """Returns bfloat16 on an accelerator; float32 on a CPU, because bfloat16 is slower on many CPUs."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def load(
    path: str | Path,
    mesh: jax.sharding.Mesh | None = None,
    dtype: str | None = None,
    init_fresh: int | None = None,
    frozen_dtype: str | None = None,
) -> "Loaded":
    """Loads a converted checkpoint, or a training run (the weights it started from and its newest checkpoint).

    mesh:         for the parameters (`mmjax.sharding.make_mesh`); None for the first device
    dtype:        of parameters and activations, "float32" or "bfloat16"; None for `default_dtype`
    init_fresh:   seed for parameters that were never trained (a checkpoint converted without a projector)
    frozen_dtype: "int8" stores large matrices that no run trained as int8, in half of bfloat16's memory; None: `dtype`

    Raises FileNotFoundError or ValueError naming the missing or invalid folder, file or parameters.
    """
    if dtype is not None and getattr(dtype, "__name__", str(dtype)) not in ("float32", "bfloat16"):
        raise ValueError(f"dtype = {dtype!r}: float32 or bfloat16")
    if frozen_dtype not in (None, "int8"):
        raise ValueError(f"frozen_dtype = {frozen_dtype!r}: int8, or None for the same as dtype")
    files.require_local({"path": path})
    folder = Path(path)
    mesh = mesh or sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    if (folder / converted.RUN_CARD).is_file():
        source, trained = converted.read_run(folder), converted.trained_params(folder)
    else:
        source, trained = ConvertedCheckpoint.open(folder), {}
    spec = ModelSpec(source, mesh, dtype or default_dtype(), frozen_dtype, exact={*trained, *source.fresh})
    return Loaded.of(source, spec.module, spec.restore(init_fresh, trained), mesh)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model with its parameters, tokenizer and settings. Call it as `module.apply({"params": params}, batch)`."""

    family: Family
    module: nn.Module
    params: Any
    config: Any
    tokenizer: Tokenizer
    text: TextConfig
    generation: dict[str, int]
    mesh: jax.sharding.Mesh

    @staticmethod
    def of(source: ConvertedCheckpoint, module: nn.Module, params: Any, mesh: jax.sharding.Mesh) -> "Loaded":
        """Returns the model that a checkpoint or run describes, with these parameters."""
        return Loaded(source.family, module, params, source.config, source.tokenizer, source.text, source.generation,
                      mesh)

    def batch(self, samples: Sequence[Sample], length: int | None = None, multiple: int = 1, **settings: Any) -> Batch:
        """Returns rows for `mmjax.loss` or the module, as numpy arrays.

        length, multiple: fixed row length, or the multiple to which the longest row is padded
        settings:         fields of `TextConfig` that replace the checkpoint's (max_txt_len, end_sym, ...)

        Raises ValueError naming the invalid rows, images or settings.
        """
        return collate(samples, self.tokenizer, self._text(settings), self.config, length, multiple)

    def _text(self, settings: dict[str, Any]) -> TextConfig:
        known = [field.name for field in dataclasses.fields(TextConfig)]
        if unknown := sorted(settings.keys() - set(known)):
            raise ValueError(f"No such text settings: {', '.join(unknown)}. There are {', '.join(known)}.")
        return dataclasses.replace(self.text, **settings)

    def generate(
        self,
        samples: Sequence[Sample],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        num_beams: int = 1,
        stop: Sequence[str] = (),
        *,
        seed: int = 0,
        first: int = 0,
        batch_size: int | None = None,
        recall: Recall | None = None,
        **settings: Any,
    ) -> list[str]:
        """Returns the generated text for each sample's prompt, without special tokens and without the stop string.

        temperature: 0 is greedy (or beam search if `num_beams` > 1), above 0 samples
        stop:        strings that end a row, whatever tokens spell them; the text before the first of them is returned
        seed, first: of sampling. The result of a sample depends on the seed and on its number alone; `first` is the
                     number of the first of these samples
        batch_size:  rows generated at once; None for all
        recall:      moves each sample's mix of senses towards known images (ImageBind-LLM); None: unchanged
        settings:    top_k, top_p, top_p_inclusive, repetition_penalty, length_penalty, min_length, early_stopping and
                     dummy as in `GenerateConfig`; and fields of `TextConfig` that replace the checkpoint's

        Rows are padded to one of a few lengths, so that most calls need no compilation. Raises ValueError naming the
        invalid samples or settings.
        """
        config, settings = self._split_settings(max_new_tokens, temperature, num_beams, stop, settings)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size = {batch_size}: at least 1, or None for all samples at once")
        size = batch_size or max(len(samples), 1)
        texts: list[str] = []
        for start in range(0, len(samples), size):
            chunk = samples[start : start + size]
            filled = [*chunk, *[chunk[-1]] * (size - len(chunk))]  # one row count, one compiled function
            generation = self._prefill(filled, config, seed, first + start, recall, settings)
            texts += self._finish(generation, stop)[: len(chunk)]
        return texts

    def stream(
        self,
        sample: Sample,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        num_beams: int = 1,
        stop: Sequence[str] = (),
        *,
        seed: int = 0,
        recall: Recall | None = None,
        **settings: Any,
    ) -> Iterator[str]:
        """Yields the text of `generate` for one sample, piece by piece as it is generated.

        A piece never ends inside a character, and never includes trailing white space or the beginning of a possible
        stop string. Beam search yields one piece, at its end. Raises what `generate` raises, before the first piece.
        """
        config, settings = self._split_settings(max_new_tokens, temperature, num_beams, stop, settings)
        generation = self._prefill([sample], config, seed, 0, recall, settings)
        return self._pieces(generation, stop)

    def _split_settings(self, max_new_tokens: int, temperature: float, num_beams: int, stop: Sequence[str],
                        settings: dict[str, Any]) -> tuple[GenerateConfig, dict[str, Any]]:
        """Returns (the decoding config, the text settings)."""
        if isinstance(stop, str) or not all(isinstance(text, str) for text in stop):
            raise ValueError(f"stop = {stop!r}: a list of strings, such as ['###']")
        special = self.generation
        ends = special["eos_token_id"]
        eos, *more = ends if isinstance(ends, list) else [ends]  # Llama 3 ends a turn with one, a text with another
        config = GenerateConfig(
            max_new_tokens=max_new_tokens, num_beams=num_beams, do_sample=temperature > 0, temperature=temperature,
            bos=special["bos_token_id"], eos=eos, pad=special["pad_token_id"],
            stop=(*((token,) for token in more if token >= 0),
                  *(sequence for text in stop for sequence in stop_tokens(self.tokenizer, text))),
            suppress_tokens=self._without_text,
            **{name: settings[name] for name in DECODING_OPTIONS if name in settings})
        return config, {name: value for name, value in settings.items() if name not in DECODING_OPTIONS}

    @functools.cached_property
    def _without_text(self) -> tuple[int, ...]:
        """The rows of the embedding table without a token, which cannot be decoded."""
        return self.tokenizer.without_text(self.config.llm.vocab)

    def _decode(self, ids: Sequence[int]) -> str:
        """Returns the text of generated tokens as the family's original decodes them."""
        return self.tokenizer.decode(ids, sentencepiece=self.text.joint)

    def _prefill(self, samples: Sequence[Sample], config: GenerateConfig, seed: int, first: int, recall: Recall | None,
                 settings: dict[str, Any]) -> Generation:
        """Starts the generation of samples, of which the first has the number `first`."""
        samples = [dataclasses.replace(sample, answer=None) for sample in samples]
        samples += [samples[-1]] * (-len(samples) % sharding.num_shards(self.mesh, "batch"))
        prompts = self._tokenize_prompts(samples, config.max_new_tokens, settings)
        length = common_length(max(prompt.length for prompt in prompts))
        batch = collate(prompts, self.tokenizer, self._text(settings), self.config, length)
        keys = row_keys(jax.random.key(seed), np.arange(first, first + len(samples))) if config.sampling else None
        module, params = self._decoder
        with sharding.use_mesh(self.mesh):
            batch = batch if recall is None else self._recalled(batch, recall)
            batch = sharding.put_batch(batch, self.mesh, len(samples))
            return Generation(module, params, batch, config, keys, common_length(config.max_new_tokens))

    def prompt_lengths(self, samples: Sequence[Sample], max_new_tokens: int = 1, **settings: Any) -> list[int]:
        """Returns the number of tokens of each sample's prompt, soft tokens included. Raises ValueError naming prompts
        that are not valid text, or that exceed the model's positions together with `max_new_tokens`."""
        return [prompt.length for prompt in self._tokenize_prompts(samples, max_new_tokens, settings)]

    def _tokenize_prompts(self, samples: Sequence[Sample], max_new_tokens: int,
                          settings: dict[str, Any]) -> list[Tokenized]:
        """Tokenises samples. Raises the errors of `prompt_lengths`."""
        if invalid := [row for row, sample in enumerate(samples) if not is_text(sample.prompt + sample.input)]:
            raise ValueError(f"The prompts of the rows {invalid} have characters that are not text (unpaired "
                             "surrogates). Decode them with their own encoding, such as UTF-8.")
        prompts = tokenize(samples, self.tokenizer, self._text(settings), self.config.image_tokens)
        limit = self.config.llm.max_positions
        if long := [f"row {row}: {prompt.length} tokens" for row, prompt in enumerate(prompts)
                    if prompt.length + max_new_tokens > limit]:
            raise ValueError(f"With max_new_tokens = {max_new_tokens} these prompts need more than the {limit} "
                             "positions of this model:\n  " + "\n  ".join(long)
                             + "\nShorten the prompts, or decrease max_new_tokens.")
        return prompts

    def _finish(self, generation: Generation, stop: Sequence[str]) -> list[str]:
        """Generates every row to its end and returns the texts."""
        with sharding.use_mesh(self.mesh):
            if not stop or generation.beams:
                generation.advance()
            while not generation.done.all():  # tokens may spell a stop string in ways that the loop does not detect
                generation.advance(generation.step + STOP_INTERVAL)
                texts = map(self._decode, generation.tokens)
                generation.close(np.array([cut(text, stop) != text for text in texts]))
            result = generation.result()
        rows = zip(np.asarray(result.sequences), np.asarray(result.lengths), strict=True)
        return [cut(self._decode(row[1:length].tolist()), stop).strip() for row, length in rows]

    def _pieces(self, generation: Generation, stop: Sequence[str]) -> Iterator[str]:
        yielded = ""
        while not (generation.done[0] or generation.beams):
            text = self._decode(generation.tokens[0])
            if cut(text, stop) != text:
                break
            stable = stable_prefix(text, stop)
            if len(stable) > len(yielded):
                yield stable[len(yielded) :]
                yielded = stable
            with sharding.use_mesh(self.mesh):
                generation.advance(generation.step + 1)
        if not generation.beams:
            generation.close(np.ones(1, bool))  # including rows that fill the mesh
        if (rest := self._finish(generation, stop)[0]) != yielded:
            yield rest[len(yielded) :]

    @functools.cached_property
    def _decoder(self) -> tuple[nn.Module, Any]:
        """Module and parameters in the layout that decodes fastest. On one CPU the layers are unstacked, if the model
        `unrolls`; if they are not large, their weights are transposed too, which takes their memory once more."""
        llm = self.config.llm
        if not llm.unrolls or self.mesh.size > 1 or self.mesh.devices.flat[0].platform != "cpu":
            return self.module, self.params
        transposed = sum(leaf.nbytes for leaf in jax.tree.leaves(self.params["llm"])) <= TRANSPOSED_BYTES
        module = self.module.clone(scan_layers=False, transposed_weights=transposed)
        return module, unstack(self.params, llm.matrices, transposed)

    def _recalled(self, batch: Batch, recall: Recall) -> Batch:
        """Returns the batch with each row's senses replaced by their mix, moved towards known images."""
        if not self.config.senses:
            raise ValueError(f"recall is for models that mix senses; the family {self.family} does not.")
        width = self.config.media.out
        if recall.vectors.shape[1] != width:
            raise ValueError(f"The vectors to recall are {recall.vectors.shape[1]} wide, this model's features {width}."
                             " Use the vectors of the model's own ImageBind.")
        mixed = mix_and_recall(self.module, recall.count, self.params, batch, recall.vectors, recall.sharpness,
                               recall.weight)
        return dataclasses.replace(batch, images=None, image_valid=None, media=None, weights=None, features=mixed)


@functools.partial(jax.jit, static_argnums=(0, 1))
def mix_and_recall(module: nn.Module, count: int, params: Any, batch: Batch, vectors: Any, sharpness: float,
                   weight: float) -> jax.Array:
    """Returns the mix of a batch's senses, moved towards its nearest vectors: float32[B,E]."""
    feature = module.apply({"params": params}, batch, method="feature")
    return bind.recall(feature, vectors, count, sharpness, weight)


def common_length(length: int) -> int:
    """Returns the next of 32, 48, 64, 96, 128, 192, ...: at most 1.5 times the length above 32."""
    power = 32 << max(0, math.ceil(math.log2(max(length, 1) / 32)))
    return power * 3 // 4 if 32 < power and length <= power * 3 // 4 else power


def cut(text: str, stop: Sequence[str]) -> str:
    """Returns the text before the first stop string in it."""
    return text[: min((text.index(end) for end in stop if end and end in text), default=None)]


def stable_prefix(text: str, stop: Sequence[str]) -> str:
    """Returns the part of an unfinished text that later tokens cannot change, nor `cut` and `strip` remove."""
    text = text.lstrip().rstrip(BROKEN)
    partial = (size for end in stop for size in range(1, len(end)) if text.endswith(end[:size]))
    return text[: len(text) - max(partial, default=0)].rstrip()


def stop_tokens(tokenizer: Tokenizer, text: str) -> list[tuple[int, ...]]:
    """Returns the token sequences that spell a stop string, at the start of a word and after another word."""
    before = tokenizer.encode("a")
    joined = tokenizer.encode("a" + text)
    sequences = [tuple(tokenizer.encode(text))]
    if joined[: len(before)] == before:
        sequences.append(tuple(joined[len(before) :]))
    return [sequence for sequence in dict.fromkeys(sequences) if sequence]
