"""What a training run needs of devices that nobody has rented yet: memory, operations, traffic, time, and whether it
fits.

The step that `mmjax.training.run` trains is compiled for them as it is, at full size, from shapes alone. What XLA says
of its memory is what it will take; the times are lower bounds, of devices that never wait for anything but the named
wall.
"""

import dataclasses
import itertools
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from mmjax import sharding, trees
from mmjax.batch import Batch, Sample
from mmjax.checkpoints.converted import ConvertedCheckpoint
from mmjax.checkpoints.restore import ModelSpec
from mmjax.config import MeshConfig, RunConfig
from mmjax.cost import flops, hardware, hlo
from mmjax.cost.flops import Flops
from mmjax.cost.hardware import Topology
from mmjax.cost.hlo import Collective
from mmjax.data import packing, text
from mmjax.data.collate import batch_spec
from mmjax.families import FAMILIES, Family, find
from mmjax.training import encode_features, optim, run, steps

GIB = hardware.GIB


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    layout:      what the device's layout adds to the arrays above
    temporaries: activations, gradients and whatever else lives within a step; if the step did not compile for lack of
                 memory, what XLA would have needed
    limit:       what a program may use; None where that is not known
    """

    frozen: int
    trained: int
    optimizer: int
    batch: int
    layout: int
    temporaries: int
    program: int
    limit: int | None

    @property
    def total(self) -> int:
        return (self.frozen + self.trained + self.optimizer + self.batch + self.layout + self.temporaries
                + self.program)

    @property
    def fits(self) -> bool:
        return self.limit is None or self.total <= self.limit


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` found.

    rows, length: of a batch over all devices, in rows and tokens
    parameters:   {"trained": count, "frozen": count}
    compiled:     seconds that it took; None if the step needs more memory than there is, and then `collectives` and
                  `traffic`, the bytes that a device moves between itself and its memory in a step, are not known
    seconds:      that a step takes at least, by what it waits for: "compute", "memory", "links"
    notes:        what was assumed
    advice:       what to change if it does not fit
    """

    family: str
    source: str
    topology: str
    mesh: dict[str, int]
    rows: int
    length: int
    parameters: dict[str, int]
    memory: Memory
    flops: Flops
    compiled: float | None
    collectives: list[Collective] | None
    traffic: int | None
    seconds: dict[str, float]
    notes: list[str]
    advice: list[str]

    @property
    def wall(self) -> str | None:
        """What a step waits for."""
        return max(self.seconds, key=self.seconds.get) if self.seconds else None

    def to_json(self) -> dict[str, Any]:
        made = dataclasses.asdict(self)
        made["memory"] |= {"total": self.memory.total, "fits": self.memory.fits}
        made["flops"] |= {"model": self.flops.model, "executed": self.flops.executed}
        for told, one in zip(made["collectives"] or (), self.collectives or (), strict=True):
            told["sent"] = one.sent
        return made | {"wall": self.wall}


def plan(config: RunConfig, where: str, preset: str | None = None, length: int | None = None) -> Plan:
    """Compiles the training step of a run for the devices of a topology (see `mmjax.cost.hardware.find`).

    preset: an architecture of the config's family; None for that of its checkpoint, or if that does not exist for the
            preset of the checkpoint folder's name
    length: tokens of a row; None for the longest that the text settings allow

    Raises ValueError for a configuration, an architecture, a topology or a mesh that cannot work, and for a step that
    XLA cannot compile.
    """
    run.check(config)
    place = hardware.find(where)
    source, notes = architecture(config, preset)
    length, said = (length, []) if length else row_length(config, source)
    notes += said
    mesh = sharding.make_mesh(config.mesh, place.devices)
    ways = sharding.num_shards(mesh, "batch")
    if config.data.batch_size % ways:
        raise ValueError(f"data.batch_size = {config.data.batch_size} cannot be cut into {ways} (mesh "
                         f"{dict(mesh.shape)}); {math.ceil(config.data.batch_size / ways) * ways} would work.")
    step = AbstractStep.of(config, source, mesh, length)
    count = flops.train_step(step.module, step.state.params, step.frozen, step.batch)
    begun = time.monotonic()
    compiled, needed = _compile(step)
    seconds = time.monotonic() - begun
    memory = _memory(step.held, compiled, needed, place.memory)
    words = compiled and compiled.as_text()
    found, traffic = (hlo.collectives(words, mesh), hlo.memory_traffic(words)) if words else (None, None)
    sizes = {kind: sum(leaf.size for leaf in jax.tree.leaves(tree, is_leaf=_is_matrix))
             for kind, tree in (("trained", step.state.params), ("frozen", step.frozen))}
    made = Plan(source.family.name, str(source.folder), where, dict(mesh.shape), config.data.batch_size, length, sizes,
                memory, count, None if compiled is None else seconds, found, traffic,
                least(place, mesh.size, count, found, traffic), notes, [])
    return made if memory.fits else dataclasses.replace(made, advice=advice(config, source, place, made))


def architecture(config: RunConfig, preset: str | None) -> tuple[ConvertedCheckpoint, list[str]]:
    """What a run trains, and a line for what had to be guessed.

    Raises ValueError if there is neither a checkpoint nor a preset, or for a phase or image size that does not exist.
    """
    folder, notes = Path(config.weights.checkpoint), []
    if preset is None and folder.exists():
        source = ConvertedCheckpoint.open(folder)
    else:
        name = preset or folder.name
        asked = f"preset = {preset!r}" if preset else f"There is no checkpoint {folder}"
        family = _family_of(name, config.weights.family, asked)
        if preset is None:
            notes.append(f"{folder} is not there; planned for the preset {name}.")
        source = ConvertedCheckpoint(Path(name), family, family.presets[name], config.text, {}, ())
    return dataclasses.replace(source, config=run.architecture(source, config), text=config.text), notes


def _family_of(preset: str, family: str, asked: str) -> Family:
    """The family that has a preset of that name; `family` names the one to look at, "" all of them.

    Raises ValueError, which begins with `asked`, if none or several have it.
    """
    families = [find(family)] if family else list(FAMILIES.values())
    found = [each for each in families if preset in each.presets]
    if len(found) > 1:
        raise ValueError(f"{asked}: several families have a preset {preset!r}: {', '.join(map(str, found))}. Name one "
                         "of them with --weights.family.")
    if not found:
        known = dict.fromkeys(name for each in families for name in each.presets)
        raise ValueError(f"{asked}: name one of the presets{f' of {find(family)}' if family else ''} with --preset: "
                         f"{', '.join(known)}.")
    return found[0]


def row_length(config: RunConfig, source: ConvertedCheckpoint) -> tuple[int, list[str]]:
    """Tokens of the longest row that the text settings allow, rounded up as batches are; and how it was found.

    Without a tokenizer a prompt is taken to have a token a byte. Questions that come with the data are not known here:
    their rows may be longer.
    """
    if config.data.pack_length is not None:
        return config.data.pack_length, []
    settings, multiple = config.text, config.data.length_multiple
    if settings.joint:
        return _up(settings.max_txt_len, multiple), []
    known = (source.folder / "tokenizer").is_dir()
    tokenizer = source.tokenizer if known else _Bytes()
    model = source.config

    def count(words: str) -> int:
        images = words.count(text.PLACEHOLDER) if words else int(model.image_size is not None)
        sample = Sample(images=[""] * images, prompt=words, answer="")
        return len(text.prompt_slots(sample, tokenizer, settings, model.image_tokens))

    prompt = max(map(count, config.data.prompts or ("",)))
    length = _up(1 + prompt + settings.max_txt_len, multiple)
    how = "" if known or not config.data.prompts else ", counted in bytes for want of a tokenizer"
    return length, [f"Rows of {length} tokens: 1 + {prompt} of the longest prompt{how} + {settings.max_txt_len} of the "
                    f"answer, rounded up to a multiple of {multiple}."]


class _Bytes:
    """In place of a tokenizer: the most tokens that one can make of a text."""

    pad = 0

    def encode(self, words: str) -> list[int]:
        return [0, *words.encode()]


def _up(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple


@dataclasses.dataclass(frozen=True)
class AbstractStep:
    """A training step and its arguments as shapes on a mesh; nothing is allocated."""

    module: Any
    call: Any
    state: steps.TrainState
    frozen: Any
    batch: Batch
    mesh: Any

    @staticmethod
    def of(config: RunConfig, source: ConvertedCheckpoint, mesh: Any, length: int) -> "AbstractStep":
        """As `mmjax.training.run.train` would call it. Raises ValueError for parameters that the mesh cannot divide."""
        spec = run.model_spec(config, source, mesh)
        params = trees.unflatten(spec.param_specs(run.loaded_by(config, source.family)))
        trained, frozen = trees.split(params, trees.mask(params, spec.trained))
        optimizer = optim.optimizer(config.optim)
        return AbstractStep(spec.module, steps.train_step(spec.module, optimizer),
                            _state(trained, optimizer, config.seed, mesh), frozen, batch_of(config, spec, length), mesh)

    @property
    def held(self) -> dict[str, int]:
        """Bytes of one device for each kind of argument; what the state has beside parameters is the optimizer's."""
        return {"frozen": nbytes(self.frozen), "trained": nbytes(self.state.params),
                "optimizer": nbytes(dataclasses.replace(self.state, params=None)), "batch": nbytes(self.batch)}


def _state(trained: Any, optimizer: optax.GradientTransformation, seed: int, mesh: Any) -> steps.TrainState:
    """A fresh state: what the optimizer has for a parameter lies where that lies, all else everywhere."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def whole(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)

    def beside(leaf: Any, param: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=param.sharding)

    state = jax.eval_shape(lambda trained: steps.start(trained, optimizer, seed), trained)
    opt_state = optax.tree_map_params(optimizer, beside, state.opt_state, trained, transform_non_params=whole)
    return steps.TrainState(whole(state.step), trained, opt_state, whole(state.key))


def batch_of(config: RunConfig, spec: ModelSpec, length: int) -> Batch:
    """The batch that the pipeline feeds, as shapes: rows with an image each, or the lists of packed rows' images."""
    groups = packing.Groups.of(config.data, sharding.num_shards(spec.mesh, "batch"))
    feature = None
    if config.data.features:
        feature = jax.ShapeDtypeStruct(encode_features.feature_shape(spec), jnp.dtype(config.weights.dtype))
    return batch_spec(spec.source.config, config.data.batch_size, length, sharding.batch_sharding(spec.mesh), groups,
                      feature)


def _is_matrix(leaf: Any) -> bool:
    return hasattr(leaf, "shape")


def nbytes(tree: Any) -> int:
    """Of one device, for a tree of shapes with places."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _memory(held: dict[str, int], compiled: Any, needed: int, limit: int | None) -> Memory:
    """held: bytes of the arguments; compiled, needed: what `_compile` gives"""
    arguments = sum(held.values())
    if compiled is None:
        return Memory(**held, layout=0, temporaries=max(needed - arguments, 0), program=0, limit=limit)
    told = compiled.memory_analysis()
    return Memory(**held, layout=max(told.argument_size_in_bytes - arguments, 0),
                  temporaries=told.temp_size_in_bytes + told.output_size_in_bytes - told.alias_size_in_bytes,
                  program=told.generated_code_size_in_bytes, limit=limit)


def _compile(step: AbstractStep) -> tuple[Any, int]:
    """The compiled step and 0; or None and the bytes that it would need, if that is more than there are.

    Raises ValueError with XLA's words if it cannot compile the step for another reason.
    """
    with sharding.use_mesh(step.mesh):
        lowered = step.call.lower(step.state, step.frozen, step.batch)
    try:
        return lowered.compile(), 0
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"\((\d+(?:\.\d+)?)([KMG])\) exceeds available", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not needed:
            raise ValueError(f"XLA cannot compile this step for these devices: {error}") from error
        return None, int(float(needed[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[needed[2]])


def least(place: Topology, devices: int, count: Flops, found: list[Collective] | None,
          traffic: int | None) -> dict[str, float]:
    """Seconds that a step takes at least if it waits for nothing but its arithmetic, the memory, or the links between
    devices; without figures of the chip nothing."""
    if place.chip is None:
        return {}
    seconds = {"compute": count.executed / devices / place.chip.flops}
    if traffic is not None:
        seconds["memory"] = traffic / place.chip.bandwidth
    if found:
        seconds["links"] = sum(one.sent for one in found) / place.links
    return seconds


# ---- what to change ----


def advice(config: RunConfig, source: ConvertedCheckpoint, place: Topology, made: Plan) -> list[str]:
    """Changes with which a plan fits by arithmetic, the fewest that do.

    What a device holds is computed as for the plan itself; temporaries are taken to grow with the rows of a device and
    not to change otherwise. Only planning again tells.
    """
    lines = []
    if not config.remat:
        lines.append(f"--remat: of the {_gib(made.memory.temporaries)} of temporaries most are activations of layers, "
                     "which would be computed again instead of kept.")
    found = _changes(config, source, place, made)
    lines += [f"{options}: about {_gib(total)} of {_gib(made.memory.limit)}." for options, total in found]
    if not lines:
        held = made.memory.frozen + made.memory.trained + made.memory.optimizer
        return [f"By arithmetic no mesh, batch size or int8 makes it fit: weights and optimizer alone are {_gib(held)} "
                f"of a device. Take more or larger chips than {made.topology}."]
    return [*lines, "These are estimates: plan again with them."]


def _changes(config: RunConfig, source: ConvertedCheckpoint, place: Topology, made: Plan) -> list[tuple[str, int]]:
    """(options, bytes that a device then needs) for each smallest set of options that suffices."""
    ways = made.mesh["data"] * made.mesh["fsdp"]
    rows, before = made.rows // ways, MeshConfig(**made.mesh)
    meshes = [MeshConfig(ways // fsdp, fsdp, made.mesh["tensor"])
              for fsdp in range(made.mesh["fsdp"], ways + 1) if ways % fsdp == 0]
    dtypes = dict.fromkeys((config.weights.frozen_dtype, "int8"))
    found: dict[tuple[str, ...], tuple[str, int]] = {}
    for dtype, mesh in itertools.product(dtypes, meshes):
        weights = dataclasses.replace(config.weights, frozen_dtype=dtype)
        held = _held(dataclasses.replace(config, weights=weights, mesh=mesh), source, place, made.length)
        if held is None:
            continue
        fixed = held + made.memory.program
        fewer = min(rows, (made.memory.limit - fixed) * rows // max(made.memory.temporaries, 1))
        if fewer < 1:
            continue
        options = {"mesh": f"--mesh.data {mesh.data} --mesh.fsdp {mesh.fsdp}" if mesh != before else "",
                   "rows": f"--data.batch-size {fewer * ways}" if fewer < rows else "",
                   "dtype": "--weights.frozen-dtype int8" if dtype != config.weights.frozen_dtype else ""}
        if kinds := tuple(kind for kind, option in options.items() if option):
            found.setdefault(kinds, (" ".join(filter(None, options.values())),
                                     fixed + made.memory.temporaries * fewer // rows))
    fewest = min(map(len, found), default=0)
    return [change for kinds, change in found.items() if len(kinds) == fewest]


def _held(config: RunConfig, source: ConvertedCheckpoint, place: Topology, length: int) -> int | None:
    """Bytes of all arguments on a device; None where the mesh cannot divide the parameters."""
    try:
        step = AbstractStep.of(config, source, sharding.make_mesh(config.mesh, place.devices), length)
    except ValueError:
        return None
    return sum(step.held.values())


# ---- showing it ----


def show(made: Plan, console: Console) -> None:
    """The plan as tables."""
    sizes, mesh = made.parameters, " ".join(f"{name}={size}" for name, size in made.mesh.items())
    console.print(f"{made.family} of {made.source}: {sizes['trained']:,} parameters trained, "
                  f"{sizes['frozen']:,} frozen", highlight=False)
    console.print(f"on {made.topology}, {math.prod(made.mesh.values())} device(s) ({mesh}); batch {made.rows} x "
                  f"{made.length} tokens; " + ("not compiled" if made.compiled is None else
                                               f"compiled in {made.compiled:.0f} s"), highlight=False)
    for note in made.notes:
        console.print(note, highlight=False)
    for title, table in (_memory_table(made.memory), _flops_table(made.flops), *_traffic_tables(made)):
        console.print(f"\n{title}", highlight=False, style="bold")
        console.print(table)
    for line in made.advice:
        console.print(line, highlight=False)


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _unit(largest: float, units: dict[str, float]) -> tuple[str, float]:
    """The largest unit that a number has at least one of; else the smallest."""
    return next(((name, size) for name, size in units.items() if largest >= size), list(units.items())[-1])


def _memory_table(memory: Memory) -> tuple[str, Table]:
    unit, size = _unit(memory.total, {"GiB": GIB, "MiB": 2**20, "KiB": 2**10})
    table = _table("", unit)
    for name, held in (("frozen weights", memory.frozen), ("trained weights", memory.trained),
                       ("optimizer", memory.optimizer), ("batch", memory.batch), ("layout", memory.layout),
                       ("activations and temporaries", memory.temporaries), ("program", memory.program)):
        table.add_row(name, f"{held / size:,.3f}")
    table.add_row("total", f"{memory.total / size:,.3f}", style="bold")
    if memory.limit is not None:
        left = memory.limit - memory.total
        table.add_row("headroom" if memory.fits else "too much", f"{abs(left) / size:,.3f}",
                      style="green" if memory.fits else "red")
        table.add_row("there is", f"{memory.limit / size:,.3f}")
    return "Memory of a device", table


def _flops_table(count: Flops) -> tuple[str, Table]:
    unit, size = _unit(count.model, {"10¹²": 1e12, "10⁹": 1e9, "10⁶": 1e6})
    table = _table("", "forward", "backward", "recomputed")
    columns = (count.forward, count.backward, count.recomputed)
    for part in count.parts:
        table.add_row(part, *(f"{column.get(part, 0) / size:,.3f}" for column in columns))
    table.add_row("all", *(f"{sum(column.values()) / size:,.3f}" for column in columns), style="bold")
    return f"Operations of a step, in {unit}", table


def _traffic_tables(made: Plan) -> Iterator[tuple[str, Table]]:
    if made.collectives is not None:
        sent = by_kind(made.collectives)
        unit, scale = _unit(max(sent.values(), default=0), {"GB": 1e9, "MB": 1e6, "kB": 1e3})
        table = _table("", "along", "dtype", unit)
        for (kind, axes, dtype), size in sent.items():
            table.add_row(kind, ", ".join(axes), dtype, f"{size / scale:,.3f}")
        if not sent:
            table.add_row("nothing", "", "", "")
        yield "Between devices, sent by each in a step", table
    if made.seconds:
        table = _table("if it waits for", "ms")
        for name, seconds in made.seconds.items():
            table.add_row(name, f"{seconds * 1e3:,.1f}", style="bold" if name == made.wall else "")
        yield "A step takes at least", table


def by_kind(found: list[Collective]) -> dict[tuple[str, tuple[str, ...], str], int]:
    """`{(kind, axes, dtype): bytes that a device sends in a step}`, the most first."""
    total: dict[tuple[str, tuple[str, ...], str], int] = {}
    for one in found:
        key = one.kind, one.axes, one.dtype
        total[key] = total.get(key, 0) + one.sent
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
