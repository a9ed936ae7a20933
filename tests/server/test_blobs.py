"""Blobs are found by their content, are whole or absent, and go when nobody needs them."""

import errno
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedcore.errors import ProtocolError
from fedcore.faults import FAULTS, Fault
from fedcore.layout import Layout, Vector
from fedcore.server.blobs import Blobs, CorruptBlob
from tests.server.conftest import LAYOUT, initial, same, sized


def adopted(blobs: Blobs, layout: Layout = LAYOUT, run: str = "run") -> str:
    path = blobs.new()
    parameters = initial(layout)
    path.write_bytes(parameters.shared.tobytes() + parameters.buffers.tobytes())
    return blobs.adopt(path, run).sha256


def test_parameters_are_found_by_their_digest(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs", {})
    address = adopted(blobs)
    assert address == initial(LAYOUT).digest
    parameters = blobs.parameters(address, LAYOUT)
    assert same(parameters.shared, initial(LAYOUT).shared) and same(
        parameters.buffers, initial(LAYOUT).buffers
    )
    with pytest.raises(ValueError, match="read-only"):
        parameters.shared[0] = 1


def test_a_draft_is_a_copy(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs", {})
    address = adopted(blobs)
    path, draft = blobs.draft(address, LAYOUT)
    draft.shared[:] = 2.0
    other = blobs.adopt(path, "run").sha256
    assert other != address
    assert (blobs.parameters(other, LAYOUT).shared == 2.0).all()
    assert same(blobs.parameters(address, LAYOUT).shared, initial(LAYOUT).shared)


def test_what_is_broadcast_lies_behind_the_model(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs", {})
    path, extra = blobs.new(), ("first", "second")
    numbers = np.arange(LAYOUT.blob_size(extra) // 4, dtype=np.float32)
    path.write_bytes(numbers.tobytes())
    address = blobs.adopt(path, "run").sha256
    for parameters in (blobs.parameters(address, LAYOUT, extra), blobs.draft(address, LAYOUT, extra)[1]):
        assert list(parameters.extra) == ["first", "second"]
        parts = [parameters.shared, parameters.buffers, *parameters.extra.values()]
        assert [len(part) for part in parts] == [44, 3, 44, 44]
        assert same(np.concatenate(parts), numbers)


def test_a_blob_goes_with_the_last_run_that_has_it(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs", {})
    address = adopted(blobs, run="one")
    assert adopted(blobs, run="two") == adopted(blobs, run="two") == address
    blobs.keep("two", ())
    assert blobs.path(address).exists()
    blobs.keep("one", {adopted(blobs, sized(3), "one")})
    assert not blobs.path(address).exists()
    with pytest.raises(ProtocolError, match="a newer model replaced it"):
        blobs.open(address)


def test_a_run_may_hold_what_another_one_has(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs", {})
    address = adopted(blobs, run="one")
    assert blobs.hold("two", address) and not blobs.hold("two", "0" * 64)
    blobs.keep("one", ())
    assert blobs.path(address).exists()
    blobs.keep("two", ())
    assert not blobs.path(address).exists() and not blobs.hold("two", address)
    assert not blobs.held and not blobs.uses


def test_at_the_start_only_what_a_run_needs_stays(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs", {})
    kept, dropped = adopted(blobs), adopted(blobs, sized(3))
    blobs.new().write_bytes(b"half a model")
    again = Blobs(tmp_path / "blobs", {"run": [kept], "other": [kept]})
    assert [path.name for path in again.folder.iterdir()] == [kept] != [dropped]
    again.keep("run", ())
    assert again.path(kept).exists()


@pytest.mark.parametrize("point", ["blob.write", "blob.rename.before"])
def test_what_the_disk_does_not_take_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    blobs = Blobs(tmp_path / "blobs", {})
    held = adopted(blobs)
    monkeypatch.setitem(FAULTS, point, Fault("ENOSPC"))
    with pytest.raises(OSError, match="No space left") as raised:
        adopted(blobs, sized(3))
    assert raised.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="No space left"):
        blobs.save_state({"velocity": np.zeros(3, np.float32)}, "run")
    assert [path.name for path in blobs.folder.iterdir()] == [held]


def test_a_copy_that_the_disk_does_not_take_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = Blobs(tmp_path / "blobs", {})
    held = adopted(blobs)

    def full(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        blobs.draft(held, LAYOUT)
    assert [path.name for path in blobs.folder.iterdir()] == [held]


def test_a_blob_with_a_wrong_bit_or_none_at_all_is_named(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs", {})
    address = adopted(blobs)
    blobs.verify(address)
    content = blobs.path(address).read_bytes()
    blobs.path(address).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CorruptBlob, match=f"blob {address} is corrupt: put it back from a backup"):
        blobs.verify(address)
    blobs.path(address).unlink()
    with pytest.raises(CorruptBlob, match=f"blob {address} is missing"):
        blobs.verify(address)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_strategys_vectors_are_there_again_and_are_safetensors(tmp_path: Path, dtype: type) -> None:
    blobs = Blobs(tmp_path / "blobs", {})
    vectors: dict[str, Vector] = {"velocity": np.arange(5, dtype=dtype), "second": np.full(3, -0.0, dtype)}
    address = blobs.save_state(vectors, "run")
    for loaded in (blobs.load_state(address), load_file(blobs.path(address))):
        assert loaded.keys() == vectors.keys()
        assert all(same(loaded[name], vectors[name]) for name in vectors)
    assert blobs.save_state({}, "run") == "" and blobs.load_state("") == {}
