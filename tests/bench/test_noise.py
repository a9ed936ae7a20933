"""The benchmark of noise in the sum: its lines."""

import json

from typer.testing import CliRunner

from fedcore.bench.cli import app


def test_the_command_prints_a_json_line_a_level() -> None:
    options = ["--clients", "11", "--size", "300", "--runs", "1"]
    ran = CliRunner().invoke(app, ["noise", *options])
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [line["level"] for line in lines] == ["client", "adaptive", "tree"]
    for line in lines:
        assert line["bench"] == "noise" and (line["clients"], line["size"]) == (11, 300)
        assert line["seconds"] > 0 and line["plain_s"] > 0 and line["ratio_to_plain"] > 0
