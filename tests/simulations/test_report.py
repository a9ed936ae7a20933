"""The report is one page that needs nothing else."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from fedcore.privacy.claims import promise, spent
from fedcore.simulations.report import figure, report
from fedcore.simulations.result import metrics_of
from fedcore.spec import RunSpec

SPEC = RunSpec.parse({"run": {"name": "digits", "rounds": 3, "task": "task:Digits"}})
ROWS: list[dict[str, Any]] = [
    {
        "round": n,
        "seconds": 0.5,
        "folded": 10,
        "refused": 0,
        "train_loss": 2 / n,
        "loss": 2.5 / n,
        "accuracy": n / 4,
    }
    for n in (1, 2, 3)
]


def summary(**changed: Any) -> dict[str, Any]:
    """Return a result.json."""
    return {
        "name": "digits",
        "rounds": 3,
        "clients": 100,
        "cohort_size": 10,
        "engine": "sequential",
        "seed": 0,
        "final": {"accuracy": 0.75, "loss": 0.8333, "train_loss": 0.6667},
        "privacy": promise(SPEC, 3),
        "seconds_per_round": [0.5, 0.5, 0.5],
        "clients_per_second": 20.0,
        "first_round_seconds": 0.5,
        "peak_rss_mb": 400,
        "parameters": 4810,
        "model_sha256": "ab" * 32,
        **changed,
    }


class Page(HTMLParser):
    """Collects what a page asks a browser to load, and checks that its tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        loading = [value or "" for name, value in attributes if name in ("src", "href", "xlink:href", "data")]
        self.loads += [tag] * (tag in ("script", "link", "iframe")) + [
            v for v in loading if not v.startswith("#")
        ]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_it_loads_nothing_and_is_well_formed() -> None:
    text = report(summary(), ROWS, SPEC)
    page = Page(text)
    assert page.loads == [] and page.open == []
    assert "url(http" not in text and "@import" not in text
    assert text.count("<svg") == 1 and text.count("<tr>") == 1 + len(ROWS)


def test_it_says_what_the_run_reached() -> None:
    words = " ".join(Page(report(summary(), ROWS, SPEC)).words)
    assert "After 3 rounds: accuracy 0.75, from 0.25 at first." in words
    assert "ab" * 32 in words and 'task = "task:Digits"' in words and "4,810" in words


def test_it_says_what_went_wrong() -> None:
    rows = [{**row, "refused": 2} for row in ROWS[:2]]
    words = " ".join(Page(report(summary(rounds=2), rows, SPEC)).words)
    assert "Stopped after 2 of 3 rounds: accuracy 0.5, from 0.25 at first. 4 updates were refused." in words


def test_names_are_text_and_never_markup() -> None:
    rows = [{"round": 1, "seconds": 1.0, "folded": 1, "refused": 0, "<img src=x>": 1.0, "$name": 2.0}]
    text = report(summary(name="<script>alert(1)</script>", final={"<img src=x>": 1.0}), rows, SPEC)
    assert Page(text).loads == []
    assert "&lt;script&gt;" in text and "<td>2.0000</td>" in text


def test_curves_have_titles_units_and_follow_the_page_into_the_dark() -> None:
    drawing = figure(ROWS)
    assert [axes.get_title("left") for axes in drawing.axes] == ["accuracy", "loss", "clients/s"]
    assert {axes.get_xlabel() for axes in drawing.axes} == {"round"}
    assert [np.asarray(line.get_ydata()).tolist() for line in drawing.axes[0].lines] == [[0.25, 0.5, 0.75]]
    svg = re.search(r"<svg.*</svg>", report(summary(), ROWS, SPEC), re.DOTALL)
    assert svg and "var(--blue)" in svg[0] and "#0072b2" not in svg[0]


def test_rounds_without_an_evaluation_are_no_points() -> None:
    rows = [
        {k: v for k, v in row.items() if row["round"] != 2 or k not in ("accuracy", "loss")} for row in ROWS
    ]
    assert np.asarray(figure(rows).axes[0].lines[0].get_xdata()).tolist() == [1, 3]
    assert "<td></td>" in report(summary(), rows, SPEC)


PRIVATE = RunSpec.parse(
    {
        "run": {"name": "digits", "rounds": 3},
        "cohort": {"size": 10},
        "privacy": {"level": "client", "noise_multiplier": 1.0, "population": 100},
    }
)


def test_a_private_run_says_what_it_promises_and_what_that_cost() -> None:
    spent_in = zip(ROWS, spent(PRIVATE), strict=True)
    rows = [{k: v for k, v in row.items() if k != "refused"} | {"epsilon": e} for row, e in spent_in]
    content = summary(final=metrics_of(rows[-1]), privacy=promise(PRIVATE, 3))
    words = " ".join(Page(report(content, rows, PRIVATE)).words)
    assert list(content["final"]) == ["accuracy", "loss", "train_loss", "epsilon"]
    cost = f"epsilon {spent(PRIVATE)[-1]:.3f} at delta 1e-05 (add/remove adjacency, PLD accountant)"
    assert f"all data of one client is protected with {cost}" in words
    assert "Against the coordinator there is no guarantee" in words
    assert "no receiver learns who took part" in words and "does not know the seed" in words
    panels = figure(rows).axes
    assert [axes.get_title("left") for axes in panels] == ["accuracy", "loss", "accuracy", "clients/s"]
    assert panels[2].get_xlabel() == "epsilon"
    assert np.asarray(panels[2].lines[0].get_xdata()).tolist() == spent(PRIVATE)


def test_another_run_says_nothing_of_privacy() -> None:
    assert "epsilon" not in report(summary(), ROWS, SPEC).partition("<pre>")[0]


@pytest.mark.parametrize("metrics", [(), ("a",), ("a", "b"), ("a", "b", "c")])
def test_any_number_of_metrics(metrics: tuple[str, ...]) -> None:
    rows = [
        {
            "round": 1,
            "seconds": 1.0,
            "folded": 1,
            "refused": 0,
            "train_loss": 1.0,
            **dict.fromkeys(metrics, 1.0),
        }
    ]
    assert len(figure(rows).axes) == len(metrics) + 2


def test_pyplot_stays_unimported() -> None:
    code = "import sys, fedcore.simulations.report; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_without_matplotlib_it_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "try: import fedcore.simulations.report\n"
        "except Exception as error: print(error)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert printed == "matplotlib is not installed; run: pip install 'fedcore[simulation]'\n"
