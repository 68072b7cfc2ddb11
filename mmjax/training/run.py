"""A training run, from its configuration to its result: what `train.py` and `mmjax train` call."""

import contextlib
import dataclasses
import importlib.metadata
import inspect
import itertools
import json
import math
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from rich.console import Console

from mmjax import files, sharding, trees
from mmjax.batch import Batch
from mmjax.checkpoints import converted, storage
from mmjax.checkpoints import training as training_checkpoints
from mmjax.checkpoints.restore import ModelSpec
from mmjax.config import RunConfig
from mmjax.convert import write
from mmjax.cost import flops, hardware
from mmjax.data import collate, formats, pipeline, scenes
from mmjax.data.features import Features
from mmjax.data.formats.account import printable
from mmjax.families import FAMILIES, Family
from mmjax.models import kernels, remat
from mmjax.training import distributed, encode_features, loop, optim, preemption, resume, steps
from mmjax.training.loop import TrainingStopped

console = Console(stderr=True, markup=False)


@dataclasses.dataclass(frozen=True)
class RunResult:
    """The result of a run."""

    folder: Path
    step: int
    loss: float | None
    scores: list[list[Any]] | None


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that a run needs, before any weight is read.

    records: of each data source
    spec:    of the model: module, dtypes, shardings, trained parameters
    earlier: trained parameters of earlier runs, which replace the checkpoint's
    stored:  the images' features, if the run does not encode images itself
    """

    config: RunConfig
    records: list[Sequence[formats.Record]]
    spec: ModelSpec
    earlier: Mapping[str, Any] | None
    stored: Features | None

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    @property
    def source(self) -> converted.ConvertedCheckpoint:
        """The checkpoint, with the run's architecture and text settings."""
        return self.spec.source

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.spec.mesh

    @property
    def module(self) -> nn.Module:
        return self.spec.module

    @property
    def rules(self) -> tuple[str, ...]:
        """Path rules of the trained parameters."""
        return self.spec.trained

    def params(self, only: Callable[[str], bool]) -> dict[str, Any]:
        """Loads the parameters whose path `only` accepts onto the mesh; trained ones are float32."""
        return self.spec.restore(self.config.seed, self.earlier, only)

    def batches(self, started: int, position: int) -> Iterator[tuple[pipeline.PipelineBatch, Batch]]:
        """Yields the remaining batches from step `started` on, each as it was read and on the devices (`put_batch`)."""
        config, data = self.config, self.config.data
        collator = collate.Collator.of(config, self.source.tokenizer, self.source.config, self.stored,
                                       sharding.num_shards(self.mesh, "batch"))
        read = pipeline.batches(self.records, data, collator, started, position,
                                sharding.process_local_rows(self.mesh, data.batch_size))
        return ((item, sharding.put_batch(item.batch, self.mesh, data.batch_size))
                for item in itertools.islice(read, config.optim.steps - started))


# Scores the model of a finished job. The second argument has the parameters that the run loaded and trained.
Score = Callable[[Job, dict[str, Any]], list[list[Any]]]


def train(config: RunConfig, score: Score | None = None) -> RunResult:
    """Trains as configured, or resumes the run in `config.out`.

    score: scores the result of a run on scenes if `config.score` is set and there is one process; None: no scores

    Raises ValueError for an invalid configuration, before anything is written, or for one that the run in `config.out`
    cannot resume with; `TrainingStopped` for unusable data or non-finite numbers; OSError if a file cannot be written.
    On a stop signal it saves its state and raises `preemption.Preempted` or KeyboardInterrupt.
    """
    check(config)
    distributed.initialize(config.hosts)
    console.quiet = not distributed.is_primary()
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    distributed.run_on_primary(lambda: prepare(config), "prepare the run", config.hosts.timeout)
    job = set_up(config)
    with (
        files.exclusive_lock(out) if distributed.is_primary() else contextlib.nullcontext(),
        sharding.use_mesh(job.mesh),
        training_checkpoints.suppress_duplicate_errors(),
        contextlib.closing(training_checkpoints.Checkpoints(
            out / "checkpoints", config.keep, config.keep_best)) as checkpoints,
    ):
        optimizer = optim.optimizer(config.optim, job.source.config.llm)
        state, frozen, progress = begin(job, optimizer, checkpoints)
        started, step = int(state.step), steps.train_step(job.module, optimizer)
        counts = distributed.ProcessCounts(job.mesh)

        def advance(state: steps.TrainState, item: pipeline.PipelineBatch,
                    batch: Batch) -> tuple[steps.TrainState, dict[str, Any]]:
            return step(state, frozen, batch, counts(len(item.bad)))

        def diagnose(loss: float, state: steps.TrainState) -> None:
            check_first_loss(loss, job.source.config.llm.vocab, {"trained": state.params, "frozen": frozen})

        batches = job.batches(started, progress.position)
        counted = step
        if job.module.kernels.fused:  # attention is counted in its dense form
            counted = steps.train_step(job.module.clone(kernels=kernels.XLA), optimizer)
        work = step_flops(job, lambda state, batch: counted.trace(state, frozen, batch, counts(0)))
        with preemption.StopSignal(started) as stop:
            state, loss = loop.loop(config, started, progress, advance, diagnose, work, state, batches, checkpoints,
                                    stop, console)
            checkpoints.wait()
        after = resume.fingerprints(frozen)
        if changed := [path for path in after if after[path] != progress.frozen[path]]:
            raise TrainingStopped(f"Frozen parameters changed during training: {', '.join(changed)}. This is a bug in "
                                  f"mmjax; please report it with {out / converted.RUN_CARD}.")
        scores = None
        if score and config.data.scenes and config.score:
            if jax.process_count() > 1:
                console.print("A run of several processes is not scored: start the same command on one host to "
                              "score it.")
            else:
                scores = score(job, trees.merge(state.params, frozen))
    return RunResult(out, int(state.step), loss, scores)


def set_up(config: RunConfig) -> Job:
    """Opens data and checkpoint. Raises ValueError if checkpoint, devices, data and trained parameters do not fit."""
    records = pipeline.read(config.data)
    source = converted.ConvertedCheckpoint.open(config.weights.checkpoint)
    source = dataclasses.replace(source.of(architecture(source, config)), text=config.text)
    mesh = sharding.make_mesh(config.mesh)
    if config.data.batch_size % sharding.num_shards(mesh, "batch"):
        raise ValueError(f"data.batch_size = {config.data.batch_size} cannot be divided into "
                         f"{sharding.num_shards(mesh, 'batch')} shards (mesh {dict(mesh.shape)}).")
    collate.check_model(config.data, source.config)
    kernels.select(mesh.devices.flat[0].platform, config.attention)  # refuses a kernel that the devices cannot run
    spec = model_spec(config, source, mesh)
    earlier = converted.trained_params(Path(config.weights.start_from)) if config.weights.start_from else None
    stored = encode_features.load(config, source, spec.trained, records, earlier) if config.data.features else None
    return Job(config, records, spec, earlier, stored)


def begin(job: Job, optimizer: optax.GradientTransformation,
          checkpoints: training_checkpoints.Checkpoints) -> tuple[steps.TrainState, Any, training_checkpoints.Progress]:
    """Returns the initial or restored state, the frozen parameters and the progress; writes `run.json`.

    Raises ValueError for a run that cannot resume with this configuration, or is beyond its last step.
    """
    config, out = job.config, job.out
    inputs = resume.inputs(config, job.records, job.stored)
    changed, checkpoints.run = [], resume.run_id(out)
    if checkpoints.latest is not None:
        changed = [resume.differences(config, out), *resume.changed_inputs(inputs, out, config.allow_changed_inputs)]
    params = job.params(loaded_by(config, job.source.family))
    mask = trees.mask(params, job.rules)
    trained, frozen = trees.split(params, mask)
    start = training_checkpoints.Progress(records=tuple(map(len, job.records)), frozen=resume.fingerprints(frozen))
    state, progress = resume.restore(steps.start(trained, optimizer, config.seed), start, checkpoints, job.mesh, out,
                                     console)
    started = int(state.step)
    if started > config.optim.steps:
        raise ValueError(f"{out} is at step {started}, beyond optim.epochs · optim.steps_per_epoch = "
                         f"{config.optim.steps}. Choose another `out`, or increase them.")
    if started:
        console.print(f"Resuming at step {started} of {config.optim.steps}. {' '.join(filter(None, changed))}")
    if distributed.is_primary():
        write_card(job, checkpoints.run, inputs, resume.history(out, started, changed))
    announce(job, params, mask)
    return state, frozen, progress


def train_phases(phases: Mapping[str, RunConfig], score: Score | None = None) -> RunResult:
    """Runs the phases in order and returns the last one's result. score: see `train`

    Raises ValueError for a path of any phase that is a URL, before the first phase begins, and what `train` raises.
    """
    files.refuse([problem for name, config in phases.items() for problem in config.url_problems(f"{name}.")])
    for name, config in phases.items():
        console.rule(name)
        result = train(config, score)
    return result


def check(config: RunConfig) -> None:
    """Raises ValueError naming every invalid setting."""
    o, d = config.optim, config.data
    wrong = [
        message for holds, message in (
            (config.out, "out: name the folder of the run"),
            (config.weights.checkpoint, "weights.checkpoint: name the converted checkpoint to start from"),
            (d.path or d.mixture, "data.path: name the folder with the images and captions"),
            (not ((d.path or d.root) and d.mixture), "data.path and data.root, or data.mixture: name one of them"),
            (not (d.scenes and d.mixture), "data.scenes: drawn into data.path, not into a mixture"),
            (d.batch_size > 0, f"data.batch_size = {d.batch_size}: at least 1"),
            (o.steps > 0, f"optim.epochs · optim.steps_per_epoch = {o.steps}: at least 1"),
            (o.accumulate > 0, f"optim.accumulate = {o.accumulate}: at least 1"),
            (not o.average or 0 < o.accumulate <= o.steps_per_epoch,
             f"optim.accumulate = {o.accumulate}: with optim.average at most optim.steps_per_epoch = "
             f"{o.steps_per_epoch}, because a window ends with its epoch"),
            (d.length_multiple > 0, f"data.length_multiple = {d.length_multiple}: at least 1"),
            (d.pack_length is None or d.pack_length > 1, f"data.pack_length = {d.pack_length}: at least 2"),
            (d.pack_images is None or 0 < d.pack_images < math.inf, f"data.pack_images = {d.pack_images}: above 0"),
            (config.log_every > 0 and config.save_every > 0 and config.keep > 0,
             "log_every, save_every and keep: at least 1"),
            (0 <= config.drop_path < 1, f"drop_path = {config.drop_path}: at least 0, below 1"),
            (0 <= d.max_bad_share < 1, f"data.max_bad_share = {d.max_bad_share}: at least 0, below 1"),
            *((s.format in formats.FORMATS, f"data.format = {s.format!r}: one of {', '.join(formats.FORMATS)}")
              for s in d.sources),
            *((s.path, f"data.mixture: the source of format {s.format!r} has no path") for s in d.mixture),
            *((0 < s.ratio < math.inf, f"data.mixture: ratio = {s.ratio} of {s.path}: above 0") for s in d.mixture),
            (o.schedule in optim.SCHEDULES, f"optim.schedule = {o.schedule!r}: one of {', '.join(optim.SCHEDULES)}"),
            (config.weights.family in FAMILIES or not (config.weights.family or config.weights.sources),
             f"weights.family = {config.weights.family!r}: one of {', '.join(FAMILIES)}"
             + ("" if config.weights.family else ", the family of weights.sources")),
            (config.weights.frozen_dtype in (None, "int8"),
             f"weights.frozen_dtype = {config.weights.frozen_dtype!r}: int8, or None for the same as weights.dtype"),
            (config.remat in remat.POLICIES,
             f"remat = {config.remat!r}: one of {', '.join(map(str, remat.POLICIES))}"),
            (config.attention in kernels.CHOICES,
             f"attention = {config.attention!r}: one of {', '.join(kernels.CHOICES)}"),
            (config.weights.dtype in ("float32", "bfloat16"), f"weights.dtype = {config.weights.dtype!r}: "
                                                              "float32 or bfloat16"),
        ) if not holds
    ]
    for rule in config.trained or ():
        try:
            re.compile(rule)
        except re.error as error:
            wrong.append(f"trained: {rule!r} is not a regular expression: {error}")
    wrong += config.url_problems()
    for name, folder in (("out", config.out), ("weights.checkpoint", config.weights.checkpoint),
                         ("weights.start_from", config.weights.start_from)):
        if folder and (problem := storage.problem(folder)):
            wrong.append(f"{name}: {problem}")
    if wrong:
        raise ValueError("This configuration cannot run:\n  " + "\n  ".join(wrong))


def prepare(config: RunConfig) -> None:
    """Converts `weights.sources` and draws `data.scenes`, if they are configured and do not exist yet."""
    weights, data = config.weights, config.data
    if weights.sources and not Path(weights.checkpoint).exists():
        console.print(f"Converting released files into {weights.checkpoint}")
        convert = write.command(weights.family)
        known = inspect.signature(convert).parameters.keys() - {"out", "overwrite"}
        if unknown := sorted(weights.sources.keys() - known):
            raise ValueError(f"weights.sources has {', '.join(unknown)}; a conversion of {weights.family} takes "
                             f"{', '.join(sorted(known))}.")
        convert(out=weights.checkpoint, **weights.sources)
    if data.scenes is not None:
        last_file, draw = scenes.LAYOUTS[data.format]
        if not (Path(data.path) / last_file).exists():
            console.print(f"Drawing {data.scenes.count} scenes into {data.path}")
            draw(data.path, scenes.scenes("train", data.scenes.count, data.scenes.seed, most=data.scenes.most))


def architecture(source: converted.ConvertedCheckpoint, config: RunConfig) -> Any:
    """Returns the checkpoint's model config with the run's phase, image size and drop path applied."""
    family, cfg = source.family, source.config
    family.rules(config.phase)  # the phase exists
    if config.phase:
        cfg = family.with_phase(cfg, config.phase)
    changes = [name for name, is_set in (("image_size", config.image_size is not None),
                                         ("drop_path", config.drop_path)) if is_set]
    if not changes:
        return cfg
    if family.resize is None:
        raise ValueError(f"The family {family} has no image encoder whose {', '.join(changes)} can be set.")
    return family.resize(cfg, config.image_size, config.drop_path)


def model_spec(config: RunConfig, source: converted.ConvertedCheckpoint, mesh: jax.sharding.Mesh) -> ModelSpec:
    """Returns the spec of the model that a run trains; `source` has the run's architecture."""
    return ModelSpec(source, mesh, config.weights.dtype, config.weights.frozen_dtype,
                     source.family.rules(config.phase, config.trained), remat=config.remat,
                     attention=config.attention)


def step_flops(job: Job, trace: Callable[[steps.TrainState, Batch], jax.stages.Traced]) -> loop.StepFlops:
    """Returns the operations of a job's training step. trace: returns the trace of the compiled step"""
    peak = hardware.peak(job.mesh.devices.flat[0])
    count = flops.by_shape(trace, job.source.config.llm)
    return loop.StepFlops(count, None if peak is None else peak * job.mesh.size)


def loaded_by(config: RunConfig, family: Family) -> Callable[[str], bool]:
    """Returns a predicate on the paths of the parameters that a run loads: with stored features, not the encoder's."""
    return lambda path: not (config.data.features and family.in_encoder(path))


def check_first_loss(loss: float, vocab: int, parts: dict[str, Any]) -> None:
    """Raises TrainingStopped if the first loss is that of a model that predicts all tokens with equal probability."""
    if abs(loss - math.log(vocab)) > 0.01 * math.log(vocab):
        return
    leaves = {f"{part}/{path}": leaf for part, tree in parts.items() for path, leaf in trees.flatten(tree).items()
              if leaf is not None and path.startswith("llm/") and not path.endswith("lora_b")}
    dead = [path for path, leaf in leaves.items() if not any(float(jnp.abs(a).max()) for a in jax.tree.leaves(leaf))]
    raise TrainingStopped(
        f"The first loss is {loss:.4f}, which is ln({vocab}) = {math.log(vocab):.4f}: the language model predicts "
        "all tokens with equal probability. Its weights are missing or broken, or an unmerged delta was converted as "
        "if it were a model. " + (f"These tensors are all zero: {', '.join(dead)}. " if dead else "")
        + "Convert the language model again (`--delta` merges a Vicuna delta); to train a random language model on "
        "purpose set check_first_loss=False.")


def write_card(job: Job, run: str, inputs: Mapping[str, Any], resumed: Sequence[Any]) -> None:
    """Writes `run.json`, which has everything needed to load or repeat the run.

    run:             its id
    inputs, resumed: see `resume.inputs` and `resume.history`
    """
    config, source, out, start = job.config, job.source, job.out, job.config.weights.start_from
    card = {
        "format": converted.FORMAT,
        "id": run,
        "family": source.family.name,
        "checkpoint": os.path.relpath(source.folder.absolute(), out.absolute()),
        "architecture": dataclasses.asdict(source.config),
        "trained": list(job.rules),
        "start_from": start and os.path.relpath(os.path.abspath(start), out.absolute()),
        "config": dataclasses.asdict(config),
        "features": job.stored and dataclasses.asdict(job.stored.card),
        "inputs": inputs,
        "resumed": resumed,
        "versions": {name: importlib.metadata.version(name) for name in ("mmjax", "jax", "flax", "optax")}
        | {"python": platform.python_version()},
        "devices": [str(device) for device in jax.devices()],
    }
    files.replace(out / converted.RUN_CARD, json.dumps(card, indent=2) + "\n")


def announce(job: Job, params: Any, mask: Any) -> None:
    """Prints the model, its parameter counts and the mesh."""
    config, mesh = job.config, job.mesh
    sizes = {True: 0, False: 0}
    for leaf, is_trained in zip(trees.flatten(params).values(), trees.flatten(mask).values(), strict=True):
        sizes[is_trained] += leaf.size
    console.print(f"{job.source.family} from {job.source.folder}: {sizes[True]:,} parameters trained, "
                  f"{sizes[False]:,} frozen ({config.weights.frozen_dtype or config.weights.dtype})")
    console.print(f"mesh {dict(mesh.shape)} of {mesh.size} {mesh.devices.flat[0].platform} device(s); "
                  f"run folder {config.out}")
    console.print(f"attention = {config.attention!r}: {job.module.kernels}")
    if note := job.spec.sharding_note:
        console.print(note)
    accounts = [formats.Account.of(records) for records in job.records]
    for each, account in zip(config.data.sources, accounts, strict=True):
        console.print(printable(account.line(each.path)), highlight=False, soft_wrap=True)
    if any(account.left or account.odd for account in accounts):
        console.print("`mmjax data check --list-all` with this config names them.", highlight=False)
