"""`mmjax convert | export`: released PyTorch files into a checkpoint, and back."""

from collections.abc import Sequence

import tyro

from mmjax.cli import options


def convert(args: Sequence[str]) -> None:
    """Convert released PyTorch files to a checkpoint, with a subcommand for each family."""
    from mmjax.convert import write
    from mmjax.families import FAMILIES

    commands = {name.replace("_", "-"): options.local(write.command(family)) for name, family in FAMILIES.items()
                if family.conversion}
    tyro.extras.subcommand_cli_from_dict(commands, args=[write.renamed(arg) for arg in args], prog="convert")


def export(args: Sequence[str]) -> None:
    """Write a part of a checkpoint or of a finished run in its released PyTorch format."""
    from mmjax.convert.export import export as write

    tyro.cli(options.local(write), args=args, prog="mmjax export")
