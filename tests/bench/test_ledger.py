"""The benchmark of the ledger: its line, and that it leaves nothing behind."""

import json
from pathlib import Path

from typer.testing import CliRunner

from fedcore.bench.cli import app


def test_the_command_prints_its_line(tmp_path: Path) -> None:
    ran = CliRunner().invoke(app, ["ledger", "--rows", "5", "--dir", str(tmp_path)])
    line = json.loads(ran.stdout)
    assert (line["bench"], line["rows"]) == ("ledger", 5)
    assert 0 < line["median_ms"] <= line["p99_ms"]
    assert list(tmp_path.iterdir()) == []
