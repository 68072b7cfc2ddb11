import dataclasses
import importlib.metadata
import json
import types

import numpy as np
import pytest

from mmjax import trees
from mmjax.families import FAMILIES, config_from_dict, find, register, shapes
from mmjax.families.base import ImageSpec

PRESETS = [(family, preset) for family, declared in FAMILIES.items() for preset in declared.presets]


@pytest.mark.parametrize(("family", "preset"), PRESETS, ids=map("/".join, PRESETS))
def test_a_config_survives_json(family, preset):
    cfg = FAMILIES[family].presets[preset]
    assert config_from_dict(FAMILIES[family].Config, json.loads(json.dumps(dataclasses.asdict(cfg)))) == cfg


def test_unknown_fields_are_named_with_their_place():
    cls = FAMILIES["minigpt4"].Config
    with pytest.raises(
        ValueError, match="architecture has fields that MiniGPT4Config does not know: audio, video. It knows"
    ):
        config_from_dict(cls, {"video": 1, "audio": 2})
    with pytest.raises(ValueError, match="architecture.qformer has fields that QFormerConfig does not know: width"):
        config_from_dict(cls, {"qformer": {"width": 3}})


# ---- the registry ----


@pytest.fixture
def registry(monkeypatch):
    """The registry, which afterwards knows what it knew before."""
    monkeypatch.setattr(FAMILIES, "_known", dict(FAMILIES.items()))
    monkeypatch.setattr(FAMILIES, "_imported", False)
    return FAMILIES


def other(name, module="elsewhere"):
    """A family of another package."""
    return dataclasses.replace(FAMILIES["llama"], name=name, Model=type("Model", (), {"__module__": module}))


def test_a_family_is_known_by_its_name_or_as_itself():
    family = FAMILIES["minigpt4"]
    assert find("minigpt4") is find(family) is FAMILIES[family] is family
    assert str(family) == "minigpt4"


def test_an_unknown_family_is_named_with_the_closest():
    with pytest.raises(ValueError, match="no family 'minigpt5'. Did you mean 'minigpt4'. Known are .*llama_adapter"):
        find("minigpt5")


def test_two_modules_cannot_register_one_name(registry):
    first = register(other("mine"))
    again = register(other("mine"))  # a module that is imported again
    assert find("mine") is again is not first
    with pytest.raises(ValueError, match="Two families are named 'mine': elsewhere and somewhere each register one"):
        register(other("mine", "somewhere"))
    with pytest.raises(ValueError, match="Two families are named 'llama'"):
        register(other("llama"))


def test_families_of_installed_packages_are_imported_when_they_are_asked_for(registry, monkeypatch):
    loaded = []
    points = [types.SimpleNamespace(load=lambda family=family: loaded.append(family) or family)
              for family in (other("first"), "a module that registers its own")]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points if group == "mmjax.families" else [])
    assert find("llama").name == "llama" and not loaded
    assert find("first").name == "first" and len(loaded) == 2


def test_families_of_installed_packages_are_listed_and_one_that_fails_is_named(registry, monkeypatch, capsys):
    def fail():
        raise ImportError("No module named 'torch'")

    points = [types.SimpleNamespace(load=fail, value="broken.family"),
              types.SimpleNamespace(load=lambda: other("second"), value="second:FAMILY")]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    assert "second" in list(registry) and len(registry) == len(list(registry))
    lines = capsys.readouterr().err.splitlines()  # once, however often they are listed
    assert lines == ["The family of broken.family (entry-point group 'mmjax.families') is not available: ImportError: "
                     "No module named 'torch'. Repair or uninstall the package that names it."]


def test_rules_of_a_run_a_phase_or_the_family():
    family = FAMILIES["imagebind_llm"]
    assert family.rules() == family.trained
    assert family.rules("finetune") == family.phases["finetune"] != family.trained
    assert family.rules("finetune", ("query",)) == ("query",)
    with pytest.raises(ValueError, match="phase = 'tuning': the family imagebind_llm has pretrain, finetune"):
        family.rules("tuning")
    with pytest.raises(ValueError, match="the family minigpt4 has no phases"):
        FAMILIES["minigpt4"].rules("pretrain", ("query",))


@pytest.mark.parametrize("name", ["minigpt4", "imagebind_llm", "llama_adapter"])
def test_what_an_image_passes_before_anything_trained(name):
    """Each of its parts is a field of the config, and none of it is trained unless a run says so."""
    family = FAMILIES[name]
    cfg = family.presets["tiny"]
    assert all(getattr(cfg, part) is not None for part in family.encoder)
    paths = [path for path in shapes(family, cfg) if family.in_encoder(path)]
    assert paths and not any(trees.matches(path, family.trained) for path in paths)


def test_how_images_are_read():
    specs = {name: FAMILIES[name].presets["tiny"].images for name in ("llama", "minigpt4", "imagebind_llm",
                                                                      "llama_adapter")}
    assert specs.pop("llama") is None
    assert {name: (spec.size, spec.fit, spec.reverse, spec.tokens) for name, spec in specs.items()} == {
        "minigpt4": (28, "stretch", False, 4), "imagebind_llm": (28, "center_crop", False, 0),
        "llama_adapter": (28, "center_crop", True, 0)}


def test_normalising_by_an_own_mean_and_in_reversed_order():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3), np.uint8)
    spec = ImageSpec(5, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), reverse=True)
    found = spec.normalise(pixels)
    assert found.shape == (2, 3, 5, 5) and found.dtype == np.float32
    np.testing.assert_allclose(found[:, 0], (pixels[..., 2] / 255 - 0.1) / 0.5, atol=1e-6)
    np.testing.assert_allclose(found[:, 2], (pixels[..., 0] / 255 - 0.3) / 0.7, atol=1e-6)
    assert spec.normalise(found) is found


def test_prompts_with_images():
    assert FAMILIES["minigpt4"].prompt.with_images("What?", 2) == "<Img><ImageHere></Img><Img><ImageHere></Img> What?"
    assert FAMILIES["minigpt4"].prompt.with_images("What?", 0) == "What?"
    assert FAMILIES["imagebind_llm"].prompt.with_images("What?", 2) == "What?"


def test_a_family_needs_the_stages_that_the_doctor_reads():
    family = FAMILIES["llama"]
    with pytest.raises(ValueError, match="llama has the stages none; it needs one of kind 'embedding'"):
        dataclasses.replace(family, stages=())
    with pytest.raises(ValueError, match="has the stages loss; it needs"):
        dataclasses.replace(family, stages=family.stages[-1:])
