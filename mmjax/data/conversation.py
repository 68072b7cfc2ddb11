"""Chat templates, and a conversation about images. Mirrors minigpt4/conversation/conversation.py (Conversation)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from mmjax.batch import Sample

IMAGE = "<Img><ImageHere></Img>"


@dataclasses.dataclass(frozen=True)
class Template:
    """How a conversation is written down.

    roles: what precedes the words of the user and of the assistant
    sep:   ends the system text and every message; with a `sep2`, that one ends every second message in its place
    """

    system: str
    roles: tuple[str, str]
    sep: str
    sep2: str | None = None

    def prompt(self, messages: Sequence[tuple[str, str | None]]) -> str:
        """The text of `(role, words)` messages; one without words is left open, to be continued."""
        ends = (self.sep, self.sep if self.sep2 is None else self.sep2)
        parts = [role + words + ends[number % 2] if words else role for number, (role, words) in enumerate(messages)]
        return self.system + self.sep + "".join(parts)


_SYSTEM = ("Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to "
           "you. Please answer my questions.")
TEMPLATES = {
    "vicuna0": Template(_SYSTEM, ("Human: ", "Assistant: "), "###"),
    "llama2": Template(_SYSTEM, ("<s>[INST] ", " [/INST] "), ""),
    "minigptv2": Template("", ("<s>[INST] ", " [/INST]"), ""),
}


@dataclasses.dataclass(frozen=True)
class Transcript:
    """A conversation as it is written down: what has been said and shown so far; every method returns a new one.

        talk = Transcript(TEMPLATES["vicuna0"]).show(image).ask("What is this?")
        talk = talk.answer("A dog.").ask("Which color?")

    messages: `(role, words)` pairs, the roles being the template's
    images:   the images shown, one for each `<ImageHere>` of the messages
    """

    template: Template
    messages: tuple[tuple[str, str], ...] = ()
    images: tuple[Any, ...] = ()

    def show(self, image: Any) -> "Transcript":
        """The user uploads an image."""
        return dataclasses.replace(self._say(0, IMAGE), images=(*self.images, image))

    def ask(self, question: str) -> "Transcript":
        """The user asks; right after an image the question joins its message."""
        if self.messages:
            *before, (role, words) = self.messages
            if role == self.template.roles[0] and words.endswith("</Img>"):
                return dataclasses.replace(self, messages=(*before, (role, f"{words} {question}")))
        return self._say(0, question)

    def answer(self, words: str) -> "Transcript":
        """The assistant has answered."""
        return self._say(1, words)

    def sample(self) -> Sample:
        """What the model is to continue. Its prompt is complete: tokenise it without a prompt template."""
        messages = (*self.messages, (self.template.roles[1], None))
        return Sample(images=list(self.images), prompt=self.template.prompt(messages))

    def _say(self, who: int, words: str) -> "Transcript":
        return dataclasses.replace(self, messages=(*self.messages, (self.template.roles[who], words)))
