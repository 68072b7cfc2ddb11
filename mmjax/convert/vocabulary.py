"""Checks of a language model's vocabulary: embedding rows, the tokenizer's tokens, and the ids that begin and end."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmjax.convert.notes import note
from mmjax.convert.tables import Problems
from mmjax.tokenizer import Tokenizer

DELTA_SCALE = 0.05  # RMSNorm scales of a model are of the order of 1, those of a delta below 0.01
MOST_PADDING = 2_048, 1 / 8  # rows without a token that are plausible: so many, or this share of the tokens
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
RELEASE = "Released models differ here (32000 or 32001 tokens): take all files from the same release."


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))


def padded(rows: int, tokens: int) -> bool:
    """Returns whether an embedding table may have so many rows more than the vocabulary has tokens."""
    most, share = MOST_PADDING
    return rows - tokens <= max(most, share * tokens)


def check_vocabulary(folder: Path, said: int, key: str, tensors: Mapping[str, Any], source: str,
                     problems: Problems) -> Tokenizer | None:
    """Returns the tokenizer of a folder. Adds problems unless it fits the embedding `key` and its vocab_size.

    More rows than tokens are padding; a line says so. A token without a row is refused, because it would silently use
    another token's.

    said, source: vocab_size, and the file that says it
    """
    tokenizer = None
    if has_tokenizer(folder):
        try:
            tokenizer = Tokenizer.from_folder(folder)
        except ValueError as error:
            problems.append(str(error))
    else:
        problems.append(f"{folder} has neither tokenizer.model nor tokenizer.json. Copy the tokenizer files of the "
                        "release into it.")
    table = tensors.get(key)
    if table is None or not table.shape:
        return tokenizer  # reported as missing
    rows = table.shape[0]
    if rows != said:
        problems.append(f"{key} has {rows} rows, {source} says vocab_size {said}. {RELEASE}")
    if tokenizer is None:
        return None
    if rows < tokenizer.vocab_size:
        problems.append(_beyond(folder, key, rows, tokenizer))
    elif not padded(rows, tokenizer.vocab_size):
        problems.append(f"{key} has {rows} rows, the tokenizer in {folder} has only {tokenizer.vocab_size} tokens, "
                        f"including added ones: it belongs to another model. {RELEASE}")
    if tokenizer.made_from_sentencepiece:
        note(f"{folder} has no tokenizer.model: tokenizer.json cuts text around special tokens and leading spaces "
             "otherwise than the tokenizer that LLaMA's descendants were trained with. To have the same tokens, copy "
             "tokenizer.model from the original folder.")
    if count := len(tokenizer.without_text(rows)) if padded(rows, tokenizer.vocab_size) else 0:
        note(f"{folder}: {key} has {rows} rows, the tokenizer has {rows - count} tokens. The other {count} rows are "
             "padding: they are kept, and never generated.")
    return tokenizer


def _beyond(folder: Path, key: str, rows: int, tokenizer: Tokenizer) -> str:
    """Returns the problem of tokens without a row, with the files that declare them."""
    said = (f"{key} has {rows} rows, the tokenizer in {folder} has {tokenizer.vocab_size} tokens, including added "
            "ones. ")
    beyond = tokenizer.tokens_from(rows)
    places = {text: _declaring(folder, text) for text in beyond.values()}
    if len(beyond) > 8 or not all(places.values()):
        return said + RELEASE
    tokens = ", ".join(f"{text!r} ({i})" for i, text in beyond.items())
    files = ", ".join(dict.fromkeys(name for names in places.values() for name in names))
    them = "them" if len(beyond) > 1 else "it"
    return (f"{said}Without a row {'are' if len(beyond) > 1 else 'is'} {tokens}. If no prompt uses {them}, take {them} "
            f"out of {files} (in a copy of the folder), and convert again; otherwise resize the model's embeddings "
            "with transformers (resize_token_embeddings) and save it again.")


def _declaring(folder: Path, text: str) -> list[str]:
    """Returns the JSON files of a tokenizer that add a token; [] for a token of the vocabulary itself."""
    def content(name: str) -> dict[str, Any]:
        path = folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def holds(value: Any) -> bool:
        items = value if isinstance(value, list) else [value]
        return any((item.get("content") if isinstance(item, dict) else item) == text for item in items)

    config, converted = content("tokenizer_config.json"), content("tokenizer.json")
    added = {
        "added_tokens.json": text in content("added_tokens.json"),
        "tokenizer_config.json (added_tokens_decoder)": holds([*(config.get("added_tokens_decoder") or {}).values()]),
        "tokenizer.json (added_tokens)": holds(converted.get("added_tokens") or []),
    }
    vocabulary = (converted.get("model") or {}).get("vocab")
    if isinstance(vocabulary, dict) and text in vocabulary:
        return []
    if not any(added.values()):
        return []
    named = {
        "special_tokens_map.json": any(map(holds, content("special_tokens_map.json").values())),
        "tokenizer_config.json": any(holds(value) for name, value in config.items() if name.endswith("_token")),
    }
    files = [name for name, found in added.items() if found]
    return files + [name for name, found in named.items() if found and bool(converted)]


# ---- ids ----


def settle_ids(sources: Sequence[tuple[str, Mapping[str, Any]]], tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """Returns the tokens that generation starts from, ends with (one or a list) and pads with.

    Each is taken from the first of `sources`, (file, its values), that names a token with a row and a text, else from
    the tokenizer; without a pad token finished rows are padded with the end, as transformers does. A line says which
    values cannot be used, and where the choice and the tokenizer disagree.
    """
    def is_token(value: Any) -> bool:
        return (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < rows
                and tokenizer.has_text(value))

    chosen, unusable, taken_from = {}, [], {}
    defaults = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    for name in IDS:
        for where, values in sources:
            value = values.get(name)
            if name == "eos_token_id" and isinstance(value, list):
                good = [token for token in value if is_token(token)]
                unusable += [f"{name} {token!r} of {where}"[:100] for token in value if not is_token(token)]
                unusable += [f"{name} [] of {where}"] * (not value)
            else:
                good = value if is_token(value) else None
                if value is not None and good is None or name in values and value is None and name != "pad_token_id":
                    unusable.append(f"{name} {value!r} of {where}"[:100])
            if good is not None and good != []:
                chosen[name], taken_from[name] = good, where
                break
        else:
            end = chosen.get("eos_token_id")
            chosen[name] = defaults.get(name, end[0] if isinstance(end, list) else end)
    if unusable:
        taken = ", ".join(f"{name} {value}" for name, value in chosen.items())
        note(f"Not usable, since these are no tokens of this model: {', '.join(unusable)}. Taken: {taken}.")
    _warn_of_ids(chosen, taken_from, tokenizer)
    return chosen


def _warn_of_ids(chosen: Mapping[str, Any], taken_from: Mapping[str, str], tokenizer: Tokenizer) -> None:
    ends = chosen["eos_token_id"] if isinstance(chosen["eos_token_id"], list) else [chosen["eos_token_id"]]
    for name, right, expected in (("eos_token_id", tokenizer.eos in ends, tokenizer.eos),
                                  ("bos_token_id", chosen["bos_token_id"] == tokenizer.bos, tokenizer.bos)):
        if right:
            continue
        is_end, value = name == "eos_token_id", chosen[name]
        early = is_end and value == tokenizer.bos
        note(f"Warning: {name} is {value} ({_text(tokenizer, value)}) in {taken_from[name]}, but the tokenizer's is "
             f"{expected} ({_text(tokenizer, expected)}). Taken: {value}, as transformers does"
             + ", so that answers go on after the tokenizer's end" * is_end
             + " (bos 0, eos 1, pad -1 is a known error of LLaMA folders of spring 2023)" * early
             + f". If the tokenizer is right, write {expected} into {taken_from[name]} and convert again.")


def _text(tokenizer: Tokenizer, value: Any) -> str:
    return ", ".join(repr(tokenizer.decode([token], skip_special=False))
                     for token in (value if isinstance(value, list) else [value]))
