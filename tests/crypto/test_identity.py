import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedcore.crypto import certificates, files
from fedcore.crypto.certificates import key_to_pem, new_key
from fedcore.crypto.files import write_atomically
from fedcore.crypto.identity import Certified, Identity, is_locked, requesting
from fedcore.crypto.names import Name
from fedcore.errors import AuthenticationError, ConfigError

NOW = datetime(2030, 1, 1, tzinfo=UTC)
CLIENT = Name("fed", "client", "hospital-1")


def identity() -> Identity:
    root_key, issuer_key, key = new_key(), new_key(), new_key()
    root = certificates.issue_root("fed", root_key, NOW)
    issuer = certificates.issue_intermediate("fed", issuer_key.public_key(), root, root_key, NOW)
    leaf = certificates.issue_leaf(CLIENT, key.public_key(), issuer, issuer_key, NOW)
    return Identity.verified(key, [leaf, issuer], root, NOW)


def load(folder: Path, days: int = 0) -> Identity:
    return Identity.load(folder, clock=lambda: NOW + timedelta(days=days))


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_an_identity_comes_back_from_its_folder(tmp_path: Path) -> None:
    made = identity()
    made.save(tmp_path / "id")
    assert load(tmp_path / "id") == made
    assert (made.name, made.not_after) == (CLIENT, NOW + timedelta(days=30))


def test_the_key_is_private_under_any_umask_and_never_shown(tmp_path: Path) -> None:
    made, before = identity(), os.umask(0)
    try:
        made.save(tmp_path / "id")
        with requesting(tmp_path / "other"):
            pass
    finally:
        os.umask(before)
    assert mode(tmp_path / "id") == mode(tmp_path / "other") == 0o700
    assert mode(tmp_path / "id" / "identity.pem") == mode(tmp_path / "other" / "next.pem") == 0o600
    assert "PRIVATE" not in repr(made)


def test_the_temporary_file_of_a_key_is_private_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(os, "replace", lambda source, target: seen.append(mode(source)))
    files.write_atomically(tmp_path / "key.pem", b"secret", 0o600)
    assert seen == [0o600]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    files.write_atomically(path, b"old", 0o600)

    def fail(source: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, b"new", 0o600)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("missing", ["identity.pem", "ca.pem"])
def test_a_missing_file_names_the_next_step(tmp_path: Path, missing: str) -> None:
    identity().save(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(ConfigError, match=rf"{missing} is missing; .*fedcore client enroll TOKEN"):
        load(tmp_path)


@pytest.mark.parametrize("file", ["identity.pem", "ca.pem"])
def test_a_damaged_file_is_said(tmp_path: Path, file: str) -> None:
    identity().save(tmp_path)
    (tmp_path / file).write_text("-----BEGIN NONSENSE-----\n")
    with pytest.raises(ConfigError, match="is damaged"):
        load(tmp_path)


@pytest.mark.parametrize("wide", [0o640, 0o604, 0o620])
def test_a_key_that_others_can_touch_is_refused(tmp_path: Path, wide: int) -> None:
    identity().save(tmp_path)
    (tmp_path / "identity.pem").chmod(wide)
    with pytest.raises(ConfigError, match=f"mode {wide:04o}.*expected 0600; run: chmod 600"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="expected 0600"), requesting(tmp_path):
        pass


def test_key_certificate_and_root_must_belong_together(tmp_path: Path) -> None:
    mine, other = identity(), identity()
    mine.save(tmp_path)
    (tmp_path / "ca.pem").write_bytes(other.root)
    with pytest.raises(AuthenticationError, match="does not lead to the federation's root"):
        load(tmp_path)
    mine.save(tmp_path)
    (tmp_path / "identity.pem").write_bytes(other.key + mine.chain)
    with pytest.raises(AuthenticationError, match="for another key"):
        load(tmp_path)


def test_an_expired_certificate_says_so_and_what_to_do(tmp_path: Path) -> None:
    identity().save(tmp_path)
    assert load(tmp_path, days=29).name == CLIENT
    with pytest.raises(AuthenticationError, match=r"to 2030-01-31 00:00 UTC.*fedcore client enroll TOKEN"):
        load(tmp_path, days=31)


def test_the_key_of_a_request_stays_until_its_answer_is_saved(tmp_path: Path) -> None:
    """However often the request is repeated; the one after it gets another key where that is wanted."""

    def asked(fresh: bool = False) -> bytes:
        with requesting(tmp_path, fresh=fresh) as key:
            return key_to_pem(key)

    first = asked()
    assert asked() == asked(fresh=True) == first
    mine = identity()
    mine.save(tmp_path)
    assert asked() == mine.key and not (tmp_path / "next.pem").exists()
    second = asked(fresh=True)
    assert second not in (first, mine.key) and asked() == second
    assert load(tmp_path) == mine


def test_a_request_with_a_damaged_key_is_said(tmp_path: Path) -> None:
    write_atomically(tmp_path / "next.pem", b"nonsense", 0o600)
    with (
        pytest.raises(ConfigError, match=r"next.pem is no key of fedcore's.*move it away"),
        requesting(tmp_path),
    ):
        pass


# --- with a passphrase


def test_an_encrypted_key_opens_with_its_passphrase_only(tmp_path: Path) -> None:
    made = replace(identity(), passphrase=b"correct horse")
    made.save(tmp_path)
    assert load_with(tmp_path, b"correct horse") == made and is_locked(tmp_path)
    assert made.key not in (tmp_path / "identity.pem").read_bytes()
    for wrong, told in ((b"battery staple", "does not open the key"), (b"", "no passphrase")):
        with pytest.raises(AuthenticationError, match=rf"{told}; give the passphrase in FEDCORE_PASSPHRASE"):
            load_with(tmp_path, wrong)
    assert "correct horse" not in repr(made)


def load_with(folder: Path, passphrase: bytes) -> Identity:
    return Identity.load(folder, lambda: NOW, passphrase)


def test_what_the_certificate_says_needs_no_passphrase(tmp_path: Path) -> None:
    made = replace(identity(), passphrase=b"correct horse")
    made.save(tmp_path)
    assert Certified.load(tmp_path, lambda: NOW).name == CLIENT
    assert Certified.load(tmp_path, lambda: NOW).renewal == NOW + timedelta(days=20)


def test_the_key_of_a_request_is_encrypted_too(tmp_path: Path) -> None:
    with requesting(tmp_path, b"correct horse") as key:
        pem = key_to_pem(key)
    assert is_locked(tmp_path) and pem not in (tmp_path / "next.pem").read_bytes()
    with requesting(tmp_path, b"correct horse") as again:
        assert again.private_numbers() == key.private_numbers()
    with pytest.raises(AuthenticationError, match="does not open"), requesting(tmp_path, b"wrong"):
        pass
