"""The chat page without a browser and without Gradio: files that are refused, visits, answers. The page itself:
tests/inference/test_web_browser.py."""

import dataclasses
import io
import re
import socket
import struct
import sys
import types
import wave
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mmjax
from mmjax.config import ScenesConfig
from mmjax.inference import web
from mmjax.inference.chat import ChatSettings
from mmjax.inference.uploads import Uploads
from mmjax.inference.web import Handlers, Page
from tests import small
from tests.inference.scripted import Scripted

FEW = ChatSettings(max_new_tokens=8)
KNOBS = (0.0, 1, 0.9, 8)  # temperature, beams, top-p, longest answer


@pytest.fixture(scope="module")
def model():
    return mmjax.load(small.checkpoint(), dtype="float32")


@pytest.fixture
def uploads(tmp_path):
    return Uploads(tmp_path / "kept")


@pytest.fixture
def does(model, uploads):
    return Handlers(Scripted(model, "A ", "<p>large</p> ", "dog & cat."), Page("small", "vicuna", FEW), uploads)


def sent(uploads, name, data, visitor="anna"):
    """The path of a file that a visitor uploaded."""
    return uploads.add(visitor, name, io.BytesIO(data))


def uploaded(uploads, name="a.jpg", size=(60, 40)):
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(file, Path(name).suffix[1:].replace("jpg", "jpeg"))
    return sent(uploads, name, file.getvalue())


def left(uploads):
    return [*uploads.folder.iterdir()]


def bomb(width, height):
    """A PNG of a few bytes that says it has so many pixels."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
            + chunk(b"IEND", b""))


# ---- files ----


def test_a_image_is_shown_and_its_file_deleted(does, uploads, tmp_path):
    visit, path = does.visit(), uploaded(uploads)
    cleared, panel, notice = does.take_images([path], visit)
    assert (cleared, notice) == (None, "")
    assert panel.count('<img src="data:image/jpeg;base64,') == 1 and str(tmp_path) not in panel
    assert len(visit.talk.images) == 1
    assert left(uploads) == []
    *_, notice = does.take_images([path], visit)
    assert "not uploaded" in notice and len(visit.talk.images) == 1


@pytest.mark.parametrize(("name", "data", "message"), [
    ("a.jpg", b"no image", "a.jpg was refused: cannot identify image file 'a.jpg'"),
    ("a.png", bomb(8000, 6000), "a.png was refused: its 8000 x 6000 pixels are more than the 40 million"),
    ("a.png", bomb(30_000, 30_000), "a.png was refused: Image size"),
    ("a.png", bomb(50, 50), "a.png was refused"),
    ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a.eps was refused: cannot identify"),
    ("a.jpg", bytes(web.MAX_BYTES + 1), "a.jpg was refused: the file is larger than 20 MB"),
])
def test_a_refused_file_is_named_and_the_others_are_taken(does, uploads, tmp_path, name, data, message):
    visit = does.visit()
    _, panel, notice = does.take_images([sent(uploads, name, data), uploaded(uploads, "b.jpg")], visit)
    assert message in notice and str(tmp_path) not in notice
    assert panel.count("<img") == len(visit.talk.images) == 1
    assert left(uploads) == []


def test_a_file_that_was_not_uploaded_is_neither_opened_nor_removed(does, tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    visit = does.visit()
    for notice in (does.take_images([str(secret)], visit)[-1], does.take_sound(str(secret), visit)[-1]):
        assert "it was not uploaded on this page" in notice
    assert (visit.talk.images, visit.shown, secret.exists()) == ([], {}, True)


def test_the_notice_is_no_html(does, uploads):
    *_, notice = does.take_images([sent(uploads, "<b>.jpg", b"no image")], does.visit())
    assert "&lt;b&gt;.jpg was refused" in notice and "<b>" not in notice


def test_a_visit_takes_so_many_images(does, uploads):
    visit = does.visit()
    paths = [uploaded(uploads, f"{number}.png", (8, 8)) for number in range(web.MAX_IMAGES + 1)]
    *_, notice = does.take_images(paths, visit)
    assert len(visit.talk.images) == web.MAX_IMAGES and "takes 16 images" in notice


class Hearing:
    """What the page asks a model that hears before it answers."""

    config = types.SimpleNamespace(image_size=None, image_tokens=0, senses=("audio",))

    def batch(self, samples, **settings):
        pass


def sound(uploads):
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(np.zeros(1600, np.int16).tobytes())
    return sent(uploads, "a.wav", data.getvalue())


def test_a_sound_is_heard(uploads):
    does = Handlers(Hearing(), Page("ears", "alpaca", FEW), uploads)
    visit = does.visit()
    _, panel, notice = does.take_sound(sound(uploads), visit)
    assert (notice, "sound: a.wav" in panel, [*visit.talk.given]) == ("", True, ["audio"])
    *_, notice = does.take_sound(sent(uploads, "b.wav", b"no sound"), visit)
    assert "b.wav was refused: b.wav is not a PCM .wav file" in notice
    assert left(uploads) == []


def test_a_sound_is_refused_by_a_model_that_does_not_hear(does, uploads):
    *_, notice = does.take_sound(sound(uploads), does.visit())
    assert "does not perceive 'audio'" in notice and left(uploads) == []


# ---- answers ----


def test_an_answer_grows_and_is_shown_as_it_is(does, uploads):
    visit = does.visit()
    does.take_images([uploaded(uploads)], visit)
    seen = []
    for messages, field, notice in does.answer("What <is> it?", visit, *KNOBS):
        assert (field, notice) == ("", "")
        seen.append(messages[-1]["content"])
    assert seen == ["", "A ", "A &lt;p&gt;large&lt;/p&gt; ", *["A &lt;p&gt;large&lt;/p&gt; dog &amp; cat."] * 2]
    asked = visit.messages[0]["content"]
    assert asked.startswith("<img ") and asked.endswith("What &lt;is&gt; it?")
    list(does.answer("And?", visit, *KNOBS))
    assert visit.messages[2]["content"] == "And?"
    assert [turn.question for turn in visit.talk.turns] == ["What <is> it?", "And?"]


def test_a_stopped_answer_stays(does):
    visit = does.visit()
    answer = does.answer("What?", visit, *KNOBS)
    for _ in range(3):
        next(answer)
    answer.close()
    assert visit.talk.turns[0].answer == "A <p>large</p>"
    assert visit.messages[-1]["content"].startswith("A &lt;p&gt;large")


@pytest.mark.parametrize(("question", "knobs", "message"), [
    (" ", KNOBS, "There is no question"), ("What?", (1.0, 3, 0.9, 8), "num_beams = 3"),
    ("What?", (0.0, 1, 0.9, 5000), "max_length = 2000"),
    ("word " * 3000, KNOBS, "A question may have 4,000 characters"),
    ("word " * 700, KNOBS, "The question takes")])
def test_what_cannot_be_asked_stays_in_the_field(does, question, knobs, message):
    visit = does.visit()
    *_, (messages, field, notice) = does.answer(question, visit, *knobs)
    assert (messages, field, visit.talk.turns) == ([], question, []) and message in notice


def test_visits_share_nothing(does, uploads):
    one, other = does.visit(), does.visit()
    does.take_images([uploaded(uploads)], one)
    list(does.answer("What?", one, *KNOBS))
    assert (other.messages, other.talk.turns, other.shown) == ([], [], {})
    fresh, messages, *_ = does.reset()
    assert messages == [] and fresh.talk.turns == []


def test_examples_are_scenes_of_the_models_world(model, uploads):
    does = Handlers(model, Page("small", "plain", FEW, ScenesConfig(most=1)), uploads)
    visit = does.visit()
    for number in (0, 3):
        panel, notice = does.take_example(number, visit)
        assert notice == ""
    assert len(does.examples) == web.EXAMPLES and panel.count("<img") == len(visit.talk.images) == 2
    assert Handlers(model, Page("small", "vicuna"), uploads).examples == []


def test_a_template_without_memory_shows_what_the_next_question_is_about(model, uploads):
    does = Handlers(Scripted(model, "Yes."), Page("small", "plain", FEW), uploads)
    visit = does.visit()
    does.take_images([uploaded(uploads, "1.jpg"), uploaded(uploads, "2.jpg")], visit)
    list(does.answer("What?", visit, *KNOBS))
    assert visit.panel().count("<img") == 2
    does.take_images([uploaded(uploads, "3.jpg")], visit)
    assert visit.panel().count("<img") == 1


def test_thumbnails_are_small():
    pixels = np.random.default_rng(0).integers(0, 256, (900, 1400, 3), np.uint8)
    words = web.thumbnail(Image.fromarray(pixels))
    data = re.fullmatch(r'<img src="data:image/jpeg;base64,([^"]+)" alt="an image">', words).group(1)
    with Image.open(io.BytesIO(web.base64.b64decode(data))) as image:
        assert max(image.size) == web.THUMBNAIL


def test_title_names_the_model(model):
    title = web._title(model, Page("a <run>", "vicuna"))
    assert "a &lt;run&gt;" in title and "minigpt4" in title and re.search(r"\d\.\d\d million parameters", title)


# ---- the server ----


def test_missing_gradio_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=re.escape("pip install 'mmjax[demo]'")):
        web.check()


def test_a_taken_port_is_named():
    with web._listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"Cannot listen at 127.0.0.1, port {port}"):
            web._listening("127.0.0.1", port)
    assert isinstance(taken, socket.socket)


def test_the_page_begins_with_settings_that_hold():
    assert dataclasses.replace(Page("a", "plain").settings, max_new_tokens=8) == FEW
