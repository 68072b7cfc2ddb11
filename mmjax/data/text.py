"""Samples to rows of token ids: which word, soft token or padding stands at each place.

A row is `[BOS][prompt][answer][padding]`; a picture's soft tokens take `image_tokens` places of the prompt. The ids,
targets and masks are those of minigpt4/models/minigpt_base.py (preparing_embedding, prompt_wrap,
tokenize_conversation, get_context_emb), and where `TextConfig.joint` says so those of imagebind_LLM/data/dataset.py;
where the originals drop what does not fit together, this raises.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mmjax.batch import Batch, Sample
from mmjax.config import TextConfig
from mmjax.tokenizer import Tokenizer

PLACEHOLDER = "<ImageHere>"
MARKED = re.compile(rf"(?:<Img>)?{PLACEHOLDER}(?:</Img>)? ?")
NO_TARGET = 0  # of joint rows: the original pads its labels with this id, and so never learns the unknown piece


class Place(NamedTuple):
    """One place of a row: the fields of `Batch` of the same names."""

    token: int
    soft_index: int = -1
    valid: bool = True
    loss_mask: bool = False


SOFT = Place._fields.index("soft_index")


def rows(samples: Sequence[Sample], tokenizer: Tokenizer, text: TextConfig, image_tokens: int,
         length: int | None = None, multiple: int = 1) -> Batch:
    """Samples as one batch of numpy arrays, with `images` left None.

    image_tokens: soft tokens of one picture; the k-th picture of a row has the indices from k·image_tokens on. With 0
                  pictures take no places: a prompt needs no `<ImageHere>`, and those that it has are left out (`bare`)
    length:       places of every row; None for the longest row's, rounded up to a multiple of `multiple`

    A sample with neither answer nor turns becomes a prompt to be continued, which no setting cuts. Raises ValueError,
    naming every row concerned, if pictures and `<ImageHere>` do not agree, a row does not fit the text settings or is
    longer than `length`; also for no samples at all, and for a template without its `{}`.
    """
    made, padded_length = row_places(samples, tokenizer, text, image_tokens)
    lengths = [len(row) for row in made]
    if length is None:
        length = -(-max(lengths) // multiple) * multiple
    if too_long := [f"row {row}: {n} tokens" for row, n in enumerate(lengths) if n > length]:
        raise ValueError(f"{len(too_long)} of {len(samples)} rows do not fit into {length} places:\n  "
                         + "\n  ".join(too_long) + "\nRaise the row length, or lower max_txt_len or max_context_len.")
    grid = empty_grid(len(samples), length, tokenizer)
    for row, n in enumerate(lengths):
        grid[row, :n] = made[row]
    return batch(grid, np.tile(np.arange(length, dtype=np.int32), (len(samples), 1)), padded_length)


def row_places(samples: Sequence[Sample], tokenizer: Tokenizer, text: TextConfig,
               image_tokens: int) -> tuple[list[np.ndarray], int]:
    """The places of each row, int32[n, fields of Place], BOS first, without padding; and the length to which the
    original pads these rows.

    Raises ValueError as `rows` does.
    """
    _check(samples, text, image_tokens)
    words = [_Words.of(sample) for sample in samples]
    if text.joint:
        return _joint_rows(words, tokenizer, text)
    return _separate_rows(words, tokenizer, text, image_tokens)


def empty_grid(count: int, length: int, tokenizer: Tokenizer) -> np.ndarray:
    """int32[count, length, fields of Place]: nothing but padding."""
    grid = np.empty((count, length, len(Place._fields)), np.int32)
    grid[:] = Place(tokenizer.pad, valid=False)
    return grid


def batch(grid: np.ndarray, positions: np.ndarray, padded_length: int, segments: np.ndarray | None = None) -> Batch:
    """A grid of places as a `Batch` without pictures."""
    tokens, soft_index, valid, loss_mask = np.moveaxis(grid, -1, 0).copy()
    return Batch(
        tokens=tokens, soft_index=soft_index, valid=valid.astype(bool), loss_mask=loss_mask.astype(bool),
        positions=positions, padded_length=np.full(len(grid), padded_length, np.int32), segments=segments)


@dataclasses.dataclass(frozen=True)
class _Words:
    """What of a sample decides its places. A run asks twice, when a batch is planned and when it is made."""

    prompt: str
    input: str
    answer: str | None
    turns: tuple[tuple[str, str], ...]
    pictures: int

    @staticmethod
    def of(sample: Sample) -> "_Words":
        return _Words(sample.prompt, sample.input, sample.answer, tuple(map(tuple, sample.turns)), len(sample.images))

    @property
    def sample(self) -> Sample:
        """The sample, without its pictures."""
        return Sample([None] * self.pictures, {}, {}, self.prompt, self.input, self.answer, list(self.turns))


@functools.lru_cache(maxsize=4096)
def _separate(words: _Words, tokenizer: Tokenizer, text: TextConfig,
              image_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    return (_array(prompt_places(words.sample, tokenizer, text, image_tokens)),
            _array(answer_places(words.sample, tokenizer, text)))


@functools.lru_cache(maxsize=4096)
def _joint(words: _Words, tokenizer: Tokenizer, text: TextConfig) -> np.ndarray:
    return _array(joint_places(words.sample, tokenizer, text))


def _array(places: list[Place]) -> np.ndarray:
    """int32[n, fields of Place], which is only read."""
    array = np.array(places, np.int32).reshape(-1, len(Place._fields))
    array.flags.writeable = False
    return array


def _separate_rows(samples: Sequence[_Words], tokenizer: Tokenizer, text: TextConfig,
                   image_tokens: int) -> tuple[list[np.ndarray], int]:
    """The rows' places, BOS first, and how long the original pads them; prompt and answer each tokenised alone."""
    prompts, answers = zip(*(_separate(words, tokenizer, text, image_tokens) for words in samples), strict=True)
    made = []
    for sample, prompt, answer in zip(samples, prompts, answers, strict=True):
        # The original gives BOS the mask entry of the padded prompts' first place, so the BOS of an empty prompt is
        # hidden as soon as another row has a prompt. If none has one, there is no such place (the original fails) and
        # BOS is seen. A prompt to be continued keeps its BOS: get_context_emb masks nothing.
        seen = len(prompt) > 0 or not _learns(sample) or not any(map(len, prompts))
        made.append(np.concatenate([_array([Place(tokenizer.bos, valid=seen)]), prompt, answer]))
    return made, 1 + max(map(len, prompts)) + max(map(len, answers))


def _joint_rows(samples: Sequence[_Words], tokenizer: Tokenizer, text: TextConfig) -> tuple[list[np.ndarray], int]:
    """The same with prompt and answer as one text; the original pads what is learnt from to max_txt_len."""
    made = [_joint(words, tokenizer, text) for words in samples]
    learning = text.max_txt_len if any(map(_learns, samples)) else 0
    return made, max(learning, *map(len, made))


def joint_places(sample: Sample, tokenizer: Tokenizer, text: TextConfig) -> list[Place]:
    """A whole row, BOS first: prompt and answer tokenised as one text without special tokens, the right end cut.

    Targets begin where the prompt alone would end, so a piece that spans the border moves it. Where `end_sym` is EOS,
    that is an id behind the text; anything else is part of the text.
    """

    def encode(words: str) -> list[int]:
        return [tokenizer.bos, *tokenizer.encode(words, special=False)]

    prompt = _wrap(bare(sample.prompt), text, bare(sample.input))
    known = encode(prompt)
    if not _learns(sample):
        return [Place(i) for i in known]
    if text.end_sym == tokenizer.eos_text:
        ids = [*encode(prompt + sample.answer), tokenizer.eos]
    else:
        ids = encode(prompt + sample.answer + text.end_sym)
    return [Place(i, loss_mask=place >= len(known) and i != NO_TARGET)
            for place, i in enumerate(ids[:text.max_txt_len])]


def prompt_places(sample: Sample, tokenizer: Tokenizer, text: TextConfig, image_tokens: int) -> list[Place]:
    """The prompt, or the first question of a conversation, behind BOS.

    Segments between pictures are tokenised one by one, so each starts with its own space marker. Pictures without a
    prompt stand alone (stage 1), without a template.
    """

    def words(segment: str) -> list[Place]:
        return [Place(token) for token in tokenizer.encode(segment)]

    def picture(k: int) -> list[Place]:
        return [Place(tokenizer.pad, k * image_tokens + j) for j in range(image_tokens)]

    prompt, *_ = _questions(sample)
    if sample.images and image_tokens and not prompt + sample.input:
        return [place for k in range(len(sample.images)) for place in picture(k)]
    prompt, given = (prompt, sample.input) if image_tokens else (bare(prompt), bare(sample.input))
    first, *others = _wrap(prompt, text, given).split(PLACEHOLDER)
    places = words(first)
    for k, segment in enumerate(others):
        places += picture(k) + words(segment)
    return places[:text.max_context_len] if sample.images and _learns(sample) else places


def answer_places(sample: Sample, tokenizer: Tokenizer, text: TextConfig) -> list[Place]:
    """What follows the prompt: the answer, or a conversation from its first answer on; the right end may be cut.

    The pad piece can come up in text, and the two forms differ there: in an answer it is seen but no target, in a
    conversation it is a target but not seen.
    """
    if not _learns(sample):
        return []
    if not sample.turns:
        ids = tokenizer.encode(sample.answer + text.end_sym)
        return [Place(i, loss_mask=i != tokenizer.pad) for i in ids[:text.max_txt_len]]
    places = []
    for number, (question, answer) in enumerate(sample.turns):
        if number > 0:
            ids = tokenizer.encode(tokenizer.bos_text + _wrap(question, text))
            places += [Place(i, valid=i != tokenizer.pad) for i in ids]
        ids = tokenizer.encode(answer + text.end_sym)
        places += [Place(i, valid=i != tokenizer.pad, loss_mask=True) for i in ids]
    return places[:text.max_txt_len]


def crop_left(batch: Batch, keep: int) -> Batch:
    """Prompts to be continued, each cut to its last `keep` tokens; positions start at 0 again.

    As `Chat` of the original does with a context that leaves no room for the answer: soft tokens count, and BOS goes
    first. Raises ValueError if nothing would be kept.
    """
    if keep < 1:
        raise ValueError(f"Cannot keep {keep} tokens of a prompt: max_length must be greater than max_new_tokens.")
    lengths = batch.valid.sum(axis=1)  # such rows have no holes
    places = np.arange(min(keep, batch.tokens.shape[1]))
    source = np.maximum(lengths - keep, 0)[:, None] + places

    def take(array: np.ndarray) -> np.ndarray:
        return np.take_along_axis(array, source, axis=1)

    return dataclasses.replace(
        batch, tokens=take(batch.tokens), soft_index=take(batch.soft_index), valid=take(batch.valid),
        loss_mask=take(batch.loss_mask), positions=batch.positions[:, places],
        padded_length=np.minimum(batch.padded_length, keep))


def bare(prompt: str) -> str:
    """A prompt as a model reads it whose pictures take no places among the words: the question alone.

    `<Img><ImageHere></Img> What is it? `, as data for MiniGPT-4 have it, is `What is it?` here: with the marks go the
    space behind them and those at both ends. A prompt without marks stays as it is.
    """
    return MARKED.sub("", prompt).strip(" ") if PLACEHOLDER in prompt else prompt


def _questions(sample: Sample) -> list[str]:
    return [question for question, _ in sample.turns] or [sample.prompt]


def _learns(sample: Sample | _Words) -> bool:
    return bool(sample.turns) or sample.answer is not None


def _wrap(prompt: str, text: TextConfig, input: str = "") -> str:
    """The prompt, and the input if there is one, in its template."""
    if input:
        before, between, after = text.input_template.split("{}")
        return before + prompt + between + input + after
    return text.prompt_template.replace("{}", prompt) if text.prompt_template else prompt


def _check(samples: Sequence[Sample], text: TextConfig, image_tokens: int) -> None:
    if not samples:
        raise ValueError("A batch needs at least one sample.")
    if text.prompt_template and text.prompt_template.count("{}") != 1:
        raise ValueError(f"prompt_template {text.prompt_template!r} must have one '{{}}', where the prompt goes.")
    if text.input_template and text.input_template.count("{}") != 2:
        raise ValueError(f"input_template {text.input_template!r} must have two '{{}}', for the prompt and the input.")
    if text.joint and image_tokens:
        raise ValueError("joint = True is for models whose pictures take no places among the words; here a picture "
                         f"takes {image_tokens}.")
    unfit, apart = [], []
    for row, sample in enumerate(samples):
        if text.joint and sample.turns:
            unfit.append(f"row {row}: a conversation, but with joint = True a row is one prompt and one answer; of "
                         "LLaVA's files the format imagebind_llm_finetune takes the first pair, as the original does")
        if sample.input and sample.turns:
            unfit.append(f"row {row}: an input beside a conversation; write it into the first question")
        elif sample.input and not text.input_template:
            unfit.append(f"row {row}: an input, but the text settings have no input_template; write it into the prompt")
        prompt, *later = _questions(sample)
        words = prompt + sample.input
        shown = words.count(PLACEHOLDER)
        if shown != len(sample.images) and (shown or image_tokens and words):  # without words: stage 1
            apart.append(f"row {row}: {shown} {PLACEHOLDER} for {len(sample.images)} pictures in {words!r}")
        apart += [f"row {row}: {PLACEHOLDER} in a later question, {question!r}"
                  for question in later if PLACEHOLDER in question]
    messages = []
    if unfit:
        messages.append("These rows do not fit the text settings:\n  " + "\n  ".join(unfit))
    if apart:
        messages.append("Pictures and placeholders do not agree:\n  " + "\n  ".join(apart))
    if apart:
        messages.append(f"Write one {PLACEHOLDER} for each picture, as in '<Img>{PLACEHOLDER}</Img> What is it?'; in a "
                        "conversation all of them into the first question."
                        + ("" if image_tokens else " Or none at all: pictures of this model take no places."))
    if messages:
        raise ValueError("\n".join(messages))
