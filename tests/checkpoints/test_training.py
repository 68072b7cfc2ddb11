"""Saving and restoring a training state; on other meshes: eight_devices.py."""

import dataclasses
import resource
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmjax import trees
from mmjax.checkpoints import storage, training
from mmjax.checkpoints import training as training_checkpoints
from mmjax.checkpoints.training import SEAL, Checkpoints, DamagedError, Progress, SaveError
from mmjax.config import OptimConfig
from mmjax.training import optim, steps

OPTIMIZER = optim.optimizer(OptimConfig(accumulate=2))


def state(seed=0, step=0, rows=3, optimizer=OPTIMIZER):
    random = np.random.default_rng(seed)
    params = {
        "projector": {"w": jnp.asarray(random.normal(size=(rows, 4)), jnp.float32), "b": jnp.ones(4) * seed},
        "llm": {"embedding": None, "layers": {"lora_a": jnp.asarray(random.normal(size=(2, 5)), jnp.bfloat16)}},
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


@pytest.fixture(scope="module", autouse=True)
def told_once():
    """In all of this module: what fails in one test is told by threads that may outlive it."""
    with training_checkpoints.suppress_duplicate_errors():
        yield


@pytest.fixture
def saved(tmp_path):
    """A folder with steps 10 and 20."""
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.latest is None
    for step in (10, 20):
        checkpoints.save(step, state(seed=step, step=step), Progress(position=step * 2**33))
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


@pytest.mark.parametrize("name", ["exp [1]", "a*?", "100%"])
def test_what_was_saved_comes_back_below_any_name(tmp_path, name):
    checkpoints = Checkpoints(tmp_path / name)
    checkpoints.save(1, state(seed=1), Progress())
    assert_equal(checkpoints.restore(state()), state(seed=1))
    checkpoints.close()
    found = training_checkpoints.trained(tmp_path / name)["projector/w"]
    np.testing.assert_array_equal(found, state(seed=1).params["projector"]["w"])


def test_a_folder_that_cannot_have_checkpoints_is_refused_before_it_is_made(tmp_path):
    with pytest.raises(ValueError, match="backslash"):
        Checkpoints(tmp_path / "a\\b")
    assert list(tmp_path.iterdir()) == []


def test_trained_parameters_alone(saved):
    for step, seed in ((None, 20), (10, 10)):
        found = training_checkpoints.trained(saved, step)
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
        training_checkpoints.trained(tmp_path / "no_run")
    assert list(tmp_path.iterdir()) == []


def test_other_trained_parameters_are_named(saved):
    checkpoints = Checkpoints(saved)
    other = state(rows=6)
    other.params["vit"] = {"cls": jnp.ones(2)}
    del other.params["llm"]["layers"]
    with pytest.raises(ValueError, match="run/20 was saved by a run with other trained parameters") as error:
        checkpoints.restore(other)
    for line in ("missing     params/vit/cls  (2,)", "unexpected  params/llm/layers/lora_a  (2, 5)",
                 "shape       params/projector/w  expected (6, 4), got (3, 4)"):
        assert line in str(error.value)
    with pytest.raises(ValueError, match="another optimizer"):
        checkpoints.restore(state(optimizer=optax.sgd(0.1)))
    checkpoints.close()


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_changed_byte_is_noticed_wherever_anything_is_read_from(saved):
    """TensorStore checks its own tables, not the arrays: without the seal most of these would be restored."""
    checkpoints, random = Checkpoints(saved), np.random.default_rng(0)
    read = {path for path in files(saved / "20") if path.name not in training_checkpoints.LATER}
    assert len(read) > 6 and saved / "20" / SEAL in read
    for path in files(saved / "20"):
        whole = path.read_bytes()
        for place in random.integers(len(whole), size=3):
            changed = bytearray(whole)
            changed[place] ^= 1 << random.integers(8)
            path.write_bytes(changed)
            if path in read:
                with pytest.raises(DamagedError, match=f"20 is damaged: .*{path.name} (has changed|is missing)"):
                    checkpoints.verify(20)
            else:
                checkpoints.verify(20)
                assert_equal(checkpoints.restore(state(), 20), state(seed=20, step=20))
        path.write_bytes(whole)
    checkpoints.verify(20)
    checkpoints.close()


@pytest.mark.parametrize("harm", ["cut", "gone", "no seal", "seal of another"])
def test_a_checkpoint_that_is_not_whole_is_noticed(saved, harm):
    largest = max(files(saved / "20"), key=lambda path: path.stat().st_size)
    name = largest.name if harm in ("cut", "gone") else SEAL
    if harm == "cut":
        largest.write_bytes(largest.read_bytes()[:-1])
    elif harm == "gone":
        largest.unlink()
    elif harm == "no seal":
        (saved / "20" / SEAL).unlink()
    else:
        shutil.copy(saved / "10" / SEAL, saved / "20" / SEAL)
        name = "that of step 10"
    with pytest.raises(DamagedError, match=f"20 is damaged: .*{name}.* .*delete that folder to use the previous one"):
        training_checkpoints.trained(saved)
    assert training_checkpoints.trained(saved, 10)["projector/b"][0] == 10


def test_a_run_knows_how_far_it_was(saved):
    checkpoints = Checkpoints(saved)
    assert checkpoints.progress(10) == Progress(position=10 * 2**33)
    progress = Progress(records=(8, 3), frozen={"vit/cls": 2**32 - 1}).after(1 / 3, 5).after(0.1, 7)
    assert (progress.position, progress.total, progress.count, progress.loss) == (7, 1 / 3 + 0.1, 2, None)
    due = progress.due()
    assert (due.total, due.count, due.loss) == (0, 0, (1 / 3 + 0.1) / 2)
    for step, each in ((30, progress), (40, due)):
        checkpoints.save(step, state(), each)
        assert checkpoints.progress() == each
    checkpoints.close()


def test_old_checkpoints_go_and_a_step_is_saved_once(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state(seed=1), Progress(1))
    checkpoints.save(2, state(seed=2), Progress(2))
    checkpoints.save(2, state(seed=3), Progress(3))
    assert_equal(checkpoints.restore(state()), state(seed=2))
    checkpoints.close()
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_the_best_stays_beside_the_newest(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: 1.5}
    checkpoints = Checkpoints(tmp_path, keep=1, keep_best=True)
    kept = []
    for step, loss in losses.items():
        checkpoints.save(step, state(), Progress(loss=loss))
        checkpoints.wait()
        kept.append(checkpoints.steps)
    checkpoints.close()
    assert kept == [[1], [2], [2, 3], [2, 4], [2, 5]]


def test_what_an_ended_process_left_is_removed_and_nothing_else(saved):
    for name in ("30.orbax-checkpoint-tmp", "5.removed", "15.damaged", "notes"):
        (saved / name).mkdir()
    Checkpoints(saved).close()
    assert sorted(path.name for path in saved.iterdir()) == ["10", "15.damaged", "20", "notes"]


def test_a_damaged_one_makes_room_for_the_same_step(saved):
    checkpoints = Checkpoints(saved)
    for seed in (3, 4):
        assert checkpoints.set_aside(20) == saved / "20.damaged"
        assert checkpoints.steps == [10]
        checkpoints.save(20, state(seed=seed), Progress())
        assert_equal(checkpoints.restore(state()), state(seed=seed))
    checkpoints.close()
    assert sorted(path.name for path in saved.iterdir()) == ["10", "20", "20.damaged"]


@pytest.fixture
def little_room():
    """Files may not grow beyond 100 bytes: writing more fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


def test_a_checkpoint_that_has_no_room_is_noticed_at_once_and_the_others_stay(saved, little_room, caplog):
    checkpoints = Checkpoints(saved, keep=1)
    little_room()
    with pytest.raises(SaveError, match=r"step 30 could not be saved in .*File too large[^\n]*\n"
                                       r"Those of steps \[10, 20\] are complete"):
        checkpoints.save(30, state(), Progress())
        while True:  # as a run does behind every step
            checkpoints.check()
    checkpoints.close()
    assert not caplog.records
    assert checkpoints.steps == [10, 20] and checkpoints.latest == 20
    for step in (10, 20):
        checkpoints.verify(step)


def test_one_that_cannot_be_read_is_not_sealed_and_the_others_stay(saved, monkeypatch, caplog):
    checkpoints = Checkpoints(saved, keep=1)
    monkeypatch.setattr(storage.LocalPath, "glob", lambda *_: iter(()))  # as etils' below a folder `[1]`
    checkpoints.save(30, state(), Progress())
    with pytest.raises(SaveError, match=r"step 30 could not be saved in .*: The checkpoint just written to .*"
                                       r"30\.orbax.* cannot be read back: [^\n]*\n"
                                       r"Those of steps \[10, 20\] are complete"):
        checkpoints.wait()
    checkpoints.close()
    assert sorted(path.name for path in saved.iterdir()) == ["10", "20"]
    for step in (10, 20):
        checkpoints.verify(step)


def test_a_folder_that_is_in_the_way_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(OSError, match="run"):
        Checkpoints(tmp_path / "run")


def test_the_states_memory_may_be_reused_while_it_is_saved(tmp_path):
    large = {"w": jnp.arange(2_000_000, dtype=jnp.float32)}
    made = steps.start(large, optax.identity(), 0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, made, Progress())
    overwrite = jax.jit(lambda w: w * 0, donate_argnums=0)
    assert not overwrite(made.params["w"]).any()
    checkpoints.close()
    np.testing.assert_array_equal(training_checkpoints.trained(tmp_path)["w"], np.arange(2_000_000, dtype=np.float32))


def test_a_checkpoint_of_another_run_is_not_taken(tmp_path):
    """The folder of a step that was copied from elsewhere: whole, but not of this run."""
    for run in ("ours", "theirs"):
        checkpoints = Checkpoints(tmp_path / run / "checkpoints")
        checkpoints.run = run
        checkpoints.save(1, state(seed=1), Progress())
        checkpoints.close()
    mixed = tmp_path / "ours" / "checkpoints"
    training.verify(mixed / "1", "ours")
    shutil.copytree(tmp_path / "theirs" / "checkpoints" / "1", mixed / "2")
    with pytest.raises(DamagedError, match="is damaged: seal.json is that of step 1"):
        training.verify(mixed / "2", "ours")
    shutil.rmtree(mixed / "1")
    (mixed / "2").rename(mixed / "1")
    with pytest.raises(DamagedError, match="seal.json is that of another run, theirs, but .*run.json has ours"):
        training.trained(mixed, run="ours")
    assert training.trained(mixed).keys() == training.trained(mixed, run="theirs").keys()
