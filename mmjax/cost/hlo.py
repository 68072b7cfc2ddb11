"""What a compiled program sends from device to device and moves between a device and its memory, read from its text
(`jax.stages.Compiled.as_text()`).

The program is one device's. XLA writes the devices of a collective as positions in the mesh, in one of three ways:

    replica_groups={{0,1},{2,3}}
    replica_groups=[2,2]<=[4], replica_groups=[4,2]<=[2,2,2]T(1,0,2)      numbers counted up, reshaped, transposed
    replica_groups=mesh['a'=2,'b'=2] {'b'}                                  the groups along one axis of a mesh

and a permutation as `source_target_pairs={{0,1},{1,0}}`. The layer scan is a `while` whose body stands in the text
once; everything in it happens as many times as there are layers.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
         "ragged-all-to-all")
BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "f8e4m3fn": 8, "f8e5m2": 8, "s16": 16, "u16": 16, "f16": 16,
        "bf16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128}
# Instructions that name or pass on what is there already, or whose work is counted where it began.
MOVE_NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
                "after-all", "partition-id", "replica-id", "opt-barrier", "copy-done", "slice-done", "all-gather-done",
                "all-reduce-done", "collective-permute-done", "async-update", "async-done"}

SEE_THE_SAME = ("bitcast", "copy", "convert", "reshape", "transpose")  # in a fusion: only what is read of it is made
RUN_OTHERS = ("while", "conditional", "call", "async-start")  # computations whose instructions are executed one by one

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][a-z0-9\-]*)\((.*)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that crosses devices.

    kind:  of `KINDS`
    axes:  the mesh axes along which the devices differ that exchange it
    ways:  how many devices exchange it with each other
    bytes: of the whole array, as a device has it after an all-gather, or before a reduce-scatter
    times: how often in one run of the program
    scope: where in the model, as JAX names it; "" where XLA does not say
    """

    kind: str
    axes: tuple[str, ...]
    ways: int
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    times: int
    scope: str = ""

    @property
    def sent(self) -> int:
        """Bytes that each device must send in one run of the program, by the best known algorithm for its kind."""
        share = {"all-reduce": 2 * (self.ways - 1) / self.ways, "collective-permute": 1.0,
                 "collective-broadcast": 1.0}.get(self.kind, (self.ways - 1) / self.ways)
        return round(self.bytes * share * self.times)


class Array(NamedTuple):
    """space: 0 for the device's memory, above 0 for what is nearer to its arithmetic (VMEM and registers of a TPU)."""

    dtype: str
    shape: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> int:
        return -(-BITS[self.dtype] * math.prod(self.shape) // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`%name = result opcode(rest`: the rest holds the operands and what follows them."""

    root: bool
    name: str
    result: str
    opcode: str
    rest: str

    @functools.cached_property
    def arrays(self) -> list[Array]:
        """The result, or what it is made up of if it is a tuple."""
        found = []
        for dtype, sizes, layout in _ARRAY.findall(self.result):
            if dtype in BITS:
                shape = tuple(int(size) for size in sizes.split(",") if size)
                space = re.search(r"S\((\d+)\)", layout)
                found.append(Array(dtype, shape, int(space[1]) if space else 0))
        return found

    @functools.cached_property
    def operands(self) -> list[str]:
        inside = self.rest.split(")")[0]
        return re.findall(r"%([\w.\-]+)", inside) or re.findall(r"[\w.\-]+", inside)

    @functools.cached_property
    def called(self) -> list[str]:
        """The computations that it runs."""
        names = _CALLED.findall(self.rest)
        for listed in _BRANCHES.findall(self.rest):
            names += re.findall(r"%?([\w.\-]+)", listed)
        return names

    @property
    def stored(self) -> int:
        """Bytes of the result that lie in the device's memory."""
        return sum(array.bytes for array in self.arrays if array.space == 0)

    def attribute(self, pattern: str) -> str | None:
        """The first group of a pattern found in the rest."""
        found = re.search(pattern, self.rest)
        return found and found[1]


Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of a text by name, each with its instructions by name."""

    computations: Mapping[str, Computation]
    entry: str

    @staticmethod
    def parse(text: str) -> "Program":
        """Raises ValueError if the text has no entry computation."""
        computations: dict[str, dict[str, Instruction]] = {}
        entry, current = None, None
        for line in text.splitlines():
            if current is None:
                if found := _COMPUTATION.match(line):
                    current = computations.setdefault(found[2], {})
                    entry = found[2] if found[1] else entry
            elif line.startswith("}"):
                current = None
            elif found := _INSTRUCTION.match(line):
                root, *others = found.groups()
                instruction = Instruction(bool(root), *others)
                current[instruction.name] = instruction
        if entry is None:
            raise ValueError("This is not the text of a compiled program: it has no ENTRY computation.")
        return Program(computations, entry)

    @functools.cached_property
    def times(self) -> dict[str, int]:
        """How often each computation runs in one run of the program."""
        count = dict.fromkeys(self.computations, 0)

        def visit(name: str, times: int) -> None:
            count[name] += times
            for instruction in self.computations[name].values():
                trips = self.trips(instruction, self.computations[name]) if instruction.opcode == "while" else 1
                for called in instruction.called:
                    visit(called, times * trips)

        visit(self.entry, 1)
        return count

    def trips(self, loop: Instruction, around: Computation) -> int:
        """How often the body of a `while` runs that stands in `around`: as XLA says, or read from its counter, which
        must begin at a constant, be raised by one, and be compared with a third, as in JAX's scans and XLA's own loops.

        Raises ValueError naming a loop of another kind.
        """
        if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}'):
            return int(known)
        condition, body = (self.computations[loop.attribute(rf"\b{part}=%?([\w.\-]+)")]
                           for part in ("condition", "body"))
        test = _root(condition)
        if test.opcode == "compare" and "direction=LT" in test.rest:
            counter, bound = _source(condition, test.operands[0]), _constant(condition, test.operands[1])
            place = int(counter.attribute(r"index=(\d+)") or 0)
            first = _constant(around, _source(around, loop.operands[0]).operands[place])
            raised = _source(body, _root(body).operands[place])
            stride = _constant(body, raised.operands[1]) if raised.opcode == "add" else None
            if counter.opcode == "get-tuple-element" and None not in (bound, first, stride):
                return max(0, -(-(bound - first) // stride))
        raise ValueError(f"How often the loop %{loop.name} runs cannot be read from the program: XLA does not say, and "
                         "it does not count from one constant to another.")


def _root(computation: Computation) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.root)


def _source(computation: Computation, name: str) -> Instruction:
    """The instruction of that name, or what it is a copy of."""
    instruction = computation[name]
    while instruction.opcode in ("copy", "bitcast"):
        instruction = computation[instruction.operands[0]]
    return instruction


def _constant(computation: Computation, name: str) -> int | None:
    """The value of a constant whole number; None if it is none."""
    source = _source(computation, name)
    return int(source.operands[0]) if source.opcode == "constant" and source.operands[0].isdigit() else None


def collectives(text: str, mesh: Any) -> list[Collective]:
    """What a compiled program sends between devices, one entry an array; a collective that stays on its device is none.

    mesh: the `jax.sharding.Mesh` that it was compiled for

    Where XLA has split a collective into pieces that run beside other work, they share a channel and are counted once.
    Raises ValueError for a text that is no program, or says in an unknown way which devices take part.
    """
    program = Program.parse(text)
    found: dict[Any, list[Collective]] = {}
    for name, computation in program.computations.items():
        for instruction in computation.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS or not program.times[name]:
                continue
            groups = _groups(instruction)
            if axes := crossed(groups, mesh):
                channel = instruction.attribute(r"\bchannel_id=(\d+)") or (name, instruction.name)
                scope = instruction.attribute(r'op_name="([^"]*)"') or ""
                found[channel] = [
                    Collective(kind, axes, max(map(len, groups)), array.dtype, array.shape, array.bytes,
                               program.times[name], scope) for array in _moved(kind, instruction, computation)]
    return [one for parts in found.values() for one in parts]


def crossed(groups: Iterable[Iterable[int]], mesh: Any) -> tuple[str, ...]:
    """The axes of a mesh along which the positions within any of the groups differ."""
    axes = set()
    for group in groups:
        places = np.unravel_index(list(group), mesh.devices.shape)
        axes |= {name for name, place in zip(mesh.axis_names, places, strict=True) if len(set(place.tolist())) > 1}
    return tuple(name for name in mesh.axis_names if name in axes)


def _moved(kind: str, instruction: Instruction, others: Computation) -> Iterator[Array]:
    """The whole arrays of a collective; the start of an asynchronous one gives (operands, results) of equal number."""
    arrays = instruction.arrays
    if kind == "reduce-scatter":  # what goes in is whole
        arrays = [array for name in instruction.operands for array in others[name].arrays]
    elif instruction.opcode in ("all-gather-start", "collective-permute-start"):
        count = len(instruction.operands)
        arrays = arrays[count : 2 * count]
    yield from arrays


def _groups(instruction: Instruction) -> list[list[int]]:
    """The sets of devices, as positions in the mesh, that exchange something. Raises ValueError for an unknown form."""
    rest = instruction.rest
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest):
        return [_ints(pair) for pair in re.findall(r"\{(\d+,\d+)\}", pairs[1])]
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", rest):
        return [_ints(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    if counted := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest):
        return counted_up(counted[2]).reshape(_ints(counted[1])).tolist()
    form = r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\))? \{(['\w,]+)\}"
    if named := re.search(form, rest):
        return _along(*named.groups())
    raise ValueError(f"Which devices take part in %{instruction.name} is written in a way that mmjax does not know: "
                     f"{rest[:300]}")


def _ints(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def counted_up(text: str) -> np.ndarray:
    """`[2,2,2]T(1,0,2)`: 0, 1, 2, ... in that shape, transposed."""
    shape, order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    numbers = np.arange(math.prod(_ints(shape))).reshape(_ints(shape))
    return numbers.transpose(_ints(order)) if order else numbers


def _along(mesh: str, devices: str | None, axes: str) -> list[list[int]]:
    """Groups along named axes of a mesh that XLA itself names: `'a'=2,'b'=4`, `[2,2,2]T(1,0,2)` and `'b'`."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    numbers = counted_up(devices) if devices else np.arange(math.prod(sizes.values()))
    numbers = numbers.reshape(list(sizes.values()))
    places = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", axes)]
    rest = [place for place in range(len(sizes)) if place not in places]
    ways = math.prod(numbers.shape[place] for place in places)
    return numbers.transpose([*rest, *places]).reshape(-1, ways).tolist()


def memory_traffic(text: str) -> int:
    """Bytes that one run of a program moves between a device and its memory.

    Every instruction reads its operands and writes its result once; of an array that it takes a slice of, or changes a
    slice in place, the slice; what XLA keeps nearer than the memory costs nothing. A CPU's caches are left out.
    """
    program = Program.parse(text)
    everything = [one for computation in program.computations.values() for one in computation.values()]
    inner = {called for instruction in everything if instruction.opcode not in RUN_OTHERS
             for called in instruction.called}
    return sum(
        program.times[name] * _traffic(instruction, computation, program)
        for name, computation in program.computations.items() if name not in inner and program.times[name]
        for instruction in computation.values())


def _traffic(instruction: Instruction, others: Computation, program: Program) -> int:
    opcode = instruction.opcode
    if opcode in MOVE_NOTHING:
        return 0
    if opcode == "copy-start":  # (target, source, context)
        return sum(array.bytes for array in instruction.arrays[:2] if array.space == 0)
    if opcode == "slice-start":  # ((source), target, context)
        return instruction.arrays[1].bytes
    if opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * instruction.stored
    operands = [others[name] for name in instruction.operands if name in others]
    if opcode == "dynamic-update-slice":
        return 2 * operands[1].stored
    if opcode != "fusion":
        return instruction.stored + sum(operand.stored for operand in operands)
    fused = program.computations[instruction.called[0]]
    read = sum(min(operand.stored, _read(fused, place, program))
               for place, operand in enumerate(operands) if operand.stored)
    return read + min(instruction.stored, _written(fused))


def _read(fused: Computation, place: int, program: Program) -> float:
    """Bytes of a parameter that a fusion reads; infinite for all of it."""
    parameter = next(one.name for one in fused.values()
                     if one.opcode == "parameter" and one.rest.startswith(f"{place})"))
    total, waiting = 0.0, [parameter]
    while waiting:
        name = waiting.pop()
        for use in fused.values():
            if name not in use.operands:
                continue
            if use.opcode in SEE_THE_SAME or "output_to_operand_aliasing" in use.rest:
                waiting.append(use.name)
            elif use.opcode in ("dynamic-slice", "slice", "gather"):
                total += sum(array.bytes for array in use.arrays)
            elif use.opcode == "fusion":
                inner = program.computations[use.called[0]]
                total += sum(_read(inner, number, program) for number, operand in enumerate(use.operands)
                             if operand == name)
            elif use.opcode == "dynamic-update-slice" and use.operands[0] == name:
                continue  # changed in place
            elif use.opcode not in (*KINDS, "tuple", "get-tuple-element", "custom-call"):  # pieces of a collective
                return math.inf
    return total


def _written(fused: Computation) -> float:
    """Bytes that a fusion writes; infinite for all of its result."""
    root = _root(fused)
    if root.opcode == "dynamic-update-slice":
        return sum(array.bytes for array in fused[root.operands[1]].arrays)
    return 0 if root.opcode == "custom-call" else math.inf
