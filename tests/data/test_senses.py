"""Inputs of ImageBind's towers. Their numbers: tests/parity."""

import dataclasses
import gzip
import wave

import numpy as np
import pytest
from PIL import Image

from benchmarks.hostile import wav
from mmjax.batch import Sample
from mmjax.data import senses
from mmjax.data.images import load
from mmjax.data.senses import WordTokenizer, clip_times, log_mel, mel_filters, read_wav, resample, sound
from mmjax.models.imagebind import TINY
from mmjax.models.pixels import MEAN, STD, normalise
from mmjax.tokenizer import WORDS

RANDOM = np.random.default_rng(0)


def write_wav(path, raw, width, channels=1, rate=16_000):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(raw)
    return path


# ---- images ----


@pytest.mark.parametrize("shape", [(20, 31, 3), (31, 20, 3), (20, 20, 3), (20, 31)])
def test_images_of_any_shape(shape, tmp_path):
    pixels = RANDOM.integers(0, 256, shape, np.uint8)
    made = senses.image(pixels, 14)
    assert made.shape == (3, 14, 14) and made.dtype == np.float32
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(made, senses.image(tmp_path / "a.png", 14))
    np.testing.assert_array_equal(made, senses.image(Image.fromarray(pixels), 14))


def test_the_middle_is_kept():
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    white = ((1 - np.float32(MEAN)) / np.float32(STD))[:, None, None]
    np.testing.assert_allclose(senses.image(pixels, 10), np.broadcast_to(white, (3, 10, 10)), rtol=1e-6)


# ---- video ----


def test_the_crops_of_a_video_go_along_its_long_side():
    columns = np.broadcast_to(np.arange(40, dtype=np.uint8)[:, None], (8, 20, 40, 3))
    wide = senses.video(columns, 4, 20, clips=1, seconds=2)
    assert wide.shape == (3, 3, 2, 20, 20) and wide.dtype == np.float32
    back = (wide.transpose(0, 2, 3, 4, 1) * STD + MEAN)[:, 0, 0, :, 0] * 255
    np.testing.assert_allclose(back, [np.arange(20), np.arange(10, 30), np.arange(20, 40)], atol=1e-3)
    tall = senses.video(columns.transpose(0, 2, 1, 3), 4, 20, clips=1, seconds=2)
    np.testing.assert_array_equal(tall, wide.swapaxes(-1, -2))


def test_the_frames_of_a_clip_are_its_first_and_last():
    frames = np.broadcast_to(np.arange(12, dtype=np.uint8)[:, None, None, None] * 20, (12, 6, 6, 3))
    made = senses.video(frames, 4, 6, clips=2, seconds=1)  # frames 0-3 and 8-11
    back = (made.transpose(0, 2, 3, 4, 1) * STD + MEAN)[::3, :, 0, 0, 0] * 255
    np.testing.assert_allclose(back, [[0, 60], [160, 220]], atol=1e-3)


@pytest.mark.parametrize("axis", [1, 2])
def test_thin_videos_are_cut_before_they_are_scaled(axis, monkeypatch):
    frames = RANDOM.integers(0, 256, (8, 4, 90, 3), np.uint8).swapaxes(1, axis)
    whole = senses.video(frames, 4, 6, clips=1)
    monkeypatch.setattr(senses, "THIN", 1)
    np.testing.assert_allclose(senses.video(frames, 4, 6, clips=1), whole, atol=1e-5)


def test_videos_that_cannot_be_used():
    for fps in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="frames a second above 0"):
            senses.video(np.zeros((2, 4, 4, 3), np.uint8), fps, 4)
    with pytest.raises(ValueError, match=r"must be uint8\[N,H,W,3\] with N > 0, got float64\[2, 4, 4, 3\]"):
        senses.video(np.zeros((2, 4, 4, 3)), 4, 4)
    with pytest.raises(ValueError, match="No frame lies between 0.950 s and 1.000 s at 2 frames a second"):
        senses.video(np.zeros((2, 4, 4, 3), np.uint8), 2, 4, clips=2, seconds=0.05)


def test_clips_of_a_short_recording_start_at_its_start():
    assert clip_times(1.5, 3, 2.0) == [(0, 2)] * 3
    assert clip_times(5.0, 1, 2.0) == [(0, 2)]


# ---- sound ----


@pytest.mark.parametrize(("width", "raw"), [
    (1, np.array([0, 64, 128, 192], np.uint8)), (2, np.array([-32768, -16384, 0, 16384], "<i2")),
    (4, np.array([-(2**31), -(2**30), 0, 2**30], "<i4"))])
def test_wav_of_any_width(width, raw, tmp_path):
    samples, rate = read_wav(write_wav(tmp_path / "a.wav", raw.tobytes(), width, channels=2, rate=8_000))
    assert rate == 8_000 and samples.dtype == np.float32
    np.testing.assert_array_equal(samples, [[-1, 0], [-0.5, 0.5]])


def test_wav_of_24_bits(tmp_path):
    raw = b"".join(int(value).to_bytes(3, "little", signed=True) for value in (-(2**23), 2**22, -1))
    samples, _ = read_wav(write_wav(tmp_path / "a.wav", raw, 3))
    np.testing.assert_array_equal(samples, [[-1, 0.5, -(2.0**-23)]])


def test_sounds_that_cannot_be_used(tmp_path):
    (tmp_path / "text.wav").write_text("no sound")
    for source, message in ((tmp_path / "none.wav", "No sound at"), (tmp_path / "text.wav", "not a PCM .wav file"),
                            ((np.zeros((1, 9), np.int16), 16_000), r"must be float\[C,samples\] .* got int16\[1, 9\]"),
                            ((np.zeros((1, 0)), 16_000), "at least one sample")):
        with pytest.raises(ValueError, match=message):
            sound(source)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 16_000])
def test_a_tone_stays_a_tone_at_another_rate(rate):
    def tone(rate):
        return np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32)[None]

    got = resample(tone(rate), rate, 16_000)
    assert got.shape == (1, 16_000)
    np.testing.assert_allclose(got[:, 200:-200], tone(16_000)[:, 200:-200], atol=5e-3)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000, 192_000])
def test_parts_are_those_of_the_whole(rate):
    waveform = RANDOM.uniform(-1, 1, (2, 3_000)).astype(np.float32)
    whole = resample(waveform, rate, 16_000)
    found = senses.resampled_part(waveform, rate, 16_000, 0, whole.shape[1])  # the whole's taps are float32's
    np.testing.assert_allclose(found, whole, atol=1e-4)
    np.testing.assert_allclose(senses.resampled_part(waveform, rate, 16_000, 50, 60), found[:, 50:60], atol=1e-6)


@pytest.mark.parametrize("rate", [11_127, 44_101, 48_001, 192_001])
def test_rates_that_share_no_factor(rate):
    """The kernels of all phases would take gigabytes."""
    seconds = np.arange(rate // 4) / rate
    got = resample(np.sin(2 * np.pi * 440 * seconds).astype(np.float32)[None], rate, 16_000)
    expected = np.sin(2 * np.pi * 440 * np.arange(got.shape[1]) / 16_000)
    assert got.shape == (1, -(-16_000 * len(seconds) // rate))
    np.testing.assert_allclose(got[0, 200:-200], expected[200:-200], atol=5e-3)
    assert resample(np.zeros((2, 0), np.float32), rate, 16_000).shape == (2, 0)


@pytest.mark.parametrize("channels", [1, 3])
def test_clips_of_slow_sounds_are_made_alone(channels, monkeypatch):
    slow = (RANDOM.uniform(-1, 1, (channels, 500)).astype(np.float32), 50)  # ten seconds
    whole = sound(slow, bins=20)
    monkeypatch.setattr(senses, "WHOLE", 1_000)
    monkeypatch.setattr(senses, "resample", None)
    np.testing.assert_allclose(sound(slow, bins=20), whole, atol=2e-2)  # logarithms of next to nothing


@pytest.mark.parametrize("rate", [0, 1, 2, 7, 39, 1_000_001, 2**31 - 1, 44_100.5, float("nan")])
def test_rates_that_nobody_records(rate, tmp_path):
    message = r"says .* samples a second; whole numbers from 40 to 1000000 are read"
    with pytest.raises(ValueError, match=message):
        sound((np.zeros((1, 100), np.float32), rate))
    if isinstance(rate, int):
        (tmp_path / "a.wav").write_bytes(wav(rate))
        with pytest.raises(ValueError, match=r"a\.wav cannot be used: it " + message):
            read_wav(tmp_path / "a.wav")


def test_headers_that_claim_too_much(tmp_path):
    for content, message in (
            (wav(16_000, claimed=1_000), "cut off: its header says 1000 bytes of sound, 128 are there"),
            (wav(16_000, bits=64), "its samples have 64 bits, not 8, 16, 24, 32"),
            (wav(16_000, bits=36), "not a PCM .wav file"),
            (wav(16_000, channels=65, bits=8), "has 65 channels; at most 64"),
            (wav(16_000)[:16] + b"\xff" * 4 + wav(16_000)[20:], r"its chunks are damaged")):
        (tmp_path / "a.wav").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_wav(tmp_path / "a.wav")
    (tmp_path / "piped.wav").write_bytes(wav(16_000, claimed=2**32 - 1))
    (tmp_path / "whole.wav").write_bytes(wav(16_000))
    np.testing.assert_array_equal(read_wav(tmp_path / "piped.wav")[0], read_wav(tmp_path / "whole.wav")[0])


def test_a_tone_is_loudest_in_its_filter():
    tone = np.sin(2 * np.pi * 1_000 * np.arange(8_000) / 16_000)
    mels = log_mel(tone, 40)
    assert mels.shape == (40, 1 + (8_000 - 400) // 160)
    assert set(mels.argmax(0)) == {mel_filters(40)[:, 1_000 * 512 // 16_000].argmax()}
    assert log_mel(tone[:399], 40).shape == (40, 0)


def test_what_a_short_sound_lacks_is_zero_before_normalisation():
    made = sound((RANDOM.uniform(-1, 1, (1, 1_000)), 16_000), bins=20, frames=9, clips=2)
    assert made.shape == (2, 1, 20, 9)
    np.testing.assert_allclose(made[..., 4:], 4.268 / 9.138, rtol=1e-6)  # four frames fit into 1000 samples
    assert np.abs(made[..., :4] - 4.268 / 9.138).min() > 0


def test_the_given_samples_are_left_alone():
    samples = (RANDOM.uniform(-1, 1, (2, 4_000)) + 0.3).astype(np.float32)
    before = samples.copy()
    sound((samples, 16_000), clips=2, seconds=0.1)
    np.testing.assert_array_equal(samples, before)


# ---- words ----


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "bpe.txt.gz"
    path.write_bytes(gzip.compress(b"header\nt h\nth e</w>\nc a\nca t</w>\n"))
    return WordTokenizer(path, 512 + 4 + 2)


def test_merges_and_marks(tokenizer):
    byte = {letter: ord(letter) - 33 for letter in "tehcasx"}  # printable bytes come first
    assert tokenizer.encode("the  CAT") == [513, 515]
    assert tokenizer.encode("thex") == [512, byte["e"], 256 + byte["x"]]
    assert tokenizer.encode("cat's") == [515, ord("'") - 33, 256 + byte["s"]]
    assert tokenizer.encode("&amp;lt;|endoftext|>") == [tokenizer.end]
    assert (tokenizer.start, tokenizer.end) == (516, 517)


@pytest.mark.parametrize(("text", "words"), [
    ("it's 42!?'s ok", ["it", "'s", "4", "2", "!?'", "s", "ok"]), ("a_b-c", ["a", "_", "b", "-", "c"]),
    ("naïve 東京½²", ["naïve", "東京", "½", "²"]), ("x\u00a0y", ["x", "y"]), ("", [])])
def test_split(text, words):
    assert senses._words(text) == words


def test_rows_are_cut_with_or_without_their_end(tokenizer):
    start, end = tokenizer.start, tokenizer.end
    np.testing.assert_array_equal(
        tokenizer.rows(["the cat", ""], 5), [[start, 513, 515, end, 0], [start, end, 0, 0, 0]])
    np.testing.assert_array_equal(tokenizer.rows(["the cat the"], 4), [[start, 513, 515, 513]])
    np.testing.assert_array_equal(tokenizer.rows(["the cat the"], 4, keep_end=True), [[start, 513, 515, end]])


def test_merges_that_do_not_fit_the_vocabulary(tmp_path):
    path = tmp_path / "bpe.txt.gz"
    path.write_bytes(gzip.compress(b"header\nt h\n"))
    with pytest.raises(ValueError, match="has 1 merges, but a vocabulary of 517 needs 3"):
        WordTokenizer(path, 517)


# ---- rows ----

CFG = TINY
SIDE = CFG.vision.image_size


def image(height=40, width=30):
    return RANDOM.integers(0, 256, (height, width, 3), np.uint8)


def inputs(name, clips=2):
    """What the tower of a sense takes, ready made."""
    shapes = {"video": (clips, 3, CFG.vision.frames, SIDE, SIDE), "audio": (clips, *CFG.audio.input_shape),
              "depth": CFG.depth.input_shape, "thermal": CFG.thermal.input_shape, "imu": CFG.imu.input_shape}
    if name == "text":
        return RANDOM.integers(0, CFG.text.vocab, CFG.text.input_shape)
    return RANDOM.normal(size=shapes[name]).astype(np.float32)


def test_every_sense_beside_a_image():
    pixels, given = image(), {name: inputs(name) for name in senses.NAMES}
    stacked = senses.stack([Sample(images=[pixels], media=given)], CFG)
    images, media, weights = stacked["images"], stacked["media"], stacked["weights"]
    assert stacked.keys() == {"images", "image_valid", "media", "weights"}
    assert media.keys() == set(senses.NAMES) and weights.keys() == {"image", *senses.NAMES}
    assert images.shape == (1, 1, SIDE, SIDE, 3) and images.dtype == np.uint8
    assert stacked["image_valid"].tolist() == [[True]] and stacked["image_valid"].dtype == bool
    np.testing.assert_array_equal(normalise(images), senses.image(pixels, SIDE)[None, None])
    for name, array in given.items():
        np.testing.assert_array_equal(media[name], array[None])
        assert media[name].dtype == (np.int32 if name == "text" else np.float32)
    assert all(weight.tolist() == [1] and weight.dtype == np.float32 for weight in weights.values())


def test_rows_that_sense_different_things():
    audio, depth = inputs("audio"), inputs("depth")
    rows = [Sample(images=[image()], media={"audio": audio}, weights={"audio": 0.5}), Sample(media={"depth": depth}),
            Sample(prompt="Only words")]
    stacked = senses.stack(rows, CFG)
    images, media = stacked["images"], stacked["media"]
    assert {name: weight.tolist() for name, weight in stacked["weights"].items()} == {
        "image": [1, 0, 1], "audio": [0.5, 0, 0], "depth": [0, 1, 0]}
    assert media.keys() == {"audio", "depth"}
    np.testing.assert_array_equal(media["audio"], [audio, audio * 0, audio * 0])
    np.testing.assert_array_equal(media["depth"], [depth * 0, depth, depth * 0])
    assert images.shape == (3, 1, SIDE, SIDE, 3) and stacked["image_valid"].tolist() == [[True], [False], [False]]
    assert images[0].any() and not images[1:].any()
    alone = senses.stack([rows[1]], CFG)
    assert alone["images"] is None and alone["image_valid"] is None and alone["weights"].keys() == {"depth"}


def test_raw_inputs_go_through_the_transforms(tmp_path):
    frames, waveform = RANDOM.integers(0, 256, (12, 40, 30, 3), np.uint8), RANDOM.uniform(-1, 1, (1, 40_000))
    wav = write_wav(tmp_path / "a.wav", (waveform * 32_000).astype("<i2").tobytes(), 2)
    rows = [Sample(media={"video": (frames, 4.0), "audio": (waveform, 16_000)}), Sample(media={"audio": wav}),
            Sample(media={"audio": str(wav)})]
    media = senses.stack(rows, CFG)["media"]
    np.testing.assert_array_equal(media["video"][0], senses.video(frames, 4.0, SIDE, shown=CFG.vision.frames))
    bins, length = CFG.audio.height, CFG.audio.width
    np.testing.assert_array_equal(media["audio"][0], sound((waveform, 16_000), bins, length))
    np.testing.assert_array_equal(media["audio"][1], sound(wav, bins, length))
    np.testing.assert_array_equal(media["audio"][1], media["audio"][2])


def test_ready_images_are_left_alone():
    ready = RANDOM.normal(size=(3, SIDE, SIDE)).astype(np.float32)
    pixels = image()
    stacked = senses.stack([Sample(images=[ready]), Sample(prompt="Only words"), Sample(images=[pixels])], CFG)
    assert stacked["media"] is None and stacked["image_valid"] is None
    assert stacked["weights"].keys() == {"image"} and stacked["weights"]["image"].tolist() == [1, 1, 1]
    np.testing.assert_array_equal(stacked["images"][:, 0], [ready, ready * 0, senses.image(pixels, SIDE)])


def test_images_that_were_cropped_for_training_are_left_alone():
    pixels = image()
    cut = load(pixels, SIDE, "center_crop", random=np.random.default_rng(1))
    np.testing.assert_array_equal(senses.stack([Sample(images=[cut])], CFG)["images"][0, 0], cut)
    assert (cut != load(pixels, SIDE, "center_crop")).any()


def test_text_in_words_and_in_ids(tmp_path):
    path = tmp_path / WORDS
    path.write_bytes(gzip.compress(b"header\nt h\nth e</w>\nc a\nca t</w>\n"))
    cfg = dataclasses.replace(CFG, text=dataclasses.replace(CFG.text, vocab=512 + 4 + 2))
    ids = WordTokenizer(path, cfg.text.vocab).rows(["the cat"], cfg.text.context)[0]
    stacked = senses.stack([Sample(media={"text": "the cat"}), Sample(media={"text": ids})], cfg, path)
    np.testing.assert_array_equal(stacked["media"]["text"], [ids, ids])


def test_everything_that_cannot_be_used_is_named(tmp_path):
    cfg = dataclasses.replace(CFG, thermal=None)
    rows = [
        Sample(images=[image(), image()], media={"smell": 1, "depth": inputs("depth").astype(int)}),
        Sample(images=[tmp_path / "none.png"], media={"thermal": inputs("thermal"), "audio": inputs("audio")}),
        Sample(media={"audio": inputs("audio", 3), "video": (np.zeros((2, 4, 4)), 4), "imu": inputs("imu")[:, 1:]}),
        Sample(media={"text": "a cat", "video": inputs("video", 0)}, weights={"text": -1.0, "depth": 1.0}),
        Sample(images=[np.zeros((3, 5, 5), np.float32)], media={"text": np.full(CFG.text.input_shape, CFG.text.vocab)}),
        Sample(media={"text": np.zeros(3, int), "image": image()}, weights={"image": float("nan")}),
        Sample(media={"audio": tmp_path / "none.wav"}),
    ]
    with pytest.raises(ValueError) as error:
        senses.stack(rows, cfg)
    message = str(error.value)
    for line in (
        "row 0, image: 2 images, but a row takes one",
        "row 0, smell: there is no such sense",
        f"row 0, depth: must be float32[1,32,32], got int64{list(CFG.depth.input_shape)}",
        f"row 1, image: No image at {tmp_path / 'none.png'}",
        "row 1, thermal: this model has no tower for this sense",
        "row 2, audio: [3, 1, 26, 36], but row 1 has [2, 1, 26, 36]",
        "row 2, video: A video must be uint8[N,H,W,3]",
        "row 2, imu: must be float32[6,32], got float32[6, 31]",
        f"row 3, text: the text tower's merges, {WORDS}, are not among",
        "row 3, video: must be float32[clips,3,2,28,28], got float32[0, 3, 2, 28, 28]",
        "row 3, text: a weight of -1.0, but weights are finite and not negative",
        "row 3, depth: a weight of 1.0, but no input",
        "row 4, image: A normalised image must be float32[3,28,28], got float32[3, 5, 5]",
        "row 4, text: tokens must be from 0 to 39, got 40 to 40",
        "row 5, text: must be a string or int[12], got int64[3]",
        "row 5, image: there is no such sense (images go into `images`)",
        "row 5, image: a weight of nan, but no input",
        f"row 6, audio: No sound at {tmp_path / 'none.wav'}",
        "The senses of this model are image, video, audio, depth, imu, text.",
    ):
        assert line in message, line
    assert message.count("\n") == 19


def test_nothing_given_to_a_model_without_images():
    with pytest.raises(ValueError, match="row 0, no input: an image of zeros is needed"):
        senses.stack([Sample(prompt="Words")], dataclasses.replace(CFG, vision=None))
