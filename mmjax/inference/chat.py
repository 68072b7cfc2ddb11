"""A conversation with a model: what was shown and said, the prompt that it makes, and the answer as it is written.

    talk = chat.Conversation(chat.template_of(model))
    chat.add(model, talk, "image", chat.take(model, "image", "a.jpg"))
    talk.ask("What is this?")
    for piece in chat.reply(model, talk):
        print(piece, end="")

Three templates are those of MiniGPT-4's chat (minigpt4/conversation/conversation.py): they write the whole history into
one prompt, every image where it was shown. The other two remember what was shown and not what was said, as the demos
of ImageBind-LLM and LLaMA-Adapter do: each question stands alone.

Where a history is longer than the limit, the original cuts tokens off its left end, the system sentence first. Here the
words of the oldest questions and answers are left out, then the oldest images; the prompt stays whole, and `Prompt`
says what is missing.
"""

import dataclasses
import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmjax import files
from mmjax.batch import Sample
from mmjax.checkpoints.converted import RUN_CARD, read_run_card
from mmjax.config import ALPACA, ScenesConfig, TextConfig
from mmjax.data import conversation, images, senses, text
from mmjax.data.arrays import read_npy
from mmjax.inference.generate import GenerateConfig
from mmjax.inference.loaded import Loaded
from mmjax.inference.requests import is_text
from mmjax.models.senses import sense_of

IMAGE = "image"  # the sense whose inputs go into `Sample.images`
HISTORIES = {"vicuna": conversation.TEMPLATES["vicuna0"], "llama2": conversation.TEMPLATES["llama2"],
             "v2": conversation.TEMPLATES["minigptv2"]}
TEMPLATES = (*HISTORIES, "alpaca", "plain")
# Templates that prompts were trained in (minigpt4/models/minigpt_base.py), and what talks to such a model.
TRAINED_IN = {"###Human: {} ###Assistant: ": "vicuna", "[INST] {} [/INST] ": "llama2", "[INST] {} [/INST]": "v2",
              ALPACA: "alpaca"}


@dataclasses.dataclass(frozen=True)
class ChatSettings:
    """How answers are written. Raises ValueError naming every value out of range."""

    # longest answer, in tokens
    max_new_tokens: int = 300
    # 0 takes the best word, above 0 draws (the original: 1)
    temperature: float = 0.0
    # above 1 searches with beams, at temperature 0; the answer comes in one piece
    num_beams: int = 1
    # draws from the fewest words that hold this share of the probability
    top_p: float = 0.9
    # draws from so many words at most; 0 for all
    top_k: int = 50
    # above 1 avoids words that the answer has already
    repetition_penalty: float = 1.05
    # of beams: above 0 favours long answers
    length_penalty: float = 1.0
    # most tokens of the history and the answer together, images counted
    max_length: int = 2000
    # of the draws; every answer of a conversation draws anew
    seed: int = 0

    def __post_init__(self):
        GenerateConfig(do_sample=self.temperature > 0, **self.decoding)
        if self.max_length <= self.max_new_tokens:
            raise ValueError(f"max_length = {self.max_length}, but must be more than max_new_tokens = "
                             f"{self.max_new_tokens}: it counts the prompt and the answer")

    @property
    def decoding(self) -> dict[str, Any]:
        """The arguments of `Loaded.stream` that do not change from answer to answer."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in ("max_length", "seed")}

    def changed(self, name: str, value: str) -> "ChatSettings":
        """With one value as a person types it. Raises ValueError naming what is wrong with name or value."""
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
    """A question with the images that were shown just before it, and its answer; "" while there is none."""

    question: str
    answer: str = ""
    images: tuple[Any, ...] = ()


@dataclasses.dataclass
class Conversation:
    """What has been shown and said so far. It knows no model: any can go on with it.

    template: one of `TEMPLATES`
    turns:    the questions, oldest first; only the last one may be without an answer
    images: shown since the last question
    given:    by sense, what the model perceives besides: the latest of each. A image is here for models whose
              images take no places among the words, and among the turns for the others
    left_out: of the last prompt: a sentence about what did not fit, or ""
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
        """Whether a prompt holds what was said before."""
        return self.template in HISTORIES

    def show(self, image: Any) -> None:
        """A image among the words, in front of the next question."""
        self.images.append(image)

    def give(self, sense: str, value: Any) -> None:
        """What the model perceives from now on through a sense."""
        self.given[sense] = value

    def ask(self, question: str) -> None:
        """The next question. Raises ValueError for one that cannot be asked."""
        question = question.strip()
        if not question:
            raise ValueError("There is no question.")
        if not is_text(question):
            raise ValueError("The question holds bytes that are not UTF-8. Save or type it as UTF-8.")
        if text.PLACEHOLDER in question:
            raise ValueError(f"A question cannot hold {text.PLACEHOLDER}: show a image instead, and it gets its "
                             "place in front of the question.")
        self.turns.append(Turn(question, images=tuple(self.images)))
        self.images = []

    def say(self, words: str) -> None:
        """More of the answer to the last question."""
        self.turns[-1] = dataclasses.replace(self.turns[-1], answer=self.turns[-1].answer + words)

    def finish(self) -> None:
        """Ends an answer; a question that got none is taken back, its images wait for the next one.

        What a model of MiniGPT-4's goes on with in the assistant's name is the answer, as in the original's `Chat`.
        """
        last = self.turns.pop()
        answer = last.answer.split("Assistant:")[-1] if self.remembers else last.answer
        if answer.strip():
            self.turns.append(dataclasses.replace(last, answer=answer.strip()))
        else:
            self.images = [*last.images, *self.images]

    def reset(self) -> None:
        """Forgets everything but the template."""
        self.turns, self.images, self.given, self.left_out = [], [], {}, ""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a model is asked, complete: no template goes around it any more.

    turns, images: how many of the conversation were left out, oldest first, for it would be too long with them
    """

    sample: Sample
    turns: int = 0
    images: int = 0

    @property
    def left_out(self) -> str:
        """One sentence about what was left out; "" for nothing."""
        parts = [f"{count} {name}{'s' * (count > 1)}" for count, name in (
            (self.turns, "earlier answer"), (self.images, "earlier image")) if count]
        return f"{' and '.join(parts)} left out: the conversation is longer than max_length." if parts else ""


# ---- what fits a model ----


def template_of(model: Loaded, scenes: ScenesConfig | None = None) -> str:
    """The chat template for a model, by what its prompts were trained in.

    One trained on prompts and answers as one text (`joint`) knows one question at a time, and so does one of the scenes
    world, whose language model never read a conversation. A converted checkpoint often says nothing about its template:
    an end of "###" is Vicuna's; LLaMA-2 and MiniGPT-v2 cannot be told apart and become "plain".
    """
    trained_in, places = model.text.prompt_template, model.config.image_tokens > 0
    if scenes is None and not model.text.joint:
        if trained_in in TRAINED_IN:
            return TRAINED_IN[trained_in]
        if not trained_in and places and model.text.end_sym == HISTORIES["vicuna"].sep:
            return "vicuna"
    return "alpaca" if trained_in == ALPACA else "plain"


def scenes_of(checkpoint: Path) -> ScenesConfig | None:
    """The scenes that a run was trained on; None for any other model. Raises ValueError for a damaged file."""
    folder = Path(checkpoint)
    card = read_run_card(folder) if (folder / RUN_CARD).is_file() else {}
    drawn = card.get("config", {}).get("data", {}).get("scenes")
    return None if drawn is None else ScenesConfig(**drawn)


def supported_inputs(model: Loaded) -> tuple[str, ...]:
    """The names of what a model can be given: "image", and of `mmjax.data.senses.NAMES` what it has a tower for."""
    media = tuple(name for name in senses.NAMES if sense_of(name) in model.config.senses)
    return ((IMAGE,) if model.config.image_size else ()) + media


def read_input(model: Loaded, sense: str, source: Any) -> Any:
    """What a sense is given, read once and checked, so that the file may change or go.

    source: of "image" whatever `mmjax.data.images.load` takes; of "text" the words; of "audio" a .wav file; of the
            others an array or a .npy file

    Raises ValueError naming the file, or the senses that the model has.
    """
    if sense not in (able := supported_inputs(model)):
        raise ValueError(f"This model does not perceive {sense!r}; "
                         + (f"it perceives {', '.join(able)}." if able else "it reads words alone."))
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
    try:
        return read_npy(source)
    except (OSError, ValueError) as error:
        raise ValueError(files.url_problem(source) or f"{source} cannot be read as the .npy file of an array: {error}"
                         ) from error


def add_input(model: Loaded, talk: Conversation, sense: str, value: Any) -> None:
    """Puts what `take` gave into a conversation, as this model perceives it."""
    if sense == IMAGE and model.config.image_tokens:
        talk.show(value)
    else:
        talk.give(sense, value)


# ---- the prompt ----


def prompt(model: Loaded, talk: Conversation, settings: ChatSettings = ChatSettings()) -> Prompt:
    """The last question, with as much of what came before it as fits.

    Raises ValueError if the question alone, with its images, does not fit.
    """
    room = min(settings.max_length, model.config.llm.max_positions) - settings.max_new_tokens
    bare = dataclasses.replace(model.text, prompt_template="")
    *earlier, last = talk.turns
    length = 0
    for made in _shorter_and_shorter(model, talk, earlier, last):
        ((places,), _) = text.row_slots([made.sample], model.tokenizer, bare, model.config.image_tokens)
        length = len(places)
        if length <= room:
            return made
    raise ValueError(
        f"The question takes {length} tokens with its images, but there is room for {max(room, 0)} beside an answer "
        f"of {settings.max_new_tokens} (max_length = {settings.max_length}; this model reads "
        f"{model.config.llm.max_positions} at most). Ask a shorter one, show fewer images, or lower "
        "max_new_tokens.")


def _shorter_and_shorter(model: Loaded, talk: Conversation, earlier: Sequence[Turn], last: Turn) -> Iterator[Prompt]:
    """Without ever more of what came first: the words of the turns, then images."""
    if not talk.remembers:
        yield Prompt(_alone(model, talk, earlier, last))
        return
    for turns in range(len(earlier) + 1):
        yield Prompt(_with_history(talk, earlier, last, turns, 0), turns)
    for hidden in range(1, sum(len(turn.images) for turn in earlier) + 1):
        yield Prompt(_with_history(talk, earlier, last, len(earlier), hidden), len(earlier), hidden)


def _alone(model: Loaded, talk: Conversation, earlier: Sequence[Turn], last: Turn) -> Sample:
    """One question about what was shown last."""
    images = next((turn.images for turn in (last, *reversed(earlier)) if turn.images), ())
    words = conversation.IMAGE * len(images) + " " * bool(images) + last.question
    around = ALPACA if talk.template == "alpaca" else model.text.prompt_template
    return _given(talk, Sample(images=list(images), prompt=around.replace("{}", words) if around else words))


def _with_history(talk: Conversation, earlier: Sequence[Turn], last: Turn, mute: int, blind: int) -> Sample:
    """A whole conversation without the words of its first `mute` turns and without its first `blind` images.

    A image whose words are left out stands in front of the next words.
    """
    waiting = [image for turn in earlier[:mute] for image in turn.images][blind:]
    written = conversation.Transcript(HISTORIES[talk.template])
    for turn in (*earlier[mute:], last):
        for image in (*waiting, *turn.images):
            written = written.show(image)
        written, waiting = written.ask(turn.question), []
        if turn is not last:  # a model may write the mark of a image; there would be none for it
            written = written.answer(turn.answer.replace(text.PLACEHOLDER, ""))
    return _given(talk, written.sample())


def _given(talk: Conversation, sample: Sample) -> Sample:
    """With what other senses perceive, and images that take no places."""
    media = {sense: value for sense, value in talk.given.items() if sense != IMAGE}
    images = [talk.given[IMAGE]] if IMAGE in talk.given else []
    return dataclasses.replace(sample, images=[*sample.images, *images], media=media)


# ---- the answer ----


def reply(model: Loaded, talk: Conversation, settings: ChatSettings = ChatSettings()) -> Iterator[str]:
    """The answer to the last question in pieces, as it is written, recorded in the conversation as it goes.

    Close the iterator to interrupt it: the conversation keeps what was said so far. A question that got no word is
    taken back.

    Raises ValueError, from the first piece on, if the question does not fit or cannot be asked.
    """
    try:
        asked = prompt(model, talk, settings)
        talk.left_out = asked.left_out
        pieces = model.stream(asked.sample, stop=stops(model.text, talk.template), prompt_template="",
                              seed=settings.seed + len(talk.turns) - 1, **settings.decoding)
        for piece in pieces:
            talk.say(piece)
            yield piece
    finally:
        talk.finish()


def stops(settings: TextConfig, template: str) -> list[str]:
    """The strings that end an answer: what the model was trained to end with, and what ends a message."""
    ends = (settings.end_sym, HISTORIES[template].sep if template in HISTORIES else "")
    return [end for end in dict.fromkeys(ends) if end]
