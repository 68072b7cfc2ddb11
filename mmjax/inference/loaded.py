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
from mmjax.data.text import row_slots
from mmjax.families import Family
from mmjax.inference.generate import GenerateConfig, Generation, row_keys
from mmjax.inference.layouts import unstack
from mmjax.inference.requests import is_text
from mmjax.models import bind
from mmjax.tokenizer import Tokenizer

BROKEN = "\ufffd"  # what the bytes of a character give that are not all there yet
TRANSPOSED_BYTES = 4 * 2**30  # of a language model that is copied into another layout to be decoded on a CPU
LOOK = 16  # ids between two looks at the words for a stop string
FURTHER = ("top_k", "top_p", "top_p_inclusive", "repetition_penalty", "length_penalty", "min_length", "early_stopping",
           "dummy")


def default_dtype() -> str:
    """bfloat16 on an accelerator; float32 on a CPU, where not all are faster in bfloat16."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def load(
    path: str | Path,
    mesh: jax.sharding.Mesh | None = None,
    dtype: str | None = None,
    init_fresh: int | None = None,
    frozen_dtype: str | None = None,
) -> "Loaded":
    """A converted checkpoint, or a training run (its newest checkpoint on top of the weights it started from).

    mesh:         where the parameters go (`mmjax.sharding.make_mesh`); None for the first device
    dtype:        of parameters and activations, "float32" or "bfloat16"; None for what suits the device
    init_fresh:   seed for parameters that were never trained (a checkpoint converted without a projector)
    frozen_dtype: "int8" holds large matrices as int8, half of bfloat16, save those that a run trained; None: as `dtype`

    Raises FileNotFoundError or ValueError naming the folder, file or parameters that are not as they should be.
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
    """A model with everything around it. `module` and `params` are for `module.apply({"params": params}, batch)`."""

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
        """The model that a checkpoint or run describes, with these parameters."""
        return Loaded(source.family, module, params, source.config, source.tokenizer, source.text, source.generation,
                      mesh)

    def batch(self, samples: Sequence[Sample], length: int | None = None, multiple: int = 1, **settings: Any) -> Batch:
        """Rows for `mmjax.loss` or the module, as numpy arrays.

        length, multiple: fixed row length, or what the longest row is rounded up to
        settings:         fields of `TextConfig` that differ from the checkpoint's (max_txt_len, end_sym, ...)

        Raises ValueError naming the rows, images or settings that cannot be used.
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
        """The model's words for each sample's prompt, without special tokens and without the stop string.

        temperature: 0 is greedy (or beam search if `num_beams` > 1), above 0 samples
        stop:        strings that end a row, however its ids spell them; the text before the first of them is returned
        seed, first: of the draws. What a sample draws depends on the seed and on its number alone, which is `first` for
                     the first of these samples
        batch_size:  rows generated at once; None for all
        recall:      draws what each sample gives to the senses towards known images (ImageBind-LLM); None: as it is
        settings:    top_k, top_p, top_p_inclusive, repetition_penalty, length_penalty, min_length, early_stopping and
                     dummy, which mean what they mean in `GenerateConfig`; and fields of `TextConfig` that differ from
                     the checkpoint's

        Rows are as long as the next of a few lengths, so that most calls need no compilation. Raises ValueError naming
        the samples or settings that cannot be used.
        """
        config, settings = self._choices(max_new_tokens, temperature, num_beams, stop, settings)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size = {batch_size}: at least 1, or None for all samples at once")
        size = batch_size or max(len(samples), 1)
        words: list[str] = []
        for start in range(0, len(samples), size):
            chunk = samples[start : start + size]
            filled = [*chunk, *[chunk[-1]] * (size - len(chunk))]  # one row count, one compiled function
            writing = self._write(filled, config, seed, first + start, recall, settings)
            words += self._finish(writing, stop)[: len(chunk)]
        return words

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
        """The words of `generate` for one sample, piece by piece as they are written.

        A piece never ends inside a character, and holds nothing that may turn out to be white space at the end or a
        stop string. Beam search decides at its end, so it gives one piece. Raises what `generate` raises, at once.
        """
        config, settings = self._choices(max_new_tokens, temperature, num_beams, stop, settings)
        writing = self._write([sample], config, seed, 0, recall, settings)
        return self._pieces(writing, stop)

    def _choices(self, max_new_tokens: int, temperature: float, num_beams: int, stop: Sequence[str],
                 settings: dict[str, Any]) -> tuple[GenerateConfig, dict[str, Any]]:
        """(how to generate, what of the settings is about the text)"""
        if isinstance(stop, str) or not all(isinstance(words, str) for words in stop):
            raise ValueError(f"stop = {stop!r}: a list of strings, such as ['###']")
        ids = self.generation
        ends = ids["eos_token_id"]
        end, *more = ends if isinstance(ends, list) else [ends]  # Llama 3 ends a turn with one, a text with another
        config = GenerateConfig(
            max_new_tokens=max_new_tokens, num_beams=num_beams, do_sample=temperature > 0, temperature=temperature,
            bos=ids["bos_token_id"], eos=end, pad=ids["pad_token_id"],
            stop=(*((other,) for other in more),
                  *(sequence for words in stop for sequence in stop_ids(self.tokenizer, words))),
            **{name: settings[name] for name in FURTHER if name in settings})
        return config, {name: value for name, value in settings.items() if name not in FURTHER}

    def _write(self, samples: Sequence[Sample], config: GenerateConfig, seed: int, first: int, recall: Recall | None,
               settings: dict[str, Any]) -> Generation:
        """The samples' prompts, read; `first` is the number of the first of them."""
        samples = [dataclasses.replace(sample, answer=None) for sample in samples]
        share = sharding.num_shards(self.mesh, "batch")
        samples += [samples[-1]] * (-len(samples) % share)
        longest = max(self.prompt_lengths(samples, config.max_new_tokens, **settings))
        batch = self.batch(samples, common_length(longest), **settings)
        keys = row_keys(jax.random.key(seed), np.arange(first, first + len(samples))) if config.sampling else None
        module, params = self._decoder
        with sharding.use_mesh(self.mesh):
            batch = batch if recall is None else self._recalled(batch, recall)
            batch = sharding.put_batch(batch, self.mesh, len(samples))
            return Generation(module, params, batch, config, keys, common_length(config.max_new_tokens))

    def prompt_lengths(self, samples: Sequence[Sample], max_new_tokens: int = 1, **settings: Any) -> list[int]:
        """Tokens of each sample's prompt, images counted. Raises ValueError naming the samples that hold no text, or
        that an answer of `max_new_tokens` would take beyond the positions that the model reads."""
        if strange := [row for row, sample in enumerate(samples) if not is_text(sample.prompt + sample.input)]:
            raise ValueError(f"The prompts of the rows {strange} hold characters that are no text (unpaired "
                             "surrogates). Read them as what they were written in, such as UTF-8.")
        made, _ = row_slots(samples, self.tokenizer, self._text(settings), self.config.image_tokens)
        lengths, most = [len(row) for row in made], self.config.llm.max_positions
        if long := [f"row {row}: {n} tokens" for row, n in enumerate(lengths) if n + max_new_tokens > most]:
            raise ValueError(f"With max_new_tokens = {max_new_tokens} these prompts need more than the {most} "
                             "positions that this model reads:\n  " + "\n  ".join(long)
                             + "\nAsk less, or lower max_new_tokens.")
        return lengths

    def _finish(self, writing: Generation, stop: Sequence[str]) -> list[str]:
        """The words of every row, written to its end."""
        with sharding.use_mesh(self.mesh):
            if not stop or writing.beams:
                writing.advance()
            while not writing.done.all():  # ids may spell a stop string in ways that the loop does not look for
                writing.advance(writing.step + LOOK)
                texts = map(self.tokenizer.decode, writing.ids)
                writing.close(np.array([cut(text, stop) != text for text in texts]))
            made = writing.result()
        rows = zip(np.asarray(made.sequences), np.asarray(made.lengths), strict=True)
        return [cut(self.tokenizer.decode(row[1:length].tolist()), stop).strip() for row, length in rows]

    def _pieces(self, writing: Generation, stop: Sequence[str]) -> Iterator[str]:
        said = ""
        while not (writing.done[0] or writing.beams):
            text = self.tokenizer.decode(writing.ids[0])
            if cut(text, stop) != text:
                break
            settled = unchanging(text, stop)
            if len(settled) > len(said):
                yield settled[len(said) :]
                said = settled
            with sharding.use_mesh(self.mesh):
                writing.advance(writing.step + 1)
        if not writing.beams:
            writing.close(np.ones(1, bool))  # the rows that fill a mesh too
        if (rest := self._finish(writing, stop)[0]) != said:
            yield rest[len(said) :]

    @functools.cached_property
    def _decoder(self) -> tuple[nn.Module, Any]:
        """Module and parameters in the form that is decoded fastest: on one CPU with every layer's weights apart, and
        turned, which takes their memory once more, if they are not large."""
        if self.mesh.size > 1 or self.mesh.devices.flat[0].platform != "cpu":
            return self.module, self.params
        transposed = sum(leaf.nbytes for leaf in jax.tree.leaves(self.params["llm"])) <= TRANSPOSED_BYTES
        module = self.module.clone(scan_layers=False, transposed_weights=transposed)
        return module, unstack(self.params, transposed)

    def _recalled(self, batch: Batch, recall: Recall) -> Batch:
        """The same batch with the mix of each row's senses in place of the senses, after a look at known images."""
        if not self.config.senses:
            raise ValueError(f"recall is for models that mix senses; the family {self.family} does not.")
        width = self.config.media.out
        if recall.vectors.shape[1] != width:
            raise ValueError(f"The vectors to recall are {recall.vectors.shape[1]} wide, this model's features {width}."
                             " Take the vectors that belong to its ImageBind.")
        mixed = mix_and_recall(self.module, recall.count, self.params, batch, recall.vectors, recall.sharpness,
                               recall.weight)
        return dataclasses.replace(batch, images=None, image_valid=None, media=None, weights=None, features=mixed)


@functools.partial(jax.jit, static_argnums=(0, 1))
def mix_and_recall(module: nn.Module, count: int, params: Any, batch: Batch, vectors: Any, sharpness: float,
                   weight: float) -> jax.Array:
    """The mix of a batch's senses, drawn towards its nearest vectors: float32[B,E]."""
    feature = module.apply({"params": params}, batch, method="feature")
    return bind.recall(feature, vectors, count, sharpness, weight)


def common_length(length: int) -> int:
    """The next of 32, 48, 64, 96, 128, 192, ...: lengths that rows share, at most half as long again as they need."""
    power = 32 << max(0, math.ceil(math.log2(max(length, 1) / 32)))
    return power * 3 // 4 if 32 < power and length <= power * 3 // 4 else power


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings in it."""
    return text[: min((text.index(end) for end in stop if end and end in text), default=None)]


def unchanging(text: str, stop: Sequence[str]) -> str:
    """The part of an unfinished text that will stay, of what `cut` and `strip` leave at its end."""
    text = text.lstrip().rstrip(BROKEN)
    begun = (size for end in stop for size in range(1, len(end)) if text.endswith(end[:size]))
    return text[: len(text) - max(begun, default=0)].rstrip()


def stop_ids(tokenizer: Tokenizer, words: str) -> list[tuple[int, ...]]:
    """The ways a vocabulary writes a stop string: at the start of a word and glued to the one before."""
    before = tokenizer.encode("a")
    glued = tokenizer.encode("a" + words)
    ways = [tuple(tokenizer.encode(words))]
    if glued[: len(before)] == before:
        ways.append(tuple(glued[len(before) :]))
    return [way for way in dict.fromkeys(ways) if way]
