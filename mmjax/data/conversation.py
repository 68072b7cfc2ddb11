"""Chat templates and conversations about images. Mirrors minigpt4/conversation/conversation.py (Conversation)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from mmjax.batch import Sample

IMAGE = "<Img><ImageHere></Img>"


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat template.

    roles: prefixes of the user's and the assistant's messages
    sep:   ends the system text and every message; `sep2`, if given, ends every second message instead
    """

    system: str
    roles: tuple[str, str]
    sep: str
    sep2: str | None = None

    def prompt(self, messages: Sequence[tuple[str, str | None]]) -> str:
        """Returns the text of `(role, text)` messages; a message without text is left open, to be continued."""
        ends = (self.sep, self.sep if self.sep2 is None else self.sep2)
        parts = [role + text + ends[number % 2] if text else role for number, (role, text) in enumerate(messages)]
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
    """The messages and images of a conversation; every method returns a new transcript.

        talk = Transcript(TEMPLATES["vicuna0"]).show(image).ask("What is this?")
        talk = talk.answer("A dog.").ask("Which color?")

    messages: `(role, text)` pairs with the template's roles
    images:   the images, one for each `<ImageHere>` of the messages
    """

    template: Template
    messages: tuple[tuple[str, str], ...] = ()
    images: tuple[Any, ...] = ()

    def show(self, image: Any) -> "Transcript":
        """Adds an image of the user."""
        return dataclasses.replace(self._say(0, IMAGE), images=(*self.images, image))

    def ask(self, question: str) -> "Transcript":
        """Adds a question of the user, to the same message if it directly follows an image."""
        if self.messages:
            *previous, (role, text) = self.messages
            if role == self.template.roles[0] and text.endswith("</Img>"):
                return dataclasses.replace(self, messages=(*previous, (role, f"{text} {question}")))
        return self._say(0, question)

    def answer(self, text: str) -> "Transcript":
        """Adds an answer of the assistant."""
        return self._say(1, text)

    def sample(self) -> Sample:
        """Returns the sample for the model to continue, whose prompt needs no prompt template."""
        messages = (*self.messages, (self.template.roles[1], None))
        return Sample(images=list(self.images), prompt=self.template.prompt(messages))

    def _say(self, role: int, text: str) -> "Transcript":
        return dataclasses.replace(self, messages=(*self.messages, (self.template.roles[role], text)))
