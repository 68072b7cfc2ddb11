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
    """Nested dicts as `{"a/b/c": leaf}`, in sorted order."""
    flat = {}
    for name in sorted(tree):
        path, value = f"{prefix}{name}", tree[name]
        flat.update(flatten(value, path + "/") if isinstance(value, Mapping) else {path: value})
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def map_with_path(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """`function(path, leaf)` at every leaf of any pytree; None is no leaf and stays where it is."""
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: function(name(keys), leaf), tree)


def matches(path: str, patterns: Iterable[str]) -> bool:
    return any(re.fullmatch(pattern, path) for pattern in patterns)


def lookup(path: str, rules: Sequence[tuple[str, T]]) -> T:
    """The value of the first rule that matches the whole path; KeyError if none does."""
    for pattern, value in rules:
        if re.fullmatch(pattern, path):
            return value
    raise KeyError(path)


def mask(tree: Mapping[str, Any], patterns: Sequence[str]) -> dict[str, Any]:
    """A tree of bools: does any pattern match the leaf's path?

    Raises ValueError naming the patterns that match nothing: a misspelt rule would silently train nothing.
    """
    paths = list(flatten(tree))
    idle = [pattern for pattern in patterns if not any(re.fullmatch(pattern, path) for path in paths)]
    if idle:
        tops = sorted({path.split("/")[0] for path in paths})
        raise ValueError(
            f"These parameter rules match no parameter: {', '.join(map(repr, idle))}.\n"
            f"A rule is a regular expression for a whole path, such as '{tops[0]}/.*'; the model has "
            f"{', '.join(name + '/…' for name in tops)}.")
    return unflatten({path: matches(path, patterns) for path in paths})


def split(params: Any, trained: Any) -> tuple[Any, Any]:
    """(trained part, rest): two trees of the same shape; each leaf is in one of them and None in the other.

    trained: the mask; what is at a place of it in `params` is a leaf, be it of several arrays
    """

    def pick(wanted: bool) -> Any:
        return jax.tree.map(lambda is_trained, leaf: leaf if is_trained == wanted else None, trained, params)

    return pick(True), pick(False)


def merge(first: Any, second: Any) -> Any:
    """The inverse of `split`."""
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda leaf: leaf is None)


def prefixed(prefix: str, rules: Sequence[tuple[str, T]]) -> tuple[tuple[str, T], ...]:
    """The same rules for a tree that hangs below `prefix`."""
    return tuple((f"{prefix}/(?:{pattern})", value) for pattern, value in rules)


def compare(expected: Mapping[str, Any], got: Mapping[str, Any]) -> list[str]:
    """What differs between two flat trees of arrays or shapes, one readable line each; empty when they agree."""
    lines = []
    for path in sorted(expected.keys() | got.keys()):
        if path not in got:
            lines.append(f"missing     {path}  {tuple(expected[path].shape)}")
        elif path not in expected:
            lines.append(f"unexpected  {path}  {tuple(got[path].shape)}")
        elif tuple(expected[path].shape) != tuple(got[path].shape):
            lines.append(f"shape       {path}  expected {tuple(expected[path].shape)}, got {tuple(got[path].shape)}")
    return lines
