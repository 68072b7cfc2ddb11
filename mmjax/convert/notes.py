"""Lines on the terminal about what a conversion reads, assumes and leaves out."""

from rich.console import Console

console = Console(stderr=True, markup=False)


def note(line: str) -> None:
    """Prints a line to stderr. Characters that a terminal could take for commands are replaced, as names in files may
    hold any."""
    line = "".join(character if character.isprintable() else "?" for character in line)
    console.print(line, highlight=False, soft_wrap=True)
