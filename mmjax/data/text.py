"""Samples to rows of token ids: which word, soft token or padding stands at each slot.

A row is `[BOS][prompt][answer][padding]`; an image's soft tokens take `image_tokens` slots of the prompt. The ids,
targets and masks are those of minigpt4/models/minigpt_base.py (preparing_embedding, prompt_wrap,
tokenize_conversation, get_context_emb), and where `TextConfig.joint` says so those of imagebind_LLM/data/dataset.py;
where the originals drop what does not fit together, this raises.
"""

import dataclasses
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


class Slot(NamedTuple):
    """One place of a row: the fields of `Batch` of the same names."""

    token: int
    soft_index: int = -1
    valid: bool = True
    loss_mask: bool = False


SOFT = Slot._fields.index("soft_index")


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """A sample with the slots of its row, without BOS and padding.

    prompt, answer: int32[n, fields of Slot], read-only. Where prompt and answer are tokenised as one text
                    (`TextConfig.joint`), `answer` is the whole row, BOS first, and `prompt` is None
    """

    sample: Sample
    prompt: np.ndarray | None
    answer: np.ndarray

    @property
    def length(self) -> int:
        """Tokens of the row."""
        return len(self.answer) if self.prompt is None else 1 + len(self.prompt) + len(self.answer)


def tokenize(samples: Sequence[Sample], tokenizer: Tokenizer, text: TextConfig, image_tokens: int) -> list[Tokenized]:
    """Samples with the slots of their rows.

    image_tokens: soft tokens of one image; the k-th image of a row has the indices from k·image_tokens on. With 0
                  images take no slots: a prompt needs no `<ImageHere>`, and those that it has are left out (`bare`)

    A sample with neither answer nor turns becomes a prompt to be continued, which no setting cuts. Raises ValueError,
    naming every row concerned, if images and `<ImageHere>` do not agree, or a row does not fit the text settings; also
    for no samples at all, and for a template without its `{}`.
    """
    _check(samples, text, image_tokens)
    if text.joint:
        return [Tokenized(sample, None, _array(joint_slots(sample, tokenizer, text))) for sample in samples]
    return [Tokenized(sample, _array(prompt_slots(sample, tokenizer, text, image_tokens)),
                      _array(answer_slots(sample, tokenizer, text))) for sample in samples]


def rows(samples: Sequence[Sample | Tokenized], tokenizer: Tokenizer, text: TextConfig, image_tokens: int,
         length: int | None = None, multiple: int = 1) -> Batch:
    """Samples as one batch of numpy arrays, with `images` left None.

    samples: tokenised or not yet
    length:  slots of every row; None for the longest row's, rounded up to a multiple of `multiple`

    Raises ValueError as `tokenize` does, and if a row is longer than `length`.
    """
    made, padded_length = row_slots(samples, tokenizer, text, image_tokens)
    lengths = [len(row) for row in made]
    if length is None:
        length = -(-max(lengths) // multiple) * multiple
    if too_long := [f"row {row}: {n} tokens" for row, n in enumerate(lengths) if n > length]:
        raise ValueError(f"{len(too_long)} of {len(samples)} rows do not fit into {length} slots:\n  "
                         + "\n  ".join(too_long) + "\nRaise the row length, or lower max_txt_len or max_context_len.")
    grid = empty_grid(len(samples), length, tokenizer)
    for row, n in enumerate(lengths):
        grid[row, :n] = made[row]
    return batch(grid, np.tile(np.arange(length, dtype=np.int32), (len(samples), 1)), padded_length)


def row_slots(samples: Sequence[Sample | Tokenized], tokenizer: Tokenizer, text: TextConfig,
              image_tokens: int) -> tuple[list[np.ndarray], int]:
    """The slots of each row, int32[n, fields of Slot], BOS first, without padding; and the length to which the
    original pads these rows.

    Raises ValueError as `tokenize` does.
    """
    tokenized = (list(samples) if samples and all(isinstance(sample, Tokenized) for sample in samples)
                 else tokenize(samples, tokenizer, text, image_tokens))
    return _joint_rows(tokenized, text) if text.joint else _separate_rows(tokenized, tokenizer)


def empty_grid(count: int, length: int, tokenizer: Tokenizer) -> np.ndarray:
    """int32[count, length, fields of Slot]: nothing but padding."""
    grid = np.empty((count, length, len(Slot._fields)), np.int32)
    grid[:] = Slot(tokenizer.pad, valid=False)
    return grid


def batch(grid: np.ndarray, positions: np.ndarray, padded_length: int, segments: np.ndarray | None = None) -> Batch:
    """A grid of slots as a `Batch` without images."""
    tokens, soft_index, valid, loss_mask = np.moveaxis(grid, -1, 0).copy()
    return Batch(
        tokens=tokens, soft_index=soft_index, valid=valid.astype(bool), loss_mask=loss_mask.astype(bool),
        positions=positions, padded_length=np.full(len(grid), padded_length, np.int32), segments=segments)


def _array(slots: list[Slot]) -> np.ndarray:
    """int32[n, fields of Slot], which is only read."""
    array = np.array(slots, np.int32).reshape(-1, len(Slot._fields))
    array.flags.writeable = False
    return array


def _separate_rows(samples: Sequence[Tokenized], tokenizer: Tokenizer) -> tuple[list[np.ndarray], int]:
    """The rows' slots, BOS first, and how long the original pads them; prompt and answer each tokenised alone."""
    prompts, answers = [row.prompt for row in samples], [row.answer for row in samples]
    made = []
    for row in samples:
        # The original gives BOS the mask entry of the padded prompts' first slot, so the BOS of an empty prompt is
        # hidden as soon as another row has a prompt. If none has one, there is no such slot (the original fails) and
        # BOS is seen. A prompt to be continued keeps its BOS: get_context_emb masks nothing.
        seen = len(row.prompt) > 0 or not _learns(row.sample) or not any(map(len, prompts))
        made.append(np.concatenate([_array([Slot(tokenizer.bos, valid=seen)]), row.prompt, row.answer]))
    return made, 1 + max(map(len, prompts)) + max(map(len, answers))


def _joint_rows(samples: Sequence[Tokenized], text: TextConfig) -> tuple[list[np.ndarray], int]:
    """The same with prompt and answer as one text; the original pads what is learnt from to max_txt_len."""
    made = [row.answer for row in samples]
    learning = text.max_txt_len if any(_learns(row.sample) for row in samples) else 0
    return made, max(learning, *map(len, made))


def joint_slots(sample: Sample, tokenizer: Tokenizer, text: TextConfig) -> list[Slot]:
    """A whole row, BOS first: prompt and answer tokenised as one text without special tokens, the right end cut.

    Targets begin where the prompt alone would end, so a piece that spans the border moves it. Where `end_sym` is EOS,
    that is an id behind the text; anything else is part of the text.
    """

    def encode(words: str) -> list[int]:
        return [tokenizer.bos, *tokenizer.encode(words, special=False)]

    prompt = _wrap(bare(sample.prompt), text, bare(sample.input))
    known = encode(prompt)
    if not _learns(sample):
        return [Slot(i) for i in known]
    if text.end_sym == tokenizer.eos_text:
        ids = [*encode(prompt + sample.answer), tokenizer.eos]
    else:
        ids = encode(prompt + sample.answer + text.end_sym)
    return [Slot(i, loss_mask=slot >= len(known) and i != NO_TARGET)
            for slot, i in enumerate(ids[:text.max_txt_len])]


def prompt_slots(sample: Sample, tokenizer: Tokenizer, text: TextConfig, image_tokens: int) -> list[Slot]:
    """The prompt, or the first question of a conversation, behind BOS.

    Segments between images are tokenised one by one, so each starts with its own space marker. Images without a
    prompt stand alone (stage 1), without a template.
    """

    def words(segment: str) -> list[Slot]:
        return [Slot(token) for token in tokenizer.encode(segment)]

    def image(k: int) -> list[Slot]:
        return [Slot(tokenizer.pad, k * image_tokens + j) for j in range(image_tokens)]

    prompt, *_ = _questions(sample)
    if sample.images and image_tokens and not prompt + sample.input:
        return [slot for k in range(len(sample.images)) for slot in image(k)]
    prompt, given = (prompt, sample.input) if image_tokens else (bare(prompt), bare(sample.input))
    first, *others = _wrap(prompt, text, given).split(PLACEHOLDER)
    slots = words(first)
    for k, segment in enumerate(others):
        slots += image(k) + words(segment)
    return slots[:text.max_context_len] if sample.images and _learns(sample) else slots


def answer_slots(sample: Sample, tokenizer: Tokenizer, text: TextConfig) -> list[Slot]:
    """What follows the prompt: the answer, or a conversation from its first answer on; the right end may be cut.

    The pad piece can come up in text, and the two forms differ there: in an answer it is seen but no target, in a
    conversation it is a target but not seen.
    """
    if not _learns(sample):
        return []
    if not sample.turns:
        ids = tokenizer.encode(sample.answer + text.end_sym)
        return [Slot(i, loss_mask=i != tokenizer.pad) for i in ids[:text.max_txt_len]]
    slots = []
    for number, (question, answer) in enumerate(sample.turns):
        if number > 0:
            ids = tokenizer.encode(tokenizer.bos_text + _wrap(question, text))
            slots += [Slot(i, valid=i != tokenizer.pad) for i in ids]
        ids = tokenizer.encode(answer + text.end_sym)
        slots += [Slot(i, valid=i != tokenizer.pad, loss_mask=True) for i in ids]
    return slots[:text.max_txt_len]


def bare(prompt: str) -> str:
    """A prompt as a model reads it whose images take no slots among the words: the question alone.

    `<Img><ImageHere></Img> What is it? `, as data for MiniGPT-4 have it, is `What is it?` here: with the marks go the
    space behind them and those at both ends. A prompt without marks stays as it is.
    """
    return MARKED.sub("", prompt).strip(" ") if PLACEHOLDER in prompt else prompt


def _questions(sample: Sample) -> list[str]:
    return [question for question, _ in sample.turns] or [sample.prompt]


def _learns(sample: Sample) -> bool:
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
        raise ValueError("joint = True is for models whose images take no slots among the words; here an image "
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
            apart.append(f"row {row}: {shown} {PLACEHOLDER} for {len(sample.images)} images in {words!r}")
        apart += [f"row {row}: {PLACEHOLDER} in a later question, {question!r}"
                  for question in later if PLACEHOLDER in question]
    messages = []
    if unfit:
        messages.append("These rows do not fit the text settings:\n  " + "\n  ".join(unfit))
    if apart:
        messages.append("Images and placeholders do not agree:\n  " + "\n  ".join(apart))
    if apart:
        messages.append(f"Write one {PLACEHOLDER} for each image, as in '<Img>{PLACEHOLDER}</Img> What is it?'; in a "
                        "conversation all of them into the first question."
                        + ("" if image_tokens else " Or none at all: images of this model take no slots."))
    if messages:
        raise ValueError("\n".join(messages))
