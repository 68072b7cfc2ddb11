"""Conversations: prompts as the original writes them, images, limits, answers in pieces, and the terminal."""

import dataclasses
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import mmjax
from mmjax import cli
from mmjax.config import ALPACA, ScenesConfig, TextConfig
from mmjax.data import scenes, text
from mmjax.data.conversation import IMAGE
from mmjax.families import imagebind_llm
from mmjax.inference import chat
from mmjax.inference.chat import ChatSettings, Conversation
from mmjax.inference.loaded import Loaded
from tests import small, tiny
from tests.inference.scripted import Scripted

ORIGINAL = {"vicuna": "CONV_VISION_Vicuna0", "llama2": "CONV_VISION_LLama2", "v2": "CONV_VISION_minigptv2"}
FEW = ChatSettings(max_new_tokens=8)
IMAGES = [scenes.draw(scene) for scene in scenes.scenes("train", 4)]


@pytest.fixture(scope="module")
def model():
    return mmjax.load(small.checkpoint(), dtype="float32")


@pytest.fixture(scope="module")
def mixing(model):
    """A tiny ImageBind-LLM that was never trained."""
    config = imagebind_llm.PRESETS["tiny"]
    config = dataclasses.replace(config, llm=dataclasses.replace(
        config.llm, vocab=model.tokenizer.vocab_size, max_positions=2048))
    words = TextConfig(prompt_template=ALPACA, end_sym="</s>", joint=True)
    return Loaded(
        imagebind_llm.FAMILY,
        imagebind_llm.ImageBindLLM(config),
        tiny.params("imagebind_llm", config),
        config,
        model.tokenizer,
        words,
        model.generation,
        model.mesh,
    )


def show(model, talk, *images):
    for image in images:
        chat.add_input(model, talk, "image", chat.read_input(model, "image", image))


def exchange(talk, question, answer):
    talk.ask(question)
    talk.append_answer(answer)
    talk.finish()


# ---- prompts ----


@pytest.mark.parametrize("template", ORIGINAL)
def test_prompts_are_the_originals(model, template):
    cases = json.loads((small.GOLDEN / "cases" / "r_conversation_templates.json").read_text(encoding="utf-8"))
    given, = (case for case in cases["templates"] if case["name"] == ORIGINAL[template])
    assert [step.split()[0] for step in given["flow"]] == ["upload", "ask", "answer", "ask"]
    talk = Conversation(template)
    show(model, talk, IMAGES[0])
    talk.ask("What is this?")
    first = chat.prompt(model, talk, FEW).sample
    talk.append_answer("A cat.")
    talk.finish()
    talk.ask("Which color?")
    second = chat.prompt(model, talk, FEW).sample
    assert [first.prompt, second.prompt] == given["prompts"]
    assert len(first.images) == len(second.images) == 1


def test_every_image_stands_where_it_was_shown(model):
    talk = Conversation("v2")
    show(model, talk, *IMAGES[:2])
    exchange(talk, "One?", "Yes.")
    show(model, talk, IMAGES[2])
    talk.ask("Two?")
    made = chat.prompt(model, talk, FEW).sample
    assert made.prompt == (f"<s>[INST] {IMAGE}<s>[INST] {IMAGE} One? [/INST]Yes."
                           f"<s>[INST] {IMAGE} Two? [/INST]")
    for image, shown in zip(made.images, IMAGES, strict=False):
        np.testing.assert_array_equal(image, chat.read_input(model, "image", shown))


def test_a_model_that_writes_the_mark_of_a_image_does_not_end_the_conversation(model):
    talk = Conversation("v2")
    exchange(talk, "One?", f"See {IMAGE}.")
    talk.ask("Two?")
    assert chat.prompt(model, talk, FEW).sample.prompt == "<s>[INST] One? [/INST]See <Img></Img>.<s>[INST] Two? [/INST]"


@pytest.mark.parametrize(("template", "around"), [("alpaca", ALPACA), ("plain", "Q: {} A:"), ("plain", "")])
def test_a_template_without_memory_asks_about_what_was_shown_last(model, template, around):
    if template == "plain":
        model = dataclasses.replace(model, text=dataclasses.replace(model.text, prompt_template=around))
    talk = Conversation(template)
    show(model, talk, IMAGES[0])
    exchange(talk, "First?", "Yes.")
    show(model, talk, IMAGES[1], IMAGES[2])
    exchange(talk, "Second?", "No.")
    talk.ask("Third?")
    made = chat.prompt(model, talk, FEW).sample
    assert made.prompt == (around or "{}").format(f"{IMAGE}{IMAGE} Third?")
    np.testing.assert_array_equal(made.images, [chat.read_input(model, "image", image) for image in IMAGES[1:3]])


def test_a_image_without_places_is_perceived_until_the_next_one(mixing):
    talk = Conversation("alpaca")
    show(mixing, talk, IMAGES[0])
    exchange(talk, "First?", "Yes.")
    depth = np.zeros(mixing.config.imagebind.towers["depth"].input_shape, np.float32)
    chat.add_input(mixing, talk, "depth", chat.read_input(mixing, "depth", depth))
    show(mixing, talk, IMAGES[1])
    talk.ask("Second?")
    made = chat.prompt(mixing, talk, FEW).sample
    assert made.prompt == ALPACA.format("Second?")
    assert [*made.media] == ["depth"] and made.media["depth"] is depth
    np.testing.assert_array_equal(made.images, [chat.read_input(mixing, "image", IMAGES[1])])


@pytest.mark.parametrize(("settings", "world", "template"), [
    ({"prompt_template": "###Human: {} ###Assistant: "}, None, "vicuna"),
    ({"prompt_template": "###Human: {} ###Assistant: "}, ScenesConfig(), "plain"),
    ({"prompt_template": "###Human: {} ###Assistant: ", "joint": True}, None, "plain"),
    ({"prompt_template": "[INST] {} [/INST] "}, None, "llama2"),
    ({"prompt_template": "[INST] {} [/INST]"}, None, "v2"),
    ({"prompt_template": ALPACA, "joint": True}, None, "alpaca"),
    ({"prompt_template": "Q: {} A:"}, None, "plain"),
    ({"end_sym": "###"}, None, "vicuna"),
    ({"end_sym": "</s>"}, None, "plain"),
])
def test_template_follows_the_training(model, settings, world, template):
    assert chat.template_of(dataclasses.replace(model, text=TextConfig(**settings)), world) == template


def test_scenes_of_a_run(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"config": {"data": {"scenes": {"count": 7, "most": 1}}}}))
    assert chat.scenes_of(tmp_path) == ScenesConfig(count=7, most=1)
    assert chat.scenes_of(small.checkpoint()) is None


# ---- what does not fit ----


def length(model, sample):
    bare = dataclasses.replace(model.text, prompt_template="")
    ((places,), _) = text.row_slots([sample], model.tokenizer, bare, model.config.image_tokens)
    return len(places)


def test_the_oldest_words_go_first_then_the_oldest_images(model):
    talk = Conversation("vicuna")
    for number, image in enumerate(IMAGES[:3]):
        show(model, talk, image)
        exchange(talk, f"Question {number}?", f"Answer {number}.")
    talk.ask("Last?")

    def room(places):
        return dataclasses.replace(FEW, max_length=FEW.max_new_tokens + places)

    whole = chat.prompt(model, talk, FEW)
    assert (whole.turns, whole.images, whole.left_out) == (0, 0, "")
    one = chat.prompt(model, talk, room(length(model, whole.sample) - 1))
    assert (one.turns, one.images, len(one.sample.images)) == (1, 0, 3)
    assert "Answer 0" not in one.sample.prompt and f"{IMAGE}###Human: {IMAGE} Question 1?" in one.sample.prompt
    assert one.left_out == "1 earlier answer left out: the conversation is longer than max_length."
    silent = one
    while silent.turns < 3:
        silent = chat.prompt(model, talk, room(length(model, silent.sample) - 1))
    assert silent.images == 0 and len(silent.sample.images) == 3
    dark = chat.prompt(model, talk, room(length(model, silent.sample) - 1))
    assert (dark.turns, dark.images) == (3, 1)
    np.testing.assert_array_equal(dark.sample.images, [chat.read_input(model, "image", image) for image in IMAGES[1:3]])
    assert dark.left_out.startswith("3 earlier answers and 1 earlier image left out")
    assert all(length(model, made.sample) <= length(model, whole.sample) for made in (one, silent, dark))


def test_a_question_that_does_not_fit_is_taken_back(model):
    talk = Conversation("vicuna")
    show(model, talk, IMAGES[0])
    talk.ask("word " * 3000)
    with pytest.raises(ValueError, match="The question takes .* this model reads 2048 at most"):
        next(chat.reply(model, talk, FEW))
    assert (len(talk.turns), len(talk.images)) == (0, 1)


@pytest.mark.parametrize("question", ["  ", "What is <ImageHere>?", "caf\udce9?"])
def test_what_cannot_be_asked(question):
    talk = Conversation("plain")
    with pytest.raises(ValueError, match="no question|cannot hold|not UTF-8"):
        talk.ask(question)
    assert talk.turns == []


# ---- answers ----


def test_pieces_make_the_answer_and_are_remembered(model):
    talk = Conversation("vicuna")
    show(model, talk, IMAGES[0])
    talk.ask("What is this?")
    whole = "".join(chat.reply(model, talk, FEW)).strip()
    assert talk.turns[0].answer == whole != ""
    talk.ask("And?")
    assert f"###Assistant: {whole}###Human: And?" in chat.prompt(model, talk, FEW).sample.prompt


def test_answers_of_one_conversation_draw_anew(model):
    drawing = dataclasses.replace(FEW, temperature=1.0)
    seeds = []

    class Seen:
        def __getattr__(self, name):
            return getattr(model, name)

        def stream(self, sample, **settings):
            seeds.append(settings["seed"])
            return iter(["word"])

    talk = Conversation("plain")
    for _ in range(3):
        talk.ask("What?")
        assert list(chat.reply(Seen(), talk, drawing)) == ["word"]
    assert seeds == [0, 1, 2]


def test_interrupting_keeps_what_was_said(model):
    talk = Conversation("v2")
    talk.ask("What?")
    answer = chat.reply(Scripted(model, "A ", "large ", "dog."), talk, FEW)
    assert [next(answer), next(answer)] == ["A ", "large "]
    answer.close()
    assert talk.turns == [chat.Turn("What?", "A large")]


@pytest.mark.parametrize("pieces", [(), ("  ",), (KeyboardInterrupt(),)])
def test_a_question_without_an_answer_is_taken_back(model, pieces):
    talk = Conversation("v2")
    show(model, talk, IMAGES[0])
    talk.ask("What?")
    try:
        list(chat.reply(Scripted(model, *pieces), talk, FEW))
    except KeyboardInterrupt:
        pass
    assert talk.turns == [] and len(talk.images) == 1


@pytest.mark.parametrize(("template", "answer"), [("vicuna", "A cat."), ("plain", "Human: x Assistant: A cat.")])
def test_only_the_assistants_last_words_are_kept_as_in_the_original(model, template, answer):
    talk = Conversation(template)
    talk.ask("What?")
    list(chat.reply(Scripted(model, "Human: x Assist", "ant: A cat. "), talk, FEW))
    assert talk.turns[0].answer == answer


def test_a_model_that_mixes_senses_takes_the_prompt(mixing):
    talk = Conversation(chat.template_of(mixing))
    assert talk.template == "alpaca"
    show(mixing, talk, IMAGES[0])
    talk.ask("What is this?")
    batch = mixing.batch([chat.prompt(mixing, talk, FEW).sample], prompt_template="")
    assert batch.images.shape[:2] == (1, 1) and batch.image_valid.tolist() == [[True]] and batch.media is None
    assert "Instruction:\nWhat is this?" in mixing.tokenizer.decode(batch.tokens[0])


# ---- what is given ----


def test_what_models_perceive(model, mixing):
    assert chat.supported_inputs(model) == ("image",)
    assert {"image", "audio", "depth", "text"} <= set(chat.supported_inputs(mixing))
    with pytest.raises(ValueError, match="does not perceive 'audio'; it perceives image"):
        chat.read_input(model, "audio", "a.wav")


def test_what_cannot_be_taken_is_named(model, mixing, tmp_path):
    (tmp_path / "a.npy").write_bytes(b"no array")
    np.save(tmp_path / "b.npy", np.zeros((2, 3, 4), np.float32))
    for loaded, sense, name, message in (
            (model, "image", "c.jpg", "No image at .*c.jpg"), (mixing, "audio", "c.wav", "No sound at .*c.wav"),
            (mixing, "depth", "a.npy", "a.npy cannot be read"), (mixing, "depth", "b.npy", "(?s)b.npy: .*float32")):
        with pytest.raises(ValueError, match=message):
            chat.read_input(loaded, sense, tmp_path / name)


def test_a_image_is_read_once(model, tmp_path):
    path = small.images() / "image" / "0.jpg"
    copy = tmp_path / "copy.jpg"
    copy.write_bytes(path.read_bytes())
    taken = chat.read_input(model, "image", copy)
    copy.unlink()
    assert taken.shape == (56, 56, 3) and taken.dtype == np.uint8


# ---- settings ----


def test_settings_are_changed_by_name():
    assert ChatSettings().changed("temperature", "0.5").temperature == 0.5
    assert ChatSettings().changed("num_beams", "3").num_beams == 3


@pytest.mark.parametrize(("name", "value", "message"), [
    ("temprature", "1", "Did you mean temperature"), ("num_beams", "1.5", "must be a whole number"),
    ("top_p", "2", "top_p = 2.0"), ("max_length", "300", "more than max_new_tokens = 300"),
    ("temperature", "warm", "must be a number")])
def test_wrong_settings_are_named(name, value, message):
    with pytest.raises(ValueError, match=message):
        ChatSettings().changed(name, value)


def test_unknown_template():
    with pytest.raises(ValueError, match="no chat template 'falcon'. There are vicuna"):
        Conversation("falcon")


# ---- the terminal ----


def call(monkeypatch, lines, *args):
    monkeypatch.setattr("sys.argv", ["mmjax", "chat", "--checkpoint", str(small.checkpoint()), *map(str, args)])
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    cli.main()


def test_a_pipe_of_questions_makes_a_line_for_each(monkeypatch, capsys, tmp_path):
    image = small.images() / "image" / "0.jpg"
    told = []
    monkeypatch.setattr(Loaded, "stream", lambda self, sample, **settings: (
        told.append((len(sample.images), settings["max_new_tokens"])), iter(["An ", f"answer {len(told)}."]))[1])
    call(monkeypatch, [
        "What is it?", f"/image '{image}'", "", "/image nowhere.jpg", "/image", "/settings max-new-tokens 5",
        "/settings colour 5", "/audio a.wav", "And now?", "/help", "/reset", "Still there?", "/quit", "Never asked"],
        "--image", image)
    out, err = capsys.readouterr()
    assert out.splitlines() == ["An answer 1.", "An answer 2.", "An answer 3."]
    assert told == [(1, 300), (2, 5), (0, 5)]
    lines = err.splitlines()
    assert "No image at nowhere.jpg." in lines
    assert "/image PATH: name one" in lines
    for part in (
        "There is no setting 'colour'",
        "There is no command /audio",
        "The conversation is empty.",
        "clear the conversation",
    ):
        assert any(part in line for line in lines), part
    assert not any(">" in line for line in lines)


def test_an_interrupted_answer_does_not_end_the_program(monkeypatch, capsys):
    answers = iter([["Some ", "words ", KeyboardInterrupt()], ["Other words."]])
    monkeypatch.setattr(Loaded, "stream", lambda self, sample, **_: Scripted(self, *next(answers)).stream(sample))
    call(monkeypatch, ["One?", "Two?"])
    assert capsys.readouterr().out.splitlines() == ["Some words ", "Other words."]


def test_a_mistake_at_the_start_ends_with_one_message(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, [], "--image", "nowhere.jpg")
    assert stopped.value.code == 2
    assert "No image at nowhere.jpg" in capsys.readouterr().err


PROGRAM = """
import time
from mmjax import cli
from mmjax.inference import loaded
def stream(self, sample, **settings):
    for word in range(100):
        yield f"word{word} "
        time.sleep(0.05)
loaded.Loaded.stream = stream
cli.main()
"""


def test_a_terminal(tmp_path):
    """A prompt, an answer that Ctrl-C stops, another question, and Ctrl-D, which leaves."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", PROGRAM, "chat", "--checkpoint", small.checkpoint(), "--max-new-tokens", "7"]
    child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
                             env={**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "dumb"})
    os.close(theirs)
    seen = ""

    def until(words):
        nonlocal seen
        end = time.monotonic() + 60
        while words not in seen:
            assert time.monotonic() < end and child.poll() is None, f"{words!r} did not come:\n{seen}"
            if select.select([ours], [], [], 0.2)[0]:
                seen += os.read(ours, 4096).decode()
        seen = seen[seen.index(words) + len(words):]

    try:
        until("Ctrl-D leaves.")
        until("> ")
        os.write(ours, b"What is it?\n")
        until("word3 ")
        child.send_signal(signal.SIGINT)
        until("(interrupted)")
        until("> ")
        os.write(ours, b"/settings\n")
        until("max_new_tokens=7")
        until("> ")
        os.write(ours, b"\x04")
        assert child.wait(30) == 0
    finally:
        child.kill()
        os.close(ours)
    assert "What is it?" in (tmp_path / "mmjax" / "chat_history").read_text()
