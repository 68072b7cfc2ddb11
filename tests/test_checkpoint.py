"""Saving and restoring a training state; on other meshes: eight_devices.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmjax import checkpoint, optim, steps, trees
from mmjax.checkpoint import Checkpoints
from mmjax.config import OptimConfig

OPTIMIZER = optim.optimizer(OptimConfig(accumulate=2))


def state(seed=0, step=0, rows=3, optimizer=OPTIMIZER):
    random = np.random.default_rng(seed)
    params = {
        "projector": {"w": jnp.asarray(random.normal(size=(rows, 4)), jnp.float32), "b": jnp.ones(4) * seed},
        "llama": {"embedding": None, "layers": {"lora_a": jnp.asarray(random.normal(size=(2, 5)), jnp.bfloat16)}},
    }
    made = steps.start(params, optimizer, seed)
    filled = jax.tree.map(lambda leaf: leaf + jnp.asarray(seed, leaf.dtype), made.opt_state)
    return dataclasses.replace(made, step=jnp.int32(step), opt_state=filled)


def named(tree):
    """`{path: numpy array}` of every leaf, keys as their bits."""
    found = {}

    def add(path, leaf):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        found[path] = np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    trees.map_with_path(add, tree)
    return found


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for path, leaf in named(expected).items():
        assert named(found)[path].dtype == leaf.dtype, path
        np.testing.assert_array_equal(named(found)[path], leaf, err_msg=path)


@pytest.fixture
def saved(tmp_path):
    """A folder with steps 10 and 20."""
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.latest is None
    for step in (10, 20):
        checkpoints.save(step, state(seed=step, step=step))
    checkpoints.close()
    return tmp_path / "run"


def test_what_was_saved_comes_back(saved):
    checkpoints = Checkpoints(saved)
    assert checkpoints.latest == 20
    restored = checkpoints.restore(state())
    assert_equal(restored, state(seed=20, step=20))
    assert_equal(checkpoints.restore(state(), 10), state(seed=10, step=10))
    np.testing.assert_array_equal(*(jax.random.bits(each.key, (4,)) for each in (restored, state(seed=20))))
    checkpoints.close()


def test_trained_parameters_alone(saved):
    for step, seed in ((None, 20), (10, 10)):
        found = checkpoint.trained(saved, step)
        expected = {path: leaf for path, leaf in trees.flatten(state(seed=seed).params).items() if leaf is not None}
        assert found.keys() == expected.keys()
        for path, leaf in found.items():
            assert leaf.dtype == expected[path].dtype
            np.testing.assert_array_equal(leaf, expected[path])


def test_steps_that_were_never_saved(saved, tmp_path):
    checkpoints, empty = Checkpoints(saved), Checkpoints(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"run has no checkpoint of step 15; it has \[10, 20\]"):
        checkpoints.restore(state(), 15)
    with pytest.raises(FileNotFoundError, match="empty has no checkpoint"):
        empty.restore(state())
    checkpoints.close()
    empty.close()


def test_reading_from_a_folder_that_is_not_there_makes_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no_run"):
        checkpoint.trained(tmp_path / "no_run")
    assert list(tmp_path.iterdir()) == []


def test_other_trained_parameters_are_named(saved):
    checkpoints = Checkpoints(saved)
    other = state(rows=6)
    other.params["vit"] = {"cls": jnp.ones(2)}
    del other.params["llama"]["layers"]
    with pytest.raises(ValueError, match="step 20 in .*run was saved by a run with other trained parameters") as error:
        checkpoints.restore(other)
    for line in ("missing     params/vit/cls  (2,)", "unexpected  params/llama/layers/lora_a  (2, 5)",
                 "shape       params/projector/w  expected (6, 4), got (3, 4)"):
        assert line in str(error.value)
    with pytest.raises(ValueError, match="another optimizer"):
        checkpoints.restore(state(optimizer=optax.sgd(0.1)))
    checkpoints.close()


def test_damaged_checkpoint_is_named(saved, monkeypatch):
    checkpoints = Checkpoints(saved)

    def restore(*_, **__):
        raise Exception("reading") from ValueError("OUT_OF_RANGE: a file is too short")  # as Orbax does

    monkeypatch.setattr(checkpoints._manager, "restore", restore)
    for read in (checkpoints.read, lambda: checkpoints.restore(state())):
        with pytest.raises(ValueError, match="20 is damaged; delete it to go on .*OUT_OF_RANGE"):
            read()
    checkpoints.close()


def test_old_checkpoints_go_and_a_step_is_saved_once(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state(seed=1))
    checkpoints.save(2, state(seed=2))
    checkpoints.save(2, state(seed=3))
    assert_equal(checkpoints.restore(state()), state(seed=2))
    checkpoints.close()
    assert [path.name for path in tmp_path.iterdir() if path.name.isdigit()] == ["2"]


def test_the_states_memory_may_be_reused_while_it_is_saved(tmp_path):
    large = {"w": jnp.arange(2_000_000, dtype=jnp.float32)}
    made = steps.start(large, optax.identity(), 0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, made)
    overwrite = jax.jit(lambda w: w * 0, donate_argnums=0)
    assert not overwrite(made.params["w"]).any()
    checkpoints.close()
    np.testing.assert_array_equal(checkpoint.trained(tmp_path)["w"], np.arange(2_000_000, dtype=np.float32))
