"""Parameter trees by path: `"llm/layers/attn/q/w"` names one leaf of nested dicts.

Rules are ordered `(pattern, value)` pairs; a pattern must match the whole path and the first match wins.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax

T = TypeVar("T")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested dicts as `{"a/b/c": leaf}`, in sorted order."""
    flat = {}
    for name in sorted(tree):
        path, value = f"{prefix}{name}", tree[name]
        flat.update(flatten(value, path + "/") if isinstance(value, Mapping) else {path: value})
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dicts of a flat tree: the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def map_with_path(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """Applies `function(path, leaf)` to every leaf of any pytree; None is no leaf and is kept."""
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: function(name(keys), leaf), tree)


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Returns whether any pattern matches the whole path."""
    return any(re.fullmatch(pattern, path) for pattern in patterns)


def lookup(path: str, rules: Sequence[tuple[str, T]]) -> T:
    """Returns the value of the first rule that matches the whole path; raises KeyError if none does."""
    for pattern, value in rules:
        if re.fullmatch(pattern, path):
            return value
    raise KeyError(path)


def mask(tree: Mapping[str, Any], patterns: Sequence[str]) -> dict[str, Any]:
    """Returns a tree of bools: whether any pattern matches the leaf's path.

    Raises ValueError naming the patterns that match nothing: a misspelt rule would silently train nothing.
    """
    paths = list(flatten(tree))
    unmatched = [pattern for pattern in patterns if not any(re.fullmatch(pattern, path) for path in paths)]
    if unmatched:
        tops = sorted({path.split("/")[0] for path in paths})
        raise ValueError(
            f"These parameter rules match no parameter: {', '.join(map(repr, unmatched))}.\n"
            f"A rule is a regular expression for a whole path, such as '{tops[0]}/.*'; the model has "
            f"{', '.join(name + '/…' for name in tops)}.")
    return unflatten({path: matches(path, patterns) for path in paths})


def split(params: Any, trained: Any) -> tuple[Any, Any]:
    """Returns (trained part, rest): two trees of the same structure; each leaf is in one and None in the other.

    trained: the mask; the subtree of `params` at each of its leaves is one leaf, which may have several arrays
    """

    def pick(wanted: bool) -> Any:
        return jax.tree.map(lambda is_trained, leaf: leaf if is_trained == wanted else None, trained, params)

    return pick(True), pick(False)


def merge(first: Any, second: Any) -> Any:
    """Returns the tree of two parts: the inverse of `split`."""
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda leaf: leaf is None)


def prefixed(prefix: str, rules: Sequence[tuple[str, T]]) -> tuple[tuple[str, T], ...]:
    """Returns the same rules for a tree below `prefix`."""
    return tuple((f"{prefix}/(?:{pattern})", value) for pattern, value in rules)


def compare(expected: Mapping[str, Any], got: Mapping[str, Any]) -> list[str]:
    """Returns a line for each difference between two flat trees of arrays or shapes; empty if they agree."""
    lines = []
    for path in sorted(expected.keys() | got.keys()):
        if path not in got:
            lines.append(f"missing     {path}  {tuple(expected[path].shape)}")
        elif path not in expected:
            lines.append(f"unexpected  {path}  {tuple(got[path].shape)}")
        elif tuple(expected[path].shape) != tuple(got[path].shape):
            lines.append(f"shape       {path}  expected {tuple(expected[path].shape)}, got {tuple(got[path].shape)}")
    return lines
