import dataclasses
import json

import pytest

from mmjax.families import FAMILIES, config_from_dict

PRESETS = [(family, preset) for family, declared in FAMILIES.items() for preset in declared.presets]


@pytest.mark.parametrize(("family", "preset"), PRESETS, ids=map("/".join, PRESETS))
def test_a_config_survives_json(family, preset):
    cfg = FAMILIES[family].presets[preset]
    assert config_from_dict(FAMILIES[family].Config, json.loads(json.dumps(dataclasses.asdict(cfg)))) == cfg


def test_unknown_fields_are_named_with_their_place():
    cls = FAMILIES["minigpt4"].Config
    with pytest.raises(ValueError, match="architecture has fields that Config does not know: audio, video. It knows"):
        config_from_dict(cls, {"video": 1, "audio": 2})
    with pytest.raises(ValueError, match="architecture.qformer has fields that QFormerConfig does not know: width"):
        config_from_dict(cls, {"qformer": {"width": 3}})
