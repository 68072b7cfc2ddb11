"""Findings of the checks, and their output as a table or JSON."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

Verdict = Literal["ok", "warning", "wrong"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check.

    name:    name of the check
    words:   message: the result, and what to do if something is wrong
    figures: numbers and names that the message is based on
    """

    name: str
    verdict: Verdict
    words: str
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)


def some(names: Iterable[Any], most: int = 4) -> str:
    """Returns the first few names as text, for a message."""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "")


def worst(findings: Sequence[Finding]) -> Verdict:
    """Returns the worst verdict; "ok" for no findings."""
    return max((finding.verdict for finding in findings), key=("ok", "warning", "wrong").index, default="ok")


def show(findings: Sequence[Finding], console: Console) -> None:
    table = Table("check", "", "finding", show_lines=True)
    for finding in findings:
        style = {"ok": "green", "warning": "yellow", "wrong": "bold red"}[finding.verdict]
        table.add_row(finding.name, Text(finding.verdict, style), finding.words)
    console.print(table)
    wrong = [finding.name for finding in findings if finding.verdict == "wrong"]
    console.print({"ok": "Nothing wrong was found.", "warning": "Nothing is surely wrong; see the warnings.",
                   "wrong": f"Wrong: {', '.join(dict.fromkeys(wrong))}."}[worst(findings)], highlight=False)


def to_json(folder: Path, findings: Sequence[Finding]) -> str:
    result = {"checkpoint": str(folder), "verdict": worst(findings),
              "findings": [dataclasses.asdict(finding) for finding in findings]}
    return json.dumps(result, indent=2) + "\n"
