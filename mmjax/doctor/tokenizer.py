"""Checks of the tokenizer against the model."""

from collections.abc import Iterator, Sequence

from mmjax.convert.vocabulary import padded
from mmjax.doctor.finding import Finding, some
from mmjax.doctor.inspection import Inspection
from mmjax.tokenizer import Tokenizer

STRINGS = ("The sun rises in the east.", "3.14 is less than 4; isn't it?", "Wie geht es dir? Ça va bien.")


def check(inspection: Inspection) -> list[Finding]:
    """Checks the vocabulary and its special ids against the embedding table, and encodes and decodes strings."""
    try:
        tokenizer = inspection.source.tokenizer
    except (ValueError, OSError) as error:
        return [Finding("tokenizer", "wrong", str(error))]
    rows = inspection.source.config.llm.vocab
    return [_vocabulary(tokenizer, rows), _special(inspection, tokenizer, rows), *_round_trip(tokenizer)]


def _vocabulary(tokenizer: Tokenizer, rows: int) -> Finding:
    figures = {"words": tokenizer.vocab_size, "rows": rows}
    if tokenizer.vocab_size <= rows and padded(rows, tokenizer.vocab_size):
        unused = len(tokenizer.without_text(rows))
        return Finding("tokenizer", "ok", f"{tokenizer.vocab_size} tokens, {rows} rows in the embedding table"
                       + f"; {unused} rows have no token and are never generated" * bool(unused) + ".", figures)
    return Finding("tokenizer", "wrong", f"The tokenizer has {tokenizer.vocab_size} tokens (added ones included), the "
                   f"embedding table {rows} rows: they are of different releases (LLaMA and Vicuna v1.1 have 32000, "
                   "Vicuna v0 32001). Take the tokenizer files from the folder of the weights.", figures)


def _special(inspection: Inspection, tokenizer: Tokenizer, rows: int) -> Finding:
    generation = inspection.source.generation
    bos, pad, eos = (generation[f"{name}_token_id"] for name in ("bos", "pad", "eos"))
    ends = eos if isinstance(eos, list) else [eos]
    special = {"bos": tokenizer.bos, "eos": tokenizer.eos, "unk": tokenizer.unk, "pad": tokenizer.pad}
    figures = {"tokenizer": special, "generation": generation}
    ids = [*(("eos_token_id", end) for end in ends), ("bos_token_id", bos), ("pad_token_id", pad),
           *((f"the tokenizer's {name}", i) for name, i in special.items())]
    outside = [f"{name} {i}" for name, i in ids if not (0 <= i < rows and tokenizer.has_text(i))]
    if not any(0 <= end < rows and tokenizer.has_text(end) and end not in (tokenizer.bos, tokenizer.unk)
               or end == tokenizer.eos for end in ends):
        return Finding("special ids", "wrong", _never_ends(ends, tokenizer)
                       + f" Besides, {some(outside)} have no row or no text." * bool(outside), figures)
    if outside:
        return Finding("special ids", "wrong", f"{', '.join(outside)} have no row in the embedding table of {rows}, or "
                       "no text in the tokenizer. Correct them in the config.json and generation_config.json of the "
                       "released folder, and convert again.", figures)
    if tokenizer.bos in (tokenizer.eos, tokenizer.unk) and tokenizer.bos != bos:
        kind = "end" if tokenizer.bos == tokenizer.eos else "unknown token"
        return Finding(
            "special ids", "wrong", f"There is no BOS: the tokenizer begins a text with {tokenizer.bos_text!r} (id "
            f"{tokenizer.bos}), which is its {kind}; the model's BOS is {bos}. Every answer is affected: "
            "correct bos_token in special_tokens_map.json or "
            "tokenizer_config.json.", figures)
    different = [f"{name} {special[name]} (generation: {generation[f'{name}_token_id']})" for name, same in (
        ("eos", tokenizer.eos in ends), ("bos", tokenizer.bos == bos)) if not same]
    if different:
        return Finding("special ids", "warning", "Tokenizer and generation_config.json do not agree: "
                       f"{', '.join(different)}. Answers may begin or end wrongly; one of the files is of another "
                       "release.",
                       figures)
    return Finding("special ids", "ok", ", ".join(f"{name} {i}" for name, i in special.items()) + "; generation "
                   "agrees.", figures)


def _never_ends(ends: Sequence[int], tokenizer: Tokenizer) -> str:
    """Returns the message about ends of generation that no answer has."""
    kinds = {tokenizer.bos: "its beginning", tokenizer.unk: "its unknown token"}
    said = ", ".join(f"{end} ({kinds.get(end, 'no token')})" for end in ends)
    return (f"Answers never end: eos_token_id is {said}, the tokenizer's end is {tokenizer.eos_text!r} "
            f"({tokenizer.eos}). Write \"eos_token_id\": {tokenizer.eos} into the config.json of the released folder "
            "(and into its generation_config.json, if that names one), and convert again.")


def _round_trip(tokenizer: Tokenizer) -> Iterator[Finding]:
    unknown, changed = [], []
    for text in STRINGS:
        tokens = tokenizer.encode(text)
        decoded = tokenizer.decode(tokens)
        if tokenizer.unk in tokens and tokenizer.unk != tokenizer.eos:
            unknown.append(text)
        elif decoded.strip() != text:
            changed.append((text, decoded))
    figures = {"changed": changed, "unknown": unknown}
    if changed:
        yield Finding("round trip", "wrong", f"Encoded and decoded, {changed[0][0]!r} becomes {changed[0][1]!r}: the "
                      "tokenizer's files do not belong together. Copy all of them from one release.", figures)
    elif unknown:
        yield Finding("round trip", "warning", f"The vocabulary cannot write {some(map(repr, unknown))}.", figures)
    else:
        yield Finding("round trip", "ok", f"{len(STRINGS)} strings are unchanged.")
