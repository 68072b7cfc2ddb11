"""Answers kept as they come: what a file of them holds after a stop at any byte, and what it is refused for."""

import dataclasses
import json
import shutil

import pytest
from rich.console import Console

import mmjax
from mmjax import compilation, files
from mmjax.inference import predictions
from mmjax.inference.predictions import OpenedRequest
from mmjax.inference.requests import Request
from tests import small

CARD = {"format": 1, "model": {"config": "a"}, "samples": {"sha256": "b"}, "settings": {"num_beams": 1, "stop": ["#"]},
        "versions": {"jax": "1"}}
QUIET = Console(quiet=True)


@dataclasses.dataclass
class Echo:
    """Answers a prompt with itself in capitals, without a model; one that begins with "bad" cannot be opened."""

    rows: int = 3
    window: int = 2

    def __post_init__(self):
        self.batches = []

    def open(self, ask):
        if ask.sample.prompt.startswith("bad"):
            raise ValueError(f"{ask.sample.prompt}.jpg is not an image")
        return OpenedRequest(ask, len(ask.sample.prompt))

    def answer(self, asks, first):
        assert 1 <= len(asks) <= self.rows
        self.batches.append([ask.sample.prompt for ask in asks])
        return [{"answer": ask.sample.prompt.upper()} for ask in asks]


PROMPTS = ("one", "twenty-two", "ü", "bad", "five", "sixty-six\u2028", "seven", "bad too", "nine", "ten")


def asks(prompts=PROMPTS):
    return [Request(f"n{number}", mmjax.Sample(prompt=prompt)) for number, prompt in enumerate(prompts)]


def predict(out, answerer, asked=None, **changes):
    return predictions.predict(out, asks() if asked is None else asked, answerer, CARD | changes, QUIET)


@pytest.mark.parametrize("window", [1, 2])
def test_lines_are_in_the_order_of_the_samples(tmp_path, window):
    answerer = Echo(window=window)
    done = predict(tmp_path / "deep" / "out.jsonl", answerer)
    lines = [json.loads(line) for line in (tmp_path / "deep" / "out.jsonl").read_bytes().split(b"\n")[:-1]]
    assert [line["id"] for line in lines] == [ask.id for ask in asks()]
    assert [line.get("answer") for line in lines] == [
        None if prompt.startswith("bad") else prompt.upper() for prompt in PROMPTS]
    assert lines[3]["error"] == "bad.jpg is not an image"
    assert (done.count, done.now, done.errors) == (10, 10, ("n3", "n7"))
    if window == 2:  # the first six without the one that is bad, the shortest first
        assert answerer.batches[0] == ["ü", "one", "five"]
    else:  # another one stands in, so that the third keeps its row
        assert answerer.batches[1] == ["five", "five", "sixty-six\u2028"]


def test_stopped_at_any_byte_whole_lines_are_kept(tmp_path):
    predict(tmp_path / "out.jsonl", Echo())
    whole = (tmp_path / "out.jsonl").read_bytes()
    ids = [ask.id for ask in asks()]
    for size in range(len(whole) + 1):
        lines, kept = predictions.read_answers(whole[:size], ids, tmp_path)
        assert [json.loads(line) for line in whole[:kept].split(b"\n")[:-1]] == lines
        assert len(lines) == whole[:size].count(b"\n") and whole[kept:size].count(b"\n") == 0


@pytest.mark.parametrize("window", [1, 2])
def test_stopped_it_goes_on_to_the_same_end(tmp_path, window):
    """Around the end of every line, and in the midst of some."""
    out = tmp_path / "out.jsonl"
    predict(out, Echo())
    whole = out.read_bytes()
    ends = [place for place, byte in enumerate(whole) if byte == ord("\n")]
    for size in sorted({end + more for end in ends for more in (-9, 0, 1)} | {0, 1}):
        out.write_bytes(whole[:size])
        files.replace(predictions.card_path(out), json.dumps(CARD))
        there = whole[:size].count(b"\n")
        answerer = Echo(window=window)
        done = predict(out, answerer)
        assert out.read_bytes() == whole
        assert (done.count, done.now) == (10, 10 - there)
        again = sum(map(len, answerer.batches))
        assert again <= 10 - there // (3 * window) * 3 * window, "windows that were done are not made again"


def test_a_line_that_lost_its_content_is_made_again(tmp_path):
    """Of a machine that lost power, a file may end in zeros."""
    out = tmp_path / "out.jsonl"
    predict(out, Echo())
    whole = out.read_bytes()
    out.write_bytes(whole[:100] + b"\0" * 20 + b"\n")
    predict(out, Echo())
    assert out.read_bytes() == whole


@pytest.mark.parametrize(("number", "line", "message"), [
    (2, b'{"id": "n7", "answer": ""}', r"line 3 is not the answer to sample 'n2'"),
    (2, b"[]", r"line 3 is not the answer to sample 'n2'"),
    (2, b"{", r"line 3 is not JSON"),
    (10, b'{"id": "more"}\n', r"line 11 is not the answer to sample None"),
])
def test_lines_that_do_not_belong_are_named(tmp_path, number, line, message):
    out = tmp_path / "out.jsonl"
    predict(out, Echo())
    lines = out.read_bytes().split(b"\n")
    out.write_bytes(b"\n".join([*lines[:number], line, *lines[number + 1:]]))
    before = out.read_bytes()
    with pytest.raises(ValueError, match=message):
        predict(out, Echo())
    assert out.read_bytes() == before


def test_other_settings_are_refused_and_named(tmp_path):
    out = tmp_path / "out.jsonl"
    predict(out, Echo())
    before = out.read_bytes()
    with pytest.raises(ValueError) as error:
        predict(out, Echo(), settings={"num_beams": 5, "stop": ["#"], "seed": 1}, model={"config": "c"},
                versions={"jax": "2"})
    message = str(error.value)
    assert "model.config: 'a' -> 'c'\n  settings.num_beams: 1 -> 5\n  settings.seed: None -> 1\n" in message
    assert "stop" not in message and "versions" not in message
    assert out.read_bytes() == before


def test_answers_without_a_card_are_refused(tmp_path):
    out = tmp_path / "out.jsonl"
    predict(out, Echo())
    predictions.card_path(out).unlink()
    with pytest.raises(ValueError, match=r"exists, but not out.jsonl.card.json"):
        predict(out, Echo())


def test_two_at_once_are_refused(tmp_path):
    out = tmp_path / "out.jsonl"
    predict(out, Echo())
    with files.exclusive_lock(out), pytest.raises(BlockingIOError, match=r"answering in .*out.jsonl"):
        predict(out, Echo())


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(ValueError, match="answered by one process, this is one of 2"):
        predict(tmp_path / "out.jsonl", Echo())
    assert not (tmp_path / "out.jsonl").exists()


def test_a_disk_that_is_full_keeps_what_was_written(tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"

    class Full(Echo):
        def answer(self, asks, first):
            if first >= 3:
                monkeypatch.setattr("os.fsync", full)
            return super().answer(asks, first)

    def full(_):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: .*out.jsonl'"):
        predict(out, Full(window=1))
    monkeypatch.undo()
    assert out.read_bytes().count(b"\n") >= 3
    assert predict(out, Echo(window=1)).count == 10


def test_programs_are_counted():
    import jax

    with compilation.count_compilations() as compiled:
        jax.jit(lambda x: x * 3 + 1)(2.0)
    programs = compiled.programs
    assert programs >= 1 and compiled.seconds > 0 and len(compiled.names) == programs
    jax.jit(lambda x: x * 5 + 2)(2.0)
    assert compiled.programs == programs


# ---- with a model ----


@pytest.fixture(scope="module")
def model():
    return mmjax.load(small.checkpoint(), dtype="float32")


@pytest.fixture
def shown(tmp_path):
    """Samples of the shipped images with prompts of several lengths, one of which cannot be read."""
    shutil.copytree(small.images() / "image", tmp_path / "image")
    (tmp_path / "image" / "2.jpg").write_text("not an image")
    prompts = ["Where?", "Describe this image in detail. " * 2, "What?", "Is it red or is it blue?", "Which one is it?"]
    return [Request(f"{n}", mmjax.Sample(images=[str(tmp_path / "image" / f"{n}.jpg")], prompt=prompt))
            for n, prompt in enumerate(prompts)]


def answered(out, asked, model, batch_size=2, **decoding):
    answerer = predictions.TextAnswerer(model, predictions.Decoding(max_new_tokens=5, **decoding), batch_size)
    made = predictions.card(asked, answerer, predictions.identity(small.checkpoint()))
    predictions.predict(out, asked, answerer, made, QUIET)
    return {line["id"]: line for line in map(json.loads, out.read_text().splitlines())}


def test_answers_do_not_depend_on_order_or_batch(tmp_path, model, shown):
    first = answered(tmp_path / "a.jsonl", shown, model)
    turned = answered(tmp_path / "b.jsonl", shown[::-1], model, batch_size=4)
    assert list(turned) == list(first)[::-1]
    assert turned == first
    assert "2.jpg is not an image that can be read" in first["2"].pop("error")
    assert len({line.get("answer") for line in first.values()}) > 2


def test_a_sample_that_is_too_long_is_an_error_of_its_own(model):
    answerer = predictions.TextAnswerer(model, predictions.Decoding(max_new_tokens=2_000))
    with pytest.raises(ValueError, match="more than the 2048 positions"):
        answerer.open(Request("long", mmjax.Sample(prompt="Why? " * 100)))
    assert answerer.open(Request("short", mmjax.Sample(prompt="Why?"))).length > 1


def test_draws_depend_on_the_number_of_the_sample_alone(tmp_path, model, shown):
    first, again, other = (answered(tmp_path / f"{n}.jsonl", shown, model, batch_size, temperature=1.0, seed=seed)
                           for n, (batch_size, seed) in enumerate([(2, 1), (4, 1), (2, 2)]))
    assert first == again != other


def test_moved_files_are_the_same_samples(tmp_path, shown):
    from mmjax.inference.requests import digest

    moved = [dataclasses.replace(ask, sample=dataclasses.replace(
        ask.sample, images=[image.replace("/image/", "/elsewhere/") for image in ask.sample.images])) for ask in shown]
    assert digest(moved) == digest(shown) != digest(shown[::-1])
    renamed = dataclasses.replace(shown[0].sample, images=["3.jpg"])
    assert digest([dataclasses.replace(shown[0], sample=renamed), *shown[1:]]) != digest(shown)


def test_identity_is_of_the_content(tmp_path):
    shutil.copytree(small.checkpoint(), tmp_path / "copy")
    assert predictions.identity(tmp_path / "copy") == predictions.identity(small.checkpoint())
    card = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(card | {"fresh": ["projector/w"]}))
    assert predictions.identity(tmp_path / "copy") != predictions.identity(small.checkpoint())


@pytest.mark.parametrize(("wrong", "message"), [
    ({"num_beams": 0}, "num_beams = 0"), ({"top_p": 0.0, "temperature": -1.0}, "temperature = -1.0"),
])
def test_impossible_decoding_is_refused_at_once(wrong, message):
    with pytest.raises(ValueError, match=message):
        predictions.Decoding(**wrong)
