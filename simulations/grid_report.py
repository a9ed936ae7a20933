"""What a grid came to: a table, and a heat map of each of the task's metrics over its first two axes."""

import csv
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np
import tomli_w
from numpy.typing import NDArray

from fedcore.simulations.grid_cells import label, short_names
from fedcore.simulations.grid_utility import SEED, Summary, utility
from fedcore.simulations.page import FAINT, INK, SOFT, canvas, inline, page, section
from fedcore.simulations.page import table as html_table
from fedcore.simulations.result import LAST

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 10  # inches of the page, to which what is wider is shrunk
LETTER = 0.095  # inches of a letter on an axis
LUMINANCE = (0.2126, 0.7152, 0.0722)  # of red, green and blue (Rec. 709)


@dataclass(frozen=True)
class HeatMap:
    """A metric over two axes of a grid, averaged over the others.

    rows, columns: keys of the spec, "" for an axis that is not there. names: the texts of the rows and of the
    columns. averaged: keys of the other axes. runs: in each field. mean, low, high: (r, c) float64 over the
    finished runs, NaN where there is none. missing: (r, c) texts, "" where all finished.
    """

    metric: str
    rows: str
    columns: str
    names: tuple[list[str], list[str]]
    averaged: tuple[str, ...]
    runs: int
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    missing: NDArray[np.str_]


def heat_map(summary: Summary, metric: str) -> HeatMap:
    """Return a metric's final values over the first two axes with several values, a seed the last of them.

    Only finished cells count: what a failed run had reached is no result.
    """
    axes = summary["axes"]
    several = sorted((key for key in axes if len(axes[key]) > 1), key=lambda key: key == SEED)
    rows, columns = (*several[:2], "", "")[:2]
    names = [[label(value) for value in axes.get(key, [""])] for key in (rows, columns)]
    shape = (len(names[0]), len(names[1]))
    fields: dict[tuple[int, ...], list[Summary]] = {place: [] for place in np.ndindex(shape)}
    for cell in summary["cells"]:
        fields[tuple(axes[key].index(cell["values"][key]) if key else 0 for key in (rows, columns))].append(
            cell
        )
    values = [_finished(field, metric) or [np.nan] for field in fields.values()]
    return HeatMap(
        metric=metric,
        rows=rows,
        columns=columns,
        names=(names[0], names[1]),
        averaged=tuple(several[2:]),
        runs=len(fields[0, 0]),
        mean=np.reshape([fmean(v) for v in values], shape),
        low=np.reshape([min(v) for v in values], shape),
        high=np.reshape([max(v) for v in values], shape),
        missing=np.reshape([_missing(field) for field in fields.values()], shape),
    )


def _finished(field: Sequence[Summary], metric: str) -> list[float]:
    """Return the values of a metric that count."""
    return [c["final"][metric] for c in field if c["status"] == "finished" and metric in c["final"]]


def _missing(field: Sequence[Summary]) -> str:
    """Return in words what a field lacks: `2 of 3 runs`, or what became of them if none finished."""
    statuses = [cell["status"] for cell in field]
    if finished := statuses.count("finished"):
        return "" if finished == len(field) else f"{finished} of {len(field)} runs"
    return statuses[0] if len(set(statuses)) == 1 else "none finished"


def metrics(summary: Summary) -> list[str]:
    """Return the names of all metrics that some cell has, the task's own before the losses."""
    return list(dict.fromkeys(name for cell in summary["cells"] for name in cell["final"]))


def table(summary: Summary) -> str:
    """Return a grid as CSV: a row a cell, with its values, final metrics, rounds and seconds."""
    keys, names = list(summary["axes"]), metrics(summary)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*keys, *names, "rounds", "seconds", "status", "reason"])
    for cell in summary["cells"]:
        values = [label(cell["values"][key]) for key in keys]
        final = [cell["final"].get(name) for name in names]
        writer.writerow([*values, *final, *(cell[k] for k in ("rounds", "seconds", "status", "reason"))])
    return buffer.getvalue()


def lines(summary: Summary) -> list[str]:
    """Return a grid for a terminal: a line of names, then a line a cell, in columns."""
    short, names = short_names(summary["axes"]), metrics(summary)
    rows = [[*short.values(), *names, "seconds", ""]]
    for cell in summary["cells"]:
        values = [label(cell["values"][key]) for key in short]
        what = (
            "" if cell["status"] == "finished" else f"{cell['status']}: {cell['reason']}".removesuffix(": ")
        )
        rows.append([*values, *_numbers(cell, names), f"{cell['seconds']:.1f}", what])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = len(short)  # columns of names; the others are numbers
    return [
        "  ".join(
            text.ljust(width) if place < left else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, [*widths[:-1], 0], strict=True))
        ).rstrip()
        for row in rows
    ]


def _numbers(cell: Summary, names: Sequence[str]) -> list[str]:
    """Return the final metrics of a cell as texts, empty where there is none."""
    values = (cell["final"].get(name) for name in names)
    return ["" if value is None else f"{value:.4f}" for value in values]


def report(summary: Summary) -> str:
    """Return a grid as one self-contained HTML page that leads to its cells' own."""
    run, asked = summary["spec"]["run"], tomli_w.dumps(summary["spec"])
    several = any(len(values) > 1 for values in summary["axes"].values())
    own = [name for name in metrics(summary) if name not in LAST] or metrics(summary)[:1]
    maps = [heat_map(summary, name) for name in own if several]
    return page(
        name=run["name"],
        kicker=f"fedcore simulation · grid of {len(summary['cells'])} runs · {run['task'] or 'a task'}",
        verdict=verdict(summary),
        sections=[
            *utility(summary, own[:1]),
            *(section(f"{inline(draw(m), title(m))}\n<p>{escape(caption(m))}</p>", title(m)) for m in maps),
            section(_runs(summary), "Runs"),
            section(f"<pre>{escape(asked)}</pre>", "The spec, before the values of a run"),
        ],
    )


def verdict(summary: Summary) -> str:
    """Return how many runs finished, and what became of the others."""
    counts = Counter(cell["status"] for cell in summary["cells"])
    finished, total = counts["finished"], len(summary["cells"])
    head = f"All {total}" if finished == total else f"{finished} of {total}"
    others = (
        f", {counts[status]} {status}" for status in ("diverged", "failed", "not run") if counts[status]
    )
    return f"{head} runs finished{''.join(others)}."


def title(drawn: HeatMap) -> str:
    """Return what a heat map shows, such as `Final accuracy by aggregator and attack`."""
    return f"Final {drawn.metric} by {' and '.join(_axis_names(drawn).values())}"


def caption(drawn: HeatMap) -> str:
    """Return how the numbers of a heat map came about."""
    if not drawn.averaged:
        return "Each number is one run."
    over = " and ".join(drawn.averaged)
    return f"Each number is the mean of {drawn.runs} runs over {over}; below it, the lowest and the highest."


def draw(drawn: HeatMap) -> "Figure":
    """Return a heat map as a matplotlib figure: a number in each field, the highest the brightest."""
    (rows, columns), names = drawn.names, {"": "", **_axis_names(drawn)}
    longest, left = max(map(len, columns)), 0.6 + LETTER * max(map(len, rows))
    wide = min(1.3, max(0.75, (WIDTH - left) / len(columns)))
    steep = LETTER * longest > wide
    lean = LETTER * longest * 0.8 if steep else 0.0  # how far the last name reaches to the right
    figure = canvas(max(left + wide * len(columns) + lean, 3), 0.7 + 0.7 * lean + 0.6 * len(rows))
    axes = figure.add_subplot()
    scale = _scale(drawn.mean)
    for row, column in np.ndindex(drawn.mean.shape):
        _field(axes, drawn, (row, column), scale(float(drawn.mean[row, column])))
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5), facecolor="none")
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xticks(range(len(columns)), columns, rotation=30 * steep, ha="left" if steep else "center")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(names[drawn.columns], fontsize=11, color=INK, weight="bold", labelpad=8)
    axes.set_ylabel(names[drawn.rows], fontsize=11, color=INK, weight="bold", labelpad=8)
    axes.tick_params(colors=INK, labelsize=11, length=0)
    axes.spines[:].set_visible(False)
    return figure


def _axis_names(drawn: HeatMap) -> dict[str, str]:
    return short_names([key for key in (drawn.rows, drawn.columns) if key])


def _scale(mean: NDArray[np.float64]) -> Callable[[float], float]:
    """Return what takes the lowest finite value to 0 and the highest to 1."""
    finite = mean[np.isfinite(mean)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    return lambda value: float((value - low) / (high - low)) if high > low else 0.5


def _field(axes: "Axes", drawn: HeatMap, place: tuple[int, int], height: float) -> None:
    """Draw one field: its colour by the mean's height among all, the mean, the range, what is missing."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    row, column = place
    box = Rectangle((column - 0.48, row - 0.47), 0.96, 0.94, facecolor="none", edgecolor=FAINT)
    axes.add_patch(box)
    if not np.isfinite(drawn.mean[place]):
        text = drawn.missing[place].replace(" ", "\n")
        axes.text(column, row, text, ha="center", va="center", fontsize=10, color=SOFT)
        return
    colour = colormaps["viridis"](height)
    box.set(facecolor=colour, edgecolor="none")
    ink = "#000000" if np.dot(colour[:3], LUMINANCE) > 0.45 else "#ffffff"
    low, mean, high = (_number(values[place]) for values in (drawn.low, drawn.mean, drawn.high))
    small = "\n".join(filter(None, (f"{low}–{high}" if low != high else "", drawn.missing[place])))
    middle = row - 0.18 if drawn.runs > 1 else row
    axes.text(column, middle, mean, ha="center", va="center", fontsize=12, color=ink, weight="bold")
    axes.text(column, row + 0.06, small, ha="center", va="top", fontsize=7.5, color=ink)


def _number(value: float) -> str:
    """Return a metric as a field has room for it."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.3g}"


def _runs(summary: Summary) -> str:
    """Return the cells as an HTML table; the status of each leads to its report, or to its failure."""
    short, names = short_names(summary["axes"]), metrics(summary)
    rows = []
    for cell in summary["cells"]:
        values = [escape(label(cell["values"][key])) for key in short]
        numbers = _numbers(cell, names)
        reason = f'<span class="why">{escape(cell["reason"])}</span>'
        rows.append([*values, _status(cell), *numbers, str(cell["rounds"]), f"{cell['seconds']:.1f}", reason])
    return html_table(map(escape, [*short.values(), "", *names, "rounds", "seconds", ""]), rows)


def _status(cell: Summary) -> str:
    """Return a cell's status as a link into its folder."""
    if cell["status"] == "not run":
        return "not run"
    file = "failure.txt" if cell["status"] == "failed" else "report.html"
    return f'<a href="{quote(cell["cell"])}/{file}">{cell["status"]}</a>'
