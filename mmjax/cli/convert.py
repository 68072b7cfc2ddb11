"""`mmjax convert | export`: released PyTorch files into a checkpoint, and back."""

from collections.abc import Sequence

import tyro

from mmjax.cli import options


def convert(args: Sequence[str]) -> None:
    """Convert released PyTorch files into a checkpoint: minigpt4, imagebind-llm, llama-adapter or llama."""
    from mmjax.convert import convert as conversions

    commands = {"minigpt4": conversions.minigpt4, "imagebind-llm": conversions.imagebind_llm,
                "llama-adapter": conversions.llama_adapter, "llama": conversions.llama}
    tyro.extras.subcommand_cli_from_dict({name: options.local(command) for name, command in commands.items()},
                                         args=args, prog="convert")


def export(args: Sequence[str]) -> None:
    """Write a part of a checkpoint or of a finished run in its released PyTorch format."""
    from mmjax.folders import export as write

    tyro.cli(options.local(write), args=args, prog="mmjax export")
