"""What lies in a folder: a converted checkpoint or a run, by its description, and what a run has trained."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmjax import files
from mmjax.checkpoint import trained as read_trained
from mmjax.config import TextConfig
from mmjax.convert.convert import FORMAT
from mmjax.convert.export import export as write_part
from mmjax.families import FAMILIES, config_from_dict
from mmjax.families import shapes as family_shapes
from mmjax.tokenizer import Tokenizer

RUN_CARD = "run.json"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The description of a converted checkpoint: `config.json` read and checked, no weights."""

    folder: Path
    family: str
    config: Any
    text: TextConfig
    generation: dict[str, int]
    fresh: tuple[str, ...]

    @staticmethod
    def open(folder: str | Path) -> "Checkpoint":
        """Raises FileNotFoundError or ValueError naming the file and what is wrong with it."""
        files.require_local({"checkpoint": folder})
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is neither a converted checkpoint (no config.json) nor a finished run "
                                    f"(no {RUN_CARD}). Make a checkpoint with convert_weights.py.")
        card = read_card(path)
        if card.get("format") != FORMAT or card.get("family") not in FAMILIES:
            raise ValueError(
                f"{path} is of format {card.get('format')!r} and family {card.get('family')!r}; this mmjax reads "
                f"format {FORMAT} of {', '.join(FAMILIES)}. Is it a Hugging Face folder? Then convert it first.")
        require(path, card, "architecture", "text", "generation", "fresh")
        config = config_from_dict(FAMILIES[card["family"]].Config, card["architecture"])
        return Checkpoint(Path(folder), card["family"], config, TextConfig(**card["text"]), card["generation"],
                          tuple(card["fresh"]))

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.folder / "tokenizer")

    def of(self, config: Any) -> "Checkpoint":
        """The same with another architecture; the parameters that only that one has are fresh."""
        if config == self.config:
            return self
        held, wanted = (family_shapes(self.family, c) for c in (self.config, config))
        fresh = tuple(path for path in wanted if path in self.fresh or path not in held)
        return dataclasses.replace(self, config=config, fresh=fresh)


def read_card(path: Path) -> dict[str, Any]:
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is damaged, it is not JSON: {error}") from error
    if not isinstance(card, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(card).__name__}.")
    return card


def require(path: Path, card: Mapping[str, Any], *fields: str) -> None:
    if absent := [field for field in fields if field not in card]:
        raise ValueError(f"{path} has no {', '.join(absent)}.")


def read_run(folder: Path) -> Checkpoint:
    """The checkpoint that a run started from, with the run's architecture and text settings."""
    card = read_card(folder / RUN_CARD)
    require(folder / RUN_CARD, card, "checkpoint", "architecture", "config")
    base = Path(card["checkpoint"])
    if not base.is_absolute():
        base = folder / base
    if not base.is_dir():
        raise FileNotFoundError(f"{folder} was trained on the checkpoint {base}, which is not there. Put it back, or "
                                f"change `checkpoint` in {folder / RUN_CARD}.")
    source = Checkpoint.open(base)
    source = source.of(config_from_dict(FAMILIES[source.family].Config, card["architecture"]))
    return dataclasses.replace(source, text=TextConfig(**card["config"]["text"]))


def lineage(folder: Path) -> list[Path]:
    """A run and those it started from, the oldest first. Raises FileNotFoundError naming one that is gone."""
    card = read_card(folder / RUN_CARD)
    if not card.get("start_from"):
        return [folder]
    before = folder / card["start_from"]
    if not (before / RUN_CARD).is_file():
        raise FileNotFoundError(f"{folder} started from the run {before}, which is not there. Put it back, or change "
                                f"`start_from` in {folder / RUN_CARD}.")
    return [*lineage(before), folder]


def trained_params(folder: Path) -> dict[str, Any]:
    """`{path: array}`: what a run, and the runs it started from, have trained; of each parameter the latest."""
    return {path: leaf for run in lineage(folder) for path, leaf in read_trained(run / "checkpoints").items()}


def export(checkpoint: Path, part: str, out: Path) -> None:
    """Writes a part of a converted checkpoint or of a training run in its released PyTorch format.

    Args:
        checkpoint: converted checkpoint, or run folder (its newest trained parameters are written)
        part: llama or llama-meta (a folder as transformers saves it, or as Meta ships it);
            of MiniGPT-4 projector (with LoRA if there is one), vit, qformer;
            of ImageBind-LLM adapter, bind, imagebind; of LLaMA-Adapter adapter, clip
        out: file to write; a folder for llama and llama-meta
    """
    folder = Path(checkpoint)
    if (folder / RUN_CARD).is_file():
        run = read_run(folder)
        write_part(run.folder, part, Path(out), trained=trained_params(folder), config=run.config)
    else:
        write_part(folder, part, Path(out))
