"""One HTML file that opens anywhere, offline, pictures inside; light or dark as the reader's system is."""

import io
import re
from collections.abc import Iterable
from html import escape
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

from fedcore.errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.axes import Axes

try:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingExtra("matplotlib", "simulation") from error

# Okabe and Ito's palette, which colour-blind readers can tell apart; the page turns each into a CSS variable.
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"
INK, SOFT, FAINT = "#24292f", "#57606a", "#d0d7de"
VARIABLES = {
    BLUE: "--blue",
    ORANGE: "--orange",
    GREEN: "--green",
    INK: "--ink",
    SOFT: "--soft",
    FAINT: "--faint",
}


def page(name: str, kicker: str, verdict: str, sections: Iterable[str], footer: str = "") -> str:
    """Return a page: a line above its name, its name, what came out, and the sections.

    name, kicker, verdict: texts. sections, footer: HTML.
    """
    template = Template((files("fedcore.simulations") / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        name=escape(name),
        kicker=escape(kicker),
        verdict=escape(verdict),
        sections="\n".join(sections),
        footer=footer,
    )


def section(content: str, title: str = "") -> str:
    """Return HTML as a section of a page, under a title if it has one."""
    heading = f"<h2>{escape(title)}</h2>\n" if title else ""
    return f"<section>\n{heading}{content}\n</section>"


def tiles(figures: Iterable[tuple[str, str]]) -> str:
    """Return key figures, (label, text) each, as a section."""
    boxes = (f"<div><b>{escape(text)}</b><span>{escape(label)}</span></div>" for label, text in figures)
    return '<section class="tiles">\n' + "\n".join(boxes) + "\n</section>"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table of HTML cells that scrolls where it is too large."""
    lines = (f"<tr>{_cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{_cells("th", head)}</tr></thead><tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def _cells(tag: str, contents: Iterable[str]) -> str:
    return "".join(f"<{tag}>{content}</{tag}>" for content in contents)


def canvas(width: float, height: float) -> Figure:
    """Return an empty figure, in inches, for `inline`; matplotlib's global state is left alone."""
    drawing = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    FigureCanvasSVG(drawing)
    return drawing


def plain(axes: "Axes", across: str, up: str = "") -> None:
    """Give axes the page's look: labels, a faint grid behind what is drawn, no frame."""
    axes.set_xlabel(across, fontsize=11, color=INK)
    axes.set_ylabel(up, fontsize=11, color=INK)
    axes.set_facecolor("none")
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", colors=INK, labelsize=10, length=0)


def inline(drawing: Figure, label: str) -> str:
    """Return a figure as an SVG element, at most as wide as it was drawn, in the page's colours.

    label: what it shows, for readers who cannot see it.
    """
    buffer = io.StringIO()
    drawing.savefig(
        buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    svg = buffer.getvalue()
    opening = f'<svg role="img" aria-label="{escape(label)}" style="max-width: {drawing.get_figwidth():g}in" '
    svg = svg[svg.index("<svg") :].replace("<svg ", opening, 1)
    return re.sub("|".join(VARIABLES), lambda match: f"var({VARIABLES[match[0]]})", svg)
