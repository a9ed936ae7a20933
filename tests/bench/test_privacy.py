"""The benchmark of DP-SGD: its line and its refusals; what it measures is for a quiet machine."""

import json

import pytest
from typer.testing import CliRunner

from fedcore.bench.cli import app
from fedcore.errors import SpecError

pytestmark = pytest.mark.slow  # trains with Opacus, nine seconds


@pytest.mark.parametrize("clipping", ["hooks", "ghost"])
def test_a_line(clipping: str) -> None:
    options = ["privacy", "digits-mlp-100", "--rounds", "1", "--clipping", clipping]
    result = CliRunner().invoke(app, options, catch_exceptions=False)
    line = json.loads(result.stdout)
    assert (line["job"], line["clipping"], line["batch"]) == ("digits-mlp-100", clipping, 16)
    assert 0 < line["ratio_to_opacus"] < 5 and line["step_ms"] > 0
    assert line["chunk_of_100_ratio_to_one_by_one"] > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["digits-cnn-10"], "did you mean 'digits-cnn-100'"),
        (["digits-mlp-100", "--clipping", "off"], "clipping"),
    ],
)
def test_what_it_does_not_know(options: list[str], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        CliRunner().invoke(app, ["privacy", *options], catch_exceptions=False)
