"""The report of a run: one HTML file that opens anywhere, offline, with its curves inside."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from statistics import median
from typing import TYPE_CHECKING, Any

from fedcore.privacy.words import sentences
from fedcore.simulations.page import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    canvas,
    inline,
    page,
    plain,
    section,
    table,
    tiles,
)
from fedcore.simulations.result import BOOKKEEPING, LAST, LOSSES, SPENT, clients_of, metrics_of
from fedcore.spec import RunSpec
from fedcore.strategies.rounds import BITS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]


def figure(metrics: Rows) -> "Figure":
    """Return the curves of a run: a panel for each of the task's metrics, the losses, and the speed.

    A private run has a panel more, of its first metric over epsilon. metrics: a row a round, as
    `Result.metrics`. Matplotlib's global state is neither read for fonts and colours nor changed.
    """
    names = list(dict.fromkeys(name for row in metrics for name in metrics_of(row)))
    losses = [name for name in names if name in LOSSES]
    own = [name for name in names if name not in LAST]
    panels = [([name], "round") for name in own] + [(losses, "round")] * bool(losses)
    panels += [([name], SPENT) for name in (own or losses)[:1] if SPENT in names]
    panels += [(["clients/s"], "round")]
    rows = [dict(row) | {"clients/s": clients_of(row) / row["seconds"]} for row in metrics]
    height, odd = -(-len(panels) // 2), len(panels) % 2
    ratios = [1.0] * (height - odd) + [0.6] * odd
    drawing = canvas(10, 3.4 * sum(ratios))
    grid = drawing.add_gridspec(height, 2, height_ratios=ratios, wspace=0.08, hspace=0.1)
    for place, panel in enumerate(panels):
        alone = odd and place == len(panels) - 1
        axes = drawing.add_subplot(grid[place // 2, :] if alone else grid[place // 2, place % 2])
        _draw(axes, *panel, rows)
    return drawing


def _draw(axes: "Axes", names: Sequence[str], over: str, rows: Rows) -> None:
    """Draw one panel: a line for each name, over the rounds that have it or what was spent in them."""
    colours = (GREEN,) if names == ["clients/s"] else (BLUE, ORANGE)
    for place, name in enumerate(names):
        points = [(row[over], row[name]) for row in rows if name in row]
        places, values = zip(*points, strict=True)
        colour, marker = colours[place % len(colours)], "o" if len(points) <= 20 else ""
        axes.plot(places, values, label=name, color=colour, marker=marker, markersize=4, linewidth=2)
        if len(names) == 1:
            axes.annotate(
                f"{values[-1]:.4g}",
                (places[-1], values[-1]),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=11,
                color=colour,
                annotation_clip=False,
            )
    axes.set_title(names[0] if len(names) == 1 else "loss", loc="left", fontsize=12, color=INK, weight="bold")
    plain(axes, over)
    axes.grid(visible=False, axis="x")
    axes.spines["bottom"].set(visible=True, color=FAINT)
    axes.locator_params(axis="x", integer=over == "round")
    if names == ["clients/s"]:
        axes.set_ylim(bottom=0)
    if len(names) > 1:
        axes.legend(frameon=False, fontsize=11, labelcolor=INK)


def report(summary: Mapping[str, Any], metrics: Rows, spec: RunSpec) -> str:
    """Return a run as one self-contained HTML page, light or dark as the reader's system is.

    summary: what `result.json` holds. metrics: a row a round. Same arguments, same page but for random
    ids inside the picture.
    """
    picture = inline(figure(metrics), "Curves over the rounds")
    rounds = ([escape(text) for text in _values(row, metrics)] for row in metrics)
    return page(
        name=summary["name"],
        kicker=f"fedcore simulation · {spec.run.task or 'a task'} · {summary['engine']} engine"
        f" · seed {summary['seed']}",
        verdict=verdict(summary, metrics, spec),
        sections=[
            tiles(key_figures(summary)),
            *privacy(summary),
            section(picture),
            section(table(map(escape, _columns(metrics)), rounds), "Rounds"),
            section(f"<p>{encryption(spec)}</p>", "Encryption"),
            section(f"<pre>{escape(spec.to_toml())}</pre>", "The spec, as the run resolved it"),
        ],
        footer=f"model SHA-256 <code>{escape(summary['model_sha256'])}</code>",
    )


def privacy(summary: Mapping[str, Any]) -> list[str]:
    """Return the section of what a private run promises, [] of another run."""
    said = list(sentences(summary["privacy"]))
    if not said:
        return []
    said.append("A simulation draws all noise from its seed: this holds against who does not know the seed.")
    return [section("\n".join(f"<p>{escape(text)}</p>" for text in said), "Privacy")]


def encryption(spec: RunSpec) -> str:
    """Return how updates were summed, and whether under masks."""
    words = f"Vectors were summed in words of {BITS[spec.encryption.encoding]} bits"
    if spec.encryption.updates == "secagg":
        lies = "Nobody sees single updates then, so a client that lies can steer a sum."
        return f"{words}, under masks: every round ran secure aggregation among its clients. {lies}"
    return f"{words}. Updates were not encrypted, since they never left this machine."


def verdict(summary: Mapping[str, Any], metrics: Rows, spec: RunSpec) -> str:
    """Return one sentence or two: how far the run came, what it reached, and what went wrong."""
    done, planned = summary["rounds"], spec.run.rounds
    ended = f"After {done} rounds" if done == planned else f"Stopped after {done} of {planned} rounds"
    name = next(iter(summary["final"]))
    reached = [row[name] for row in metrics if name in row]
    refused = sum(row.get("refused", 0) for row in metrics)
    trouble = f" {refused} updates were refused." if refused else ""
    return f"{ended}: {name} {reached[-1]:.4g}, from {reached[0]:.4g} at first.{trouble}"


def key_figures(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the key figures of a run as (label, text)."""
    figures = [(name, f"{value:.4g}") for name, value in summary["final"].items()]
    return [
        *figures,
        ("rounds", f"{summary['rounds']:,}"),
        ("clients", f"{summary['clients']:,}"),
        ("clients in a round", f"{summary['cohort_size']:,}"),
        ("clients a second", f"{summary['clients_per_second']:,.0f}"),
        ("a round, median", f"{median(summary['seconds_per_round']):.3g} s"),
        ("parameters", f"{summary['parameters']:,}"),
        ("peak memory", f"{summary['peak_rss_mb']:,} MB"),
    ]


def _columns(metrics: Rows) -> list[str]:
    """Return the columns of the table of rounds."""
    kept = (name for name in BOOKKEEPING if any(name in row for row in metrics))
    return [*kept, *dict.fromkeys(name for row in metrics for name in metrics_of(row))]


def _values(row: Mapping[str, Any], metrics: Rows) -> Iterable[str]:
    """Return a round's texts, empty where nothing was measured."""
    for name in _columns(metrics):
        value = row.get(name, "")
        yield f"{value:.4f}" if isinstance(value, float) else str(value)
