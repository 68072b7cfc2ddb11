"""Tokenizers, which convert text to tokens and back as the original models do.

A `tokenizer.model` is read with `sentencepiece` and behaves like the slow LLaMA tokenizer of transformers 4.30
(its "legacy" mode), which the released models were trained with: text is split at special tokens, and every remaining
part is tokenised separately, so each one gets the leading-space marker. A folder that has only a `tokenizer.json` is
read with `transformers`.

Left out: the clean-up of spaces while decoding (LLaMA folders switch it off), and a new embedding row for a token that
a folder declares without an id, such as `[PAD]` (the original replaces the pad token by "$$" anyway).
"""

import abc
import copy
import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmjax import files

PAD_PIECE = "$$"  # minigpt4/models/base_model.py: init_llm
WORDS = "bpe_simple_vocab_16e6.txt.gz"  # the merges of ImageBind's text tower, in a checkpoint's tokenizer folder


class Tokenizer(abc.ABC):
    """Encodes text and decodes tokens. `Tokenizer.from_folder` returns the tokenizer of a folder.

    bos, eos, unk: tokens, from the folder's JSON files
    bos_text:      text of the BOS token
    eos_text:      text of the EOS token
    pad:           the token "$$" if the vocabulary has one, else the unknown token: an ordinary token, which may also
                   occur in text
    vocab_size:    rows of the embedding table, including added tokens
    folder:        the folder that it was read from
    """

    bos: int
    eos: int
    unk: int
    pad: int
    bos_text: str
    eos_text: str
    folder: Path
    vocab_size: int

    @staticmethod
    def from_folder(path: str | Path) -> "Tokenizer":
        """Reads the tokenizer of a LLaMA folder.

        Raises FileNotFoundError if the folder has none, and ValueError for a damaged or contradictory file.
        """
        folder = Path(path)
        for file, kind in (("tokenizer.model", SentencePieceTokenizer), ("tokenizer.json", JsonTokenizer)):
            if (folder / file).exists():
                try:
                    return kind(folder)
                except (ValueError, OSError):
                    raise
                except Exception as error:  # the files are not trusted, and their readers raise any error
                    raise ValueError(f"The tokenizer files of {folder} cannot be used: {error!r}. Download them again."
                                     ) from error
        raise FileNotFoundError(
            f"{folder} has no tokenizer: expected tokenizer.model or tokenizer.json in it. "
            "Give the LLaMA or Vicuna folder with all its files.")

    @abc.abstractmethod
    def encode(self, text: str, special: bool = True) -> list[int]:
        """Returns the tokens of a text, without BOS.

        special: whether a special token written in the text is that token; if not, it is ordinary text
        """

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Returns the text of tokens. Special tokens, including the pad token, are skipped or written out.

        Raises ValueError for tokens that are not in the vocabulary.
        """
        ids = [int(i) for i in ids]
        if unknown := sorted({i for i in ids if not 0 <= i < self.vocab_size}):
            raise ValueError(
                f"Cannot decode the tokens {unknown}: this tokenizer has tokens 0 to {self.vocab_size - 1}. "
                "Use the tokenizer of the model.")
        return self._decode(ids, skip_special)

    @abc.abstractmethod
    def _decode(self, ids: list[int], skip_special: bool) -> str:
        """Implements `decode` for tokens in the vocabulary."""


class SentencePieceTokenizer(Tokenizer):
    """A `tokenizer.model`, with the special and added tokens that the folder's JSON files declare."""

    def __init__(self, folder: Path):
        declared = DeclaredTokens.read(folder)
        self._model = model = _load_model(folder / "tokenizer.model")

        def find(text: str) -> int | None:
            i = declared.added.get(text, model.piece_to_id(text))  # the unknown piece for a text that is no piece
            return i if text in declared.added or model.id_to_piece(i) == text else None

        ids = {name: find(text) for name, text in declared.named.items()}
        if missing := [f"{name} {declared.named[name]!r}" for name, i in ids.items() if i is None]:
            raise ValueError(
                f"{folder}: {', '.join(missing)} is neither in tokenizer.model nor among the added tokens. "
                "Correct special_tokens_map.json or tokenizer_config.json.")
        self.folder = folder
        self.bos, self.eos, self.unk = (ids[name] for name in ("bos_token", "eos_token", "unk_token"))
        self.bos_text, self.eos_text = declared.named["bos_token"], declared.named["eos_token"]
        pad = find(PAD_PIECE)
        self.pad = model.unk_id() if pad is None else pad
        self.vocab_size = max(len(model), 1 + max(declared.added.values(), default=0))

        self._added = {i: text for text, i in declared.added.items() if i >= len(model)}
        # The original sets the pad token after loading: special when decoding, but text is not split at it.
        self._special = {find(text) for text in declared.special} - {None} | {self.pad}
        self._splits = {text: (i, *strips) for text, strips in declared.strips.items() if (i := find(text)) is not None}
        longest_first = sorted(self._splits, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def encode(self, text: str, special: bool = True) -> list[int]:
        if not special:
            return self._model.encode(text)
        parts = self._pattern.split(text)  # text, token, text, token, ..., text
        for index in range(1, len(parts), 2):
            _, left, right = self._splits[parts[index]]
            parts[index - 1] = parts[index - 1].rstrip() if left else parts[index - 1]
            parts[index + 1] = parts[index + 1].lstrip() if right else parts[index + 1]
        ids = []
        for index, part in enumerate(parts):
            ids += self._model.encode(part) if index % 2 == 0 else [self._splits[part][0]]
        return ids

    def _decode(self, ids: list[int], skip_special: bool) -> str:
        parts: list[list[int] | str] = [[]]  # added tokens are separate, between single spaces
        for i in ids:
            if skip_special and i in self._special:
                continue
            if i in self._added:
                parts += [self._added[i], []]
            else:
                parts[-1].append(i)
        return " ".join(part if isinstance(part, str) else self._join(part) for part in parts if part)

    def _join(self, ids: list[int]) -> str:
        # transformers 4.30, LlamaTokenizer.convert_tokens_to_string: a space before text that a special token follows
        text, ordinary = "", []
        for i in ids:
            if i in self._special:
                text += (" " + self._model.decode(ordinary) if ordinary else "") + self._model.id_to_piece(i)
                ordinary = []
            else:
                ordinary.append(i)
        return text + self._model.decode(ordinary)


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json` without `tokenizer.model`, read with `transformers`."""

    def __init__(self, folder: Path):
        from transformers import PreTrainedTokenizerFast

        try:
            self._fast = fast = PreTrainedTokenizerFast.from_pretrained(folder)
        except Exception as error:  # transformers raises a bare Exception for a damaged file
            raise ValueError(f"{folder / 'tokenizer.json'} cannot be read as a tokenizer: {error}") from error
        if missing := [name for name in ("bos_token", "eos_token") if getattr(fast, name) is None]:
            raise ValueError(f"{folder} declares no {' and no '.join(missing)}. Name them in tokenizer_config.json.")
        self.folder = folder
        vocabulary = fast.get_vocab()
        self.bos, self.eos = fast.bos_token_id, fast.eos_token_id
        self.unk = self.eos if fast.unk_token_id is None else fast.unk_token_id  # byte-level vocabularies need none
        self.pad = vocabulary.get(PAD_PIECE, self.unk)
        self.bos_text, self.eos_text = fast.bos_token, fast.eos_token
        self.vocab_size = 1 + max(vocabulary.values())

    def encode(self, text: str, special: bool = True) -> list[int]:
        if not special:
            return self._without_special.encode(text, add_special_tokens=False).ids
        return self._fast.encode(text, add_special_tokens=False)

    @functools.cached_property
    def _without_special(self) -> Any:
        """A copy that encodes special tokens as ordinary text; changing the original would affect other threads."""
        backend = copy.deepcopy(self._fast.backend_tokenizer)
        backend.encode_special_tokens = True
        return backend

    def _decode(self, ids: list[int], skip_special: bool) -> str:
        kept = [i for i in ids if not (skip_special and i == self.pad)]
        return self._fast.decode(kept, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)


@dataclasses.dataclass(frozen=True)
class DeclaredTokens:
    """The tokens that the JSON files of a folder declare.

    named:   texts of bos_token, eos_token and unk_token
    added:   ids of tokens that are not in the model file, or repeat one of it
    special: texts that decoding may skip
    strips:  for every text that splits: whether white space on its left and on its right is removed
    """

    named: dict[str, str]
    added: dict[str, int]
    special: set[str]
    strips: dict[str, tuple[bool, bool]]

    @staticmethod
    def read(folder: Path) -> "DeclaredTokens":
        """Reads the JSON files of a folder. Raises ValueError naming a damaged one."""
        config = _read_json(folder / "tokenizer_config.json")
        special_map = _read_json(folder / "special_tokens_map.json")
        added = _read_json(folder / "added_tokens.json")
        records = config.get("added_tokens_decoder", {})
        strips = dict.fromkeys(added, (True, True))
        strips |= {_content(record): _flags(record) for record in records.values()}
        special = {_content(record) for record in records.values() if record.get("special")}

        # As transformers 4.30 reads a folder: special_tokens_map.json takes precedence. Its plain strings strip white
        # space, those of tokenizer_config.json do not. Vicuna-v0 leaves the latter's entries empty.
        named = {}
        for name, default in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")):
            entry = special_map.get(name) or config.get(name) or default
            named[name] = _content(entry)
            strips[named[name]] = _flags(entry)
        lists = (value if isinstance(value, list) else [value] for value in special_map.values())
        entries = [entry for some in lists for entry in some if entry and _content(entry)]
        strips |= {entry: (True, True) for entry in entries if isinstance(entry, str)}
        strips |= {_content(entry): _flags(entry) for entry in entries if isinstance(entry, dict)}
        special |= {*named.values(), *map(_content, entries)}
        added |= {_content(record): int(i) for i, record in records.items()}
        return DeclaredTokens(named, added, special, strips)


def _content(entry: str | dict[str, Any]) -> str:
    """Returns the text of a token that is declared as a plain string or as a record."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    if not isinstance(text, str):
        raise ValueError(
            f"A special token is declared as {entry!r}: expected a string or a record with a 'content'. "
            "Correct special_tokens_map.json or tokenizer_config.json.")
    return text


def _flags(entry: str | dict[str, Any]) -> tuple[bool, bool]:
    """Returns whether a token strips white space on its left and on its right."""
    return (False, False) if isinstance(entry, str) else (entry.get("lstrip", False), entry.get("rstrip", False))


def _read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; an empty one if there is no such file."""
    if not path.exists():
        return {}
    try:
        return files.read_json_object(path)
    except ValueError as error:
        raise ValueError(f"{error} Download the file again.") from error


def _load_model(path: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(path.read_bytes())
    except RuntimeError as error:
        raise ValueError(
            f"{path} is not a sentencepiece model ({path.stat().st_size} bytes; {error}). Download the file again; "
            "a very small one may be a Git LFS pointer.") from error
    return model
