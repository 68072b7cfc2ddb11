"""`mmjax convert | export`: released PyTorch files into a checkpoint, and back."""

from collections.abc import Sequence

import tyro


def convert(args: Sequence[str]) -> None:
    """Convert released PyTorch files into a checkpoint: minigpt4, imagebind-llm, llama-adapter or llama."""
    from mmjax.convert import write as conversions

    commands = {"minigpt4": conversions.minigpt4, "imagebind-llm": conversions.imagebind_llm,
                "llama-adapter": conversions.llama_adapter, "llama": conversions.llama}
    tyro.extras.subcommand_cli_from_dict(commands, args=args, prog="convert")


def export(args: Sequence[str]) -> None:
    """Write a part of a checkpoint or of a finished run in its released PyTorch format."""
    from mmjax.checkpoints.converted import export as write

    tyro.cli(write, args=args, prog="mmjax export")
