import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import trees

TREE = {"vit": {"patch": {"w": 1, "b": 2}, "cls": 3}, "projector": {"w": 4, "b": 5}}


def test_flatten_sorts_and_unflatten_restores():
    flat = trees.flatten(TREE)
    assert list(flat.items()) == [
        ("projector/b", 5), ("projector/w", 4), ("vit/cls", 3), ("vit/patch/b", 2), ("vit/patch/w", 1)]
    assert trees.unflatten(flat) == TREE


def test_paths_through_any_pytree():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class State:
        step: int
        params: dict
        rest: tuple

    state = State(0, {"a": {"b": 1}, "c": None}, (2, {"d": 3}))
    named = trees.map_with_path(lambda path, leaf: f"{path}={leaf}", state)
    assert named == State("step=0", {"a": {"b": "params/a/b=1"}, "c": None}, ("rest/0=2", {"d": "rest/1/d=3"}))


def test_first_full_match_wins():
    rules = (("a/b", 1), ("a/.*", 2), ("c", 3))
    assert [trees.lookup(path, rules) for path in ("a/b", "a/bc", "a/b/d", "c")] == [1, 2, 2, 3]
    for path in ("cc", "xc", "a"):
        with pytest.raises(KeyError, match=path):
            trees.lookup(path, rules)


def test_mask():
    assert trees.mask(TREE, ("projector/.*", ".*/cls")) == {
        "vit": {"patch": {"w": False, "b": False}, "cls": True}, "projector": {"w": True, "b": True}}
    assert not any(jax.tree.leaves(trees.mask(TREE, ())))


def test_mask_names_every_rule_that_matches_nothing():
    with pytest.raises(ValueError, match="'proj/.*', 'vit'") as error:
        trees.mask(TREE, ("proj/.*", "projector/w", "vit"))
    assert "projector/w'" not in str(error.value)
    assert "projector/…, vit/…" in str(error.value)


def test_split_and_merge():
    trained, frozen = trees.split(TREE, trees.mask(TREE, ("projector/w", "vit/patch/.*")))
    assert trained == {"vit": {"patch": {"w": 1, "b": 2}, "cls": None}, "projector": {"w": 4, "b": None}}
    assert frozen == {"vit": {"patch": {"w": None, "b": None}, "cls": 3}, "projector": {"w": None, "b": 5}}
    assert trees.merge(trained, frozen) == trees.merge(frozen, trained) == TREE


def test_merge_takes_arrays_of_zeros():
    """A zero is a value, not an absence."""
    merged = trees.merge({"a": jnp.zeros(2), "b": None}, {"a": None, "b": jnp.ones(2)})
    np.testing.assert_array_equal(merged["a"], [0, 0])


def test_prefixed_rules_keep_their_alternatives_below_the_prefix():
    rules = trees.prefixed("vit", (("patch/b|cls", "x"),))
    assert trees.lookup("vit/cls", rules) == trees.lookup("vit/patch/b", rules) == "x"
    for path in ("cls", "patch/b", "vit/vit/cls"):
        with pytest.raises(KeyError):
            trees.lookup(path, rules)


def test_compare_names_every_difference():
    a, b = np.zeros((2, 3)), np.zeros(4)
    assert trees.compare({"a": a, "b": b}, {"b": b, "a": a}) == []
    lines = trees.compare({"a": a, "b": b, "c": a}, {"a": b, "b": b, "d": b})
    assert [line.split() for line in lines] == [
        ["shape", "a", "expected", "(2,", "3),", "got", "(4,)"],
        ["missing", "c", "(2,", "3)"],
        ["unexpected", "d", "(4,)"],
    ]
