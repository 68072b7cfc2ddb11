"""The compiler's estimate of a program for a TPU: its operations, bytes and cycles, by part of the model.

libtpu writes its own estimate into the text of a compiled program: the cycles of each fusion (`estimated_cycles`). A
loop's body is in the text once and runs once an iteration. Copies and collectives that overlap with other work have no
cycles. `cost_analysis()` of JAX is not used, because it counts the body of a loop once.

Pallas kernels have no estimate. One rule holds for all of them: `KERNEL_SHARE` of the chip's peak, for the operations
of the blocks that they visit, including the blocks that they compute a second time.
"""

import dataclasses
import functools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mmjax.cost import flops as flops_of
from mmjax.cost import hlo
from mmjax.cost.hardware import Chip
from mmjax.cost.hlo import Computation, Instruction, Program

KERNEL_SHARE = 0.5
RULE = (f"Pallas kernels have no estimate of the compiler: the operations of the blocks that they visit are taken at "
        f"{KERNEL_SHARE:.0%} of the chip's peak.")
KERNEL = "tpu_custom_call"  # the target of a Pallas kernel

# Parts of a model, by the scope that JAX gives an instruction, with "@" and the Python functions that traced it. The
# first pattern found wins.
COLLECTIVES, COPIES, KERNELS, OTHER = "collectives", "copies", "attention kernels", "other"
PARTS = (
    ("norms", r"norm\w*/|/ln_\w+/"),
    ("rope", r"[/@]rope\b"),
    ("projections", r"/(attn|cross|attention)/(q|k|v|o|qkv)/|/(projector|patch|proj)/"),
    ("feed-forward", r"/(gate|up|down|fc1|fc2|mlp|bind)/"),
    ("scores and softmax", r"/(attn|cross|attention)(/|$)|splash|flash|softmax(?!_cross)"),
    ("logits and loss", r"logits|softmax_cross|loss|branch_\d+_fun|argsort|take_along"),
    ("embedding", r"embed"),
)
DATA_MOVEMENT = {"copy", "copy-start", "slice-start", "slice", "dynamic-slice", "dynamic-update-slice", "transpose",
                 "reshape", "bitcast", "concatenate", "pad", "broadcast", "convert", "parameter", "constant", "tuple",
                 "get-tuple-element", "bitcast-convert", "fusion", "iota", "gather"}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What an instruction costs in one run of a program.

    loop:    name of the outermost loop that it is in; "" for none
    times:   number of executions
    bytes:   moved to and from the device's memory, of all executions
    flops:   of matrix products, of all executions
    seconds: of all executions; 0 if it overlaps with other work
    """

    name: str
    opcode: str
    scope: str
    part: str
    loop: str
    times: int
    bytes: int
    flops: int
    seconds: float

    @property
    def recomputed(self) -> bool:
        return flops_of.RECOMPUTED in self.scope


@dataclasses.dataclass(frozen=True)
class Part:
    """The sums of a part of a program.

    wasted: seconds beyond those that its products take at the chip's peak
    """

    name: str
    seconds: float
    wasted: float
    flops: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The costs of a program on a chip.

    uncounted: names of Pallas kernels whose operations are not known; they count as nothing
    """

    chip: Chip
    costs: tuple[Cost, ...]
    uncounted: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return sum(cost.seconds for cost in self.costs)

    @property
    def flops(self) -> int:
        return sum(cost.flops for cost in self.costs)

    @property
    def bytes(self) -> int:
        return sum(cost.bytes for cost in self.costs)

    @property
    def vmem_seconds(self) -> float:
        """Of `seconds`, those of instructions without products that neither read nor write the device's memory."""
        return sum(cost.seconds for cost in self.costs if not cost.bytes and not cost.flops)

    @property
    def kernel_flops(self) -> int:
        return sum(cost.flops for cost in self.costs if cost.part == KERNELS)

    def part(self, name: str, costs: Sequence[Cost]) -> Part:
        """Returns the sums of some costs under a name."""
        seconds, flops = sum(cost.seconds for cost in costs), sum(cost.flops for cost in costs)
        return Part(name, seconds, seconds - flops / self.chip.flops, flops, sum(cost.bytes for cost in costs))

    @property
    def parts(self) -> list[Part]:
        """The parts of the program, the one that wastes the most first."""
        names = dict.fromkeys(cost.part for cost in self.costs)
        found = [self.part(name, [cost for cost in self.costs if cost.part == name]) for name in names]
        return sorted(found, key=lambda part: -part.wasted)

    def main_loop(self) -> "Estimate":
        """Returns the costs inside that outermost loop which moves the most bytes."""
        moved = Counter()
        for cost in self.costs:
            moved[cost.loop] += cost.bytes if cost.loop else 0
        (loop, _), = moved.most_common(1) or [("", 0)]
        return dataclasses.replace(self, costs=tuple(cost for cost in self.costs if cost.loop == loop))

    @property
    def recomputed(self) -> Part:
        """What is computed again for the backward pass; the other parts include it."""
        return self.part("recomputed", [cost for cost in self.costs if cost.recomputed])


def estimate(text: str, chip: Chip, unknown_trips: int | None = None) -> Estimate:
    """Returns the costs of a compiled program, given its text.

    unknown_trips: number of iterations of a loop whose number is not in the text

    Raises ValueError for a text that is no program, and without `unknown_trips` for such a loop.
    """
    program = Program.parse(text, unknown_trips)
    costs, uncounted, loops = [], [], _outermost_loops(program)
    for times, instruction, computation in program.executed():
        is_kernel = instruction.target == KERNEL
        flops = kernel_flops(instruction, computation) if is_kernel else products(instruction, computation, program)
        if flops is None:
            uncounted.append(instruction.name)
            flops = 0
        cycles = int(instruction.attribute(r'"estimated_cycles":"?(\d+)') or 0)
        seconds = flops / (KERNEL_SHARE * chip.flops) if is_kernel else cycles / chip.clock
        moved = hlo.traffic(instruction, computation, program)
        if moved or flops or seconds:
            origin = origin_of(instruction, program)
            costs.append(Cost(instruction.name, instruction.opcode, origin.scope,
                              part_of(instruction, origin, flops, program), loops.get(id(computation), ""), times,
                              times * moved, times * flops, times * seconds))
    return Estimate(chip, tuple(costs), tuple(uncounted))


def _outermost_loops(program: Program) -> Mapping[int, str]:
    """Returns the name of the outermost loop around each computation, by the computation's id."""
    found: dict[int, str] = {}

    def visit(name: str, loop: str) -> None:
        computation = program.computations[name]
        found.setdefault(id(computation), loop)
        for instruction in computation.values():
            if instruction.opcode in hlo.RUN_OTHERS:
                for called in instruction.called:
                    visit(called, loop or (instruction.name if instruction.opcode == "while" else ""))

    visit(program.entry, "")
    return found


# ---- parts ----


def origin_of(instruction: Instruction, program: Program) -> Instruction:
    """Returns the instruction whose scope shows where in the model another one belongs: of a fusion the largest product
    in it, or else the fusion or the first instruction in it with a scope."""
    if instruction.opcode != "fusion":
        return instruction
    inside = list(_inside(instruction, program))
    operations, product = max(((_product(one, computation), one) for one, computation in inside if one.scope),
                              key=lambda found: found[0], default=(0, instruction))
    if operations:
        return product
    return instruction if instruction.scope else next((one for one, _ in inside if one.scope), instruction)


def part_of(instruction: Instruction, origin: Instruction, flops: int, program: Program) -> str:
    """Returns the name of the part of a model that an instruction belongs to; origin: see `origin_of`."""
    if instruction.opcode.removesuffix("-start") in hlo.KINDS:
        return COLLECTIVES
    if instruction.target == KERNEL:
        return KERNELS
    if not flops and _only_moves(instruction, program):
        return COPIES
    where = "@".join((origin.scope, *program.functions(origin)))
    return next((name for name, pattern in PARTS if re.search(pattern, where)), OTHER)


def _only_moves(instruction: Instruction, program: Program) -> bool:
    """Returns whether an instruction computes nothing, such as a copy to another layout."""
    opcodes = {one.opcode for one, _ in _inside(instruction, program)} if instruction.opcode == "fusion" else set()
    return {instruction.opcode, *opcodes} <= DATA_MOVEMENT


def _inside(fusion: Instruction, program: Program) -> Iterator[tuple[Instruction, Computation]]:
    """Yields the instructions of a fusion and of the fusions in it."""
    fused = program.body(fusion)
    for one in fused.values():
        yield one, fused
        if one.opcode == "fusion":
            yield from _inside(one, program)


# ---- operations ----


def products(instruction: Instruction, others: Computation, program: Program) -> int:
    """Returns the operations of the matrix products of an instruction, 2 for a multiplication and an addition."""
    if instruction.opcode == "fusion":
        return sum(_product(one, computation) for one, computation in _inside(instruction, program))
    return _product(instruction, others)


def _product(instruction: Instruction, others: Computation) -> int:
    if instruction.opcode not in ("dot", "convolution"):
        return 0
    left, right = (others[name].arrays[0].shape for name in instruction.operands[:2])
    out = instruction.arrays[0].shape
    if instruction.opcode == "convolution":
        return _convolution(instruction, left, right, out)
    contracted = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
    return 2 * math.prod(out) * math.prod(left[int(axis)] for axis in (contracted or "").split(",") if axis)


def _convolution(instruction: Instruction, left: Sequence[int], right: Sequence[int], out: Sequence[int]) -> int:
    """A TPU's matrix products are convolutions; axes of a batch are windows of which only some positions are valid."""
    names = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    of_left, of_right, of_out = names.groups()
    window = dict(re.findall(r"(\w+)=([\w\-]+)", instruction.attribute(r"window=\{([^}]*)\}") or ""))
    total = 2 * out[of_out.index("b")] * out[of_out.index("f")] * right[of_right.index("i")]
    for axis in filter(str.isdigit, of_out):
        here = {name: values.split("x")[int(axis)] for name, values in window.items()}
        total *= _positions(left[of_left.index(axis)], out[of_out.index(axis)], right[of_right.index(axis)],
                            int(here.get("stride", 1)), int(here.get("pad", "0_0").split("_")[0]),
                            int(here.get("lhs_dilate", 1)), int(here.get("rhs_dilate", 1)))
    return total


@functools.cache
def _positions(size: int, out: int, kernel: int, stride: int, low: int, dilate: int, kernel_dilate: int) -> int:
    """Returns for how many pairs of an output and a tap of the window the input is neither padding nor a hole."""
    total, taps = 0, np.arange(kernel) * kernel_dilate - low
    for first in range(0, out, 1024):
        at = np.arange(first, min(first + 1024, out))[:, None] * stride + taps
        total += int(((at >= 0) & (at <= (size - 1) * dilate) & (at % dilate == 0)).sum())
    return total


# Products of a block of queries with one of keys, by kernel of splash attention: q·k and weights·v; for the gradients
# q·k and dO·v, each time again, and one for each gradient.
SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
SPLASH_BLOCKS = {"fwd": ("block_q", "block_kv"), "dq": ("block_q_dq", "block_kv_dq"),
                 "dkv": ("block_q_dkv", "block_kv_dkv")}


def kernel_flops(instruction: Instruction, others: Computation) -> int | None:
    """Returns the operations of a Pallas kernel: its own cost estimate, or of the blocks that splash attention visits;
    None if they are not known."""
    if stated := instruction.attribute(r'"cost_estimate":\{[^}]*"flops":"?(\d+)'):
        return int(stated)
    kind = flops_of.SPLASH.search(f"{instruction.name} {instruction.scope}")
    if kind is None:
        return None
    arrays = [others[name].arrays[0] for name in instruction.operands if name in others]
    q, k = [array.shape for array in arrays if array.dtype in ("bf16", "f32", "f16") and len(array.shape) > 1][:2]
    blocks = _block_sizes(instruction)
    sides = [blocks.get(name, length) for name, length in zip(SPLASH_BLOCKS[kind[1]], (q[-2], k[-2]), strict=True)]
    masked = arrays[0].dtype in ("s8", "s32") and len(arrays[0].shape) == 3  # it skips blocks that the mask hides
    share = _visited(q[-2], k[-2], *sides) if masked else 1.0
    count = SPLASH_PRODUCTS[kind[1]] + (kind[1] == "dkv" and bool(blocks.get("use_fused_bwd_kernel")))
    return round(count * 2 * math.prod(q) * k[-2] * share)


def _block_sizes(instruction: Instruction) -> dict[str, int]:
    """Returns the sizes of a kernel's blocks, from its metadata."""
    found = instruction.attribute(r'"xprof_metadata":"(\{(?:[^"\\]|\\.)*\})"')
    return json.loads(found.replace('\\"', '"')) if found else {}


def _visited(queries: int, keys: int, block_q: int, block_kv: int) -> float:
    """Returns the share of the blocks that a causal mask does not hide entirely."""
    rows, columns = -(-queries // block_q), -(-keys // block_kv)
    seen = sum(column * block_kv < (row + 1) * block_q for row in range(rows) for column in range(columns))
    return seen / (rows * columns)
