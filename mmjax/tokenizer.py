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
UNKNOWN = " \u2047 "  # what sentencepiece decodes the unknown token to
TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")  # a line of a vocabulary: base64 and the token
MAX_TOKEN = 2**31  # tokens are int32
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
    made_from_sentencepiece: whether it is a tokenizer.json made from a tokenizer.model that is not there

    A vocabulary may have gaps: tokens below `vocab_size` without a text, see `has_text`.
    """

    bos: int
    eos: int
    unk: int
    pad: int
    bos_text: str
    eos_text: str
    folder: Path
    vocab_size: int
    made_from_sentencepiece: bool = False

    @staticmethod
    def from_folder(path: str | Path) -> "Tokenizer":
        """Reads the tokenizer of a LLaMA folder.

        A tokenizer.model in tiktoken's format (Llama 3) is not read; the tokenizer.json beside it is.
        Raises FileNotFoundError if the folder has none, and ValueError for a damaged or contradictory file.
        """
        folder = Path(path)
        model, converted = folder / "tokenizer.model", folder / "tokenizer.json"
        if model.exists() and not (converted.exists() and is_tiktoken(model)):
            return _load_kind(SentencePieceTokenizer, folder)
        if converted.exists():
            return _load_kind(JsonTokenizer, folder)
        raise FileNotFoundError(
            f"{folder} has no tokenizer: expected tokenizer.model or tokenizer.json in it. "
            "Give the LLaMA or Vicuna folder with all its files.")

    @abc.abstractmethod
    def encode(self, text: str, special: bool = True) -> list[int]:
        """Returns the tokens of a text, without BOS.

        special: whether a special token written in the text is that token; if not, it is ordinary text
        """

    def decode(self, ids: Sequence[int], skip_special: bool = True, sentencepiece: bool = False) -> str:
        """Returns the text of tokens. Special tokens, including the pad token, are skipped or written out.

        sentencepiece: decode as the sentencepiece library does, which Meta's code calls: the beginning and the end are
                       skipped, the unknown token becomes " \u2047 ", and the pad token is an ordinary one

        Raises ValueError for tokens that are not in the vocabulary.
        """
        ids = [int(i) for i in ids]
        if unknown := sorted({i for i in ids if not self.has_text(i)}):
            raise ValueError(
                f"Cannot decode the tokens {unknown}: this tokenizer has tokens 0 to {self.vocab_size - 1}"
                + ", but not these" * (unknown[0] >= 0 and unknown[-1] < self.vocab_size)
                + ". Use the tokenizer of the model.")
        return self._decode_as_sentencepiece(ids) if sentencepiece else self._decode(ids, skip_special)

    def without_text(self, rows: int) -> tuple[int, ...]:
        """Returns the tokens below `rows`, the size of an embedding table, that this vocabulary does not have."""
        return tuple(i for i in range(rows) if not self.has_text(i))

    @abc.abstractmethod
    def tokens_from(self, first: int) -> dict[int, str]:
        """Returns the tokens from a number on with their texts, in order."""

    @abc.abstractmethod
    def has_text(self, token: int) -> bool:
        """Returns whether a number is a token of this vocabulary."""

    @abc.abstractmethod
    def _decode(self, ids: list[int], skip_special: bool) -> str:
        """Implements `decode` for tokens in the vocabulary."""

    @abc.abstractmethod
    def _decode_as_sentencepiece(self, ids: list[int]) -> str:
        """Implements `decode` for tokens in the vocabulary, with `sentencepiece`."""


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

    def tokens_from(self, first: int) -> dict[int, str]:
        pieces = {i: self._model.id_to_piece(i) for i in range(first, len(self._model))}
        return pieces | {i: text for i, text in sorted(self._added.items()) if i >= first}

    def has_text(self, token: int) -> bool:
        return 0 <= token < len(self._model) or token in self._added

    def _decode(self, ids: list[int], skip_special: bool) -> str:
        kept = [i for i in ids if not (skip_special and i in self._special)]
        return " ".join(part if isinstance(part, str) else self._join(part) for part in self._parts(kept) if part)

    def _decode_as_sentencepiece(self, ids: list[int]) -> str:
        return " ".join(part if isinstance(part, str) else self._model.decode(part)
                        for part in self._parts(ids) if part)

    def _parts(self, ids: list[int]) -> list[list[int] | str]:
        """Returns tokens of the model file in lists, and between them the texts of added tokens."""
        parts: list[list[int] | str] = [[]]
        for i in ids:
            if i in self._added:
                parts += [self._added[i], []]
            else:
                parts[-1].append(i)
        return parts

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

        DeclaredTokens.read(folder)  # names a damaged file
        try:
            self._fast = fast = PreTrainedTokenizerFast.from_pretrained(folder)
            vocabulary = fast.get_vocab()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # transformers raises a bare Exception for a damaged file, tokenizers may panic
            reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
            raise ValueError(f"{folder / 'tokenizer.json'} cannot be read as a tokenizer: {reason}") from error
        if not vocabulary:
            raise ValueError(f"{folder / 'tokenizer.json'} has an empty vocabulary. Copy the release's file again.")
        if missing := [name for name in ("bos_token", "eos_token") if getattr(fast, name) is None]:
            raise ValueError(f"{folder} declares no {' and no '.join(missing)}. Name them in tokenizer_config.json.")
        self.folder = folder
        self.bos, self.eos = fast.bos_token_id, fast.eos_token_id
        self.unk = self.eos if fast.unk_token_id is None else fast.unk_token_id  # byte-level vocabularies need none
        self.pad = vocabulary.get(PAD_PIECE, self.unk)
        self.bos_text, self.eos_text = fast.bos_token, fast.eos_token
        self.vocab_size = 1 + max(vocabulary.values())
        self._ids = frozenset(vocabulary.values())
        self.made_from_sentencepiece = "<0x0A>" in vocabulary  # byte-level vocabularies write bytes otherwise

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

    def tokens_from(self, first: int) -> dict[int, str]:
        return dict(sorted((i, text) for text, i in self._fast.get_vocab().items() if i >= first))

    def has_text(self, token: int) -> bool:
        return token in self._ids

    def _decode_as_sentencepiece(self, ids: list[int]) -> str:
        parts: list[list[int]] = [[]]
        for i in ids:
            if i == self.unk != self.eos:
                parts.append([])
            else:
                parts[-1].append(i)
        return UNKNOWN.join(self._fast.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                            for part in parts)


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
        config_path, map_path, added_path = (folder / name for name in (
            "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"))
        config, special_map = _read_json(config_path), _read_json(map_path)
        added = {text: _token(text, i, added_path) for text, i in _read_json(added_path).items()}
        records = _records(config.get("added_tokens_decoder") or {}, config_path)
        strips = dict.fromkeys(added, (True, True))
        strips |= {record["content"]: _flags(record) for record in records.values()}
        special = {record["content"] for record in records.values() if record.get("special")}

        # As transformers 4.30 reads a folder: special_tokens_map.json takes precedence. Its plain strings strip white
        # space, those of tokenizer_config.json do not. Vicuna-v0 leaves the latter's entries empty.
        named = {}
        for name, default in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")):
            entry, path = special_map.get(name), map_path
            if not entry:
                entry, path = config.get(name) or default, config_path
            named[name] = _content(name, entry, path)
            strips[named[name]] = _flags(entry)
        entries = {name: value if isinstance(value, list) else [value] for name, value in special_map.items()}
        entries = [entry for name, some in entries.items() for entry in some
                   if entry and _content(name, entry, map_path)]
        strips |= {entry: (True, True) for entry in entries if isinstance(entry, str)}
        strips |= {entry["content"]: _flags(entry) for entry in entries if isinstance(entry, dict)}
        special |= {*named.values(), *(entry if isinstance(entry, str) else entry["content"] for entry in entries)}
        added |= {record["content"]: i for i, record in records.items()}
        return DeclaredTokens(named, added, special, strips)


def _records(value: Any, path: Path) -> dict[int, dict[str, Any]]:
    """Returns the records of added_tokens_decoder by token."""
    if not isinstance(value, dict):
        raise ValueError(f"{path}: added_tokens_decoder is a {type(value).__name__}; expected an object of tokens.")
    for i, record in value.items():
        if not isinstance(record, dict) or not isinstance(record.get("content"), str):
            raise ValueError(f"{path}: added_tokens_decoder[{i!r}] is {_short(record)}; expected a record with a "
                             "'content'.")
    return {_token(record["content"], int(i) if re.fullmatch(r"\d{1,12}", i) else i, path): record
            for i, record in value.items()}


def _token(text: str, i: Any, path: Path) -> int:
    """Returns the number of an added token. Raises ValueError if it is none, or the text is empty."""
    if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < MAX_TOKEN:
        raise ValueError(f"{path}: the token {_short(text)} has the number {_short(i)}; expected a whole number from 0 "
                         f"to {MAX_TOKEN - 1}. Copy the file again from the release.")
    if not text:
        raise ValueError(f"{path}: the token {i} is empty text. Take it out, or copy the file again from the release.")
    return i


def _content(name: str, entry: Any, path: Path) -> str:
    """Returns the text of a token that is declared as a plain string or as a record."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    if not isinstance(text, str):
        raise ValueError(f"{path}: {name} is {_short(entry)}; expected a string or a record with a 'content'.")
    return text


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:80]}..."


def _flags(entry: str | dict[str, Any]) -> tuple[bool, bool]:
    """Returns whether a token strips white space on its left and on its right."""
    if isinstance(entry, str):
        return False, False
    return bool(entry.get("lstrip", False)), bool(entry.get("rstrip", False))


def _read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; an empty one if there is no such file."""
    if not path.exists():
        return {}
    try:
        return files.read_json_object(path)
    except ValueError as error:
        raise ValueError(f"{error} Download the file again.") from error


def _load_kind(kind: type[Tokenizer], folder: Path) -> Tokenizer:
    """Returns the tokenizer of a folder. Raises ValueError or OSError for files that cannot be used."""
    try:
        return kind(folder)
    except (ValueError, OSError):
        raise
    except Exception as error:  # the files are not trusted, and their readers raise any error
        raise ValueError(f"The tokenizer files of {folder} cannot be used: {error!r}. Download them again.") from error


def is_tiktoken(path: Path) -> bool:
    """Returns whether a tokenizer.model is a vocabulary of tiktoken (Llama 3): lines of base64 and a number."""
    try:
        with open(path, "rb") as file:
            return TIKTOKEN.match(file.read(1000)) is not None
    except OSError:
        return False


def _load_model(path: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor()
    if is_tiktoken(path):
        raise ValueError(
            f"{path} is Llama 3's vocabulary in tiktoken's format, which is not read. Copy tokenizer.json, "
            "tokenizer_config.json and special_tokens_map.json from the model's Hugging Face folder beside it.")
    try:
        model.LoadFromSerializedProto(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}).") from error
    except RuntimeError as error:
        raise ValueError(
            f"{path} is not a sentencepiece model ({path.stat().st_size} bytes; {error}). Download the file again; "
            "a very small one may be a Git LFS pointer.") from error
    return model
