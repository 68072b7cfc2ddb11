"""Templates as shipped, and conversations. Prompts of whole chats: tests/parity."""

import json
from pathlib import Path

import pytest

from mmjax.data.conversation import IMAGE, TEMPLATES, Template, Transcript
from mmjax.data.text import PLACEHOLDER

GOLDEN = Path(__file__).parents[1] / "golden" / "minigpt4"
ORIGINAL = {"vicuna0": "CONV_VISION_Vicuna0", "llama2": "CONV_VISION_LLama2", "minigptv2": "CONV_VISION_minigptv2"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_shipped_templates_are_the_original_ones(name):
    cases = json.loads((GOLDEN / "cases" / "r_conversation_templates.json").read_text(encoding="utf-8"))
    given, = (template for template in cases["templates"] if template["name"] == ORIGINAL[name])
    assert TEMPLATES[name] == Template(given["system"], tuple(given["roles"]), given["sep"], given["sep2"])


def test_question_joins_the_image_before_it_only():
    talk = Transcript(TEMPLATES["minigptv2"]).ask("Hello").show("a").ask("What is it?")
    user, _ = TEMPLATES["minigptv2"].roles
    assert talk.messages == ((user, "Hello"), (user, f"{IMAGE} What is it?"))
    assert talk.answer(f"see {IMAGE}").ask("Sure?").messages[-1] == (user, "Sure?")


def test_every_image_has_its_placeholder():
    talk = Transcript(TEMPLATES["vicuna0"]).show("a").ask("What?").answer("A dog.").show("b").ask("And this?")
    sample = talk.sample()
    assert sample.images == ["a", "b"]
    assert sample.prompt.count(PLACEHOLDER) == 2
    assert sample.answer is None


def test_a_transcript_leaves_the_earlier_ones_as_they_were():
    start = Transcript(TEMPLATES["vicuna0"]).show("a")
    one, other = start.ask("What?"), start.ask("Where?")
    assert one.sample().prompt.endswith(" What?###Assistant: ")
    assert other.sample().prompt.endswith(" Where?###Assistant: ")
    assert len(start.messages) == 1
