"""HTML pages about a model: scores, images with its answers, and for a finished run the loss curve.

The inputs are arrays, text and numbers; nothing here depends on a model.
"""

import base64
import html
import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmjax import files


class Example(NamedTuple):
    """An image with a question and its answer. `right` None leaves the mark out.

    note:    small print, such as the id and the score of the item
    choices: (text, loss in nats) of the answers that were ranked
    """

    image: np.ndarray | None  # uint8[H,W,3]; None where there is none
    question: str
    answer: str
    truth: str
    right: bool | None = None
    note: str = ""
    choices: tuple[tuple[str, float], ...] = ()


LIGHT = {"ink": "#1c2128", "muted": "#667080", "grid": "#e3e6ea", "line": "#2563c9", "good": "#1a7f4b",
         "bad": "#c0362c", "page": "#ffffff"}
DARK = {"ink": "#e6e9ee", "muted": "#98a2b0", "grid": "#343b46", "line": "#7db0ff", "good": "#5fcf93",
        "bad": "#ff8f85", "page": "#1c2027"}
MARKS = {True: "✓", False: "✗", None: ""}
NOTHING = "(nothing)"
PHOTO = 128  # pixels; images with a longer side are photographs, smaller ones show their pixels


class Curves(NamedTuple):
    """Metrics of a run and of the runs it started from; the steps are counted across them.

    starts: the steps at which the second and later runs begin
    gates:  (step, opening of each layer's gate), if it was measured
    """

    steps: list[float]
    losses: list[float]
    starts: list[float]
    gates: list[tuple[float, list[float]]]


def write(folder: str | Path, title: str, metrics: Sequence[str | Path], examples: Sequence[Example],
          table: Sequence[Sequence[str | float | None]], facts: Mapping[str, str] | None = None) -> Path:
    """Writes `report.html` (self-contained), `loss.png`, `images.png` and, if gates were measured, `gates.png`;
    returns the path of the page.

    metrics: JSON lines of the run, after those of the runs it started from; lines with "step" and "loss" make the
             curve, those with "gates" (a number for each layer) a second plot
    table:   rows of text and numbers, the first is the heading; floats have three digits, None is a dash
    facts:   short figures for the top of the page, such as {"trained parameters": "9,312"}

    Raises ValueError if the metrics hold no loss or a row of the table has another length than the heading.
    """
    files.require_local({"folder": folder})
    folder = Path(folder)
    curves = _curves(list(map(Path, metrics)))
    _check_table(table)
    folder.mkdir(parents=True, exist_ok=True)
    plots = {"Loss": ("loss", "training loss by step", _draw_loss)}
    if curves.gates:
        plots["Gates"] = ("gates", "how far each layer's gate is open, by step and by depth", _draw_gates)
    images = []
    for heading, (name, description, draw) in plots.items():
        light, dark = (draw(curves, colors) for colors in (LIGHT, DARK))
        (folder / f"{name}.png").write_bytes(light)
        images.append((heading, description, light, dark))
    (folder / "images.png").write_bytes(_draw_sheet(title, examples))
    page = folder / "report.html"
    page.write_text(_page(title, images, {"Images and answers": examples}, table, facts or {}, {}), encoding="utf-8")
    return page


def write_scores(folder: str | Path, title: str, table: Sequence[Sequence[str | float | None]],
                 sections: Mapping[str, Sequence[Example]], facts: Mapping[str, str] | None = None,
                 notes: Mapping[str, Sequence[str]] | None = None) -> Path:
    """Writes `report.html` (self-contained) with the scores of a benchmark; returns its path.

    sections: examples by heading
    notes:    lines of text by heading, at the end of the page
    The other arguments are as in `write`, which raises the same errors for the table.
    """
    _check_table(table)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "report.html"
    page.write_text(_page(title, [], sections, table, facts or {}, notes or {}), encoding="utf-8")
    return page


def thumbnail(image: Any, side: int) -> np.ndarray:
    """Returns uint8[H,W,3] of a PIL image, reduced to sides of at most `side`."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    return np.asarray(small)


def boxed(pixels: np.ndarray, size: tuple[int, int],
          boxes: Mapping[str, tuple[float, float, float, float]]) -> np.ndarray:
    """Returns an image uint8[H,W,3] with boxes drawn on it, each with its name: "truth" in green, others in blue.

    size:  (width, height) of the original image; boxes are (x1, y1, x2, y2) in its pixels
    """
    from PIL import Image, ImageDraw

    image = Image.fromarray(pixels)
    draw, (across, down) = ImageDraw.Draw(image), (image.width / size[0], image.height / size[1])
    wide = max(2, round(max(image.size) / 120))
    labels = []
    for name, (x1, y1, x2, y2) in boxes.items():
        color = LIGHT["good" if name == "truth" else "line"]
        left, right = sorted((x1 * across, x2 * across))  # a predicted box may have its ends in the wrong order
        top, bottom = sorted((y1 * down, y2 * down))
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline="white")
        draw.rectangle((left, top, right, bottom), outline=color, width=wide)
        labels.append((f" {name} ", (left, top if name == "truth" else max(top, bottom - 14)), color))
    for label, corner, color in labels:  # on top of all boxes
        draw.rectangle(draw.textbbox(corner, label, font_size=12), fill=color)
        draw.text(corner, label, fill="white", font_size=12)
    return np.asarray(image)


def _check_table(table: Sequence[Sequence[str | float | None]]) -> None:
    uneven = [number for number, row in enumerate(table) if len(row) != len(table[0])]
    if uneven:
        raise ValueError(f"The table's heading has {len(table[0])} columns; these rows have another number: {uneven}.")


def _curves(paths: Sequence[Path]) -> Curves:
    curves, before = Curves([], [], [], []), 0
    for path in paths:
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
        try:
            records = [files.parse_json(line) for line in lines]
        except ValueError as error:
            raise ValueError(f"{path} has a line that is not JSON: {error}. Repair or remove it.") from error
        records = [record for record in records if isinstance(record, dict)
                   and all(isinstance(record.get(name), (int, float)) for name in ("step", "loss"))]
        if not records:
            raise ValueError(f"{path} has no line with \"step\" and \"loss\", so there is no curve to draw.")
        if before:
            curves.starts.append(before)
        for record in records:
            curves.steps.append(before + record["step"])
            curves.losses.append(record["loss"])
            if "gates" in record:
                curves.gates.append((before + record["step"], record["gates"]))
        before = curves.steps[-1] + 1
    return curves


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Returns a centred mean over about 5 % of the run; the windows are shorter at the ends."""
    half = max(1, len(values) // 40)
    return np.array([np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _figure_of(count: int, colors: Mapping[str, str], widths: Sequence[float]):
    """Returns an empty figure and its plots side by side."""
    from matplotlib.figure import Figure  # needs neither pyplot nor a display

    figure = Figure(figsize=(7.6, 3.0), dpi=160, facecolor="none", layout="constrained")
    plots = figure.subplots(1, count, squeeze=False, width_ratios=widths)[0]
    for axes in plots:
        axes.set_facecolor("none")
        axes.grid(axis="y", color=colors["grid"], linewidth=0.8)
        axes.tick_params(which="both", colors=colors["muted"], labelsize=8.5, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(colors["grid"])
        axes.set_axisbelow(True)
        axes.margins(x=0.01)
    return figure, plots


def _name(axes, title: str, below: str, colors: Mapping[str, str]) -> None:
    axes.set_xlabel(below, color=colors["muted"], fontsize=9)
    axes.set_title(title, color=colors["muted"], fontsize=9, loc="left")


def _draw_loss(curves: Curves, colors: Mapping[str, str]) -> bytes:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, (axes,) = _figure_of(1, colors, [1])
    bounds = [0, *np.searchsorted(curves.steps, curves.starts), len(curves.steps)]
    for first, last in zip(bounds, bounds[1:], strict=False):  # one run's curve is not smoothed into the next one's
        steps, losses = curves.steps[first:last], curves.losses[first:last]
        smooth = _smooth(losses)
        axes.plot(steps, losses, color=colors["line"], linewidth=0.8, alpha=0.35)
        axes.plot(steps, smooth, color=colors["line"], linewidth=2)
    for start in curves.starts:
        axes.axvline(start, color=colors["muted"], linewidth=0.8, linestyle=(0, (4, 3)))
    if min(curves.losses) > 0 and max(curves.losses) > 20 * min(curves.losses):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.annotate(f"{smooth[-1]:.3g}", (steps[-1], smooth[-1]), xytext=(6, 0), textcoords="offset points",
                  va="center", color=colors["ink"], fontsize=9, fontweight="bold", annotation_clip=False)
    _name(axes, "training loss", "step", colors)
    return _png(figure, None if colors is DARK else colors["page"])


def _draw_gates(curves: Curves, colors: Mapping[str, str]) -> bytes:
    """Each layer's gate over the steps, deeper layers darker; and at the end, over the depth."""
    figure, (over_steps, over_depth) = _figure_of(2, colors, [2, 1])
    steps, values = (np.array(column) for column in zip(*curves.gates, strict=True))
    layers = values.shape[1]
    for layer in range(layers):
        depth = (layer + 1) / layers
        over_steps.plot(steps, values[:, layer], color=colors["line"], alpha=0.25 + 0.75 * depth, linewidth=1.6)
        if layers <= 8:
            over_steps.annotate(f"layer {layer}", (steps[-1], values[-1, layer]), xytext=(6, 0), va="center",
                                textcoords="offset points", color=colors["muted"], fontsize=8, annotation_clip=False)
        over_depth.bar(layer, values[-1, layer], color=colors["line"], alpha=0.25 + 0.75 * depth)
    over_depth.set_xticks(range(0, layers, max(1, layers // 8)))
    _name(over_steps, "mean |tanh(gate)| of a layer", "step", colors)
    _name(over_depth, "at the end", "layer", colors)
    return _png(figure, None if colors is DARK else colors["page"])


def _draw_sheet(title: str, examples: Sequence[Example]) -> bytes:
    """Draws the images enlarged, four in a row, each with its question, its answer, and the truth if that differs."""
    from matplotlib.figure import Figure

    columns = min(4, max(1, len(examples)))
    cell, side, line, head = 3.1, 2.78, 0.163, 0.6  # inches
    margin = (cell - side) / 2
    texts = [_sheet_lines(example) for example in examples]
    grid = [range(first, min(first + columns, len(examples))) for first in range(0, len(examples), columns)]
    tall = [side + 0.4 + line * max(sum(len(lines) for lines, *_ in texts[n]) for n in row) for row in grid]
    width, height = cell * columns, head + sum(tall)
    figure = Figure(figsize=(width, height), dpi=110, facecolor=LIGHT["page"])

    def write_text(x, y, words, **style):
        figure.text(x / width, y / height, words, va="top", parse_math=False, **style)

    write_text(margin, height - 0.2, title, fontsize=14, fontweight="bold", color=LIGHT["ink"])
    for row, numbers in enumerate(grid):
        top = height - head - sum(tall[:row])
        for column, number in enumerate(numbers):
            x, y = cell * column + margin, top - side
            axes = figure.add_axes((x / width, y / height, side / width, side / height))
            axes.imshow(examples[number].image, interpolation="nearest")
            axes.axis("off")
            y -= 0.08
            for lines, color, weight in texts[number]:
                write_text(x, y, "\n".join(lines), fontsize=8.6, color=LIGHT[color], fontweight=weight, linespacing=1.2)
                y -= line * len(lines) + 0.04
    return _png(figure, LIGHT["page"])


def _sheet_lines(example: Example) -> list[tuple[list[str], str, str]]:
    """Returns (lines, colour, weight) of the texts below an image."""

    def wrap(words: str, width: int) -> list[str]:
        return textwrap.wrap(words, width, max_lines=5, placeholder=" …", break_on_hyphens=False) or [""]

    answer = f"{MARKS[example.right]} {example.answer or NOTHING}".strip()
    below = [(wrap(example.question, 46), "muted", "normal"),
             (wrap(answer, 39), "bad" if example.right is False else "ink", "bold")]
    return below if example.right else [*below, (wrap(f"truth: {example.truth}", 46), "muted", "normal")]


def _png(figure, face: str | None) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", facecolor=face or "none")
    return out.getvalue()


STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --muted: #667080; --grid: #e3e6ea; --page: #f5f6f8; --card: #ffffff;
  --good: #1a7f4b; --bad: #c0362c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --muted: #98a2b0; --grid: #343b46; --page: #14171c;
  --card: #1c2027; --good: #5fcf93; --bad: #ff8f85; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 20px 60px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 20px; }
h2 { font-size: 17px; margin: 36px 0 12px; }
.facts { display: flex; flex-wrap: wrap; gap: 10px 36px; margin: 0; }
.facts dt { color: var(--muted); font-size: 13px; }
.facts dd { margin: 0; font-size: 21px; font-weight: 600; }
.card { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; }
.wide { overflow-x: auto; padding: 6px 16px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 9px 12px; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr:last-child td { border-bottom: 0; }
thead th { color: var(--muted); font-weight: 500; font-size: 13px; }
.curve { padding: 14px; }
.curve img { display: block; width: 100%; max-width: 860px; height: auto; margin: 0 auto; }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 16px; }
figure { margin: 0; overflow: hidden; }
figure img { display: block; width: 100%; image-rendering: pixelated; }
figure img.photo { aspect-ratio: 4 / 3; object-fit: contain; background: var(--grid); image-rendering: auto; }
.none { aspect-ratio: 4 / 3; display: grid; place-items: center; color: var(--muted); background: var(--grid);
  font-size: 13px; }
figcaption { padding: 11px 14px 14px; overflow-wrap: anywhere; }
.question, .truth { color: var(--muted); font-size: 13px; margin: 0; }
.answer { margin: 3px 0 0; font-weight: 600; }
.truth { margin-top: 6px; }
.choices { list-style: none; margin: 8px 0 0; padding: 0; font-size: 13px; }
.choices li { display: flex; justify-content: space-between; gap: 12px; padding: 3px 0; color: var(--muted);
  border-top: 1px solid var(--grid); font-variant-numeric: tabular-nums; }
.choices .chosen { color: var(--ink); font-weight: 600; }
.note { color: var(--muted); font-size: 12px; margin: 8px 0 0; }
.lines { margin: 0; padding: 12px 16px 12px 34px; font-size: 13px; overflow-wrap: anywhere; }
.mark.good { color: var(--good); } .mark.bad, .answer.bad { color: var(--bad); }
"""


def _page(title: str, plots: Sequence[tuple[str, str, bytes, bytes]], sections: Mapping[str, Sequence[Example]],
          table: Sequence[Sequence[str | float | None]], facts: Mapping[str, str],
          notes: Mapping[str, Sequence[str]]) -> str:
    text = html.escape
    heading, *rows = table or [[]]
    head = "".join(f'<th scope="col">{text(_cell(cell))}</th>' for cell in heading)
    body = "\n".join("<tr>" + "".join(f"<td>{text(_cell(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    curves = "\n".join(f'''<h2>{heading}</h2>
<div class="card curve"><picture><source media="(prefers-color-scheme: dark)" srcset="{_inline(dark)}">
<img src="{_inline(light)}" alt="{description}"></picture></div>''' for heading, description, light, dark in plots)
    figures = "\n".join(f"""<h2>{text(name)}</h2>
<div class="images">
{"".join(map(_figure, examples))}</div>""" for name, examples in sections.items())
    lists = "\n".join(f"""<h2>{text(name)}</h2>
<ul class="card lines">{"".join(f"<li>{text(line)}</li>" for line in lines)}</ul>""" for name, lines in notes.items())
    tiles = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in facts.items())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{text(title)}</h1>
<dl class="facts">{tiles}</dl>
<h2>Scores</h2>
<div class="card wide"><table><thead><tr>{head}</tr></thead><tbody>
{body}
</tbody></table></div>
{curves}
{figures}
{lists}
</main>
</body>
</html>
"""


def _figure(example: Example) -> str:
    text = html.escape
    kind = {True: "good", False: "bad", None: ""}[example.right]
    mark = f'<span class="mark {kind}">{MARKS[example.right]}</span> ' if kind else ""
    truth = "" if example.right else f'<p class="truth">truth: {text(example.truth)}</p>'
    options = "".join(f'<li{" class=chosen" if choice == example.answer else ""}><span>{text(choice)}</span>'
                      f'<span title="loss in nats">{loss:.2f}</span></li>' for choice, loss in example.choices)
    below = (f'<ul class="choices">{options}</ul>' if options else "") + (
        f'<p class="note">{text(example.note)}</p>' if example.note else "")
    return f"""<figure class="card">{_image(example)}
<figcaption><p class="question">{text(example.question)}</p>
<p class="answer {kind}">{mark}{text(example.answer or NOTHING)}</p>{truth}{below}</figcaption></figure>
"""


def _image(example: Example) -> str:
    from PIL import Image

    if example.image is None:
        return '<div class="none">no image</div>'
    out, photo = io.BytesIO(), max(example.image.shape[:2]) > PHOTO
    Image.fromarray(example.image).save(out, format="jpeg" if photo else "png", **{"quality": 85} if photo else {})
    source = _inline(out.getvalue(), "jpeg" if photo else "png")
    return f'<img{" class=photo" if photo else ""} src="{source}" alt="{html.escape(example.truth)}">'


def _cell(value: str | float | None) -> str:
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _inline(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()
