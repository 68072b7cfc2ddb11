"""Tokenises samples into rows whose slots hold a token, a soft token or padding.

A row is `[BOS][prompt][answer][padding]`; an image's soft tokens take `image_tokens` slots of the prompt. The tokens,
targets and masks are those of minigpt4/models/minigpt_base.py (preparing_embedding, prompt_wrap,
tokenize_conversation, get_context_emb), or with `TextConfig.joint` those of imagebind_LLM/data/dataset.py. Where the
originals drop inconsistent inputs, errors are raised here.
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
NO_TARGET = 0  # of joint rows: the original pads its labels with this token, so the unknown piece is never a target


class Slot(NamedTuple):
    """One slot of a row: the fields of `Batch` of the same names."""

    token: int
    soft_index: int = -1
    valid: bool = True
    loss_mask: bool = False


SOFT = Slot._fields.index("soft_index")


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """A sample with the slots of its row, without BOS and padding.

    prompt, answer: int32[n, fields of Slot], read-only. If prompt and answer are tokenised as one text
                    (`TextConfig.joint`), `answer` is the whole row with BOS, and `prompt` is None
    """

    sample: Sample
    prompt: np.ndarray | None
    answer: np.ndarray

    @property
    def length(self) -> int:
        """The number of tokens of the row, without padding."""
        return len(self.answer) if self.prompt is None else 1 + len(self.prompt) + len(self.answer)


def tokenize(samples: Sequence[Sample], tokenizer: Tokenizer, text: TextConfig, image_tokens: int) -> list[Tokenized]:
    """Returns samples with the slots of their rows.

    image_tokens: soft tokens of one image; image k of a row has the indices from k·image_tokens on. If 0, images take
                  no slots: a prompt needs no `<ImageHere>`, and those that it has are removed
                  (`without_placeholders`)

    A sample with neither answer nor turns becomes a prompt to be continued, which is never truncated. Raises
    ValueError naming every row whose images do not match its `<ImageHere>`, or that does not fit the text settings;
    also for no samples, and for a template without its `{}`.
    """
    _check(samples, text, image_tokens)
    if text.joint:
        return [Tokenized(sample, None, _array(joint_slots(sample, tokenizer, text))) for sample in samples]
    return [Tokenized(sample, _array(prompt_slots(sample, tokenizer, text, image_tokens)),
                      _array(answer_slots(sample, tokenizer, text))) for sample in samples]


def rows(samples: Sequence[Sample | Tokenized], tokenizer: Tokenizer, text: TextConfig, image_tokens: int,
         length: int | None = None, multiple: int = 1) -> Batch:
    """Returns samples as one batch of numpy arrays, without `images`.

    samples: tokenised or not
    length:  slots of every row; None for that of the longest row, rounded up to a multiple of `multiple`

    Raises the errors of `tokenize`, and ValueError if a row is longer than `length`.
    """
    slots, padded_length = row_slots(samples, tokenizer, text, image_tokens)
    lengths = [len(row) for row in slots]
    if length is None:
        length = -(-max(lengths) // multiple) * multiple
    if too_long := [f"row {row}: {n} tokens" for row, n in enumerate(lengths) if n > length]:
        raise ValueError(f"{len(too_long)} of {len(samples)} rows do not fit into {length} slots:\n  "
                         + "\n  ".join(too_long) + "\nRaise the row length, or lower max_txt_len or max_context_len.")
    grid = empty_grid(len(samples), length, tokenizer)
    for row, n in enumerate(lengths):
        grid[row, :n] = slots[row]
    return batch(grid, np.tile(np.arange(length, dtype=np.int32), (len(samples), 1)), padded_length)


def row_slots(samples: Sequence[Sample | Tokenized], tokenizer: Tokenizer, text: TextConfig,
              image_tokens: int) -> tuple[list[np.ndarray], int]:
    """Returns the slots of each row, int32[n, fields of Slot] with BOS and without padding, and the length to which the
    original pads these rows.

    Raises the errors of `tokenize`.
    """
    tokenized = (list(samples) if samples and all(isinstance(sample, Tokenized) for sample in samples)
                 else tokenize(samples, tokenizer, text, image_tokens))
    return _joint_rows(tokenized, text) if text.joint else _separate_rows(tokenized, tokenizer)


def empty_grid(count: int, length: int, tokenizer: Tokenizer) -> np.ndarray:
    """Returns int32[count, length, fields of Slot] of padding."""
    grid = np.empty((count, length, len(Slot._fields)), np.int32)
    grid[:] = Slot(tokenizer.pad, valid=False)
    return grid


def batch(grid: np.ndarray, positions: np.ndarray, padded_length: int, segments: np.ndarray | None = None) -> Batch:
    """Returns a grid of slots as a `Batch` without images."""
    tokens, soft_index, valid, loss_mask = np.moveaxis(grid, -1, 0).copy()
    return Batch(
        tokens=tokens, soft_index=soft_index, valid=valid.astype(bool), loss_mask=loss_mask.astype(bool),
        positions=positions, padded_length=np.full(len(grid), padded_length, np.int32), segments=segments)


def _array(slots: list[Slot]) -> np.ndarray:
    """Returns int32[n, fields of Slot], read-only."""
    array = np.array(slots, np.int32).reshape(-1, len(Slot._fields))
    array.flags.writeable = False
    return array


def _separate_rows(samples: Sequence[Tokenized], tokenizer: Tokenizer) -> tuple[list[np.ndarray], int]:
    """Returns `row_slots` for prompts and answers that are tokenised separately."""
    prompts, answers = [row.prompt for row in samples], [row.answer for row in samples]
    rows = []
    for row in samples:
        # The original gives BOS the mask of the padded prompts' first slot, so the BOS of an empty prompt is masked
        # if another row has a prompt. If none has one, there is no such slot (the original fails) and BOS is visible.
        # A prompt to be continued keeps its BOS: get_context_emb masks nothing.
        visible = len(row.prompt) > 0 or not _has_answer(row.sample) or not any(map(len, prompts))
        rows.append(np.concatenate([_array([Slot(tokenizer.bos, valid=visible)]), row.prompt, row.answer]))
    return rows, 1 + max(map(len, prompts)) + max(map(len, answers))


def _joint_rows(samples: Sequence[Tokenized], text: TextConfig) -> tuple[list[np.ndarray], int]:
    """Returns `row_slots` for prompts and answers tokenised as one text; training rows are padded to max_txt_len."""
    rows = [row.answer for row in samples]
    least = text.max_txt_len if any(_has_answer(row.sample) for row in samples) else 0
    return rows, max(least, *map(len, rows))


def joint_slots(sample: Sample, tokenizer: Tokenizer, text: TextConfig) -> list[Slot]:
    """Returns a row with BOS: prompt and answer tokenised as one text without special tokens, truncated on the right.

    Targets begin at the length of the tokenised prompt alone, so a token that spans the border shifts it. If `end_sym`
    is EOS, it is a token after the text; otherwise it is part of the text.
    """

    def encode(string: str) -> list[int]:
        return [tokenizer.bos, *tokenizer.encode(string, special=False)]

    prompt = _wrap(without_placeholders(sample.prompt), text, without_placeholders(sample.input))
    known = encode(prompt)
    if not _has_answer(sample):
        return [Slot(i) for i in known]
    if text.end_sym == tokenizer.eos_text:
        ids = [*encode(prompt + sample.answer), tokenizer.eos]
    else:
        ids = encode(prompt + sample.answer + text.end_sym)
    return [Slot(i, loss_mask=slot >= len(known) and i != NO_TARGET)
            for slot, i in enumerate(ids[:text.max_txt_len])]


def prompt_slots(sample: Sample, tokenizer: Tokenizer, text: TextConfig, image_tokens: int) -> list[Slot]:
    """Returns the slots of the prompt, or of the first question of a conversation, without BOS.

    Segments between images are tokenised separately, so each starts with its own space marker. Images without a
    prompt (stage 1) have no template.
    """

    def encode(segment: str) -> list[Slot]:
        return [Slot(token) for token in tokenizer.encode(segment)]

    def image(k: int) -> list[Slot]:
        return [Slot(tokenizer.pad, k * image_tokens + j) for j in range(image_tokens)]

    prompt, *_ = _questions(sample)
    if sample.images and image_tokens and not prompt + sample.input:
        return [slot for k in range(len(sample.images)) for slot in image(k)]
    input = sample.input
    if not image_tokens:
        prompt, input = without_placeholders(prompt), without_placeholders(input)
    first, *segments = _wrap(prompt, text, input).split(PLACEHOLDER)
    slots = encode(first)
    for k, segment in enumerate(segments):
        slots += image(k) + encode(segment)
    return slots[:text.max_context_len] if sample.images and _has_answer(sample) else slots


def answer_slots(sample: Sample, tokenizer: Tokenizer, text: TextConfig) -> list[Slot]:
    """Returns the slots after the prompt: the answer, or a conversation from its first answer on; truncated.

    The pad token can occur in text: in an answer it is visible but no target, in a conversation it is a target but not
    visible, as in the original.
    """
    if not _has_answer(sample):
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


def without_placeholders(prompt: str) -> str:
    """Returns a prompt without image placeholders, for models whose images take no slots.

    `<Img><ImageHere></Img> What is it? `, from data for MiniGPT-4, becomes `What is it?`: the space after a placeholder
    and those at both ends are removed, too. A prompt without placeholders is unchanged.
    """
    return MARKED.sub("", prompt).strip(" ") if PLACEHOLDER in prompt else prompt


def _questions(sample: Sample) -> list[str]:
    return [question for question, _ in sample.turns] or [sample.prompt]


def _has_answer(sample: Sample) -> bool:
    return bool(sample.turns) or sample.answer is not None


def _wrap(prompt: str, text: TextConfig, input: str = "") -> str:
    """Returns the prompt and a non-empty input in their template."""
    if input:
        start, middle, end = text.input_template.split("{}")
        return start + prompt + middle + input + end
    return text.prompt_template.replace("{}", prompt) if text.prompt_template else prompt


def _check(samples: Sequence[Sample], text: TextConfig, image_tokens: int) -> None:
    if not samples:
        raise ValueError("A batch needs at least one sample.")
    if text.prompt_template and text.prompt_template.count("{}") != 1:
        raise ValueError(f"prompt_template {text.prompt_template!r} must have one '{{}}', for the prompt.")
    if text.input_template and text.input_template.count("{}") != 2:
        raise ValueError(f"input_template {text.input_template!r} must have two '{{}}', for the prompt and the input.")
    if text.joint and image_tokens:
        raise ValueError("joint = True is for models whose images take no slots; an image of this model takes "
                         f"{image_tokens}.")
    unfit, mismatched = [], []
    for row, sample in enumerate(samples):
        if text.joint and sample.turns:
            unfit.append(f"row {row}: a conversation, but with joint = True a row is one prompt and one answer; the "
                         "format imagebind_llm_finetune reads the first pair of LLaVA's files, as the original does")
        if sample.input and sample.turns:
            unfit.append(f"row {row}: an input and a conversation; write it into the first question")
        elif sample.input and not text.input_template:
            unfit.append(f"row {row}: an input, but the text settings have no input_template; write it into the prompt")
        prompt, *later = _questions(sample)
        whole = prompt + sample.input
        count = whole.count(PLACEHOLDER)
        if count != len(sample.images) and (count or image_tokens and whole):  # without a prompt: stage 1
            mismatched.append(f"row {row}: {count} {PLACEHOLDER} for {len(sample.images)} images in {whole!r}")
        mismatched += [f"row {row}: {PLACEHOLDER} in a later question, {question!r}"
                       for question in later if PLACEHOLDER in question]
    messages = []
    if unfit:
        messages.append("These rows do not fit the text settings:\n  " + "\n  ".join(unfit))
    if mismatched:
        messages.append("Images and placeholders do not match:\n  " + "\n  ".join(mismatched))
        messages.append(f"Write one {PLACEHOLDER} for each image, as in '<Img>{PLACEHOLDER}</Img> What is it?'; in a "
                        "conversation all of them into the first question."
                        + ("" if image_tokens else " Or write none: images of this model take no slots."))
    if messages:
        raise ValueError("\n".join(messages))
