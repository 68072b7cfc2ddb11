"""From records on disk to batches: a fixed global order, read ahead by threads.

Batch number n of a run is a function of the configuration and n alone, so a run goes on where it stopped by asking
for the next n. Grain gives the order (a shuffle of each pass over the data) and the reading ahead.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mmjax.batch import Batch, Sample
from mmjax.config import DataConfig
from mmjax.data.formats import Record, clean_caption


@dataclasses.dataclass(frozen=True)
class Step:
    """A batch and where it came from."""

    number: int
    names: tuple[str, ...]
    batch: Batch


def batches(
    records: Sequence[Record],
    cfg: DataConfig,
    collate: Callable[[list[Sample], np.random.Generator | None], Batch],
    start: int = 0,
) -> Iterator[Step]:
    """Endless batches from number `start` on.

    collate: makes a `Batch` of `Sample`s, pictures read (it runs in the reading threads). It also gets what draws the
             crops of the batch's pictures, or None where they are not cropped

    Raises ValueError if there are fewer records than rows in a batch, and whatever `collate` raises for one of the
    configuration's prompts: each is tried before the first batch, not when its turn comes.
    """
    import grain

    if len(records) < cfg.batch_size:
        raise ValueError(f"{cfg.path} has {len(records)} records: too few for a batch of {cfg.batch_size}.")
    without = next((record for record in records if record.prompt is None), None)
    if without is not None and cfg.prompts:
        collate([sample(without, prompt, cfg) for prompt in cfg.prompts], None)
    order = grain.MapDataset.range(len(records)).seed(cfg.seed).shuffle().repeat()

    def step(number: int) -> Step:
        rows = [records[order[number * cfg.batch_size + row]] for row in range(cfg.batch_size)]
        # one prompt for the whole batch, as in the original (minigpt_base.py: preparing_embedding)
        choice = np.random.default_rng([cfg.seed, number]).integers(len(cfg.prompts)) if cfg.prompts else None
        prompt = "" if choice is None else cfg.prompts[choice]
        crops = np.random.default_rng([cfg.seed, number, 1]) if cfg.random_crop else None
        batch = collate([sample(row, prompt, cfg) for row in rows], crops)
        return Step(number, tuple(row.name for row in rows), batch)

    numbers = grain.MapDataset.range(start, np.iinfo(np.int32).max).map(step)
    return iter(numbers.to_iter_dataset(grain.ReadOptions(num_threads=cfg.threads, prefetch_buffer_size=4)))


def sample(record: Record, prompt: str, cfg: DataConfig) -> Sample:
    """What a record becomes; `prompt` is for those without one of their own."""
    return Sample(
        images=[] if record.image is None else [record.image],
        prompt=prompt if record.prompt is None else record.prompt,
        input=record.input,
        answer=clean_caption(record.answer) if cfg.clean_captions else record.answer)
