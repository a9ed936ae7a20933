"""Where the passphrase of a key comes from."""

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from fedcore.crypto.passphrase import passphrase
from fedcore.errors import ConfigError

ASK = "from fedcore.crypto.passphrase import passphrase as p; print(p(new=True).decode())"


@pytest.fixture(autouse=True)
def _nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FEDCORE_PASSPHRASE", "FEDCORE_PASSPHRASE_FILE"):
        monkeypatch.delenv(name, raising=False)


def typed(*lines: str) -> tuple[str, str]:
    """Type a line at each prompt of a terminal; return standard output and error."""
    keyboard, terminal = pty.openpty()
    pipe, command = subprocess.PIPE, [sys.executable, "-c", ASK]
    with subprocess.Popen(
        command, stdin=terminal, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout and process.stderr
            shown = ""
            for line in lines:
                while not shown.endswith(": "):  # what is typed before a prompt is thrown away
                    shown += process.stderr.read(1)
                os.write(keyboard, f"{line}\n".encode())
                shown += process.stderr.read(1)
            return process.stdout.read(), shown + process.stderr.read()
        finally:
            process.kill()
            os.close(keyboard)
            os.close(terminal)


def test_a_person_types_a_new_one_twice() -> None:
    out, err = typed("correct horse", "correct horse")
    assert out == "correct horse\n" and "Passphrase: " in err and "The same again: " in err
    assert "the two passphrases differ" in typed("correct horse", "correct hose")[1]
    assert "the passphrase is empty" in typed("", "")[1]


def test_a_service_has_it_in_its_environment_and_its_children_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDCORE_PASSPHRASE", "correct horse")
    assert passphrase() == b"correct horse"
    assert "FEDCORE_PASSPHRASE" not in os.environ


def test_or_in_a_private_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "secret"
    monkeypatch.setenv("FEDCORE_PASSPHRASE_FILE", str(file))
    with pytest.raises(ConfigError, match=r"FEDCORE_PASSPHRASE_FILE: .*secret: No such file"):
        passphrase()
    file.write_text("correct horse \n")
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="mode 0640"):
        passphrase()
    file.chmod(0o600)
    assert passphrase() == b"correct horse "
    file.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="secret: it is no UTF-8 text"):
        passphrase()


def test_without_any_of_them_it_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(ConfigError, match="set FEDCORE_PASSPHRASE, or FEDCORE_PASSPHRASE_FILE to a file of"):
        passphrase()
