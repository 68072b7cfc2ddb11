"""Checks of the tokenizer against the model."""

from collections.abc import Iterator

from mmjax.convert.vocabulary import PADDED_VOCABULARY
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
    padded = -(-tokenizer.vocab_size // PADDED_VOCABULARY) * PADDED_VOCABULARY
    if rows in (tokenizer.vocab_size, padded):
        return Finding("tokenizer", "ok", f"{tokenizer.vocab_size} tokens, {rows} rows in the embedding table.",
                       figures)
    return Finding("tokenizer", "wrong", f"The tokenizer has {tokenizer.vocab_size} tokens (added ones included), the "
                   f"embedding table {rows} rows: they are of different releases (LLaMA and Vicuna v1.1 have 32000, "
                   "Vicuna v0 32001). Take the tokenizer files from the folder of the weights.", figures)


def _special(inspection: Inspection, tokenizer: Tokenizer, rows: int) -> Finding:
    generation = inspection.source.generation
    bos, pad, eos = (generation[f"{name}_token_id"] for name in ("bos", "pad", "eos"))
    ends = eos if isinstance(eos, list) else [eos]
    special = {"bos": tokenizer.bos, "eos": tokenizer.eos, "unk": tokenizer.unk, "pad": tokenizer.pad}
    figures = {"tokenizer": special, "generation": generation}
    ids = [*((f"the tokenizer's {name}", i) for name, i in special.items()), ("bos_token_id", bos),
           ("pad_token_id", pad), *(("eos_token_id", end) for end in ends)]
    if outside := [f"{name} {i}" for name, i in ids if not 0 <= i < rows]:
        return Finding("special ids", "wrong", f"{', '.join(outside)} have no row in the embedding table of {rows}. "
                       "Take tokenizer and generation_config.json from the folder of the weights.", figures)
    if tokenizer.bos in (tokenizer.eos, tokenizer.unk) and tokenizer.bos != bos:
        kind = "end" if tokenizer.bos == tokenizer.eos else "unknown token"
        return Finding(
            "special ids", "wrong", f"There is no BOS: the tokenizer begins a text with {tokenizer.bos_text!r} (id "
            f"{tokenizer.bos}), which is its {kind}; the model's BOS is {bos}. Every answer is affected: "
            "correct bos_token in special_tokens_map.json or "
            "tokenizer_config.json.", figures)
    different = [f"{name} {special[name]} (generation: {generation[f'{name}_token_id']})" for name, same in (
        ("bos", tokenizer.bos == bos), ("eos", tokenizer.eos in ends)) if not same]
    if different:
        return Finding("special ids", "warning", "Tokenizer and generation_config.json do not agree: "
                       f"{', '.join(different)}. Answers may begin or end wrongly; one of the files is of another "
                       "release.",
                       figures)
    return Finding("special ids", "ok", ", ".join(f"{name} {i}" for name, i in special.items()) + "; generation "
                   "agrees.", figures)


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
