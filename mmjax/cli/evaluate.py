"""`mmjax evaluate`: the scores of a model on a benchmark, or on the embedded default's scenes."""

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from mmjax.cli.generate import EVERY_DEVICE, GREEDY, visual_cache
from mmjax.cli.options import require_local
from mmjax.config import MeshConfig
from mmjax.inference.predictions import Decoding

SCENES = "scenes"
AT_ONCE = 16  # default batch size
# Options that do not apply to scenes, and those that do not apply to stored answers.
NOT_OF_SCENES = ("data", "root", "follow_links", "prompt", "limit", "rank_by", "in_words", "score_only", "recall",
                 "prompt_template")
NOT_OF_ANSWERS = ("checkpoint", *(field.name for field in dataclasses.fields(Decoding)), "recall", "prompt_template",
                  "batch_size", "mesh", "dtype", "frozen_dtype")


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """Score a model on a benchmark: stored answers, figures with intervals, and a page of the worst and best images.

    Every item is a separate conversation. After an interruption the same command continues. An item that could not be
    answered counts as wrong; then the exit status is 1.

    Args:
        benchmark: captions, vqa, gqa, vizwiz, vsr, scienceqa, iconqa, pope, refer, jsonl, jsonl_choices; or scenes,
            the embedded default's, for a run on them
        out: the folder for predictions.jsonl, scores.json and report.html
        checkpoint: converted checkpoint or run folder
        data: the benchmark's folder or file
        root: the folder of the images (default: the folder of the data)
        follow_links: allow links that lead out of root
        prompt: template with {} for the question (default: the benchmark's)
        limit: number of items, evenly spread over all (default: all)
        rank_by: the loss that ranks choices: sum over the answer, mean of its tokens, or the original's
            multi_select, where it depends on the other rows of the batch
        in_words: generate answers and read the choices from them, instead of ranking
        score_only: score the answers in out, without a model
        recall: ImageBind-LLM's visual cache: vectors in a .npy file or a flat faiss index
        prompt_template: template with {} for the prompt (default: the checkpoint's)
        batch_size: items in a batch (default: 16; 100 for scenes)
        mesh: the devices; by default all of them share the items
        dtype: float32 or bfloat16 (default: depends on the device)
        frozen_dtype: int8 stores the large matrices in half the memory of bfloat16
    """

    benchmark: str
    out: Path
    checkpoint: Path | None = None
    data: str | None = None
    root: str | None = None
    follow_links: bool = False
    prompt: str | None = None
    limit: int | None = None
    rank_by: Literal["sum", "mean", "original"] = "sum"
    in_words: bool = False
    score_only: bool = False
    decoding: tyro.conf.OmitArgPrefixes[Decoding] = GREEDY
    recall: Path | None = None
    prompt_template: str | None = None
    batch_size: int | None = None
    mesh: MeshConfig = EVERY_DEVICE
    dtype: str | None = None
    frozen_dtype: Literal["int8"] | None = None

    def given(self, names: Iterable[str]) -> list[str]:
        """Returns the names of those options whose values are not the defaults."""
        changed = {field.name: getattr(owner, field.name) != field.default for owner in (self, self.decoding)
                   for field in dataclasses.fields(owner)}
        return [name for name in names if changed[name]]


def evaluate(args: Sequence[str]) -> None:
    """Score a model on a benchmark: stored answers, figures with intervals, and a page of the worst and best images."""
    score(tyro.cli(EvaluateOptions, args=args, prog="mmjax evaluate"))


def score(options: EvaluateOptions) -> None:
    """Runs the command. Raises ValueError naming all options that are missing or do not apply."""
    from rich.console import Console

    from mmjax.evaluate import benchmark as benchmarks
    from mmjax.inference import predictions

    require_local(EvaluateOptions, vars(options), "data", "root")
    if options.benchmark == SCENES:
        _scenes(options)
        return
    test = benchmarks.Test(options.benchmark, options.data or "", options.root, options.prompt, options.limit,
                           options.in_words, options.rank_by, options.follow_links)
    if options.score_only:
        test = benchmarks.stored_test(options.out, test)
    _check(options, test)
    items, console = test.items(), Console(markup=False)
    if not options.score_only:
        text = {} if options.prompt_template is None else {"prompt_template": options.prompt_template}
        cache = visual_cache(options.recall)
        answers = benchmarks.answerer(test, _load(options), options.decoding,
                                      AT_ONCE if options.batch_size is None else options.batch_size, cache, text)
        done = benchmarks.evaluate(test, items, answers, options.checkpoint, options.out)
        for line in predictions.summary(done):
            Console(stderr=True, markup=False).print(line, highlight=False, soft_wrap=True)
    result = benchmarks.scored(test, items, options.out)
    page = benchmarks.write(result, options.out)
    benchmarks.show(result, console)
    console.print(f"{options.out / benchmarks.SCORES} has the figures, {page} the worst and best images.",
                  highlight=False, soft_wrap=True)
    if result.errors:
        sys.exit(1)


def _check(options: EvaluateOptions, test: Any) -> None:
    """Raises ValueError naming the options that a `mmjax.evaluate.benchmark.Test` lacks or cannot use."""
    from mmjax.evaluate import benchmark as benchmarks

    wrong = []
    if options.checkpoint is None and not options.score_only:
        wrong.append("--checkpoint is missing: the converted checkpoint or run to score")
    if options.follow_links and options.root is None:
        wrong.append("--follow-links: name the folder of the images as --root")
    if options.data is None:
        wrong.append("--data is missing: the benchmark's folder or file")
    unused, why = benchmarks.unused(test, options.decoding, options.recall)
    if unused:
        wrong.append(f"{_option_list(unused)}: {why}")
    if options.score_only and (unused := options.given(NOT_OF_ANSWERS)):
        wrong.append(f"{_option_list(unused)}: --score-only scores answers that are there; leave that out, or answer "
                     "again into another folder")
    _refuse(options, wrong)


def _option_list(names: Iterable[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)


def _refuse(options: EvaluateOptions, wrong: Sequence[str]) -> None:
    if wrong:
        raise ValueError(f"--benchmark {options.benchmark} cannot be scored like this:\n  " + "\n  ".join(wrong))


def _load(options: EvaluateOptions) -> Any:
    from mmjax import compilation, sharding
    from mmjax.inference import loaded

    compilation.enable()
    return loaded.load(options.checkpoint, sharding.make_mesh(options.mesh), options.dtype,
                       frozen_dtype=options.frozen_dtype)


def _scenes(options: EvaluateOptions) -> None:
    """Runs the evaluation that training ends with, for an existing run: `evaluate.report_scenes`."""
    from mmjax import trees
    from mmjax.checkpoints import converted
    from mmjax.checkpoints.restore import ModelSpec
    from mmjax.config import ScenesConfig
    from mmjax.evaluate import scenes
    from mmjax.models.int8 import Int8

    config, run = _config_of_scenes(options), options.checkpoint
    model = _load(options)
    exact = [path for path, leaf in trees.flatten(model.params).items() if not isinstance(leaf, Int8)]
    spec = ModelSpec(converted.read_run(run), model.mesh, model.module.dtype, options.frozen_dtype, exact=exact)
    untrained = dataclasses.replace(model, params=spec.restore(config["seed"]))
    facts = {"run": run.name, "steps": f"{config['optim']['epochs'] * config['optim']['steps_per_epoch']:,}"}
    options.out.mkdir(parents=True, exist_ok=True)
    scenes.report_scenes(model, untrained, ScenesConfig(**config["data"]["scenes"]), options.out,
                         converted.lineage(run), facts, options.decoding,
                         scenes.AT_ONCE if options.batch_size is None else options.batch_size)


def _config_of_scenes(options: EvaluateOptions) -> dict[str, Any]:
    """Returns the config of the run to score. Raises ValueError for other runs, and options that do not apply."""
    from mmjax.checkpoints import converted

    run, wrong = options.checkpoint, []
    if unused := options.given(NOT_OF_SCENES):
        wrong.append(f"{_option_list(unused)}: the images and the questions are generated, and the answers are text; "
                     "leave that out")
    if run is None:
        wrong.append("--checkpoint is missing: the run to score")
    elif not (run / converted.RUN_CARD).is_file():
        wrong.append(f"--checkpoint: it is for runs, which {run} is not: it has no {converted.RUN_CARD}")
    _refuse(options, wrong)
    config = converted.read_run_card(run)["config"]
    if not config["data"].get("scenes"):
        raise ValueError(f"The run {run} was not trained on scenes. Use another benchmark for it.")
    return config
