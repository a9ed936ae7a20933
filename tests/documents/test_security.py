"""The threat table: every row leads to a section, and every section to tests that exist."""

import re
from pathlib import Path

import pytest

from fedcore.crypto.secagg import Config
from fedcore.crypto.secagg.parameters import quorum
from fedcore.messages import Ref

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
TABLE = PAGE.split("## The threat table")[1].split("\n### ")[0]
ROWS = re.findall(r"^\| \[.+?\]\(#([a-z-]+)\)", TABLE, re.MULTILINE)
SECTIONS = {
    re.sub(r"\W+", "-", title.lower()): text
    for title, text in re.findall(r"^### (.+)\n((?:(?!#).*\n)*)", PAGE, re.MULTILINE)
}
NAMED = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)


def test_every_row_leads_to_a_section_and_every_section_comes_from_a_row() -> None:
    assert len(ROWS) == len(re.findall(r"^\| ", TABLE, re.MULTILINE)) - 1  # all but the head
    assert list(SECTIONS) == ROWS


@pytest.mark.parametrize("row", ROWS)
def test_a_test_stands_behind_every_row(row: str) -> None:
    assert re.search(r"`tests/[\w/]+\.py::\w+`", SECTIONS[row])


@pytest.mark.parametrize(("path", "name"), NAMED, ids=["::".join(each) for each in NAMED])
def test_a_test_that_is_named_exists(path: str, name: str) -> None:
    source = (ROOT / path).read_text(encoding="utf-8")
    assert not name or re.search(rf"^(async )?def {name}\(", source, re.MULTILINE)


def test_the_peers_of_a_cohort_are_those_of_the_graph() -> None:
    config = Config(
        "fed", Ref("run", 1, 0, "train"), "", "", 1000, 3, 32, 0, 1, corrupt=0.2, lost=0.1, rounds=100
    )
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", PAGE, re.MULTILINE)
    said = {int(n): tuple(map(int, numbers)) for n, *numbers in rows}
    graphs = {n: config.graph(n) for n in said}
    assert said == {n: (graph.degree, graph.threshold, quorum(n)) for n, graph in graphs.items()}
    assert len(said) == 4
