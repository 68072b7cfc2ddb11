"""`mmjax evaluate`: the scores of a model on a benchmark, or on the embedded default's scenes."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from mmjax.cli.generate import EVERY_DEVICE, GREEDY, visual_cache
from mmjax.config import MeshConfig
from mmjax.predictions import Decoding

SCENES = "scenes"


def evaluate(args: Sequence[str]) -> None:
    """Score a model on a benchmark: answers kept, figures with intervals, and a page of the worst and best pictures."""
    tyro.cli(score, args=args, prog="mmjax evaluate")


def score(
    benchmark: str,
    out: Path,
    checkpoint: Path | None = None,
    data: str | None = None,
    root: str | None = None,
    prompt: str | None = None,
    limit: int | None = None,
    rank_by: Literal["sum", "mean", "original"] = "sum",
    in_words: bool = False,
    score_only: bool = False,
    decoding: tyro.conf.OmitArgPrefixes[Decoding] = GREEDY,
    recall: Path | None = None,
    prompt_template: str | None = None,
    batch_size: int = 16,
    mesh: MeshConfig = EVERY_DEVICE,
    dtype: str | None = None,
    frozen_dtype: Literal["int8"] | None = None,
) -> None:
    """Score a model on a benchmark: answers kept, figures with intervals, and a page of the worst and best pictures.

    Every item is asked in a conversation of its own. Stopped, the same command goes on. An item that could not be
    answered counts as wrong; then the exit status is 1.

    Args:
        benchmark: captions, vqa, gqa, vizwiz, vsr, scienceqa, iconqa, pope, refer, jsonl, jsonl_choices; or scenes,
            the embedded default's, for a run on them
        out: the folder for predictions.jsonl, scores.json and report.html
        checkpoint: converted checkpoint or run folder
        data: the benchmark's folder or file
        root: the folder below which the pictures lie (default: beside the data)
        prompt: put around what an item asks at its {} (default: the benchmark's own)
        limit: ask so many items only, evenly spread over all
        rank_by: of choices, the loss that ranks them: sum over the answer, mean of its tokens, or the original's
            multi_select, where it depends on the other rows of the batch
        in_words: have choices answered in words, too, instead of ranking them
        score_only: score the answers that out has, without a model
        recall: vectors that ImageBind-LLM's senses are drawn towards (its visual cache): .npy or a flat faiss index
        prompt_template: put around the prompt at its {} (default: the checkpoint's)
        batch_size: items at once
        mesh: the devices; all of them share the items unless this says otherwise
        dtype: float32 or bfloat16 (default: what suits the device)
        frozen_dtype: int8 holds the large matrices in half the memory of bfloat16
    """
    from rich.console import Console

    from mmjax import predictions
    from mmjax.evaluate import benchmark as benchmarks

    if checkpoint is None and not score_only:
        raise ValueError("--checkpoint is missing: the converted checkpoint or run to score.")
    if benchmark == SCENES:
        given = {"data": data, "root": root, "prompt": prompt, "limit": limit, "recall": recall,
                 "prompt-template": prompt_template, "score-only": score_only, "in-words": in_words}
        if unfit := [f"--{name}" for name, value in given.items() if value not in (None, False)]:
            raise ValueError(f"--benchmark {SCENES} draws its own pictures and asks its own questions: leave out "
                             f"{', '.join(unfit)}.")
        _scenes(checkpoint, out, mesh, dtype, frozen_dtype)
        return
    if data is None:
        raise ValueError("--data is missing: the benchmark's folder or file.")
    test = benchmarks.Test(benchmark, data, root, prompt, limit, in_words, rank_by)
    if score_only:
        test = benchmarks.begun(out, test)
    items, console = test.items(), Console()
    if not score_only:
        model = _load(checkpoint, mesh, dtype, frozen_dtype)
        text = {} if prompt_template is None else {"prompt_template": prompt_template}
        answers = benchmarks.answerer(test, model, decoding, batch_size, visual_cache(recall), text)
        done = benchmarks.evaluate(test, items, answers, checkpoint, out)
        for line in predictions.summary(done):
            Console(stderr=True).print(line, highlight=False, markup=False, soft_wrap=True)
    result = benchmarks.scored(test, items, out)
    page = benchmarks.write(result, out)
    benchmarks.show(result, console)
    console.print(f"{out / benchmarks.SCORES} has the figures, {page} the worst and best pictures.", highlight=False,
                  markup=False, soft_wrap=True)
    if result.errors:
        sys.exit(1)


def _load(checkpoint: Path, mesh: MeshConfig, dtype: str | None, frozen_dtype: str | None) -> Any:
    from mmjax import compilation, loaded, sharding

    compilation.enable()
    return loaded.load(checkpoint, sharding.make_mesh(mesh), dtype, frozen_dtype=frozen_dtype)


def _scenes(checkpoint: Path | None, out: Path, mesh: MeshConfig, dtype: str | None,
            frozen_dtype: Literal["int8"] | None) -> None:
    """What training does at its end, for a run that is there: `evaluate.report_scenes`."""
    from mmjax import loaded
    from mmjax.config import ScenesConfig
    from mmjax.evaluate import report_scenes

    if checkpoint is None or not (checkpoint / loaded.RUN_CARD).is_file():
        raise ValueError(f"--benchmark {SCENES} is for runs, which {checkpoint} is not: it has no {loaded.RUN_CARD}.")
    made = loaded.read_card(checkpoint / loaded.RUN_CARD)["config"]
    if not made["data"].get("scenes"):
        raise ValueError(f"The run {checkpoint} was not trained on scenes. Other benchmarks are for it.")
    model = _load(checkpoint, mesh, dtype, frozen_dtype)
    untrained = dataclasses.replace(model, params=loaded.read_params(
        loaded.read_run(checkpoint), model.module, model.mesh, lambda path: model.module.dtype, made["seed"]))
    facts = {"run": checkpoint.name, "steps": f"{made['optim']['epochs'] * made['optim']['steps_per_epoch']:,}"}
    out.mkdir(parents=True, exist_ok=True)
    report_scenes(model, untrained, ScenesConfig(**made["data"]["scenes"]), out, loaded.lineage(checkpoint), facts)
