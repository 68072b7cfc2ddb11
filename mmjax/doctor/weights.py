"""Checks of the stored numbers; none of them loads the model."""

import collections
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from mmjax import trees
from mmjax.convert.vocabulary import DELTA_SCALE
from mmjax.doctor.finding import Finding, some
from mmjax.doctor.inspection import Inspection, Moments, StoredRows

NOISE = 2.0  # variance of embeddings' norms over that of independent numbers: fresh ones 1, trained ones 9 and more
OUTLIER = 30.0  # largest factor between the RMS of a layer's matrix and the median layer's
SATURATED = 0.999  # of tanh(gate)
MATRIX = r".*/(w|embedding|pos|cls|query_tokens|query)|query"
NORM = r".*norm\d?/scale"
LORA_B = r"llm/.*/lora_b"


def finite(inspection: Inspection) -> Iterator[Finding]:
    """Finds NaN and infinity in stored tensors."""
    bad = {path: tensor for path, tensor in inspection.tensors.items() if tensor.whole.bad}
    for path, tensor in bad.items():
        where = [i for i, layer in enumerate(tensor.layers) if layer.bad]
        yield Finding("finite", "wrong", f"{path} has {tensor.whole.bad} numbers that are not finite"
                      + (f", in layer {some(where)}" if where else "") + f". It came from "
                      f"{inspection.comes_from(path)}: that file is damaged, or overflowed in float16 "
                      "training; get it again.",
                      {"tensor": path, "numbers": tensor.whole.bad, "layers": where})
    if not bad:
        yield Finding("finite", "ok", "No stored number is NaN or infinite.")


def empty(inspection: Inspection) -> Iterator[Finding]:
    """Finds tensors and layers that are all zeros, or constant."""
    known, wrong = inspection.card.get("constant", {}), False
    for path, tensor in inspection.matching(f"{MATRIX}|{NORM}").items():
        if path in known or path in inspection.fresh or tensor.whole.count < 2:
            continue
        of_norm = re.fullmatch(NORM, path)
        layers = [i for i, layer in enumerate(tensor.layers) if layer.zero or (layer.constant and not of_norm)]
        if tensor.whole.zero or (tensor.whole.constant and not of_norm) or layers:
            wrong = True
            where = "" if tensor.whole.constant else f" in layer {some(layers)}"
            content = "zeros" if tensor.whole.zero or where else f"the number {tensor.whole.low:g}"
            yield Finding("empty", "wrong", f"{path} has only {content}{where}. It came from "
                          f"{inspection.comes_from(path)}: there it was absent, or never filled; get that file again "
                          "and convert it.", {"tensor": path, "layers": layers})
    ones = [path for path, tensor in inspection.matching(NORM).items()
            if path not in known and path not in inspection.fresh and tensor.whole.low == tensor.whole.high == 1]
    if ones:
        yield Finding("empty", "warning", f"All scales of {some(ones)} are 1, as before any training.",
                      {"tensors": ones})
    if not wrong and not ones:
        yield Finding("empty", "ok", "No matrix, table or layer is empty.")


def layers(inspection: Inspection) -> Iterator[Finding]:
    """Finds layers that are copies of each other, or of another order of magnitude."""
    copies: dict[tuple[str, int, int], list[str]] = collections.defaultdict(list)
    strange, compared = [], collections.Counter()
    for name, group in _groups(inspection).items():
        tower = name.split("/")[0]
        if not re.fullmatch(r".*/w", name):
            continue
        compared[tower] += 1
        for i, j in _alike(group):
            if np.array_equal(_layer(inspection, *group[i][1:]), _layer(inspection, *group[j][1:])):
                copies[tower, i, j].append(name)
        sizes = {i: moments.rms for i, (moments, *_) in group.items() if not moments.constant}
        middle = float(np.median(list(sizes.values()))) if sizes else 0.0
        strange += [(name, i, rms / middle) for i, rms in sizes.items()
                    if not 1 / OUTLIER < rms / middle < OUTLIER]
    for (tower, i, j), names in copies.items():
        yield Finding("layers", "wrong", f"Layers {i} and {j} of {tower} are bit for bit the same in {len(names)} of "
                      f"{compared[tower]} matrices ({some(names)}). No training does that: shards were mixed up or a "
                      f"merge repeated a layer; get {inspection.comes_from(names[0])} again.",
                      {"tower": tower, "layers": [i, j], "tensors": names})
    for name, i, factor in strange:
        yield Finding("layers", "warning", f"{name} of layer {i} is {factor:.2g} times as large as that of the median "
                      f"layer. It came from {inspection.comes_from(name)}; the cause may be a shard of another "
                      "dtype or a wrong merge.", {"tensor": name, "layer": i, "factor": factor})
    if compared and not copies and not strange:
        yield Finding("layers", "ok", f"No two layers are the same, and all are of one order of magnitude "
                      f"({sum(compared.values())} kinds of matrices).")


def _groups(inspection: Inspection) -> dict[str, dict[int, tuple[Moments, str, int | None]]]:
    """Returns `{name: {layer: (moments, path, index along the first axis or None)}}` of the parameters of layers."""
    groups: dict[str, dict[int, tuple[Moments, str, int | None]]] = collections.defaultdict(dict)
    for path, tensor in inspection.tensors.items():
        for i, moments in enumerate(tensor.layers):
            groups[path][i] = (moments, path, i)
        if match := re.fullmatch(r"(.*/(?:layer|block)_)(\d+)(/.*)", path):
            groups[f"{match[1]}N{match[3]}"][int(match[2])] = (tensor.whole, path, None)
    return groups


def _alike(group: Mapping[int, tuple[Moments, str, int | None]]) -> Iterator[tuple[int, int]]:
    """Yields pairs of layers with the same moments; only these are compared number by number."""
    first: dict[Moments, int] = {}
    for i, (moments, *_) in group.items():
        if not moments.constant and first.setdefault(moments, i) != i:
            yield first[moments], i


def _layer(inspection: Inspection, path: str, index: int | None) -> np.ndarray:
    return inspection.array(path) if index is None else inspection.read[path](index, index + 1)


def delta(inspection: Inspection) -> Iterator[Finding]:
    """Finds a delta in place of the language model: its norm scales are around 0."""
    scales = {path: inspection.array(path) for path in inspection.matching_llm(inspection.llm.norm_scales)}
    if not scales:
        return
    middle = float(np.median(np.concatenate([np.abs(np.atleast_2d(x)).mean(-1) for x in scales.values()])))
    negative = float((np.concatenate([x.reshape(-1) for x in scales.values()]) < 0).mean())
    figures = {"tensor": next(iter(scales)), "median norm scale": middle, "negative": negative}
    if middle < DELTA_SCALE:
        yield Finding(
            "delta", "wrong", f"The language model is a delta, not a model: the scales of its norms are {middle:.2g} "
            f"in the median ({negative:.0%} of them negative); a model's are 0.1 to 1, and positive. Convert the base "
            f"model as --llm, and what was given here ({inspection.comes_from(figures['tensor'])}) as --delta.",
            figures)
    else:
        yield Finding("delta", "ok", f"The language model is no delta: norm scales are {middle:.2g} in the median, "
                      f"{negative:.1%} of them negative.", figures)


def word_vectors(inspection: Inspection) -> Iterator[Finding]:
    """Checks whether the embedding table and the head look trained: the norms of fresh random vectors hardly differ."""
    rules = trees.prefixed("llm", inspection.llm.axes)
    for path, tensor in inspection.matching("llm/.*").items():
        axes = trees.lookup(path, rules)
        if len(axes) != 2 or "vocab" not in axes or tensor.whole.bad or tensor.whole.constant:
            continue
        axis = axes.index("vocab")
        spread, blank = _spread(inspection.read[path], axis)
        figures = {"tensor": path, "rms": tensor.whole.rms, "spread": spread, "zero words": blank}
        vocab = tensor.shape[axis]
        if blank - _padding(inspection, vocab) > 0.05 * vocab:
            yield Finding("word vectors", "wrong", f"{path}: {blank} of {vocab} tokens are zeros. It came from "
                          f"{inspection.comes_from(path)}; a merge or a resized vocabulary left them empty.", figures)
        elif spread < NOISE:
            yield Finding("word vectors", "wrong", f"{path} looks like fresh random numbers: the norms of its vectors "
                          f"vary {spread:.1f} times as much as those of independent numbers (at least {NOISE:g} times "
                          f"after training). It came from {inspection.comes_from(path)}: there it is absent or "
                          "was never trained.", figures)
        else:
            yield Finding("word vectors", "ok", f"{path} looks trained: the norms of its vectors vary "
                          f"{spread:.0f} times as much as those of independent numbers.", figures)


def _padding(inspection: Inspection, rows: int) -> int:
    """Returns the number of rows without a token, which may be empty; 0 if the tokenizer cannot be read."""
    try:
        return len(inspection.source.tokenizer.without_text(rows))
    except (ValueError, OSError):
        return 0


def _spread(rows: StoredRows, axis: int) -> tuple[float, int]:
    """Returns (variance of the vectors' squared norms over that of independent numbers, number of zero vectors).

    The squared norm of D independent numbers x has the variance D·(E[x⁴] - E[x²]²).
    """
    lengths = np.zeros(rows.shape[axis])
    fourth, width = 0.0, math.prod(rows.shape) // rows.shape[axis]
    for first, end in rows.ranges():
        square = np.square(rows(first, end), dtype=np.float64)
        fourth += float(np.square(square).sum())
        if axis:
            lengths += square.sum(0)
        else:
            lengths[first:end] = square.sum(1)
    written = lengths[lengths > 0]
    second = written.sum() / (len(written) * width)
    chance = width * (fourth / (len(written) * width) - second**2)
    return float(written.var() / chance) if chance > 0 else math.inf, int((lengths == 0).sum())


def never_trained(inspection: Inspection) -> Iterator[Finding]:
    """Lists parameters that were in no file."""
    if inspection.fresh:
        yield Finding("never trained", "warning", f"{len(inspection.fresh)} parameters were in no file and have "
                      f"initial values: {some(inspection.fresh)}. They are useless until they are trained: "
                      "convert with the trained file (--projector, --lora, --adapter), or train.",
                      {"parameters": list(inspection.fresh)})


def gates(inspection: Inspection) -> Iterator[Finding]:
    """Checks the gates through which images and prompts reach the language model."""
    cfg = inspection.source.config
    for path, tensor in inspection.matching_llm(cfg.llm.gates).items():
        if tensor.whole.bad:
            continue
        values = np.abs(inspection.array(path))
        values = values.reshape(len(values), -1)
        if cfg.injected_layers is not None:
            values = values[len(values) - cfg.injected_layers :]
        values = np.tanh(values) if cfg.llm.tanh_gates else values
        widest = values.max(1)
        closed, figures = int((widest == 0).sum()), {"tensor": path, "widest of each layer": widest.tolist()}
        if closed == len(widest):
            yield Finding(
                "gates", "wrong", f"Every gate of {path} is closed (0): what the model sees never reaches the language "
                f"model. It came from {inspection.comes_from(path)}, which was never trained or lacks the "
                "gates; convert with the trained file, or train.", figures)
        elif closed:
            yield Finding("gates", "warning", f"{closed} of the {len(widest)} layers of {path} that read prompts have "
                          "closed gates (0): they were never trained.", figures)
        elif cfg.llm.tanh_gates and (values > SATURATED).mean() > 0.5:
            yield Finding("gates", "warning", f"More than half of {path} is as wide open as tanh allows, where "
                          "gradients vanish: the learning rate was too high.", figures)
        else:
            yield Finding("gates", "ok", f"{path} is open in every layer: the widest gates are {widest.min():.2g} to "
                          f"{widest.max():.2g}.", figures)


def lora(inspection: Inspection) -> Iterator[Finding]:
    """Finds LoRA that adds nothing because one of its matrices is zero."""
    zeros, total = {}, 0
    for path, second in inspection.matching(LORA_B).items():
        first = inspection.tensors.get(path.removesuffix("b") + "a", second)
        total += len(second.layers)
        if zero := [i for i, pair in enumerate(zip(first.layers, second.layers, strict=True))
                    if any(moments.zero for moments in pair)]:
            zeros[path] = zero
    if not total:
        return
    count, figures = sum(map(len, zeros.values())), {"idle": zeros, "of": total}
    if count == 0:
        yield Finding("LoRA", "ok", f"All {total} LoRA matrices add something.", figures)
        return
    source = inspection.comes_from(next(iter(zeros)))
    if count == total:
        yield Finding("LoRA", "wrong", f"LoRA adds nothing: {some(zeros)} are zero in every layer, as before any "
                      f"training. They came from {source}; convert with the trained file, or train.", figures)
    else:
        yield Finding("LoRA", "warning", f"LoRA adds nothing in {count} of {total} matrices, layers of {some(zeros)}. "
                      f"They came from {source}.", figures)


CHECKS = (finite, empty, layers, delta, word_vectors, never_trained, gates, lora)
