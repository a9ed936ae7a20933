"""The benchmark of masked sums: its lines, and that the sum behind them is exact."""

import json
import sys

import pytest
from typer.testing import CliRunner

from fedcore.bench import flower_secagg
from fedcore.bench.cli import app
from fedcore.bench.secagg import drawn, measure, protocol
from fedcore.crypto.secagg.parameters import Graph
from fedcore.errors import SpecError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
MOD = "flwr.client.mod.secure_aggregation.secaggplus_mod"


@pytest.mark.parametrize("encoding", ["q32", "exact"])
@pytest.mark.parametrize("degree", [6, 11, 0])
def test_the_sum_is_exact(encoding: str, degree: int) -> None:
    line = protocol(12, 1000, 1, degree, encoding)
    assert line["exact"] is True
    assert 0 < line["client_s"] == pytest.approx(sum(line["client_parts_s"].values()), rel=0.5)
    assert 0 < line["server_s"] == pytest.approx(sum(line["server_parts_s"].values()), rel=0.5)
    assert line["upload_ratio"] > {"q32": 1, "exact": 2}[encoding]


def test_nobody_has_to_be_lost() -> None:
    assert protocol(5, 10, 0, 4, "exact")["exact"] is True


def test_a_graph_of_about_that_many_masks() -> None:
    assert drawn(100, 99) == Graph(99, 66)
    assert drawn(100, 40) == Graph(23, 12)  # 23 + 76 * 23 / 99 = 40.7 masks
    assert drawn(5, 40) == Graph(4, 3)


def test_the_command_prints_a_json_line_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MOD, None)
    options = ["--clients", "8", "--params", "300", "--lost", "1", "--degree", "7"]
    ran = CliRunner().invoke(app, ["secagg", *options])
    masks, ours, theirs = map(json.loads, ran.stdout.splitlines())
    assert {line["bench"] for line in (masks, ours, theirs)} == {"secagg"}
    assert masks["cipher_gb_per_s"] > 0 and masks["ratio"] > 0 and masks["generated_ratio"] > 0
    assert (ours["clients"], ours["parameters"], ours["masks"], ours["exact"]) == (8, 300, 7, True)
    assert theirs["missing"] == "flwr is not installed; run: pip install flwr"


def test_flower_is_timed_for_the_same_round() -> None:
    line = flower_secagg.measure(10, 100, 1, 6)
    assert line["client_s"] > 0 and line["server_s"] > 0
    assert line["upload_ratio"] == pytest.approx(2, rel=0.02)  # the factor beside


def test_a_third_lost_is_refused() -> None:
    with pytest.raises(SpecError, match="3 of 9 clients are lost, expected fewer than a third"):
        next(measure(9, 10, 3, 4, "q32"))
