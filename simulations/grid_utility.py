"""What privacy costs in a grid: a metric against epsilon, a line for each way to train."""

from collections.abc import Iterable, Mapping, Sequence
from math import inf
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fedcore.simulations.grid_cells import label, short_names
from fedcore.simulations.page import BLUE, GREEN, INK, ORANGE, canvas, inline, plain, section
from fedcore.simulations.result import SPENT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Summary = Mapping[str, Any]  # what grid.json holds
Point = tuple[float, float]  # epsilon, metric
SEED = "run.seed"


def utility(summary: Summary, names: Iterable[str]) -> list[str]:
    """Return a section for each metric that says what it costs, [] where no cell is private."""
    found = [(name, lines) for name in names if (lines := costs(summary, name))]
    said = "Each point is a run, or the mean over run.seed; a dashed line is what is reached without privacy."
    return [
        section(f"{inline(draw(lines, name), title)}\n<p>{said}</p>", title)
        for name, lines in found
        for title in [f"{name.capitalize()} against epsilon"]
    ]


def costs(summary: Summary, metric: str) -> dict[str, list[Point]]:
    """Return the finished cells as lines, label -> points by epsilon; {} where none is private.

    The cells of a line differ in [privacy] and the seed only, and have one level, since an epsilon for
    examples is no epsilon for clients. Cells that differ in the seed are one point, their mean. epsilon is
    infinite without privacy.
    """
    cells = [c for c in summary["cells"] if c["status"] == "finished" and c["final"].get(metric) is not None]
    found: dict[str, dict[float, list[float]]] = {}
    for cell in cells:
        spent = cell["final"].get(SPENT)
        points = found.setdefault(_way(summary, cell), {})
        points.setdefault(inf if spent is None else spent, []).append(cell["final"][metric])
    lines = {way: [(x, fmean(ys)) for x, ys in sorted(points.items())] for way, points in found.items()}
    return lines if any(points[0][0] < inf for points in lines.values()) else {}


def _way(summary: Summary, cell: Summary) -> str:
    """Return what tells the line of a cell from the others: its values outside [privacy], and its level."""
    axes, values = summary["axes"], cell["values"]
    ways = [key for key in axes if key != SEED and key.split(".")[0] != "privacy" and len(axes[key]) > 1]
    said = [f"{name} {label(values[key])}" for key, name in short_names(ways).items()]
    level = values.get("privacy.level") or values.get("privacy", {}).get("level")
    return ", ".join([*said, *([f"privacy {level}"] if level else [])])


def draw(lines: Mapping[str, Sequence[Point]], metric: str) -> "Figure":
    """Return a metric against epsilon as a figure, epsilon on a logarithmic scale."""
    figure = canvas(10, 3.6)
    axes = figure.add_subplot()
    for place, (way, points) in enumerate(lines.items()):
        colour = (BLUE, ORANGE, GREEN)[place % 3]
        finite = [point for point in points if point[0] < inf]
        if finite:
            marker = "osD^v"[place // 3 % 5]
            axes.plot(*zip(*finite, strict=True), label=way, color=colour, marker=marker, linewidth=2)
        for _, height in points[len(finite) :]:
            axes.axhline(
                height, label=way if not finite else None, color=colour, linestyle="--", linewidth=1.5
            )
    axes.set_xscale("log")
    plain(axes, "epsilon, against whoever receives the model", metric)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=11, labelcolor=INK)
    return figure
