"""Reads the text of a compiled program (`jax.stages.Compiled.as_text()`): its instructions, what its devices send to
each other, and the bytes that a device moves to and from its memory.

The program is that of one device. XLA writes the devices of a collective as positions in the mesh, in three ways:

    replica_groups={{0,1},{2,3}}
    replica_groups=[2,2]<=[4], replica_groups=[4,2]<=[2,2,2]T(1,0,2)        an iota, reshaped and transposed
    replica_groups=mesh['a'=2,'b'=2] {'b'}                                  the groups along one axis of a mesh

and a permutation as `source_target_pairs={{0,1},{1,0}}`. A scan over layers is a `while` whose body is in the text
once; everything in it runs as many times as there are layers.

A layout such as `{2,1,0:T(8,128)(2,1)S(1)}` lists the axes from minor to major, then the tiles that the last axes are
padded to, then the memory space.
"""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
         "ragged-all-to-all")
# Instructions that name or pass on an existing array, or run computations whose instructions are counted themselves.
# `...-done` is another one: its work is counted at its start.
MOVE_NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
                "after-all", "add-dependency", "partition-id", "replica-id", "opt-barrier", "async-start",
                "async-update"}
# Custom calls that only name memory.
NO_TRAFFIC = {"AllocateBuffer", "CreateBuffer", "LayoutConstraint", "AssumeGatherIndicesInBound"}
# In a fusion these compute only those elements that their users read.
ELEMENTWISE = ("bitcast", "copy", "convert", "reshape", "transpose")
SLICES = ("dynamic-slice", "slice", "gather")
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # they change their first operand in place; which one is the update
RUN_OTHERS = ("while", "conditional", "call", "async-start")  # computations whose instructions run one by one

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_END = re.compile(r"\}(, execution_thread=\"[^\"]*\")?\s*$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", re.DOTALL)
_OPCODE = re.compile(r"(.*?)\s([a-z][a-z0-9\-]*)\((.*)", re.DOTALL)
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """An array that crosses devices.

    kind:       of `KINDS`
    axes:       the mesh axes along which the devices differ that exchange it
    group_size: number of devices that exchange it with each other
    bytes:      of the whole array, as a device holds it after an all-gather, or before a reduce-scatter
    times:      number of executions in one run of the program
    scope:      where in the model, as JAX names it; "" if XLA does not say
    """

    kind: str
    axes: tuple[str, ...]
    group_size: int
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    times: int
    scope: str = ""

    @property
    def sent(self) -> int:
        """Bytes that each device must send in one run of the program, with the best known algorithm of the kind."""
        others = (self.group_size - 1) / self.group_size
        share = {"all-reduce": 2 * others, "collective-permute": 1.0, "collective-broadcast": 1.0}
        return round(self.bytes * share.get(self.kind, others) * self.times)


class Array(NamedTuple):
    """An array of a device.

    space:  0 for the device's memory, above 0 for memory nearer to its arithmetic units (VMEM and registers of a TPU)
    layout: its layout as text, without the braces; "" if the text has none
    """

    dtype: str
    shape: tuple[int, ...]
    space: int = 0
    layout: str = ""

    @property
    def bytes(self) -> int:
        """Bytes of the elements alone."""
        return -(-bits(self.dtype) * math.prod(self.shape) // 8)

    @property
    def padded_bytes(self) -> int:
        """Bytes that it takes with the padding of its tiles."""
        element = re.search(r"E\((\d+)\)", self.layout)
        return -(-(int(element[1]) if element else bits(self.dtype)) * math.prod(_tiled(self.shape, self.layout)) // 8)


@functools.cache
def bits(dtype: str) -> int:
    """Returns the bits of an element: 8 for "pred", 16 for "bf16", 8 for "f8e4m3fn", 0 for "token" and "opaque"."""
    width = re.search(r"\d+", dtype)
    return 8 if dtype == "pred" else int(width[0]) if width else 0


@functools.cache
def _tiled(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """Returns the sizes of an array in memory: each tile splits the last axes into numbers of tiles and the tile."""
    order = re.match(r"[\d,]*", layout)[0]
    sizes = [shape[int(axis)] for axis in reversed(order.split(","))] if order else list(shape)
    tiles = re.search(r"T((?:\([\d,*]+\))+)", layout)
    for tile in re.findall(r"\(([\d,*]+)\)", tiles[1]) if tiles else ():
        sides = tile.split(",")
        sizes = [1] * (len(sides) - len(sizes)) + sizes
        first = len(sizes) - len(sides)
        for axis in range(len(sides) - 1):
            if sides[axis] == "*":  # joined with the next axis
                sizes[first + axis + 1] *= sizes[first + axis]
                sizes[first + axis], sides[axis] = 1, "1"
        counts = [-(-size // int(side)) for size, side in zip(sizes[first:], sides, strict=True)]
        sizes = [*sizes[:first], *counts, *map(int, sides)]
    return tuple(sizes)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`%name = result opcode(rest`: the rest are the operands and the attributes."""

    root: bool
    name: str
    result: str
    opcode: str
    rest: str

    @functools.cached_property
    def arrays(self) -> list[Array]:
        """The result, or the elements of a tuple."""
        found = []
        for dtype, sizes, layout in _ARRAY.findall(self.result):
            shape = tuple(int(size.removeprefix("<=")) for size in sizes.split(",") if size)
            space = re.search(r"S\((\d+)\)", layout)
            if bits(dtype):
                found.append(Array(dtype, shape, int(space[1]) if space else 0, layout))
        return found

    @functools.cached_property
    def _operands_end(self) -> int:
        depth = 1
        for end, character in enumerate(self.rest):
            depth += (character == "(") - (character == ")")
            if depth == 0:
                return end
        return len(self.rest)

    @functools.cached_property
    def operands(self) -> list[str]:
        """Names of the operands; the value of a constant, the number of a parameter."""
        inside = re.sub(r"/\*.*?\*/", "", self.rest[:self._operands_end])
        return re.findall(r"%([\w.\-]+)", inside) or re.findall(r"[\w.\-]+", inside)

    @functools.cached_property
    def called(self) -> list[str]:
        """The computations that it runs."""
        attributes = self.rest[self._operands_end:]
        names = _CALLED.findall(attributes)
        for listed in _BRANCHES.findall(attributes):
            names += re.findall(r"%?([\w.\-]+)", listed)
        return names

    @property
    def stored(self) -> int:
        """Bytes of the result that are in the device's memory."""
        return sum(array.padded_bytes for array in self.arrays if array.space == 0)

    @property
    def target(self) -> str:
        """What a custom call calls; "" for other instructions."""
        return (self.attribute(r'custom_call_target="([^"]*)"') or "") if self.opcode == "custom-call" else ""

    @property
    def scope(self) -> str:
        """Where in the model it is, as JAX names it; "" if XLA does not say."""
        return self.attribute(r'op_name="((?:[^"\\]|\\.)*)"') or ""

    def attribute(self, pattern: str) -> str | None:
        """Returns the first group of a pattern found in the rest."""
        found = re.search(pattern, self.rest)
        return found and found[1]


Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of a text by name, each with its instructions by name.

    frames:        names of the Python functions that traced an instruction, the innermost first, by its stack frame
    unknown_trips: number of iterations of a loop whose number is not in the text; None: such a loop is an error
    """

    computations: Mapping[str, Computation]
    entry: str
    frames: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    unknown_trips: int | None = None

    @staticmethod
    def parse(text: str, unknown_trips: int | None = None) -> "Program":
        """Raises ValueError if the text has no entry computation."""
        computations: dict[str, dict[str, Instruction]] = {}
        entry, current, lines = None, None, []
        for line in text.splitlines():
            if current is None:
                if found := _COMPUTATION.match(line):
                    current = computations.setdefault(found[2], {})
                    entry = found[2] if found[1] else entry
            elif _END.match(line):
                _add(current, lines)
                current, lines = None, []
            elif _INSTRUCTION.match(line):
                _add(current, lines)
                lines = [line]
            else:  # an attribute of the instruction goes on, such as the metadata of a Pallas kernel
                lines.append(line)
        if entry is None:
            raise ValueError("This is not the text of a compiled program: it has no ENTRY computation.")
        return Program(computations, entry, _frames(text), unknown_trips)

    def functions(self, instruction: Instruction) -> tuple[str, ...]:
        """Returns the names of the Python functions that traced an instruction, the innermost first; () if unknown."""
        return self.frames.get(instruction.attribute(r"\bstack_frame_id=(\d+)") or "", ())

    @functools.cached_property
    def times(self) -> dict[str, int]:
        """How often each computation runs in one run of the program; every branch of a conditional counts."""
        count = dict.fromkeys(self.computations, 0)

        def visit(name: str, times: int) -> None:
            count[name] += times
            for instruction in self.computations[name].values():
                trips = self.trips(instruction, self.computations[name]) if instruction.opcode == "while" else 1
                for called in instruction.called:
                    visit(called, times * trips)

        visit(self.entry, 1)
        return count

    @functools.cached_property
    def fused(self) -> set[str]:
        """Computations that are part of an instruction: of a fusion, a reduction, a sort."""
        return {called for computation in self.computations.values() for one in computation.values()
                if one.opcode not in RUN_OTHERS for called in one.called}

    def executed(self) -> Iterator[tuple[int, Instruction, Computation]]:
        """Yields (number of executions, instruction, its computation) of what a device runs one after the other."""
        for name, computation in self.computations.items():
            if name not in self.fused and self.times[name]:
                for instruction in computation.values():
                    yield self.times[name], instruction, computation

    def body(self, instruction: Instruction) -> Computation:
        """Returns the first computation that an instruction runs."""
        return self.computations[instruction.called[0]]

    @functools.cached_property
    def _users(self) -> dict[int, dict[str, list[Instruction]]]:
        return {}

    def users(self, computation: Computation, name: str) -> list[Instruction]:
        """Returns the instructions of a computation that have this operand."""
        if id(computation) not in self._users:
            found = self._users[id(computation)] = defaultdict(list)
            for instruction in computation.values():
                for operand in dict.fromkeys(instruction.operands):
                    found[operand].append(instruction)
        return self._users[id(computation)].get(name, [])

    def trips(self, loop: Instruction, around: Computation) -> int:
        """Returns how often the body of a `while` in `around` runs: its known trip count, or what its counter shows.
        That must start at a constant, grow by a constant, and be compared with a third, as in JAX's scans.

        For other loops `unknown_trips`; if that is None, raises ValueError naming the loop.
        """
        if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}'):
            return int(known)
        counted = self._counted(loop, around)
        if counted is not None:
            return counted
        if self.unknown_trips is not None:
            return self.unknown_trips
        raise ValueError(f"The program does not say how often the loop %{loop.name} runs: it has no known trip count, "
                         "and does not count from one constant to another.")

    def _counted(self, loop: Instruction, around: Computation) -> int | None:
        condition, body = (self.computations[loop.attribute(rf"\b{part}=%?([\w.\-]+)")]
                           for part in ("condition", "body"))
        test, result = root(condition), root(body)
        if test is None or result is None or test.opcode != "compare" or "direction=LT" not in test.rest:
            return None
        counter, bound = _source(condition, test.operands[0]), _constant(condition, test.operands[1])
        start = _source(around, loop.operands[0])
        index = int(counter.attribute(r"index=(\d+)") or 0)
        if counter.opcode != "get-tuple-element" or {start.opcode, result.opcode} != {"tuple"}:
            return None
        first, raised = _constant(around, start.operands[index]), _source(body, result.operands[index])
        stride = _constant(body, raised.operands[1]) if raised.opcode == "add" else None
        if None in (bound, first, stride) or stride < 1:
            return None
        return max(0, -(-(bound - first) // stride))


def _add(computation: dict[str, Instruction], lines: list[str]) -> None:
    """Adds the instruction that is written on these lines, if any."""
    if not lines:
        return
    is_root, name, rest = _INSTRUCTION.match("\n".join(lines)).groups()
    if found := _OPCODE.match(rest):
        computation[name] = Instruction(bool(is_root), name, *found.groups())


def _frames(text: str) -> dict[str, tuple[str, ...]]:
    """Reads the tables before the computations: each frame has a location, which has a function, and a parent."""
    head = text[:text.find("\n%")]
    functions = head.partition("\nFunctionNames\n")[2].partition("\n\n")[0]
    names = dict(re.findall(r'^(\d+) "(.*)"$', functions, re.MULTILINE))
    locations = dict(re.findall(r"^(\d+) \{file_name_id=\d+ function_name_id=(\d+)", head, re.MULTILINE))
    parents = {frame: (location, parent) for frame, location, parent in re.findall(
        r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)\}", head, re.MULTILINE)}

    def chain(frame: str) -> Iterator[str]:
        seen: set[str] = set()
        while frame in parents and frame not in seen:  # the outermost frame is its own parent
            seen.add(frame)
            location, frame = parents[frame]
            yield names.get(locations.get(location, ""), "")

    return {frame: tuple(chain(frame)) for frame in parents}


def root(computation: Computation) -> Instruction | None:
    """Returns the instruction whose result is the computation's."""
    return next((instruction for instruction in computation.values() if instruction.root), None)


def _source(computation: Computation, name: str) -> Instruction:
    """Returns the instruction of that name, or the one that it copies."""
    instruction = computation[name]
    while instruction.opcode in ("copy", "bitcast"):
        instruction = computation[instruction.operands[0]]
    return instruction


def _constant(computation: Computation, name: str) -> int | None:
    """Returns the value of a constant integer; None for anything else."""
    source = _source(computation, name)
    return int(source.operands[0]) if source.opcode == "constant" and source.operands[0].isdigit() else None


# ---- between devices ----


def collectives(text: str, mesh: Any) -> list[Collective]:
    """Returns what a compiled program sends between devices, one entry for each array. A collective within one device
    is left out.

    mesh: the `jax.sharding.Mesh` that the program was compiled for

    Where XLA splits a collective into pieces that overlap with other work, they share a channel and are counted once.
    Raises ValueError for a text that is no program, or that names the devices in an unknown way.
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
                found[channel] = [
                    Collective(kind, axes, max(map(len, groups)), array.dtype, array.shape, array.bytes,
                               program.times[name], instruction.scope)
                    for array in _exchanged(kind, instruction, computation)]
    return [collective for pieces in found.values() for collective in pieces]


def crossed(groups: Iterable[Iterable[int]], mesh: Any) -> tuple[str, ...]:
    """Returns the mesh axes along which the positions within any of the groups differ."""
    axes = set()
    for group in groups:
        coordinates = np.unravel_index(list(group), mesh.devices.shape)
        axes |= {name for name, along in zip(mesh.axis_names, coordinates, strict=True) if len(set(along.tolist())) > 1}
    return tuple(name for name in mesh.axis_names if name in axes)


def _exchanged(kind: str, instruction: Instruction, others: Computation) -> list[Array]:
    """Returns the whole arrays of a collective. The start of an asynchronous one returns (operands, results)."""
    if kind == "reduce-scatter":  # its operand is the whole array
        return [array for name in instruction.operands for array in others[name].arrays]
    return _results(instruction)


def _results(instruction: Instruction) -> list[Array]:
    """Returns the arrays that an instruction computes."""
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        count = len(instruction.operands)
        return instruction.arrays[count : 2 * count]
    return instruction.arrays


def _groups(instruction: Instruction) -> list[list[int]]:
    """Returns the groups of devices, as positions in the mesh, that exchange arrays. Raises ValueError for an unknown
    notation."""
    rest = instruction.rest
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest):
        return [_ints(pair) for pair in re.findall(r"\{(\d+,\d+)\}", pairs[1])]
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", rest):
        return [_ints(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    if counted := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest):
        return iota(counted[2]).reshape(_ints(counted[1])).tolist()
    notation = r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\))? \{(['\w,]+)\}"
    if named := re.search(notation, rest):
        return _along(*named.groups())
    raise ValueError(f"mmjax cannot read which devices take part in %{instruction.name}: {rest[:300]}")


def _ints(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def iota(text: str) -> np.ndarray:
    """Returns the array of `[2,2,2]T(1,0,2)`: 0, 1, 2, ... in that shape, transposed."""
    shape, order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    numbers = np.arange(math.prod(_ints(shape))).reshape(_ints(shape))
    return numbers.transpose(_ints(order)) if order else numbers


def _along(mesh: str, devices: str | None, axes: str) -> list[list[int]]:
    """Returns the groups along named axes of a mesh of XLA's: `'a'=2,'b'=4`, `[2,2,2]T(1,0,2)` and `'b'`."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    numbers = iota(devices) if devices else np.arange(math.prod(sizes.values()))
    numbers = numbers.reshape(list(sizes.values()))
    inner = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", axes)]
    outer = [axis for axis in range(len(sizes)) if axis not in inner]
    group_size = math.prod(numbers.shape[axis] for axis in inner)
    return numbers.transpose([*outer, *inner]).reshape(-1, group_size).tolist()


# ---- between a device and its memory ----


def memory_traffic(text: str) -> int:
    """Returns the bytes that one run of a program moves between a device and its memory.

    Every instruction reads its operands and writes its result once, with the padding of their tiles. Of an array that
    an instruction slices, or changes in place, only the slice counts. Arrays in memory closer to the arithmetic units
    cost nothing. The caches of a CPU are ignored.
    """
    program = Program.parse(text)
    return sum(times * traffic(instruction, computation, program)
               for times, instruction, computation in program.executed())


def traffic(instruction: Instruction, others: Computation, program: Program) -> int:
    """Returns the bytes that one execution of an instruction moves to and from the device's memory.

    others: the computation that it is in
    """
    opcode = instruction.opcode
    if opcode in MOVE_NOTHING or opcode.endswith("-done") or instruction.target in NO_TRAFFIC:
        return 0
    if opcode == "copy-start":  # (target, source, context)
        return sum(array.padded_bytes for array in instruction.arrays[:2] if array.space == 0)
    operands = [others[name] for name in instruction.operands if name in others]
    if opcode == "slice-start":  # ((source), target, context)
        return _slice(operands[0], instruction.arrays[1])
    if opcode in SLICES:
        return _slice(operands[0], instruction.arrays[0])
    if opcode in UPDATES:
        update = operands[UPDATES[opcode]]
        return update.stored + (update.arrays[0].padded_bytes if instruction.stored else 0)
    if opcode == "fusion":
        fused = program.body(instruction)
        read = sum(min(operand.stored, _reads(fused, number, program))
                   for number, operand in enumerate(operands) if operand.stored)
        return int(read) + _stored(instruction.arrays, _writes(fused, program))
    results = sum(array.padded_bytes for array in _results(instruction) if array.space == 0)
    return results + sum(operand.stored for operand in operands)


def _stored(results: Sequence[Array], written: Sequence[float]) -> int:
    """Returns the bytes of a fusion's results that it writes to memory, given `_writes`."""
    if len(results) != len(written):
        written = [math.inf] * len(results)
    return int(sum(min(array.padded_bytes, size)
                   for array, size in zip(results, written, strict=True) if array.space == 0))


def _slice(source: Instruction, result: Array) -> int:
    read, written = (result.padded_bytes if space == 0 else 0 for space in (source.arrays[0].space, result.space))
    return read + written


class _Passed(NamedTuple):
    """A parameter as an array of a fused computation.

    name:    of the instruction that has it
    index:   the element of that instruction's tuple; None if it is no tuple
    updated: part of it was overwritten on the way
    """

    name: str
    index: int | None = None
    updated: bool = False


def _reads(fused: Computation, number: int, program: Program) -> float:
    """Returns the bytes of a parameter that a fusion reads; infinite for all of it."""
    total, results = _followed(fused, number, program)
    return total if all(each.updated for each in results) else math.inf


def _followed(fused: Computation, number: int, program: Program) -> tuple[float, list[_Passed]]:
    """Returns (bytes of a parameter that a fused computation reads, the results that are the same array)."""
    parameter = next(one.name for one in fused.values() if one.opcode == "parameter" and one.operands[0] == str(number))
    total, passed, waiting, seen = 0.0, [], [_Passed(parameter)], set()
    while waiting:
        here = waiting.pop()
        if here in seen:
            continue
        seen.add(here)
        if fused[here.name].root:
            passed.append(here)
        for use in program.users(fused, here.name):
            read, onward = _used(use, here, program)
            total += read
            waiting += onward
    return total, passed


def _used(use: Instruction, here: _Passed, program: Program) -> tuple[float, list[_Passed]]:
    """Returns (bytes that an instruction of a fused computation reads of an array, its results that are the array)."""
    opcode, positions = use.opcode, [at for at, operand in enumerate(use.operands) if operand == here.name]
    if opcode == "get-tuple-element":
        same = here.index is None or use.attribute(r"index=(\d+)") == str(here.index)
        return 0, [_Passed(use.name, None, here.updated)] if same else []
    if opcode == "tuple":
        return 0, [_Passed(use.name, at, here.updated) for at in positions]
    if opcode in ELEMENTWISE or "output_to_operand_aliasing" in use.rest:
        return 0, [_Passed(use.name, None, here.updated)]
    if opcode in SLICES and positions == [0]:
        return use.arrays[0].padded_bytes, []
    if opcode in UPDATES and positions == [0]:
        return 0, [_Passed(use.name, None, True)]
    if opcode == "fusion":
        found = [_followed(program.body(use), at, program) for at in positions]
        onward = [_Passed(use.name, each.index, here.updated or each.updated) for _, passed in found for each in passed]
        return sum(read for read, _ in found), onward
    if opcode in KINDS or opcode == "custom-call":  # a piece of a collective, which is counted itself
        return 0, []
    return math.inf, []


def _writes(fused: Computation, program: Program) -> list[float]:
    """Returns the bytes that a fused computation writes of each array of its result; infinite for all of it."""
    result = root(fused)
    if result.opcode == "tuple":
        return [_written(fused, name, program) for name in result.operands]
    if result.opcode == "fusion":
        return _writes(program.body(result), program)
    return [_written(fused, result.name, program)] * len(result.arrays)


def _written(fused: Computation, name: str, program: Program) -> float:
    """Returns the bytes written for one array of the result: of an array that was a parameter, what was changed."""
    total, instruction = 0.0, fused[name]
    while instruction.opcode != "parameter":
        if instruction.opcode == "custom-call":
            return 0
        if instruction.opcode in UPDATES:
            total += fused[instruction.operands[UPDATES[instruction.opcode]]].arrays[0].padded_bytes
        elif instruction.opcode == "get-tuple-element" and fused[instruction.operands[0]].opcode == "fusion":
            index = int(instruction.attribute(r"index=(\d+)"))
            return total + _writes(program.body(fused[instruction.operands[0]]), program)[index]
        elif instruction.opcode == "fusion" and total == 0:
            return _writes(program.body(instruction), program)[0]
        elif instruction.opcode == "fusion":
            return total if _is_view(program.body(instruction)) else math.inf
        elif instruction.opcode not in ("bitcast", "copy"):
            return math.inf
        instruction = fused[instruction.operands[0]]
    return total or math.inf


def _is_view(fused: Computation) -> bool:
    """Returns whether a computation only renames its parameter."""
    return all(one.opcode in ("parameter", *ELEMENTWISE) for one in fused.values())
