"""Checks of the tokenizer against the model."""

from collections.abc import Iterator

from mmjax.convert.vocabulary import PADDED_VOCABULARY
from mmjax.doctor.finding import Finding, some
from mmjax.doctor.inspection import Inspection
from mmjax.tokenizer import Tokenizer

STRINGS = ("The sun rises in the east.", "3.14 is less than 4; isn't it?", "Wie geht es dir? Ça va bien.")


def check(patient: Inspection) -> list[Finding]:
    """Does the vocabulary fit the embedding table, and do its special ids?"""
    try:
        words = patient.source.tokenizer
    except (ValueError, OSError) as error:
        return [Finding("tokenizer", "wrong", str(error))]
    rows = patient.source.config.llm.vocab
    return [_vocabulary(words, rows), _special(patient, words, rows), *_round_trip(words)]


def _vocabulary(words: Tokenizer, rows: int) -> Finding:
    figures = {"words": words.vocab_size, "rows": rows}
    padded = -(-words.vocab_size // PADDED_VOCABULARY) * PADDED_VOCABULARY
    if rows in (words.vocab_size, padded):
        return Finding("tokenizer", "ok", f"{words.vocab_size} words, {rows} rows in the embedding table.", figures)
    return Finding("tokenizer", "wrong", f"The tokenizer has {words.vocab_size} words (added ones included), the "
                   f"embedding table {rows} rows: they are of different releases (LLaMA and Vicuna v1.1 have 32000, "
                   "Vicuna v0 32001). Take the tokenizer files from the folder of the weights.", figures)


def _special(patient: Inspection, words: Tokenizer, rows: int) -> Finding:
    told = patient.source.generation
    ends = told["eos_token_id"] if isinstance(told["eos_token_id"], list) else [told["eos_token_id"]]
    own = {"bos": words.bos, "eos": words.eos, "unk": words.unk, "pad": words.pad}
    figures = {"tokenizer": own, "generation": told}
    ids = [*((f"the tokenizer's {name}", i) for name, i in own.items()), ("bos_token_id", told["bos_token_id"]),
           ("pad_token_id", told["pad_token_id"]), *(("eos_token_id", end) for end in ends)]
    if outside := [f"{name} {i}" for name, i in ids if not 0 <= i < rows]:
        return Finding("special ids", "wrong", f"{', '.join(outside)} have no row in the embedding table of {rows}. "
                       "Take tokenizer and generation_config.json from the folder of the weights.", figures)
    if words.bos in (words.eos, words.unk) and words.bos != told["bos_token_id"]:
        return Finding(
            "special ids", "wrong", f"There is no BOS: to the tokenizer a text begins with {words.bos_text!r} (id "
            f"{words.bos}), which is its {'end' if words.bos == words.eos else 'unknown word'}; the model's own is "
            f"{told['bos_token_id']}. Every answer suffers: correct bos_token in special_tokens_map.json or "
            "tokenizer_config.json.", figures)
    apart = [f"{name} {own[name]} (generation: {told[f'{name}_token_id']})" for name, same in (
        ("bos", words.bos == told["bos_token_id"]), ("eos", words.eos in ends)) if not same]
    if apart:
        return Finding("special ids", "warning", "Tokenizer and generation_config.json do not agree: "
                       f"{', '.join(apart)}. Answers may begin or end wrongly; one of the files is of another release.",
                       figures)
    return Finding("special ids", "ok", ", ".join(f"{name} {i}" for name, i in own.items()) + "; generation agrees.",
                   figures)


def _round_trip(words: Tokenizer) -> Iterator[Finding]:
    unknown, changed = [], []
    for text in STRINGS:
        ids = words.encode(text)
        back = words.decode(ids)
        if words.unk in ids and words.unk != words.eos:
            unknown.append(text)
        elif back.strip() != text:
            changed.append((text, back))
    figures = {"changed": changed, "unknown": unknown}
    if changed:
        yield Finding("round trip", "wrong", f"Encoded and decoded, {changed[0][0]!r} becomes {changed[0][1]!r}: the "
                      "tokenizer's files do not belong together. Copy all of them from one release.", figures)
    elif unknown:
        yield Finding("round trip", "warning", f"The vocabulary cannot write {some(map(repr, unknown))}.", figures)
    else:
        yield Finding("round trip", "ok", f"{len(STRINGS)} strings come back as they were.")
