"""How many floating-point operations a training step does, counted from the matrix products of its gradient.

A product of `[m, k]` and `[k, n]` is 2·m·k·n operations; nothing else is counted. JAX differentiates only what leads
to a trained parameter, so with N parameters a token the usual figures come out by themselves:

    2N  a frozen part below everything trained, such as an image tower: forward alone
    4N  a frozen part above something trained, such as the language model: forward, and the gradient of its inputs
    4N  a trained part with nothing trained below it, such as a projector: forward, and the gradient of its weights
    6N  any other trained part

Attention is in it, with the whole square of places though half of it is masked. What `remat` computes a second time is
counted apart: it keeps the device busy, but a model's utilisation (MFU) is measured without it. The logits are counted
at every place, as a plain model computes them, or at whole chunks of places, as `mmjax.training.losses` has them;
`Flops.useful` leaves out those that training does not make.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
from flax import linen as nn

from mmjax import trees
from mmjax.batch import Batch
from mmjax.models.kernels import XLA
from mmjax.training import steps

OTHER = "other"
RECOMPUTED = "rematted_computation"  # as JAX names it
UNKNOWN = ("conv_general_dilated", "ragged_dot", "ragged_dot_general", "pallas_call")


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations of one step over the whole batch, of all devices together; by part, such as "vit" or "llm".

    recomputed: what `remat` does a second time
    logits:     of forward and backward, what makes logits, at so many `places`
    """

    forward: Mapping[str, int]
    backward: Mapping[str, int]
    recomputed: Mapping[str, int]
    logits: int = 0
    places: int = 1

    @property
    def model(self) -> int:
        """What the step is about: forward and backward."""
        return sum(self.forward.values()) + sum(self.backward.values())

    def useful(self, targets: int) -> int:
        """`model` with logits at so many places alone: what a step cannot do without (see `mmjax.training.losses`)."""
        return self.model - self.logits + self.logits * targets // self.places

    @property
    def executed(self) -> int:
        """What the devices do."""
        return self.model + sum(self.recomputed.values())

    @property
    def parts(self) -> list[str]:
        """The part with the most first."""
        total = Counter(self.forward) + Counter(self.backward) + Counter(self.recomputed)
        return [part for part, _ in total.most_common()]


def train_step(module: nn.Module, trained: Any, frozen: Any, batch: Batch) -> Flops:
    """The operations of one training step; everything may be shapes (`jax.ShapeDtypeStruct`), nothing is computed.

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
    """The operations of `steps.train_step`, counted once for each shape of a batch; None where they cannot be.

    trace: what the step's `trace` gives for them. JAX keeps that of a step that has run, so no model is traced again
    llm:   the language model's config
    """
    found: dict[Any, Flops | None] = {}

    def count(state: steps.TrainState, batch: Batch) -> Flops | None:
        leaves, structure = jax.tree.flatten(batch)
        key = structure, *((leaf.shape, leaf.dtype) for leaf in leaves)
        if key not in found:
            try:
                found[key] = _counted(trace(state, batch).jaxpr, state.params.keys(), llm)
            except ValueError:  # an operation whose work is not known beforehand
                found[key] = None
        return found[key]

    return count


def _counted(jaxpr: Any, parts: Collection[str], llm: Any) -> Flops:
    """The operations of a loss and its gradient, or of a whole step, as a `jax.extend.core.ClosedJaxpr`."""
    counts = {"forward": Counter(), "backward": Counter(), "recomputed": Counter()}
    logits = Counter()
    for scope, operations in products(jaxpr.jaxpr):
        kind = "recomputed" if RECOMPUTED in scope else "backward" if "transpose(" in scope else "forward"
        names = (name.split(".")[0] for name in scope.split("/"))
        counts[kind][next((name for name in names if name in parts), OTHER)] += operations
        logits[kind] += operations if "llm.logits/" in scope else 0
    places = max(logits["forward"] // (2 * llm.dim * llm.vocab), 1)
    return Flops(**{kind: dict(count) for kind, count in counts.items()}, logits=logits.total(), places=places)


def products(jaxpr: Any, scope: str = "", times: int = 1) -> Iterator[tuple[str, int]]:
    """(where in the model, operations) of every matrix product of a `jax.extend.core.Jaxpr`.

    Raises ValueError for an operation whose work cannot be counted so: a convolution, or a product in a loop that ends
    when its condition says so.
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
        elif name == "cond":  # the longest branch
            branches = [list(products(branch.jaxpr, inner, times)) for branch in equation.params["branches"]]
            yield from max(branches, key=lambda found: sum(operations for _, operations in found))
        else:
            rounds = times * (equation.params["length"] if name == "scan" else 1)
            for called in _jaxprs(equation.params.values()):
                found = list(products(called, inner, rounds))
                if found and name == "while":
                    raise ValueError(f"The loop {inner} ends when its condition says so; its operations cannot be "
                                     "counted beforehand.")
                yield from found


def _jaxprs(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _jaxprs(value)
        elif hasattr(value, "eqns"):
            yield value
        elif hasattr(value, "jaxpr"):
            yield value.jaxpr
