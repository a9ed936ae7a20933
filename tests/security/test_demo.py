"""`fedcore demo attack`: the inversion works on plain updates, and on nothing else of a single client."""

import json
from pathlib import Path

from typer.testing import CliRunner

from fedcore.cli import app

PNG = b"\x89PNG\r\n\x1a\n"


def test_the_attack_reads_plain_updates_and_no_other(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["demo", "attack", "--out", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    similar = {attempt["name"]: attempt["similarity"] for attempt in found["attempts"]}
    recovered = {attempt["name"]: attempt["recovered"] for attempt in found["attempts"]}

    held, plain, sealed, masked, total, guessed, noised, guessed_noised = similar
    assert similar[held] == 1.0 and similar[plain] > 0.999 and recovered[plain] == 10
    for hidden in (sealed, masked, noised, guessed_noised):
        assert similar[hidden] < 0.05 and recovered[hidden] == 0
    assert similar[total] < 0.5 and recovered[total] == 0
    assert 0 < recovered[guessed] < 10  # the sum is no secret
    assert (tmp_path / "attack.png").read_bytes().startswith(PNG)
