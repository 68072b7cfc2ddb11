"""Reads checkpoints and runs of format 1, in which the language model's parameters and config were named `llama`.

Names are changed to today's (`llm`) while reading, and nothing on disk changes: a run of format 1 can be resumed, and
its new checkpoints have today's names.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

FORMAT = 1
_OLD = re.compile(r"(^|/)llama(?=/)")


def rename(path: str) -> str:
    """Returns today's path of a parameter, also inside a training state: "params/llama/gate" -> "params/llm/gate"."""
    return _OLD.sub(r"\1llm", path)


def stored_names(stored: Iterable[str]) -> dict[str, str]:
    """Returns `{today's path: name on disk}`."""
    return {rename(name): name for name in stored}


def rule(pattern: str) -> str:
    """Returns today's form of a path rule, such as "query|llama/.*/gate" or "(llama|vit)/.*"."""
    return re.sub(r"(?<![\w/-])llama(?![\w-])", "llm", pattern)


def checkpoint_card(card: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config.json of a converted checkpoint with today's names."""
    new = _with_llm(card, "architecture", "sources", "constant")
    if isinstance(fresh := new.get("fresh"), list):
        new["fresh"] = [rename(path) for path in fresh]
    return new


def run_card(card: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the run.json of a run with today's names."""
    new = _with_rules(_with_llm(card, "architecture"))
    if isinstance(config := new.get("config"), dict):
        new["config"] = config = _with_rules(config)
        if isinstance(weights := config.get("weights"), dict):
            config["weights"] = weights = _with_llm(weights, "sources")
            if not weights.get("sources"):  # format 1 named a family even without sources
                weights.pop("family", None)
        if isinstance(data := config.get("data"), dict):
            config["data"] = {"pack_images" if name == "pack_pictures" else name: value for name, value in data.items()}
    return new


def _with_rules(card: Mapping[str, Any]) -> dict[str, Any]:
    rules = card.get("trained")
    return card | {"trained": [rule(each) for each in rules]} if isinstance(rules, list) else dict(card)


def _with_llm(card: Mapping[str, Any], *tables: str) -> dict[str, Any]:
    """Returns a card in which the key "llama" of these tables, and the paths in them, are renamed."""
    new = dict(card)
    for table in tables:
        if isinstance(old := new.get(table), dict):
            new[table] = {"llm" if name == "llama" else rename(name): value for name, value in old.items()}
    return new
