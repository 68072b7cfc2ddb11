"""What a training run needs on devices that need not be present: memory, operations, traffic, time, and whether it
fits.

The step of `mmjax.training.run` is compiled for them at full size, from shapes alone. The memory is what XLA reports.
The times are the compiler's own estimate, and lower bounds for a step that is limited by one resource alone.
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
from mmjax.cost import estimate, flops, hardware, hlo
from mmjax.cost.flops import Flops
from mmjax.cost.hardware import Topology
from mmjax.cost.hlo import Collective
from mmjax.data import collate, packing, text
from mmjax.families import FAMILIES, Family, find
from mmjax.models import remat
from mmjax.training import encode_features, optim, run, steps

GIB = hardware.GIB


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    layout:      padding of the arrays above in the device's memory
    temporaries: activations, gradients and everything else that is allocated within a step; if the step did not compile
                 for lack of memory, what XLA would have needed
    limit:       what a program may use; None if unknown
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
    """The result of `plan`.

    rows, length: of a batch over all devices, in rows and tokens
    parameters:   {"trained": count, "frozen": count}
    compiled:     seconds of the compilation; None if the step needs more memory than there is, and then `collectives`,
                  `traffic` and `estimate` are unknown
    traffic:      bytes that a device moves to and from its memory in a step
    seconds:      lower bounds of a step's time, by resource: "compute", "memory", "links"
    estimate:     seconds of a step by the compiler's estimate, see `mmjax.cost.estimate`; None if it makes none
    notes:        assumptions
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
    estimate: float | None
    notes: list[str]
    advice: list[str]

    @property
    def bottleneck(self) -> str | None:
        """The resource with the largest lower bound."""
        return max(self.seconds, key=self.seconds.get) if self.seconds else None

    def to_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        values["memory"] |= {"total": self.memory.total, "fits": self.memory.fits}
        values["flops"] |= {"model": self.flops.model, "executed": self.flops.executed}
        for entry, collective in zip(values["collectives"] or (), self.collectives or (), strict=True):
            entry["sent"] = collective.sent
        return values | {"bottleneck": self.bottleneck}


def plan(config: RunConfig, topology_name: str, preset: str | None = None, length: int | None = None) -> Plan:
    """Compiles the training step of a run for the devices of a topology (see `mmjax.cost.hardware.find`).

    preset: an architecture of the config's family; None: that of its checkpoint or, if that does not exist, the preset
            with the checkpoint folder's name
    length: tokens of a row; None: the largest number that the text settings allow

    Raises ValueError for a configuration, an architecture, a topology or a mesh that cannot work, and for a step that
    XLA cannot compile.
    """
    run.check(config)
    topology = hardware.find(topology_name)
    source, notes = architecture(config, preset)
    length, length_notes = (length, []) if length else row_length(config, source)
    notes += length_notes
    mesh = sharding.make_mesh(config.mesh, topology.devices)
    shards = sharding.num_shards(mesh, "batch")
    if config.data.batch_size % shards:
        raise ValueError(f"data.batch_size = {config.data.batch_size} cannot be cut into {shards} (mesh "
                         f"{dict(mesh.shape)}); {math.ceil(config.data.batch_size / shards) * shards} would work.")
    step = AbstractStep.of(config, source, mesh, length)
    count = flops.train_step(step.module, step.state.params, step.frozen, step.batch)
    start = time.monotonic()
    compiled, needed = _compile(step)
    seconds = None if compiled is None else time.monotonic() - start
    memory = _memory(step.held, compiled, needed, topology.memory)
    found, traffic, estimated = None, None, None
    if compiled:
        found, traffic, estimated, kernel_notes = _read(compiled.as_text(), mesh, topology)
        notes += kernel_notes
    sizes = {kind: sum(leaf.size for leaf in jax.tree.leaves(tree, is_leaf=_is_matrix))
             for kind, tree in (("trained", step.state.params), ("frozen", step.frozen))}
    result = Plan(source.family.name, str(source.folder), topology_name, dict(mesh.shape), config.data.batch_size,
                  length, sizes, memory, count, seconds, found, traffic,
                  lower_bounds(topology, mesh.size, count, found, traffic), estimated, notes, [])
    return result if memory.fits else dataclasses.replace(result, advice=advice(config, source, topology, result))


def _read(text: str, mesh: Any, topology: Topology) -> tuple[list[Collective], int, float | None, list[str]]:
    """Returns a compiled step's collectives, a device's memory traffic in bytes, the compiler's estimate in seconds,
    and lines about its kernels."""
    collectives, traffic = hlo.collectives(text, mesh), hlo.memory_traffic(text)
    if topology.chip is None:
        return collectives, traffic, None, []
    found = estimate.estimate(text, topology.chip)
    notes = [estimate.RULE] if found.kernel_flops else []
    if found.uncounted:
        notes.append(f"The estimate leaves out kernels whose operations are unknown: {', '.join(found.uncounted)}.")
    return collectives, traffic, found.seconds or None, notes


def architecture(config: RunConfig, preset: str | None) -> tuple[ConvertedCheckpoint, list[str]]:
    """Returns the checkpoint with the architecture that a run trains, and lines about what was assumed.

    Raises ValueError if there is neither a checkpoint nor a preset, or for a phase or image size that does not exist.
    """
    folder, notes = Path(config.weights.checkpoint), []
    if preset is None and folder.exists():
        source = ConvertedCheckpoint.open(folder)
    else:
        name = preset or folder.name
        reason = f"preset = {preset!r}" if preset else f"There is no checkpoint {folder}"
        family = _family_of(name, config.weights.family, reason)
        if preset is None:
            notes.append(f"{folder} does not exist; planned for the preset {name}.")
        source = ConvertedCheckpoint(Path(name), family, family.presets[name], config.text, {}, ())
    source = dataclasses.replace(source, config=run.architecture(source, config), text=config.text)
    collate.check_model(config.data, source.config)
    return source, notes


def _family_of(preset: str, family: str, reason: str) -> Family:
    """Returns the family with a preset of that name; `family` names the one to search, "" all of them.

    Raises ValueError, which begins with `reason`, if none or several have it.
    """
    families = [find(family)] if family else list(FAMILIES.values())
    found = [each for each in families if preset in each.presets]
    if len(found) > 1:
        raise ValueError(f"{reason}: several families have a preset {preset!r}: {', '.join(map(str, found))}. Name one "
                         "of them with --weights.family.")
    if not found:
        known = dict.fromkeys(name for each in families for name in each.presets)
        raise ValueError(f"{reason}: name one of the presets{f' of {find(family)}' if family else ''} with --preset: "
                         f"{', '.join(known)}.")
    return found[0]


def row_length(config: RunConfig, source: ConvertedCheckpoint) -> tuple[int, list[str]]:
    """Returns the tokens of the longest row that the text settings allow, rounded up as batches are, and lines about
    how it was computed.

    Without a tokenizer each byte of a prompt counts as a token. Questions that are part of the data are unknown here;
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

    def count(prompt: str) -> int:
        images = prompt.count(text.PLACEHOLDER) if prompt else int(model.image_size is not None)
        sample = Sample(images=[""] * images, prompt=prompt, answer="")
        return len(text.prompt_slots(sample, tokenizer, settings, model.image_tokens))

    prompt = max(map(count, config.data.prompts or ("",)))
    length = _up(1 + prompt + settings.max_txt_len, multiple)
    how = "" if known or not config.data.prompts else ", counted in bytes because there is no tokenizer"
    return length, [f"Rows of {length} tokens: 1 + {prompt} of the longest prompt{how} + {settings.max_txt_len} of the "
                    f"answer, rounded up to a multiple of {multiple}."]


class _Bytes:
    """A stand-in for a tokenizer that returns the largest number of tokens a text can have."""

    pad = 0

    def encode(self, text: str) -> list[int]:
        return [0, *text.encode()]


def _up(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple


@dataclasses.dataclass(frozen=True)
class AbstractStep:
    """A training step and its arguments on a mesh, as shapes; nothing is allocated."""

    module: Any
    call: Any
    state: steps.TrainState
    frozen: Any
    batch: Batch
    mesh: Any

    @staticmethod
    def of(config: RunConfig, source: ConvertedCheckpoint, mesh: Any, length: int) -> "AbstractStep":
        """Returns the step as `mmjax.training.run.train` calls it. Raises ValueError if the mesh cannot divide a
        parameter."""
        spec = run.model_spec(config, source, mesh)
        params = trees.unflatten(spec.param_specs(run.loaded_by(config, source.family)))
        trained, frozen = trees.split(params, trees.mask(params, spec.trained))
        optimizer = optim.optimizer(config.optim, source.config.llm)
        return AbstractStep(spec.module, steps.train_step(spec.module, optimizer),
                            _state(trained, optimizer, config.seed, mesh), frozen, batch_of(config, spec, length), mesh)

    @property
    def held(self) -> dict[str, int]:
        """Bytes of one device for each kind of argument; the state without its parameters is the optimizer's."""
        return {"frozen": nbytes(self.frozen), "trained": nbytes(self.state.params),
                "optimizer": nbytes(dataclasses.replace(self.state, params=None)), "batch": nbytes(self.batch)}


def _state(trained: Any, optimizer: optax.GradientTransformation, seed: int, mesh: Any) -> steps.TrainState:
    """Returns a fresh state: the optimizer's arrays for a parameter have its sharding, all others are replicated."""
    replicated = NamedSharding(mesh, PartitionSpec())

    def whole(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)

    def like(leaf: Any, param: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=param.sharding)

    state = jax.eval_shape(lambda trained: steps.start(trained, optimizer, seed), trained)
    opt_state = optax.tree_map_params(optimizer, like, state.opt_state, trained, transform_non_params=whole)
    return steps.TrainState(whole(state.step), trained, opt_state, whole(state.key))


def batch_of(config: RunConfig, spec: ModelSpec, length: int) -> Batch:
    """Returns the batch that the pipeline feeds, as shapes: rows with an image each, or the lists of packed rows."""
    groups = packing.Groups.of(config.data, sharding.num_shards(spec.mesh, "batch"))
    feature = None
    if config.data.features:
        feature = jax.ShapeDtypeStruct(encode_features.feature_shape(spec), jnp.dtype(config.weights.dtype))
    return collate.batch_spec(spec.source.config, config.data.batch_size, length, sharding.batch_sharding(spec.mesh),
                              groups, feature)


def _is_matrix(leaf: Any) -> bool:
    return hasattr(leaf, "shape")


def nbytes(tree: Any) -> int:
    """Returns the bytes of one device, for a tree of shapes with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _memory(held: dict[str, int], compiled: Any, needed: int, limit: int | None) -> Memory:
    """held: bytes of the arguments; compiled, needed: the result of `_compile`"""
    arguments = sum(held.values())
    if compiled is None:
        return Memory(**held, layout=0, temporaries=max(needed - arguments, 0), program=0, limit=limit)
    sizes = compiled.memory_analysis()
    return Memory(**held, layout=max(sizes.argument_size_in_bytes - arguments, 0),
                  temporaries=sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
                  program=sizes.generated_code_size_in_bytes, limit=limit)


def _compile(step: AbstractStep) -> tuple[Any, int]:
    """Returns the compiled step and 0; or None and the bytes that it would need, if that is more than there are.

    Raises ValueError with XLA's message if it cannot compile the step for another reason.
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


def lower_bounds(topology: Topology, devices: int, count: Flops, found: list[Collective] | None,
                 traffic: int | None) -> dict[str, float]:
    """Returns the seconds of a step that is limited by its arithmetic alone, by the memory, and by the links between
    devices; {} if the chip's figures are unknown."""
    if topology.chip is None:
        return {}
    seconds = {"compute": count.executed / devices / topology.chip.flops}
    if traffic is not None:
        seconds["memory"] = traffic / topology.chip.bandwidth
    if found:
        seconds["links"] = sum(one.sent for one in found) / topology.links
    return seconds


# ---- what to change ----


def advice(config: RunConfig, source: ConvertedCheckpoint, topology: Topology, plan: Plan) -> list[str]:
    """Returns lines with the smallest sets of changes that should make a plan fit.

    The arguments of a step are computed exactly; temporaries are assumed to grow with the rows of a device and not to
    depend on anything else, so a new plan is needed to be sure.
    """
    lines = []
    if config.remat not in (True, "full"):
        less = list(itertools.dropwhile(lambda name: name != (config.remat or "none"), remat.NAMES))[1:]
        lines.append(f"--remat {' or '.join(less)}: of the {_gib(plan.memory.temporaries)} of temporaries most are "
                     "activations of layers, which would be recomputed instead of saved.")
    found = _changes(config, source, topology, plan)
    lines += [f"{options}: about {_gib(total)} of {_gib(plan.memory.limit)}." for options, total in found]
    if not lines:
        held = plan.memory.frozen + plan.memory.trained + plan.memory.optimizer
        return [f"By this estimate no mesh, batch size or int8 makes it fit: weights and optimizer alone need "
                f"{_gib(held)} on each device. Take more or larger chips than {plan.topology}."]
    return [*lines, "These are estimates: plan again with them."]


def _changes(config: RunConfig, source: ConvertedCheckpoint, topology: Topology, plan: Plan) -> list[tuple[str, int]]:
    """Returns (options, bytes that a device then needs) for each of the smallest sufficient sets of options."""
    shards = plan.mesh["data"] * plan.mesh["fsdp"]
    rows, before = plan.rows // shards, MeshConfig(**plan.mesh)
    meshes = [MeshConfig(shards // fsdp, fsdp, plan.mesh["tensor"])
              for fsdp in range(plan.mesh["fsdp"], shards + 1) if shards % fsdp == 0]
    dtypes = dict.fromkeys((config.weights.frozen_dtype, "int8"))
    found: dict[tuple[str, ...], tuple[str, int]] = {}
    for dtype, mesh in itertools.product(dtypes, meshes):
        weights = dataclasses.replace(config.weights, frozen_dtype=dtype)
        held = _held(dataclasses.replace(config, weights=weights, mesh=mesh), source, topology, plan.length)
        if held is None:
            continue
        fixed = held + plan.memory.program
        fewer = min(rows, (plan.memory.limit - fixed) * rows // max(plan.memory.temporaries, 1))
        if fewer < 1:
            continue
        options = {"mesh": f"--mesh.data {mesh.data} --mesh.fsdp {mesh.fsdp}" if mesh != before else "",
                   "rows": f"--data.batch-size {fewer * shards}" if fewer < rows else "",
                   "dtype": "--weights.frozen-dtype int8" if dtype != config.weights.frozen_dtype else ""}
        if kinds := tuple(kind for kind, option in options.items() if option):
            found.setdefault(kinds, (" ".join(filter(None, options.values())),
                                     fixed + plan.memory.temporaries * fewer // rows))
    fewest = min(map(len, found), default=0)
    return [change for kinds, change in found.items() if len(kinds) == fewest]


def _held(config: RunConfig, source: ConvertedCheckpoint, topology: Topology, length: int) -> int | None:
    """Returns the bytes of all arguments on a device; None if the mesh cannot divide the parameters."""
    try:
        step = AbstractStep.of(config, source, sharding.make_mesh(config.mesh, topology.devices), length)
    except ValueError:
        return None
    return sum(step.held.values())


# ---- output ----


def show(plan: Plan, console: Console) -> None:
    """Prints the plan as tables."""
    sizes, mesh = plan.parameters, " ".join(f"{name}={size}" for name, size in plan.mesh.items())
    console.print(f"{plan.family} of {plan.source}: {sizes['trained']:,} parameters trained, "
                  f"{sizes['frozen']:,} frozen", highlight=False)
    console.print(f"on {plan.topology}, {math.prod(plan.mesh.values())} device(s) ({mesh}); batch {plan.rows} x "
                  f"{plan.length} tokens; " + ("not compiled" if plan.compiled is None else
                                               f"compiled in {plan.compiled:.0f} s"), highlight=False)
    for note in plan.notes:
        console.print(note, highlight=False)
    for title, table in (_memory_table(plan.memory), _flops_table(plan.flops), *_traffic_tables(plan)):
        console.print(f"\n{title}", highlight=False, style="bold")
        console.print(table)
    console.print(f"\n{summary(plan)}", highlight=False, soft_wrap=True)
    for line in plan.advice:
        console.print(line, highlight=False)


def summary(plan: Plan) -> str:
    """Returns the line that the configs quote: memory, the largest lower bound of a step's time, and the estimate."""
    limit = "" if plan.memory.limit is None else f" of {plan.memory.limit / GIB:.2f}"
    parts = [f"{plan.memory.total / GIB:.2f}{limit} GiB a device"]
    if plan.compiled is None:
        return f"{parts[0]}; it does not compile"
    if plan.seconds:
        parts.append(f"a step takes {1e3 * plan.seconds[plan.bottleneck]:,.0f} ms at least ({plan.bottleneck})")
    if plan.estimate is not None:
        parts[-1] += f", {1e3 * plan.estimate:,.0f} ms by the compiler's estimate"
    return "; ".join(parts)


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _unit(largest: float, units: dict[str, float]) -> tuple[str, float]:
    """Returns the name and size of the largest unit that is at most `largest`, or else of the smallest unit."""
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
        table.add_row("headroom" if memory.fits else "missing", f"{abs(left) / size:,.3f}",
                      style="green" if memory.fits else "red")
        table.add_row("limit", f"{memory.limit / size:,.3f}")
    return "Memory of a device", table


def _flops_table(count: Flops) -> tuple[str, Table]:
    unit, size = _unit(count.model, {"10¹²": 1e12, "10⁹": 1e9, "10⁶": 1e6})
    table = _table("", "forward", "backward", "recomputed")
    columns = (count.forward, count.backward, count.recomputed)
    for part in count.parts:
        table.add_row(part, *(f"{column.get(part, 0) / size:,.3f}" for column in columns))
    table.add_row("all", *(f"{sum(column.values()) / size:,.3f}" for column in columns), style="bold")
    return f"Operations of a step, in {unit}", table


def _traffic_tables(plan: Plan) -> Iterator[tuple[str, Table]]:
    if plan.collectives is not None:
        sent = by_kind(plan.collectives)
        unit, scale = _unit(max(sent.values(), default=0), {"GB": 1e9, "MB": 1e6, "kB": 1e3})
        table = _table("", "along", "dtype", unit)
        for (kind, axes, dtype), size in sent.items():
            table.add_row(kind, ", ".join(axes), dtype, f"{size / scale:,.3f}")
        if not sent:
            table.add_row("nothing", "", "", "")
        yield "Sent by each device in a step", table
    if plan.seconds:
        table = _table("", "ms")
        for name, seconds in plan.seconds.items():
            table.add_row(f"at least, for {name}", f"{seconds * 1e3:,.1f}",
                          style="bold" if name == plan.bottleneck else "")
        if plan.estimate is not None:
            table.add_row("by the compiler's estimate, links excluded", f"{plan.estimate * 1e3:,.1f}")
        yield "Time of a step", table


def by_kind(found: list[Collective]) -> dict[tuple[str, tuple[str, ...], str], int]:
    """Returns `{(kind, axes, dtype): bytes that a device sends in a step}`, the largest first."""
    total: dict[tuple[str, tuple[str, ...], str], int] = {}
    for one in found:
        key = one.kind, one.axes, one.dtype
        total[key] = total.get(key, 0) + one.sent
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
