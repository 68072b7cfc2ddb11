import json
import re

import numpy as np
import pytest
from PIL import Image

from mmjax.data import scenes as world
from mmjax.data.scenes import Scene, Thing
from mmjax.tokenizer import Tokenizer

TWO = Scene((Thing("large", "red", "circle", "top-left"), Thing("small", "blue", "star", "center")), (0,))
RED_CROSS = Thing("large", "red", "cross", "bottom-right")


def pairs(scene):
    return {(thing.color, thing.shape) for thing in scene.things}


def test_a_scene_follows_from_seed_and_index():
    first = world.scenes("train", 5, seed=7)
    assert first == world.scenes("train", 9, seed=7)[:5]
    assert first != world.scenes("train", 5, seed=8)
    np.testing.assert_array_equal(world.draw(first[3]), world.draw(world.scenes("train", 4, seed=7)[3]))


def test_scenes_are_in_raster_order_and_do_not_overlap():
    shown = world.scenes("train", 200)
    for scene in shown:
        order = [world.PLACES.index(thing.place) for thing in scene.things]
        assert order == sorted(set(order))
    assert {len(scene.things) for scene in shown} == {1, 2, 3}


def test_splits_keep_captions_and_pairs_apart():
    train, held_out, new_pairs = (world.scenes(split, 400) for split in world.SPLITS)
    new = set(world.NEW_PAIRS)
    assert not any(pairs(scene) & new for scene in train + held_out)
    assert all(pairs(scene) & new for scene in new_pairs)
    assert not {world.caption(scene) for scene in train} & {world.caption(scene) for scene in held_out}
    everything = {(color, shape) for color in world.COLORS for shape in world.SHAPES}
    assert set().union(*map(pairs, train)) == everything - new


def test_unknown_split_or_pair_is_refused():
    with pytest.raises(ValueError, match="'test'.*train, held_out, new_pairs"):
        world.scenes("test", 1)
    with pytest.raises(ValueError, match="'grey', 'circle'"):
        world.scenes("train", 1, new_pairs=[("grey", "circle")])


def test_caption():
    three = Scene((*TWO.things, RED_CROSS), (0,))
    assert world.caption(TWO) == "A large red circle at the top-left and a small blue star in the center."
    assert world.caption(three) == ("A large red circle at the top-left, a small blue star in the center and "
                                    "a large red cross at the bottom-right.")


def test_a_caption_parses_to_its_scene():
    for split in world.SPLITS:
        for scene in world.scenes(split, 100):
            assert tuple(world.parse(world.caption(scene))) == scene.things


def test_parse_takes_what_it_finds():
    assert world.parse("A red thing and, and a small star at the at the") == [
        Thing(None, "red", None, None), Thing("small", None, "star", None)]
    assert world.parse("###") == world.parse("") == []


@pytest.mark.parametrize(("text", "right", "total"), [
    (world.caption(TWO), {"size": 2, "color": 2, "shape": 2, "place": 2, "whole": 1}, 2),
    ("A large red circle at the top-left.", {"size": 1, "color": 1, "shape": 1, "place": 1, "whole": 0}, 2),
    ("A small red circle at the top and a small green star in the center.",
     {"size": 1, "color": 1, "shape": 2, "place": 1, "whole": 0}, 2),
    (world.caption(Scene((*TWO.things, RED_CROSS), (0,))),
     {"size": 2, "color": 2, "shape": 2, "place": 2, "whole": 0}, 3),
    ("", {"size": 0, "color": 0, "shape": 0, "place": 0, "whole": 0}, 2),
])
def test_score(text, right, total):
    points = world.score(text, TWO)
    assert {name: points[name][0] for name in points} == right
    assert {points[name][1] for name in world.ATTRIBUTES} == {total}


def test_an_attribute_left_unsaid_is_wrong():
    assert world.score("A circle.", Scene((RED_CROSS,), (0,)))["color"] == (0, 1)


def test_total_is_a_share_of_all_things():
    lone = Scene((RED_CROSS,), (0,))
    shares = world.total([world.score(world.caption(TWO), TWO), world.score("a small red circle at the top", lone)])
    assert shares == pytest.approx(
        {"size": 2 / 3, "color": 1.0, "shape": 2 / 3, "place": 2 / 3, "whole": 0.5, "mean": 0.75})


def test_questions_have_one_answer():
    asked = {question.text: (question.answer, question.kind) for question in world.questions(TWO)}
    assert asked["What color is the star?"] == ("blue", "color")
    assert asked["What color is the shape at the top-left?"] == ("red", "color")
    assert asked["What size is the circle?"] == ("large", "size")
    assert asked["Where is the star?"] == ("in the center", "place")
    assert asked["What shape is in the center?"] == ("star", "shape")
    assert asked["How many shapes are there?"] == ("two", "count")

    twins = Scene((Thing("small", "red", "cross", "top"), RED_CROSS), (0,))
    texts = [question.text for question in world.questions(twins)]
    assert not any("the cross" in text for text in texts)
    assert not any(question.kind == "count" for question in world.questions(Scene((RED_CROSS,), (0,))))


def test_shapes_are_drawn_where_and_as_the_scene_says():
    """In the cell of the place most pixels have the colour, as many as the size says, and no other cell has any."""
    for color, rgb in world.COLORS.items():
        for shape in world.SHAPES:
            areas = {}
            for size in world.SIZES:
                picture = world.draw(Scene((Thing(size, color, shape, "right"),), (3,))) / 255
                near = np.abs(picture - rgb).max(-1) < 0.16
                cells = near.reshape(3, 16, 3, 16).sum((1, 3))
                assert cells[1, 2] > 0.95 * cells.sum(), (size, color, shape)
                areas[size] = cells[1, 2]
            assert areas["large"] > 1.8 * areas["small"] > 30, (color, shape)


def test_shapes_differ():
    """Cover of the circle that holds a shape: a full circle most, a cross and a star least."""
    cover = {}
    for shape in world.SHAPES:
        picture = world.draw(Scene((Thing("large", "white", shape, "center"),), (5,))) / 255
        cover[shape] = (picture.min(-1) > 0.85).sum()
    assert cover["circle"] > cover["square"] > cover["cross"]
    assert cover["square"] > cover["triangle"]
    assert cover["square"] > cover["star"]


def test_backgrounds_vary_and_stay_grey():
    drawn = [world.draw(Scene((), (0, 0, index))).astype(float) for index in range(30)]
    means = np.array([picture.mean((0, 1)) for picture in drawn])
    assert np.ptp(means, axis=1).max() < 40
    assert np.ptp(means[:, 0]) > 30
    assert min(picture.std() for picture in drawn) > 5  # noise at least


def test_write_makes_the_layout_of_cc_sbu_align(tmp_path):
    shown = world.scenes("train", 3)
    world.write(tmp_path / "made", shown)
    annotations = json.loads((tmp_path / "made" / "filter_cap.json").read_text())["annotations"]
    assert annotations == [{"image_id": str(i), "caption": world.caption(scene)} for i, scene in enumerate(shown)]
    for i, scene in enumerate(shown):
        with Image.open(tmp_path / "made" / "image" / f"{i}.jpg") as file:
            picture = np.asarray(file)
        assert picture.shape == (48, 48, 3)
        # Noise of 8 levels is JPEG's hardest case; what is lost stays below it.
        assert np.abs(picture.astype(float) - world.draw(scene)).mean() < 4


def test_every_word_is_one_token_of_the_shipped_tokenizer():
    tokenizer = Tokenizer.from_folder(world.ASSETS / "llama")
    for words in (*world.ATTRIBUTES.values(), world.COUNTS[2:]):
        for word in words:
            assert len(tokenizer.encode(word)) == 1, word
    scene = Scene((*TWO.things, RED_CROSS), (0,))
    for text in (world.caption(scene), *world.PROMPTS, *(question.text for question in world.questions(scene))):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert len(ids) == len(re.findall(r"[a-z]+(?:-[a-z]+)?|[.,?]", text, re.IGNORECASE)), text
    assert tokenizer.decode(tokenizer.encode("Été? 12 €")) == "Été? 12 €"  # bytes where there is no piece
