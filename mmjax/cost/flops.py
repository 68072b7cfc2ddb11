"""The floating-point operations of a training step, counted from the matrix products of its gradient.

A product of `[m, k]` and `[k, n]` is 2·m·k·n operations; nothing else is counted. JAX differentiates only what leads
to a trained parameter, so for N parameters a token needs the usual numbers of operations:

    2N  a frozen part below everything trained, such as an image tower: forward alone
    4N  a frozen part above something trained, such as the language model: forward, and the gradient of its inputs
    4N  a trained part with nothing trained below it, such as a projector: forward, and the gradient of its weights
    6N  any other trained part

Attention is included, with all pairs of slots although half of them are masked; a kernel that skips masked blocks
counts the same. What `remat` computes again is counted separately: it keeps the device busy, but a model's utilisation
(MFU) is measured without it. The logits are counted at every slot, as a plain model computes them, or at whole chunks
of slots, as `mmjax.training.losses` computes them; `Flops.useful` leaves out those that training does not compute.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax import trees
from mmjax.batch import Batch
from mmjax.models.kernels import XLA
from mmjax.training import steps

OTHER = "other"
RECOMPUTED = "rematted_computation"  # as JAX names it
UNKNOWN = ("conv_general_dilated", "ragged_dot", "ragged_dot_general")
# The kernels of JAX's splash attention, and how many of the products of dense attention each replaces: q·k and
# weights·v, and for the gradients dO·v, and one for each of q, k and v.
SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")
SPLASH_DENSE = {"fwd": 2, "dq": 2, "dkv": 2}


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations of one step over the whole batch, of all devices together; by part, such as "vit" or "llm".

    recomputed: what `remat` computes a second time
    logits:     of forward and backward, those of the logits
    slots:      number of slots at which the logits are counted
    """

    forward: Mapping[str, int]
    backward: Mapping[str, int]
    recomputed: Mapping[str, int]
    logits: int = 0
    slots: int = 1

    @property
    def model(self) -> int:
        """Forward and backward."""
        return sum(self.forward.values()) + sum(self.backward.values())

    def useful(self, targets: int) -> int:
        """Returns `model` with logits at this number of slots alone, which a step needs (`mmjax.training.losses`)."""
        return self.model - self.logits + self.logits * targets // self.slots

    @property
    def executed(self) -> int:
        """`model` and what is recomputed: what the devices compute."""
        return self.model + sum(self.recomputed.values())

    @property
    def parts(self) -> list[str]:
        """The parts, the one with the most operations first."""
        total = Counter(self.forward) + Counter(self.backward) + Counter(self.recomputed)
        return [part for part, _ in total.most_common()]


def train_step(module: nn.Module, trained: Any, frozen: Any, batch: Batch) -> Flops:
    """Returns the operations of one training step. All arguments may be shapes (`jax.ShapeDtypeStruct`); nothing is
    computed.

    trained, frozen: the parameters as `trees.split` gives them

    Attention is counted in its dense form, whichever kernels the module has.
    """
    module = module.clone(kernels=XLA)
    parts = {path.split("/")[0] for path in trees.flatten(trees.merge(trained, frozen))}

    def objective(trained: Any, frozen: Any, batch: Batch) -> jax.Array:
        return steps.loss(module, trees.merge(trained, frozen), batch)[0]

    return _counted(jax.make_jaxpr(jax.value_and_grad(objective))(trained, frozen, batch), parts, module.cfg.llm)


def by_shape(trace: Callable[[steps.TrainState, Batch], jax.stages.Traced],
             llm: Any) -> Callable[[steps.TrainState, Batch], Flops | None]:
    """Returns a function that counts the operations of `steps.train_step`, once for each shape of a batch; None if they
    cannot be counted.

    trace: the step's `trace`. JAX caches the trace of a step that has run, so no model is traced again
    llm:   the language model's config
    """
    found: dict[Any, Flops | None] = {}

    def count(state: steps.TrainState, batch: Batch) -> Flops | None:
        leaves, structure = jax.tree.flatten(batch)
        key = structure, *((leaf.shape, leaf.dtype) for leaf in leaves)
        if key not in found:
            try:
                found[key] = _counted(trace(state, batch).jaxpr, state.params.keys(), llm)
            except ValueError:  # an operation whose work is not known
                found[key] = None
        return found[key]

    return count


def _counted(jaxpr: Any, parts: Collection[str], llm: Any) -> Flops:
    """Returns the operations of a loss and its gradient, or of a whole step, a `jax.extend.core.ClosedJaxpr`."""
    counts = {"forward": Counter(), "backward": Counter(), "recomputed": Counter()}
    logits = Counter()
    for scope, operations in products(jaxpr.jaxpr):
        kind = "recomputed" if RECOMPUTED in scope else "backward" if "transpose(" in scope else "forward"
        names = (name.split(".")[0] for name in scope.split("/"))
        counts[kind][next((name for name in names if name in parts), OTHER)] += operations
        logits[kind] += operations if "llm.logits/" in scope else 0
    slots = max(logits["forward"] // (2 * llm.dim * llm.vocab), 1)
    return Flops(**{kind: dict(count) for kind, count in counts.items()}, logits=logits.total(), slots=slots)


def products(jaxpr: Any, scope: str = "", times: int = 1) -> Iterator[tuple[str, int]]:
    """Yields (where in the model, operations) of every matrix product of a `jax.extend.core.Jaxpr`.

    Raises ValueError for an operation whose work is not known: a convolution, an unknown kernel, or a product in a loop
    whose number of iterations depends on its condition.
    """
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        inner = f"{scope}/{equation.source_info.name_stack}"
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            yield inner, 2 * times * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
        elif name in UNKNOWN:
            raise ValueError(f"The operations of a {name} ({inner}) are not counted by mmjax.cost.flops.")
        elif name == "pallas_call":
            yield inner, times * _kernel(equation)
        elif name == "cond":  # the longest branch
            branches = [list(products(branch.jaxpr, inner, times)) for branch in equation.params["branches"]]
            yield from max(branches, key=lambda found: sum(operations for _, operations in found))
        else:
            rounds = times * (equation.params["length"] if name == "scan" else _shards(equation))
            for called in _jaxprs(equation.params.values()):
                found = list(products(called, inner, rounds))
                if found and name == "while":
                    raise ValueError(f"The number of iterations of the loop {inner} depends on its condition; "
                                     "its operations cannot be counted.")
                yield from found


def _kernel(equation: Any) -> int:
    """Returns the operations of a Pallas kernel, as dense attention would compute them."""
    name = str(equation.params["name"])
    kind = SPLASH.search(name)
    if kind is None:
        raise ValueError(f"The operations of the kernel {name} are not counted by mmjax.cost.flops.")
    q, k = [one.aval.shape for one in equation.invars if jnp.issubdtype(one.aval.dtype, jnp.floating)][:2]
    return SPLASH_DENSE[kind[1]] * 2 * math.prod(q) * k[-2]


def _shards(equation: Any) -> int:
    """Returns the number of shards that a `shard_map` computes; 1 for other equations."""
    if equation.primitive.name != "shard_map":
        return 1
    specs = equation.params["out_specs"]
    axes = {axis for spec in specs for names in spec if names is not None
            for axis in ((names,) if isinstance(names, str) else names)}
    return math.prod(equation.params["mesh"].shape[axis] for axis in axes)


def _jaxprs(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _jaxprs(value)
        elif hasattr(value, "eqns"):
            yield value
        elif hasattr(value, "jaxpr"):
            yield value.jaxpr
