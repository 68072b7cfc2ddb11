"""A training run from its configuration to its report: what `train.py` and `mmjax train` call."""

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
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmjax import checkpoint, evaluate, loaded, optim, sharding, steps, trees
from mmjax.batch import Batch, Sample
from mmjax.config import RunConfig
from mmjax.convert import convert
from mmjax.data import formats, images, pipeline, scenes
from mmjax.families import FAMILIES

CONVERSIONS = {"minigpt4": convert.minigpt4, "imagebind_llm": convert.imagebind_llm,
               "llama_adapter": convert.llama_adapter, "llama": convert.llama}
console = Console(stderr=True)
FORMAT = 1  # of the run's card


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why, where the last good checkpoint is, and what to do."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run left behind."""

    folder: Path
    step: int
    loss: float | None
    scores: list[list[Any]] | None


def train(config: RunConfig) -> Run:
    """Trains as configured, or goes on with the run in `config.out` where it stopped.

    Raises ValueError for a configuration that cannot work, before anything is written, and `TrainingStopped` when the
    numbers say that going on is pointless.
    """
    check(config)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    prepare(config)
    sources = pipeline.read(config.data)

    source = loaded.Checkpoint.open(config.weights.checkpoint)
    source = dataclasses.replace(source.of(architecture(source, config)), text=config.text)
    family = FAMILIES[source.family]
    mesh = sharding.make_mesh(config.mesh)
    if config.data.batch_size % sharding.ways(mesh, "batch"):
        raise ValueError(f"data.batch_size = {config.data.batch_size} cannot be cut into "
                         f"{sharding.ways(mesh, 'batch')} (mesh {dict(mesh.shape)}).")
    size = source.config.image_size
    crops = size is not None and source.config.crops
    if config.data.random_crop and not crops:
        raise ValueError("Only models that keep the aspect ratio of pictures (ImageBind-LLM, LLaMA-Adapter v2) are "
                         "trained with pictures cropped at random: set data.random_crop = False.")
    rules = trained_rules(config, source.family)
    dtype = jnp.dtype(config.weights.dtype)
    module = family.Model(source.config, dtype, config.remat)

    earlier = config.weights.start_from and loaded.trained_params(Path(config.weights.start_from))

    def kind(path: str) -> Any:
        return jnp.float32 if trees.matches(path, rules) else dtype

    checkpoints = contextlib.closing(checkpoint.Checkpoints(out / "checkpoints", config.keep))
    with sharding.use(mesh), checkpoints as checkpoints:
        params = loaded.read_params(source, module, mesh, kind, config.seed, earlier)
        mask = trees.mask(params, rules)
        trained, frozen = trees.split(params, mask)
        optimizer = optim.optimizer(config.optim)
        state, started = resume(steps.start(trained, optimizer, config.seed), checkpoints, mesh)
        if started > config.optim.steps:
            raise ValueError(f"{out} is at step {started}, beyond optim.epochs · optim.steps_per_epoch = "
                             f"{config.optim.steps}. Name another `out`, or raise them.")
        if started:
            console.print(f"Going on at step {started} of {config.optim.steps}. {differences(config, out)}")
        write_card(config, source, out)
        announce(source, params, mask, mesh, config)
        del params, trained

        tokenizer = source.tokenizer
        step, place = steps.train_step(module, optimizer), sharding.batch_sharding(mesh)

        def collate(samples: list[Sample]) -> Batch:
            return loaded.collate(samples, tokenizer, config.text, source.config, multiple=config.data.length_multiple)

        def picture(image: Any, random: np.random.Generator | None) -> Any:  # without a tower, collate refuses it
            return image if size is None else images.load(image, size, crops, random)

        def advance(state: steps.TrainState, batch: Batch) -> tuple[steps.TrainState, dict[str, Any]]:
            return step(state, frozen, jax.device_put(batch, place))

        def diagnose(loss: float, state: steps.TrainState) -> None:
            check_first_loss(loss, source.config.llama.vocab, {"trained": state.params, "frozen": frozen})

        batches = pipeline.batches(sources, config.data, collate, picture, started, jax.process_index(),
                                   jax.process_count())
        before = int(steps.fingerprint(frozen))
        state, loss = loop(config, started, advance, diagnose, state, batches, checkpoints)
        checkpoints.save(int(state.step), state)
        if int(steps.fingerprint(frozen)) != before:
            raise TrainingStopped("Frozen parameters changed during training. That is a bug in mmjax; please report it "
                                  f"with {out / loaded.RUN_CARD}.")
        scores = None
        if config.data.scenes and config.score:
            scores = score(config, source, mesh, trees.merge(state.params, frozen))
    return Run(out, int(state.step), loss, scores)


def train_phases(phases: Mapping[str, RunConfig]) -> Run:
    """One run after the other, in order; the last one's result."""
    for name, config in phases.items():
        console.rule(name)
        done = train(config)
    return done


def check(config: RunConfig) -> None:
    """Raises ValueError naming everything in the configuration that cannot work."""
    o, d = config.optim, config.data
    wrong = [
        message for holds, message in (
            (config.out, "out: the run needs a folder"),
            (config.weights.checkpoint, "weights.checkpoint: name the converted checkpoint to start from"),
            (d.path or d.mixture, "data.path: name the folder with the pictures and captions"),
            (not (d.path and d.mixture), "data.path and data.mixture: name one of them"),
            (not (d.scenes and d.mixture), "data.scenes: drawn into data.path, not into a mixture"),
            (d.batch_size > 0, f"data.batch_size = {d.batch_size}: at least 1"),
            (o.steps > 0, f"optim.epochs · optim.steps_per_epoch = {o.steps}: at least 1"),
            (o.accumulate > 0, f"optim.accumulate = {o.accumulate}: at least 1"),
            (not o.average or 0 < o.accumulate <= o.steps_per_epoch,
             f"optim.accumulate = {o.accumulate}: with optim.average at most optim.steps_per_epoch = "
             f"{o.steps_per_epoch}, because a window ends with its epoch"),
            (d.length_multiple > 0, f"data.length_multiple = {d.length_multiple}: at least 1"),
            (config.log_every > 0 and config.save_every > 0 and config.keep > 0,
             "log_every, save_every and keep: at least 1"),
            (0 <= config.drop_path < 1, f"drop_path = {config.drop_path}: at least 0, below 1"),
            (0 <= d.max_bad_share < 1, f"data.max_bad_share = {d.max_bad_share}: at least 0, below 1"),
            *((s.format in formats.FORMATS, f"data.format = {s.format!r}: one of {', '.join(formats.FORMATS)}")
              for s in d.sources),
            *((s.path, f"data.mixture: the source of format {s.format!r} has no path") for s in d.mixture),
            *((0 < s.ratio < math.inf, f"data.mixture: ratio = {s.ratio} of {s.path}: above 0") for s in d.mixture),
            (o.schedule in optim.SCHEDULES, f"optim.schedule = {o.schedule!r}: one of {', '.join(optim.SCHEDULES)}"),
            (config.weights.family in CONVERSIONS,
             f"weights.family = {config.weights.family!r}: one of {', '.join(CONVERSIONS)}"),
            (config.weights.dtype in ("float32", "bfloat16"), f"weights.dtype = {config.weights.dtype!r}: "
                                                              "float32 or bfloat16"),
        ) if not holds
    ]
    for rule in config.trained or ():
        try:
            re.compile(rule)
        except re.error as error:
            wrong.append(f"trained: {rule!r} is not a regular expression: {error}")
    if wrong:
        raise ValueError("This configuration cannot run:\n  " + "\n  ".join(wrong))


def prepare(config: RunConfig) -> None:
    """Converts the sources and draws the scenes, where the configuration asks for it and it has not been done."""
    weights, data = config.weights, config.data
    if weights.sources and not Path(weights.checkpoint).exists():
        console.print(f"Converting released files into {weights.checkpoint}")
        command = CONVERSIONS[weights.family]
        known = inspect.signature(command).parameters
        if unknown := sorted(weights.sources.keys() - known.keys()):
            raise ValueError(f"weights.sources names {', '.join(unknown)}; a conversion of {weights.family} takes "
                             f"{', '.join(known)}.")
        command(out=weights.checkpoint, **weights.sources)
    if data.scenes is not None:
        last, write = scenes.LAYOUTS[data.format]
        if not (Path(data.path) / last).exists():
            console.print(f"Drawing {data.scenes.count} scenes into {data.path}")
            world = scenes.scenes("train", data.scenes.count, data.scenes.seed, most=data.scenes.most)
            write(data.path, world)


def trained_rules(config: RunConfig, name: str) -> tuple[str, ...]:
    """What a run of a family trains: its own rules, its phase's, or the family's."""
    family = FAMILIES[name]
    if config.phase is not None and config.phase not in family.PHASES:
        raise ValueError(f"phase = {config.phase!r}: the family {name} has "
                         + (f"{', '.join(family.PHASES)}." if family.PHASES else "no phases."))
    return config.trained or (family.PHASES[config.phase] if config.phase else family.TRAINED)


def architecture(source: loaded.Checkpoint, config: RunConfig) -> Any:
    """The checkpoint's, with what the run's phase adds and the run's picture size and drop path."""
    trained_rules(config, source.family)  # the phase exists
    base = FAMILIES[source.family].with_phase(source.config, config.phase) if config.phase else source.config
    changes = {}
    if config.image_size is not None:
        changes["image_size"] = config.image_size
    if config.drop_path:
        changes["drop_path"] = config.drop_path
    if not changes:
        return base
    if not hasattr(base, "vit"):
        raise ValueError(f"The family {source.family} has no picture tower whose {', '.join(changes)} can be set.")
    changed = dataclasses.replace(base, vit=dataclasses.replace(base.vit, **changes))
    side = changed.vit.patch if changed.qformer else 2 * changed.vit.patch  # four patches join without a Q-Former
    if changed.image_size <= 0 or changed.image_size % side:
        raise ValueError(f"image_size = {changed.image_size}: must be a multiple of {side}, the side of "
                         f"{'a patch' if changed.qformer else 'two patches'} of {source.folder}.")
    return changed


def resume(state: steps.TrainState, checkpoints: checkpoint.Checkpoints, mesh: Any) -> tuple[steps.TrainState, int]:
    """The newest checkpoint's state and step; the given state and 0 if there is none."""
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def on_mesh(leaf: jax.Array) -> jax.Array:
        return leaf if isinstance(leaf.sharding, jax.sharding.NamedSharding) else jax.device_put(leaf, everywhere)

    state = jax.tree.map(on_mesh, state)
    if checkpoints.latest is None:
        return state, 0
    state = checkpoints.restore(state)
    return state, int(state.step)


def loop(
    config: RunConfig,
    started: int,
    advance: Callable[[steps.TrainState, Batch], tuple[steps.TrainState, dict[str, Any]]],
    diagnose: Callable[[float, steps.TrainState], None],
    state: steps.TrainState,
    batches: Iterator[pipeline.Step],
    checkpoints: checkpoint.Checkpoints,
) -> tuple[steps.TrainState, float | None]:
    """The steps from `started` on: the state and the last loss. See `TrainingStopped`.

    advance:  one training step
    diagnose: looks at the first loss of a run
    """
    loss = None
    columns = (TextColumn(config.phase or "training"), BarColumn(), MofNCompleteColumn(),
               TextColumn("{task.fields[loss]}"), TimeElapsedColumn(), TimeRemainingColumn())
    out = Path(config.out)
    with (Log(out / "metrics.jsonl", started, config) as log,
          BadData(out / "data_errors.jsonl", started, config) as bad, Progress(*columns, console=console) as bar):
        task = bar.add_task("", total=config.optim.steps, completed=started, loss="")
        for item in itertools.islice(batches, config.optim.steps - started):
            samples = f"Its samples: {', '.join(item.names)}. {last_good(checkpoints)}"
            if bad.add(item):
                raise TrainingStopped(
                    f"{bad.count} of the first {bad.tried} records that were tried cannot be used, more than "
                    f"data.max_bad_share = {config.data.max_bad_share} allows. {out / 'data_errors.jsonl'} names them. "
                    f"Mend them, or raise data.max_bad_share. {last_good(checkpoints)}")
            if not np.any(item.batch.loss_mask[:, 1:]):
                raise TrainingStopped(
                    f"Batch {item.number} has no token to learn: all its answers are empty or cut away "
                    f"(text.max_txt_len = {config.text.max_txt_len}). {samples}")
            state, metrics = advance(state, item.batch)
            loss = float(metrics["loss"])
            if not bool(metrics["finite"]):
                raise TrainingStopped(
                    f"The loss, a gradient or the update of batch {item.number} is not finite (loss {loss}, gradient "
                    f"norm {float(metrics['grad_norm'])}). The update was not made. {samples}")
            if item.number == 0 and config.check_first_loss:
                diagnose(loss, state)
            log.add(item, metrics, loss, state.params)
            bar.update(task, advance=1, loss=f"loss {loss:.3f}")
            if (item.number + 1) % config.save_every == 0:
                checkpoints.save(item.number + 1, state)
    return state, loss


def last_good(checkpoints: checkpoint.Checkpoints) -> str:
    if checkpoints.latest is None:
        return "No checkpoint had been saved yet."
    return f"The last good checkpoint is of step {checkpoints.latest}; the same command goes on from there."


def check_first_loss(loss: float, vocab: int, parts: dict[str, Any]) -> None:
    """Raises TrainingStopped if the first loss is that of a model that holds every word for equally likely."""
    if abs(loss - math.log(vocab)) > 0.01 * math.log(vocab):
        return
    dead = [f"{part}/{path}" for part, tree in parts.items() for path, leaf in _named(tree)
            if path.startswith("llama/") and not path.endswith("lora_b") and float(jnp.abs(leaf).max()) == 0]
    raise TrainingStopped(
        f"The first loss is {loss:.4f}, which is ln({vocab}) = {math.log(vocab):.4f}: the language model holds every "
        "word for equally likely. Its weights are missing or broken, or an unmerged delta was converted as if it were "
        "a model. " + (f"These tensors are all zero: {', '.join(dead)}. " if dead else "")
        + "Convert the language model again (`--delta` merges a Vicuna delta); to train a random language model on "
        "purpose set check_first_loss=False.")


def _named(tree: Any) -> Iterator[tuple[str, Any]]:
    yield from ((path, leaf) for path, leaf in trees.flatten(tree).items() if leaf is not None)


def keep_lines(path: Path, field: str, below: int) -> int:
    """Of a file of JSON lines keeps those whose field is below a number: what an interrupted run wrote beyond its last
    checkpoint will be written again. Returns how many it kept."""
    if not path.exists():
        return 0
    kept = [line for line in path.read_text().splitlines() if line and json.loads(line)[field] < below]
    path.write_text("".join(line + "\n" for line in kept))
    return len(kept)


class BadData:
    """`data_errors.jsonl`: one line each time that a record could not be used.

    count: such times since the run began, before an interruption too
    tried: records tried since then
    """

    def __init__(self, path: Path, started: int, config: RunConfig):
        self._path, self._data = path, config.data
        self.count, self.tried = keep_lines(path, "position", started * config.data.batch_size), 0

    def __enter__(self) -> "BadData":
        self._file = self._path.open("a", buffering=1)
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def add(self, item: pipeline.Step) -> bool:
        """Whether there are now more of them than the configuration allows."""
        for record in item.bad:
            self._file.write(json.dumps(dataclasses.asdict(record)) + "\n")
        self.count += len(item.bad)
        self.tried = (item.number + 1) * len(item.names) + self.count
        return self._data.too_bad(self.count, self.tried)


class Log:
    """`metrics.jsonl`: one line each `log_every` steps, and the first and the last."""

    def __init__(self, path: Path, started: int, config: RunConfig):
        self._config, self._path = config, path
        self._since, self._images, self._tokens = time.monotonic(), 0, 0
        keep_lines(path, "step", started)

    def __enter__(self) -> "Log":
        self._file = self._path.open("a", buffering=1)
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def add(self, item: pipeline.Step, metrics: dict[str, Any], loss: float, trained: Any) -> None:
        self._images += len(item.names)
        self._tokens += item.batch.tokens.size
        last = item.number + 1 == self._config.optim.steps
        if item.number % self._config.log_every and not last:
            return
        seconds = time.monotonic() - self._since
        line = {
            "step": item.number,
            "loss": loss,
            "lr": float(optim.learning_rate(self._config.optim, item.number)),
            "grad_norm": float(metrics["grad_norm"]),
            "targets": int(metrics["tokens"]),
            "samples_per_second": round(self._images / seconds, 2),
            "tokens_per_second": round(self._tokens / seconds, 1),
        }
        if gates := open_gates(trained):
            line["gates"] = gates
        self._file.write(json.dumps(line) + "\n")
        self._since, self._images, self._tokens = time.monotonic(), 0, 0


def open_gates(trained: Any) -> list[float]:
    """How far each layer's gate is open, as the mean of |tanh|; nothing if no gate is trained."""
    gates = [leaf for path, leaf in _named(trained) if re.fullmatch(r"llama/layers/(attn/)?gate", path)]
    return [round(float(layer), 6) for gate in gates for layer in np.abs(np.tanh(np.asarray(gate))).mean(-1)]


def write_card(config: RunConfig, source: loaded.Checkpoint, out: Path) -> None:
    """`run.json`: what anyone needs to load, repeat or understand the run."""
    start = config.weights.start_from
    card = {
        "format": FORMAT,
        "family": source.family,
        "checkpoint": os.path.relpath(source.folder.absolute(), out.absolute()),
        "architecture": dataclasses.asdict(source.config),
        "trained": list(trained_rules(config, source.family)),
        "start_from": start and os.path.relpath(os.path.abspath(start), out.absolute()),
        "config": dataclasses.asdict(config),
        "versions": {name: importlib.metadata.version(name) for name in ("mmjax", "jax", "flax", "optax")}
        | {"python": platform.python_version()},
        "devices": [str(device) for device in jax.devices()],
    }
    partial = out / (loaded.RUN_CARD + ".partial")
    partial.write_text(json.dumps(card, indent=2) + "\n")
    partial.rename(out / loaded.RUN_CARD)


def differences(config: RunConfig, out: Path) -> str:
    """In what the configuration differs from that of the run so far, in words."""
    before = trees.flatten(loaded.read_card(out / loaded.RUN_CARD)["config"])
    now = trees.flatten(json.loads(json.dumps(dataclasses.asdict(config))))
    changed = [f"{path.replace('/', '.')} {before.get(path)!r} -> {now.get(path)!r}"
               for path in sorted(before.keys() | now.keys()) if before.get(path) != now.get(path)]
    return f"Changed since it began: {', '.join(changed)}." if changed else ""


def announce(source, params, mask, mesh, config: RunConfig) -> None:
    """What is about to happen, in two lines."""
    sizes = {True: 0, False: 0}
    for leaf, is_trained in zip(jax.tree.leaves(params), jax.tree.leaves(mask), strict=True):
        sizes[is_trained] += leaf.size
    console.print(f"[bold]{source.family}[/bold] from {source.folder}: {sizes[True]:,} parameters trained, "
                  f"{sizes[False]:,} frozen ({config.weights.dtype})")
    console.print(f"mesh {dict(mesh.shape)} of {mesh.size} {mesh.devices.flat[0].platform} device(s); "
                  f"run folder {config.out}")


def score(config: RunConfig, source: loaded.Checkpoint, mesh: Any, params: Any) -> list[list[Any]]:
    """Scores a run on scenes it never saw, beside the same model before any training; see `evaluate.report_scenes`."""
    dtype = jnp.dtype(config.weights.dtype)
    module = FAMILIES[source.family].Model(source.config, dtype)
    untrained = loaded.read_params(source, module, mesh, lambda _: dtype, config.seed)
    model = source.loaded(module, params, mesh)
    sizes = {path: leaf.size for path, leaf in trees.flatten(params).items()}
    trained = sum(size for path, size in sizes.items() if trees.matches(path, trained_rules(config, source.family)))
    facts = {"trained parameters": f"{trained:,} of {sum(sizes.values()):,}", "steps": f"{config.optim.steps:,}"}
    return evaluate.report_scenes(model, dataclasses.replace(model, params=untrained), config.data.scenes,
                                  Path(config.out), loaded.lineage(Path(config.out)), facts)
