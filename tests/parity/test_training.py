"""The learning rate, and whole training runs: losses, rates, weights and optimizer state of every recorded step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import trees
from mmjax.config import OptimConfig
from mmjax.families import minigpt4
from mmjax.training import optim, steps
from tests.parity import golden
from tests.parity.close import assert_close
from tests.parity.model import model

LOSSES, WEIGHTS = 1e-4, 2e-5  # absolute; section 3 of the reference set's description


def schedule(settings, **more):
    """The original's names -> ours."""
    theirs = {"max_epoch": "epochs", "iters_per_epoch": "steps_per_epoch"}
    known = {field.name for field in dataclasses.fields(OptimConfig)}
    named = {theirs.get(name, name): value for name, value in settings.items()}
    return OptimConfig(**{name: value for name, value in named.items() if name in known}, **more)


@golden.each("schedule")
def test_learning_rates(case):
    for name, settings in case.spec["schedules"].items():
        config = schedule(settings)
        at = case.arrays[f"{name}.step"].astype(np.float64)
        np.testing.assert_allclose(optim.learning_rate(config, at), case.arrays[f"{name}.lr"], rtol=1e-14)
        compiled = jax.jit(lambda step, config=config: optim.learning_rate(config, step, jnp))(at.astype(np.int32))
        np.testing.assert_allclose(compiled, case.arrays[f"{name}.lr"], rtol=1e-5)


@golden.each("train")
def test_trajectory(case):
    """Thirty chained steps from the original's first weights."""
    m, spec = model(case), case.spec
    config = schedule(spec["run_cfg"], beta1=spec["betas"][0], eps=spec["eps"])
    first = {"w": jnp.asarray(case.arrays["w_init"].T), "b": jnp.asarray(case.arrays["b_init"])}
    params = m.params | {"projector": first}
    trained, frozen = trees.split(params, trees.mask(params, minigpt4.TRAINED))
    optimizer = optim.optimizer(config)
    state, step = steps.start(trained, optimizer, 0), steps.train_step(m.module, optimizer)
    text = {"end_sym": spec["end_sym"], "max_txt_len": spec["max_txt_len"], "prompt_template": ""}
    samples = golden.train_batches(case)
    longest = max(m.batch(rows, **text).tokens.shape[1] for rows in samples)
    batches = [m.batch(rows, length=longest, **text) for rows in samples]
    before = int(steps.fingerprint(frozen))

    losses = []
    for number in range(config.steps):
        state, metrics = step(state, frozen, batches[number % len(batches)])
        losses.append(float(metrics["loss"]))
        for name, leaf in (("w", state.params["projector"]["w"].T), ("b", state.params["projector"]["b"])):
            for recorded in case.holds(f"{name}_after_{number + 1}"):
                assert_close(f"{name}_after", leaf, case.arrays[recorded], absolute=WEIGHTS)
    for name in case.holds("loss"):
        assert_close("losses", losses, case.arrays[name], absolute=LOSSES)
    for name in case.holds("lr"):
        np.testing.assert_allclose(optim.learning_rate(config, np.arange(config.steps)), case.arrays[name], rtol=1e-14)
    adam = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
    for name in ("w", "b"):
        for ours, theirs in ((adam.mu, "exp_avg"), (adam.nu, "exp_avg_sq")):
            for recorded in case.holds(f"{theirs}_{name}"):
                assert_close(theirs, ours["projector"][name].T, case.arrays[recorded], relative=1e-4)
    assert int(steps.fingerprint(frozen)) == before
