"""A conversation with a model: its inputs and turns, the prompt made from them, and the streamed answer.

    talk = chat.Conversation(chat.template_of(model))
    chat.add_input(model, talk, "image", chat.read_input(model, "image", "a.jpg"))
    talk.ask("What is this?")
    for piece in chat.reply(model, talk):
        print(piece, end="")

Three templates are those of MiniGPT-4's chat (minigpt4/conversation/conversation.py): the prompt has the whole history,
with each image at the point where it was shown. The other two keep the inputs but not the text of earlier turns, as the
demos of ImageBind-LLM and LLaMA-Adapter do.

If a history is longer than the limit, the original cuts tokens off its left end, beginning with the system message.
Here the oldest questions and answers are left out, then the oldest images; the prompt keeps its format, and `Prompt`
says what was left out.
"""

import dataclasses
import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmjax.batch import Sample
from mmjax.checkpoints.converted import RUN_CARD, read_run_card
from mmjax.config import ALPACA, ScenesConfig, TextConfig
from mmjax.data import conversation, images, senses, text
from mmjax.families import config_from_dict
from mmjax.inference.generate import GenerateConfig
from mmjax.inference.loaded import Loaded
from mmjax.inference.requests import is_text
from mmjax.models.senses import sense_of

IMAGE = "image"  # the sense whose inputs go into `Sample.images`
HISTORIES = {"vicuna": conversation.TEMPLATES["vicuna0"], "llama2": conversation.TEMPLATES["llama2"],
             "v2": conversation.TEMPLATES["minigptv2"]}
TEMPLATES = (*HISTORIES, "alpaca", "plain")
# Training prompt templates (minigpt4/models/minigpt_base.py) and the chat templates for models trained with them.
TRAINED_IN = {"###Human: {} ###Assistant: ": "vicuna", "[INST] {} [/INST] ": "llama2", "[INST] {} [/INST]": "v2",
              ALPACA: "alpaca"}


@dataclasses.dataclass(frozen=True)
class ChatSettings:
    """The decoding options of a chat. Raises ValueError naming every value out of range."""

    # longest answer, in tokens
    max_new_tokens: int = 300
    # 0 takes the best token, above 0 samples (the original: 1)
    temperature: float = 0.0
    # above 1: beam search, at temperature 0; the answer is not streamed
    num_beams: int = 1
    # sample from the fewest tokens whose probabilities reach this sum
    top_p: float = 0.9
    # sample from this many tokens at most; 0 for all
    top_k: int = 50
    # above 1 penalizes tokens that the answer already has
    repetition_penalty: float = 1.05
    # in beam search: above 0 favours long answers
    length_penalty: float = 1.0
    # most tokens of the prompt and the answer together, soft tokens included
    max_length: int = 2000
    # of sampling; each answer of a conversation adds 1
    seed: int = 0

    def __post_init__(self):
        GenerateConfig(do_sample=self.temperature > 0, **self.decoding)
        if self.max_length <= self.max_new_tokens:
            raise ValueError(f"max_length = {self.max_length}, but must be more than max_new_tokens = "
                             f"{self.max_new_tokens}: it counts the prompt and the answer")

    @property
    def decoding(self) -> dict[str, Any]:
        """The arguments of `Loaded.stream` that are the same for all answers."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in ("max_length", "seed")}

    def changed(self, name: str, value: str) -> "ChatSettings":
        """Returns settings with one value parsed from a string. Raises ValueError for an invalid name or value."""
        kinds = {field.name: field.type for field in dataclasses.fields(self)}
        if name not in kinds:
            close = difflib.get_close_matches(name, kinds, n=1)
            raise ValueError(f"There is no setting {name!r}. " + (f"Did you mean {close[0]}? " if close else "")
                             + f"There are {', '.join(kinds)}.")
        try:
            number = kinds[name](value)
        except ValueError as error:
            wanted = "a whole number" if kinds[name] is int else "a number"
            raise ValueError(f"{name} = {value!r}, but must be {wanted}") from error
        return dataclasses.replace(self, **{name: number})


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question with the images shown before it, and its answer; "" while there is none."""

    question: str
    answer: str = ""
    images: tuple[Any, ...] = ()


@dataclasses.dataclass
class Conversation:
    """The inputs and turns of a conversation, independent of a model.

    template: one of `TEMPLATES`
    turns:    oldest first; only the last one may lack an answer
    images:   shown since the last question
    given:    by sense, the latest other input. Images are here for models whose images take no slots of the text, and
              in `turns` for all others
    left_out: a sentence about what did not fit into the last prompt, or ""
    """

    template: str
    turns: list[Turn] = dataclasses.field(default_factory=list)
    images: list[Any] = dataclasses.field(default_factory=list)
    given: dict[str, Any] = dataclasses.field(default_factory=dict)
    left_out: str = ""

    def __post_init__(self):
        if self.template not in TEMPLATES:
            raise ValueError(f"There is no chat template {self.template!r}. There are {', '.join(TEMPLATES)}.")

    @property
    def remembers(self) -> bool:
        """Whether prompts include earlier turns."""
        return self.template in HISTORIES

    def show(self, image: Any) -> None:
        """Adds an image in front of the next question."""
        self.images.append(image)

    def give(self, sense: str, value: Any) -> None:
        """Sets the input of a sense, from the next question on."""
        self.given[sense] = value

    def ask(self, question: str) -> None:
        """Adds the next question. Raises ValueError for an invalid one."""
        question = question.strip()
        if not question:
            raise ValueError("There is no question.")
        if not is_text(question):
            raise ValueError("The question has bytes that are not UTF-8. Save or type it as UTF-8.")
        if text.PLACEHOLDER in question:
            raise ValueError(f"A question cannot hold {text.PLACEHOLDER}: show an image instead, and it is put in "
                             "front of the question.")
        self.turns.append(Turn(question, images=tuple(self.images)))
        self.images = []

    def append_answer(self, text: str) -> None:
        """Appends text to the answer to the last question."""
        self.turns[-1] = dataclasses.replace(self.turns[-1], answer=self.turns[-1].answer + text)

    def finish(self) -> None:
        """Ends an answer. A question with an empty answer is removed, and its images go before the next one.

        Of text with several "Assistant:" only what follows the last one is the answer, as in MiniGPT-4's `Chat`.
        """
        last = self.turns.pop()
        answer = last.answer.split("Assistant:")[-1] if self.remembers else last.answer
        if answer.strip():
            self.turns.append(dataclasses.replace(last, answer=answer.strip()))
        else:
            self.images = [*last.images, *self.images]

    def reset(self) -> None:
        """Removes everything but the template."""
        self.turns, self.images, self.given, self.left_out = [], [], {}, ""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A complete prompt, with its template applied.

    turns, images: numbers of turns and images that were left out, oldest first, because they did not fit
    """

    sample: Sample
    turns: int = 0
    images: int = 0

    @property
    def left_out(self) -> str:
        """A sentence about what was left out; "" if nothing was."""
        parts = [f"{count} {name}{'s' * (count > 1)}" for count, name in (
            (self.turns, "earlier answer"), (self.images, "earlier image")) if count]
        return f"{' and '.join(parts)} left out: the conversation is longer than max_length." if parts else ""


# ---- templates and inputs of a model ----


def template_of(model: Loaded, scenes: ScenesConfig | None = None) -> str:
    """Returns the chat template for a model, by the template of its training prompts.

    A model trained on prompts and answers as one text (`joint`) gets one question at a time, and so does one of the
    scenes, whose language model was not trained on conversations. Converted checkpoints often have no template: then an
    end symbol "###" means Vicuna; LLaMA-2 and MiniGPT-v2 cannot be distinguished and get "plain".
    """
    trained_in, has_slots = model.text.prompt_template, model.config.image_tokens > 0
    if scenes is None and not model.text.joint:
        if trained_in in TRAINED_IN:
            return TRAINED_IN[trained_in]
        if not trained_in and has_slots and model.text.end_sym == HISTORIES["vicuna"].sep:
            return "vicuna"
    return "alpaca" if trained_in == ALPACA else "plain"


def scenes_of(checkpoint: Path) -> ScenesConfig | None:
    """Returns the scenes that a run was trained on; None for any other model. Raises ValueError for a damaged file."""
    folder = Path(checkpoint)
    card = read_run_card(folder) if (folder / RUN_CARD).is_file() else {}
    for name in ("config", "data", "scenes"):
        card = card.get(name) or {}
        if not isinstance(card, dict):
            raise ValueError(f"{folder / RUN_CARD} is damaged: {name} is no object.")
    return config_from_dict(ScenesConfig, card, f"{folder / RUN_CARD}: scenes") if card else None


def supported_inputs(model: Loaded) -> tuple[str, ...]:
    """Returns the inputs that a model supports: "image", and those of `mmjax.data.senses.NAMES` that it has a tower
    for."""
    media = tuple(name for name in senses.NAMES if sense_of(name) in model.config.senses)
    return ((IMAGE,) if model.config.image_size else ()) + media


def read_input(model: Loaded, sense: str, source: Any) -> Any:
    """Reads and checks the input of a sense, so that its file may change or be deleted.

    source: for "image" whatever `mmjax.data.images.load` takes; for "text" a string; for "audio" a .wav file; for all
            others an array or a .npy file

    Raises ValueError naming the file, or the inputs that the model supports.
    """
    if sense not in (supported := supported_inputs(model)):
        raise ValueError(f"This model does not perceive {sense!r}; "
                         + (f"it perceives {', '.join(supported)}." if supported else "it reads text only."))
    if sense == IMAGE:
        return images.read(source, model.config.images)
    value = _read(sense, source) if isinstance(source, (str, os.PathLike)) else source
    try:
        model.batch([Sample(prompt="?", media={sense: value})], prompt_template="")
    except ValueError as error:
        raise ValueError(f"{source if isinstance(source, (str, os.PathLike)) else sense}: {error}") from error
    return value


def _read(sense: str, source: str | os.PathLike) -> Any:
    if sense == "text":
        return str(source)
    if sense == "audio":
        return senses.read_wav(source)
    return senses.read_array(sense, source)


def add_input(model: Loaded, talk: Conversation, sense: str, value: Any) -> None:
    """Adds an input from `read_input` to a conversation."""
    if sense == IMAGE and model.config.image_tokens:
        talk.show(value)
    else:
        talk.give(sense, value)


# ---- the prompt ----


def prompt(model: Loaded, talk: Conversation, settings: ChatSettings = ChatSettings()) -> Prompt:
    """Returns the prompt of the last question, with as much of the earlier conversation as fits.

    Raises ValueError if the question alone, with its images, does not fit.
    """
    room = min(settings.max_length, model.config.llm.max_positions) - settings.max_new_tokens
    text_settings = dataclasses.replace(model.text, prompt_template="")
    *earlier, last = talk.turns
    length = 0
    for candidate in _candidates(model, talk, earlier, last):
        ((slots,), _) = text.row_slots([candidate.sample], model.tokenizer, text_settings, model.config.image_tokens)
        length = len(slots)
        if length <= room:
            return candidate
    raise ValueError(
        f"The question takes {length} tokens with its images, but there is room for {max(room, 0)} besides an answer "
        f"of {settings.max_new_tokens} (max_length = {settings.max_length}; this model reads "
        f"{model.config.llm.max_positions} at most). Ask a shorter one, show fewer images, or "
        "decrease max_new_tokens.")


def _candidates(model: Loaded, talk: Conversation, earlier: Sequence[Turn], last: Turn) -> Iterator[Prompt]:
    """Yields shorter and shorter prompts: without the text of the oldest turns, then without the oldest images."""
    if not talk.remembers:
        yield Prompt(_single_question(model, talk, earlier, last))
        return
    for turns in range(len(earlier) + 1):
        yield Prompt(_with_history(talk, earlier, last, turns, 0), turns)
    for hidden in range(1, sum(len(turn.images) for turn in earlier) + 1):
        yield Prompt(_with_history(talk, earlier, last, len(earlier), hidden), len(earlier), hidden)


def _single_question(model: Loaded, talk: Conversation, earlier: Sequence[Turn], last: Turn) -> Sample:
    """Returns the last question with the latest images, without earlier turns."""
    images = next((turn.images for turn in (last, *reversed(earlier)) if turn.images), ())
    question = conversation.IMAGE * len(images) + " " * bool(images) + last.question
    template = ALPACA if talk.template == "alpaca" else model.text.prompt_template
    prompt = template.replace("{}", question) if template else question
    return _add_given(talk, Sample(images=list(images), prompt=prompt))


def _with_history(talk: Conversation, earlier: Sequence[Turn], last: Turn, skip_turns: int, skip_images: int) -> Sample:
    """Returns the conversation without the text of its first `skip_turns` turns and without its first `skip_images`
    images. The remaining images of skipped turns precede the next question."""
    waiting = [image for turn in earlier[:skip_turns] for image in turn.images][skip_images:]
    transcript = conversation.Transcript(HISTORIES[talk.template])
    for turn in (*earlier[skip_turns:], last):
        for image in (*waiting, *turn.images):
            transcript = transcript.show(image)
        transcript, waiting = transcript.ask(turn.question), []
        if turn is not last:  # a placeholder that the model generated has no image
            transcript = transcript.answer(turn.answer.replace(text.PLACEHOLDER, ""))
    return _add_given(talk, transcript.sample())


def _add_given(talk: Conversation, sample: Sample) -> Sample:
    """Returns the sample with the inputs of other senses, and with images that take no slots."""
    media = {sense: value for sense, value in talk.given.items() if sense != IMAGE}
    images = [talk.given[IMAGE]] if IMAGE in talk.given else []
    return dataclasses.replace(sample, images=[*sample.images, *images], media=media)


# ---- the answer ----


def reply(model: Loaded, talk: Conversation, settings: ChatSettings = ChatSettings()) -> Iterator[str]:
    """Yields the answer to the last question in pieces, and appends them to the conversation.

    Close the iterator to interrupt it: the conversation keeps the answer so far. A question without any answer is
    removed.

    Raises ValueError, with the first piece, if the question does not fit or is invalid.
    """
    try:
        complete = prompt(model, talk, settings)
        talk.left_out = complete.left_out
        pieces = model.stream(complete.sample, stop=stops(model.text, talk.template), prompt_template="",
                              seed=settings.seed + len(talk.turns) - 1, **settings.decoding)
        for piece in pieces:
            talk.append_answer(piece)
            yield piece
    finally:
        talk.finish()


def stops(settings: TextConfig, template: str) -> list[str]:
    """Returns the strings that end an answer: the model's end symbol and the template's separator."""
    ends = (settings.end_sym, HISTORIES[template].sep if template in HISTORIES else "")
    return [end for end in dict.fromkeys(ends) if end]
