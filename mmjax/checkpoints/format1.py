"""Checkpoints and runs of format 1, in which the language model's parameters and config were named `llama`, not `llm`.

They are renamed while they are read, and nothing on disk changes: a run that format 1 began goes on, and its new
checkpoints have today's names.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

FORMAT = 1
_OLD = re.compile(r"(^|/)llama(?=/)")


def rename(path: str) -> str:
    """Today's path of a parameter, also inside a training state: "params/llama/norm/scale" -> "params/llm/norm/scale"."""
    return _OLD.sub(r"\1llm", path)


def stored_names(stored: Iterable[str]) -> dict[str, str]:
    """`{today's path: name on disk}`."""
    return {rename(name): name for name in stored}


def rule(pattern: str) -> str:
    """Today's form of a path rule, such as "llama/.*/lora_[ab]"."""
    return re.sub(r"(?<![\w/-])llama/", "llm/", pattern)


def checkpoint_card(card: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a converted checkpoint with today's names."""
    return _with_llm(card, "architecture", "sources", "constant") | {
        "fresh": [rename(path) for path in card.get("fresh", ())]}


def run_card(card: Mapping[str, Any]) -> dict[str, Any]:
    """The run.json of a run with today's names."""
    new = _with_llm(card, "architecture")
    if isinstance(config := new.get("config"), dict):
        weights = config.get("weights")
        new["config"] = config | {"trained": _rules(config.get("trained"))} | (
            {"weights": _with_llm(weights, "sources")} if isinstance(weights, dict) else {})
    return new | {"trained": _rules(card.get("trained"))}


def _rules(rules: Any) -> Any:
    return [rule(each) if isinstance(each, str) else each for each in rules] if isinstance(rules, list) else rules


def _with_llm(card: Mapping[str, Any], *tables: str) -> dict[str, Any]:
    """A card with the key "llama" of these tables, and the paths in them, renamed."""
    new = dict(card)
    for table in tables:
        if isinstance(held := new.get(table), dict):
            new[table] = {"llm" if name == "llama" else rename(name): value for name, value in held.items()}
    return new
