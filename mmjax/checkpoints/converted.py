"""Reads the cards of converted checkpoints and runs, and the parameters that runs have trained."""

import contextlib
import dataclasses
import glob
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmjax import files
from mmjax.checkpoints import format1
from mmjax.checkpoints.training import trained as read_trained
from mmjax.config import TextConfig
from mmjax.families import FAMILIES, Family, config_from_dict, shapes
from mmjax.tokenizer import Tokenizer

CARD, RUN_CARD = "config.json", "run.json"
FORMAT = 2  # of both; `mmjax.checkpoints.format1` reads format 1


@dataclasses.dataclass(frozen=True)
class ConvertedCheckpoint:
    """The description of a converted checkpoint: its checked `config.json`, without weights."""

    folder: Path
    family: Family
    config: Any
    text: TextConfig
    generation: dict[str, Any]
    fresh: tuple[str, ...]

    @staticmethod
    def open(folder: str | Path) -> "ConvertedCheckpoint":
        """Reads a folder's description. Raises FileNotFoundError or ValueError naming the file and the problem."""
        files.require_local({"checkpoint": folder})
        path = Path(folder) / CARD
        if not path.is_file():
            if moved := [*Path(folder).parent.glob(f".{glob.escape(Path(folder).name[:40])}.partial-*-old")]:
                raise FileNotFoundError(f"A conversion was killed while it replaced {folder}. The former checkpoint is "
                                        f"{moved[0]}: rename it to {folder}. Converting again restores it first, too.")
            raise FileNotFoundError(f"{folder} is neither a converted checkpoint (no {CARD}) nor a finished run "
                                    f"(no {RUN_CARD}). Make a checkpoint with convert_weights.py.")
        card = read_checkpoint_card(Path(folder))
        if "family" not in card and ("model_type" in card or "architectures" in card):
            raise ValueError(f"{folder} is a model as transformers saves it, not a converted checkpoint. Convert it "
                             f"first: python convert_weights.py llama --llm {folder} --out OUT, or give it as --llm of "
                             "another conversion.")
        if card.get("format") != FORMAT or not isinstance(card.get("family"), str) or card["family"] not in FAMILIES:
            raise ValueError(
                f"{path} is of format {card.get('format')!r} and family {card.get('family')!r}; this mmjax reads "
                f"formats up to {FORMAT}, of {', '.join(FAMILIES)}. Convert a Hugging Face folder first. "
                "For a family of another package, import its module first.")
        require(path, card, architecture=dict, text=dict, generation=dict, fresh=list)
        family = FAMILIES[card["family"]]
        with _naming(path):
            config = config_from_dict(family.Config, card["architecture"])
            text = config_from_dict(TextConfig, card["text"], "text")
        return ConvertedCheckpoint(Path(folder), family, config, text, generation_ids(card["generation"]),
                                   tuple(map(str, card["fresh"])))

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.folder / "tokenizer")

    def of(self, config: Any) -> "ConvertedCheckpoint":
        """Returns this checkpoint with another architecture; parameters that only the new one has are fresh."""
        if config == self.config:
            return self
        stored, wanted = (shapes(self.family, c) for c in (self.config, config))
        fresh = tuple(path for path in wanted if path in self.fresh or path not in stored)
        return dataclasses.replace(self, config=config, fresh=fresh)


def read_card(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file. Raises ValueError if there is none in it."""
    return files.read_json_object(path)


def read_checkpoint_card(folder: Path) -> dict[str, Any]:
    """Returns the config.json of a converted checkpoint, with the names of today's format."""
    card = read_card(folder / CARD)
    if card.get("format") == format1.FORMAT:
        with _naming(folder / CARD):
            card = format1.checkpoint_card(card) | {"format": FORMAT}
    return card


def read_run_card(folder: Path) -> dict[str, Any]:
    """Returns the run.json of a run, with the names of today's format."""
    card = read_card(folder / RUN_CARD)
    if card.get("format", format1.FORMAT) == format1.FORMAT:
        with _naming(folder / RUN_CARD):
            card = format1.run_card(card) | {"format": FORMAT}
    return card


def generation_ids(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {"bos_token_id", "eos_token_id", "pad_token_id"} of a card, as `GenerateConfig` takes them.

    Conversion writes usable values; a card of an earlier version, or an edited one, may hold null or []: then no token
    ends a row (-1).
    """

    def is_token(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    ids = {name: values.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ends = ids["eos_token_id"] if isinstance(ids["eos_token_id"], list) else [ids["eos_token_id"]]
    ends = [token for token in ends if is_token(token)]
    ids["eos_token_id"] = ends if len(ends) > 1 else ends[0] if ends else -1
    return {name: value if name == "eos_token_id" or is_token(value) else 0 for name, value in ids.items()}


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Raises ValueError naming a card in place of what its content raises: any error, since it is not trusted."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} is damaged: {error if isinstance(error, ValueError) else repr(error)}") from error


def require(path: Path, card: Mapping[str, Any], **kinds: type) -> None:
    """Raises ValueError naming the fields that a card does not have, or that have another type."""
    if absent := [field for field in kinds if field not in card]:
        raise ValueError(f"{path} has no {', '.join(absent)}.")
    if wrong := [f"{field} is {reprlib.repr(card[field])}, but must be {kind.__name__}"
                 for field, kind in kinds.items() if not isinstance(card[field], kind)]:
        raise ValueError(f"{path} is damaged: {', '.join(wrong)}.")


def read_run(folder: Path) -> ConvertedCheckpoint:
    """Returns the checkpoint that a run started from, with the run's architecture and text settings."""
    card = read_run_card(folder)
    require(folder / RUN_CARD, card, checkpoint=str, architecture=dict, config=dict)
    require(folder / RUN_CARD, card["config"], text=dict)
    base = Path(card["checkpoint"])
    if not base.is_absolute():
        base = folder / base
    if not base.is_dir():
        raise FileNotFoundError(f"{folder} was trained on the checkpoint {base}, which is not there. Put it back, or "
                                f"change `checkpoint` in {folder / RUN_CARD}.")
    source = ConvertedCheckpoint.open(base)
    with _naming(folder / RUN_CARD):
        source = source.of(config_from_dict(source.family.Config, card["architecture"]))
        text = config_from_dict(TextConfig, card["config"]["text"], "text")
    return dataclasses.replace(source, text=text)


def lineage(folder: Path) -> list[Path]:
    """Returns a run and the runs it started from, the oldest first. Raises FileNotFoundError naming a missing run, or
    ValueError for runs that started from each other."""
    runs = [folder]
    while (card := read_run_card(runs[0])).get("start_from"):
        require(runs[0] / RUN_CARD, card, start_from=str)
        previous = runs[0] / card["start_from"]
        if not _is_file(previous / RUN_CARD):
            raise FileNotFoundError(f"{runs[0]} started from the run {previous}, which is not there. Put it back, or "
                                    f"change `start_from` in {runs[0] / RUN_CARD}.")
        if previous.resolve() in [run.resolve() for run in runs]:
            raise ValueError(f"{runs[0] / RUN_CARD} says that the run started from itself, by way of {previous}. "
                             "Correct `start_from`.")
        runs.insert(0, previous)
    return runs


def _is_file(path: Path) -> bool:
    """Returns whether there is a file; False for a name that cannot be one."""
    try:
        return path.is_file()
    except (ValueError, OSError):  # a zero byte, or too long
        return False


def trained_params(folder: Path) -> dict[str, Any]:
    """Returns `{path: array}`: the latest value of each parameter that a run, or one it started from, has trained."""
    return {path: leaf for run in lineage(folder)
            for path, leaf in read_trained(run / "checkpoints", run=read_run_card(run).get("id")).items()}
