"""The results of the benchmarks as a table, as JSON, and as a chart."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement.

    unit:     of `ours` and `theirs`; with `lower`, less is better
    theirs:   PyTorch's value; None without a counterpart
    ceiling:  share of the machine's peak that each side reaches, measured in the same run: {"ours", "theirs"}
    memory:   peak bytes of each side: {"ours", "theirs"}
    target:   the minimum of the ratio
    note:     a remark
    """

    name: str
    unit: str
    ours: float
    theirs: float | None = None
    lower: bool = False
    ceiling: dict[str, float] = dataclasses.field(default_factory=dict)
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    target: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """The speedup of mmjax over PyTorch; None without a counterpart."""
        if self.theirs is None:
            return None
        return self.theirs / self.ours if self.lower else self.ours / self.theirs

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"ratio": self.ratio}


def table(rows: Sequence[Row]) -> Table:
    result = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("", "unit", "mmjax", "PyTorch", "ratio", "of the ceiling", "peak memory", ""):
        result.add_column(name, justify="left" if name in ("", "unit") else "right", no_wrap=bool(name))
    for row in rows:
        style = "" if row.ratio is None or row.target is None else "green" if row.ratio >= row.target else "red"
        result.add_row(row.name, row.unit, number(row.ours), number(row.theirs),
                       "" if row.ratio is None else f"[{style or 'default'}]{row.ratio:.2f}[/]",
                       pair(row.ceiling, lambda share: f"{share:.0%}"),
                       pair(row.memory, lambda size: f"{size / 1e9:.2f} GB"), row.note)
    return result


def number(value: float | None) -> str:
    """Formats a value with three digits."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def pair(sides: dict[str, Any], shown: Any) -> str:
    """Formats "ours / theirs", or one of them."""
    return " / ".join(shown(sides[side]) for side in ("ours", "theirs") if side in sides)


def show(rows: Sequence[Row], console: Console) -> None:
    console.print(table(rows), highlight=False)


def write(rows: Sequence[Row], facts: dict[str, Any], folder: Path) -> None:
    """Writes `benchmarks.json` and `benchmarks.png` to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"facts": facts, "rows": [row.to_json() for row in rows]}
    (folder / "benchmarks.json").write_text(json.dumps(content, indent=2) + "\n")
    chart(rows, facts, folder / "benchmarks.png")


def chart(rows: Sequence[Row], facts: dict[str, Any], path: Path) -> None:
    """Draws the speedups of mmjax over PyTorch, with a line at 1. Writes nothing if no row has a counterpart."""
    compared = [row for row in rows if row.ratio is not None][::-1]
    if not compared:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.42 * len(compared)), layout="constrained")
    axes = figure.subplots()
    colours = ["#2a6f97" if row.ratio >= 1 else "#c1666b" for row in compared]
    bars = axes.barh([row.name for row in compared], [row.ratio for row in compared], color=colours, height=0.62)
    axes.bar_label(bars, [f"{row.ratio:.2f} ×   ({number(row.ours)} against {number(row.theirs)} {row.unit})"
                          for row in compared], padding=4, fontsize=8.5,
                   bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    axes.axvline(1, color="black", linewidth=1, zorder=0)
    targets = [(index, row.target) for index, row in enumerate(compared) if row.target is not None]
    for index, target in targets:
        axes.plot([target, target], [index - 0.38, index + 0.38], color="#e09f3e", linewidth=2)
    axes.set_xlim(0, max(1.75 * max(row.ratio for row in compared), *(1.05 * target for _, target in targets), 0))
    axes.set_xlabel("times PyTorch" + (" (orange: target)" if targets else ""))
    axes.set_title(f"mmjax against PyTorch {facts.get('torch', '')} on {facts.get('device', 'this machine')}, "
                   f"size {facts.get('size', '')}", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
