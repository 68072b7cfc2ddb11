import dataclasses
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmjax import trees
from mmjax.convert import imagebind as imagebind_files
from mmjax.convert import torch_file
from mmjax.convert.tables import Problems, forward
from mmjax.data import scenes as world
from mmjax.data import senses
from mmjax.data.scenes import Scene, Thing
from mmjax.models.imagebind import ImageBind
from mmjax.models.layers import unit
from mmjax.tokenizer import Tokenizer
from tests import tiny

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


@pytest.mark.parametrize("split", world.SPLITS)
def test_at_most_this_many_things(split):
    lone = world.scenes(split, 40, most=1)
    assert {len(scene.things) for scene in lone} == {1}
    assert {len(scene.things) for scene in world.scenes(split, 40, most=2)} == {1, 2}
    assert all((scene.things[0].color, scene.things[0].shape) in world.NEW_PAIRS for scene in lone) == (
        split == "new_pairs")


def test_scenes_stay_what_the_shipped_towers_were_trained_and_measured_on():
    shown = [scene for split in world.SPLITS for scene in world.scenes(split, 20, seed=1)]
    assert zlib.crc32("".join(map(world.caption, shown)).encode()) == 2202804392
    means = [world.draw(scene).mean() for scene in shown[:5]]
    np.testing.assert_allclose(means, [112.161, 153.026, 97.156, 136.064, 157.777], atol=0.01)


def test_unknown_split_or_pair_is_refused():
    with pytest.raises(ValueError, match="'test'.*train, held_out, new_pairs"):
        world.scenes("test", 1)
    with pytest.raises(ValueError, match="'grey', 'circle'"):
        world.scenes("train", 1, new_pairs=[("grey", "circle")])
    for most in (0, 4):
        with pytest.raises(ValueError, match=f"1 to 3 things.*most={most}"):
            world.scenes("train", 1, most=most)


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
                image = world.draw(Scene((Thing(size, color, shape, "right"),), (3,))) / 255
                near = np.abs(image - rgb).max(-1) < 0.16
                cells = near.reshape(3, 16, 3, 16).sum((1, 3))
                assert cells[1, 2] > 0.95 * cells.sum(), (size, color, shape)
                areas[size] = cells[1, 2]
            assert areas["large"] > 1.8 * areas["small"] > 30, (color, shape)


def test_shapes_differ():
    """Cover of the circle that holds a shape: a full circle most, a cross and a star least."""
    cover = {}
    for shape in world.SHAPES:
        image = world.draw(Scene((Thing("large", "white", shape, "center"),), (5,))) / 255
        cover[shape] = (image.min(-1) > 0.85).sum()
    assert cover["circle"] > cover["square"] > cover["cross"]
    assert cover["square"] > cover["triangle"]
    assert cover["square"] > cover["star"]


def test_backgrounds_vary_and_stay_grey():
    drawn = [world.draw(Scene((), (0, 0, index))).astype(float) for index in range(30)]
    means = np.array([image.mean((0, 1)) for image in drawn])
    assert np.ptp(means, axis=1).max() < 40
    assert np.ptp(means[:, 0]) > 30
    assert min(image.std() for image in drawn) > 5  # noise at least


def test_a_depth_map_shows_size_shape_and_place_but_no_colour():
    """What stands out covers the pixels that have the colour in the image, and stays the same in another colour."""
    for number, thing in enumerate((RED_CROSS, *TWO.things)):
        scene = Scene((thing,), (6, number))
        depth, wall = (world.depth(Scene(things, scene.key)) for things in ((thing,), ()))
        assert depth.shape == (1, 48, 48)
        assert depth.dtype == np.float32
        nearer = depth[0] - np.median(depth) > 0.15
        colored = np.abs(world.draw(scene) / 255 - world.COLORS[thing.color]).max(-1) < 0.2
        assert (nearer & colored).sum() > 0.65 * (nearer | colored).sum()  # the rim is blurred
        assert np.ptp(wall) < 0.4
        repainted = dataclasses.replace(thing, color="purple")
        np.testing.assert_array_equal(depth, world.depth(Scene((repainted,), scene.key)))


def test_a_depth_map_follows_from_its_scene():
    scenes = world.scenes("train", 3, most=1)
    depths = [world.depth(scene) for scene in scenes]
    np.testing.assert_array_equal(depths[0], world.depth(scenes[0]))
    assert len({depth.tobytes() for depth in depths}) == 3


def test_write_pretrain_makes_the_layout_of_imagebind_llm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = world.scenes("train", 3, most=1)
    world.write_pretrain("made", shown)
    meta = (tmp_path / "made" / "pretrain.yaml").read_text()
    assert meta == f'META:\n  - "{tmp_path / "made" / "pretrain.csv"}"\n'
    header, *lines = (tmp_path / "made" / "pretrain.csv").read_text().splitlines()
    assert header == "url\tcaption"
    for i, (line, scene) in enumerate(zip(lines, shown, strict=True)):
        assert line == f"{tmp_path / 'made' / 'image' / f'{i}.jpg'}\t{world.caption(scene)}"
        assert Path(line.split("\t")[0]).is_file()


def test_write_finetune_makes_the_layout_of_imagebind_llm(tmp_path):
    shown = world.scenes("train", 2, most=1)
    world.write_finetune(tmp_path, shown)
    assert (tmp_path / "finetune.yaml").read_text() == f'META:\n  - "{tmp_path / "finetune.json"}"\n'
    rows = json.loads((tmp_path / "finetune.json").read_text())
    assert [row["id"] for row in rows] == [str(number) for number in range(len(rows))]
    said = [(row["image"], row["conversations"]) for row in rows]
    assert said == [
        (str(tmp_path / "image" / f"{i}.jpg"),
         [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}])
        for i, scene in enumerate(shown) for prompt, answer in world.instructions(scene)]
    assert len(said) == sum(len(world.PROMPTS) + len(world.questions(scene)) for scene in shown)
    assert all(Path(image).is_file() for image, _ in said)


def test_write_makes_the_layout_of_cc_sbu_align(tmp_path):
    shown = world.scenes("train", 3)
    world.write(tmp_path / "made", shown)
    annotations = json.loads((tmp_path / "made" / "filter_cap.json").read_text())["annotations"]
    assert annotations == [{"image_id": str(i), "caption": world.caption(scene)} for i, scene in enumerate(shown)]
    for i, scene in enumerate(shown):
        with Image.open(tmp_path / "made" / "image" / f"{i}.jpg") as file:
            image = np.asarray(file)
        assert image.shape == (48, 48, 3)
        # Noise of 8 levels is JPEG's hardest case; what is lost stays below it.
        assert np.abs(image.astype(float) - world.draw(scene)).mean() < 4


def test_the_shipped_senses_agree_on_a_scene():
    """On scenes that no tower was trained on, a depth map's vector is nearer to the own image's than to the others',
    and there are others of the same colour, shape or place among them."""
    tensors, problems = torch_file.load(world.ASSETS / "imagebind.pth"), Problems()
    arch = json.loads((world.ASSETS / "imagebind_arch.json").read_text())["imagebind"]
    cfg = imagebind_files.config(tensors, arch, problems)
    parameters = forward(imagebind_files.entries(cfg), tensors, imagebind_files.IGNORED, "imagebind.pth", problems)
    assert not problems
    params = trees.unflatten({path.removeprefix("imagebind/"): np.float32(np.concatenate(list(parameter.slices())))
                              for path, parameter in parameters.items()})
    alike = {(scene.things[0].size, scene.things[0].shape, scene.things[0].place): scene
             for scene in world.scenes("held_out", 24, seed=5, most=1)}  # depth cannot tell colours apart
    inputs = {"vision": np.stack([senses.image(world.draw(scene), world.SIDE) for scene in alike.values()]),
              "depth": np.stack([world.depth(scene) for scene in alike.values()])}
    vectors = tiny.jit(ImageBind(cfg).apply)({"params": params}, inputs)
    likeness = np.asarray(unit(vectors["depth"]) @ vectors["vision"].T)
    assert len(likeness) > 15
    assert (likeness.argmax(1) == np.arange(len(likeness))).mean() > 0.9
    assert likeness.trace() / len(likeness) > likeness.mean() + 0.3


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
