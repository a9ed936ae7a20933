"""Data sets from a folder, and fetched into it; small files always, real ones where FEDCORE_DATA has them."""

import hashlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.datasets

from fedcore.data import ALPHABET, DATASETS, ArrayDataset, Natural, digits, mnist, shakespeare
from fedcore.errors import DataError, MissingExtra

PLAY = """ROMEO:
{}

JULIET:
{}

ROMEO:
{}

SERVANT:
Ay.
""".format("abcdefghij" * 3, "klmnopqrst" * 6, "uvwxyz" * 5)

REAL = Path(os.environ["FEDCORE_DATA"]) if os.environ.get("FEDCORE_DATA") else None


def decode(codes: Any) -> str:
    return "".join(ALPHABET[code] for code in np.atleast_1d(codes))


def test_the_names_of_the_data_sets() -> None:
    assert dict(DATASETS) == {"digits": digits, "mnist": mnist, "shakespeare": shakespeare}


def test_digits_are_the_split_of_the_peers_jobs() -> None:
    data = digits()
    assert data.test is not None
    assert data.train.x.shape == (1437, 1, 8, 8)
    assert len(data.test) == 360
    assert data.train.x.dtype == np.float32
    assert data.train.y.dtype == np.int64
    assert (data.train.x.min(), data.train.x.max()) == (0, 1)
    raw = sklearn.datasets.load_digits()
    order = np.random.RandomState(0).permutation(1797)
    both = np.concatenate([data.train.x, data.test.x])
    assert np.array_equal(both[:, 0] * 16, raw.images[order])
    assert np.array_equal(np.concatenate([data.train.y, data.test.y]), raw.target[order])


def test_without_scikit_learn_the_error_tells_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtra, match=r"pip install 'fedcore\[simulation\]'"):
        digits()


def test_digits_of_a_scikit_learn_that_keeps_its_file_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    read = digits().train
    monkeypatch.setattr("fedcore.data.datasets.find_spec", lambda name: None)
    assert np.array_equal(digits().train.x, read.x) and np.array_equal(digits().train.y, read.y)


def test_digits_are_read_without_importing_scikit_learn() -> None:
    code = "import sys, fedcore.data; fedcore.data.digits(); sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def write_mnist(folder: Path, pixels: tuple[int, ...] = (28, 28), **arrays: Any) -> None:
    rng = np.random.default_rng(0)
    made = {"x_train": rng.integers(0, 256, (6, *pixels), np.uint8), "y_train": np.arange(6, dtype=np.uint8)}
    made |= {"x_test": made["x_train"][:2], "y_test": made["y_train"][:2]}
    np.savez(folder / "mnist.npz", **{name: a for name, a in (made | arrays).items() if a is not None})


def test_mnist_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path)
    data = mnist(tmp_path)
    assert data.test is not None
    assert data.train.x.shape == (6, 1, 28, 28)
    assert data.train.x.dtype == np.float32
    assert data.test.y.tolist() == [0, 1]
    assert data.test.y.dtype == np.int64
    with np.load(tmp_path / "mnist.npz") as raw:
        assert np.array_equal(np.rint(data.train.x[:, 0] * 255), raw["x_train"])
    monkeypatch.setenv("FEDCORE_DATA", str(tmp_path))
    assert np.array_equal(mnist().train.x, data.train.x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_test": None, "y_test": None}, "has no arrays x_test and y_test; delete it to fetch it anew"),
        ({"pixels": (8, 8)}, r"pixels have shape \(6, 8, 8\), expected \(n, 28, 28\)"),
        ({"y_train": np.zeros(5)}, r"mnist\.npz, arrays named \*_train: x has shape"),
    ],
)
def test_an_mnist_file_that_does_not_fit_says_why(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_mnist(tmp_path, **change)
    with pytest.raises(DataError, match=message):
        mnist(tmp_path)


def test_mnist_is_fetched_once_and_split_as_usual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fetch_openml(name: str, **options: Any) -> tuple[Any, Any]:
        calls.append((name, options))
        return np.full((60_003, 784), 255), np.array(["7"] * 60_000 + ["1", "2", "3"])

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch_openml)
    for _ in range(2):
        data = mnist(tmp_path / "new")
        assert data.test is not None
        assert (len(data.train), data.test.y.tolist(), data.test.x.min()) == (60_000, [1, 2, 3], 1)
    ((name, options),) = calls
    assert name == "mnist_784"
    assert options["parser"] == "liac-arff"  # the others need pandas, which no extra installs


def test_mnist_without_file_and_network_says_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch_openml(name: str, **options: Any) -> Any:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch_openml)
    monkeypatch.setenv("FEDCORE_DATA", str(tmp_path))
    both = (
        r"known\); set FEDCORE_DATA to a folder that holds mnist\.npz, or run once where there is a network"
    )
    with pytest.raises(DataError, match=both):
        mnist()


def test_the_alphabet_is_sorted_and_without_repetition() -> None:
    assert len(ALPHABET) == 65
    assert list(ALPHABET) == sorted(set(ALPHABET))


def examples(data: ArrayDataset, speaker: str) -> list[tuple[str, str]]:
    rows = data.take(data.keys["speaker"] == speaker)
    return [(decode(x), decode(y)) for x, y in zip(rows.x, rows.y, strict=True)]


def test_shakespeare_predicts_the_next_character_of_one_speaker_in_time(tmp_path: Path) -> None:
    (tmp_path / "shakespeare.txt").write_text(PLAY)
    data = shakespeare(tmp_path, length=4)
    assert data.test is not None
    assert data.train.x.shape == (len(data.train), 4)
    assert data.train.x.dtype == data.train.y.dtype == np.int64
    romeo = "abcdefghij" * 3 + "\n" + "uvwxyz" * 5
    cut = int(0.8 * len(romeo))
    assert examples(data.train, "ROMEO") == [(romeo[i : i + 4], romeo[i + 4]) for i in range(0, cut - 4, 10)]
    assert examples(data.test, "ROMEO") == [(romeo[cut : cut + 4], romeo[cut + 4])]
    assert examples(data.train, "JULIET")[0] == ("klmn", "o")
    assert set(data.train.keys["speaker"]) == {"ROMEO", "JULIET"}  # SERVANT says too little
    clients = Natural("speaker").split(data.train.y, data.train.keys, 2, np.random.default_rng(0))
    assert [set(data.train.keys["speaker"][index]) for index in clients] == [{"JULIET"}, {"ROMEO"}]


@pytest.mark.parametrize(
    ("text", "length", "message"),
    [
        (PLAY, 48, "length = 48; expected 1 to 47, for the longest part of a speaker"),
        (PLAY, 0, "length = 0; expected 1 to 47"),
        (PLAY, 20, "length = 20; expected 1 to 12"),  # too long for the test part only
        (PLAY.replace("xyz", "xÿz"), 4, "'ÿ' in .* is not in fedcore.data.ALPHABET"),
        (PLAY + "\nExeunt\n", 4, "a paragraph starts with 'Exeunt'; expected a line 'SPEAKER:'"),
        ("", 4, "a paragraph starts with ''; expected a line 'SPEAKER:'"),
        ("A:\n", 4, "length = 4; expected 1 to"),
    ],
)
def test_a_text_that_does_not_fit_says_why(text: str, length: int, message: str, tmp_path: Path) -> None:
    (tmp_path / "shakespeare.txt").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=message.replace("ÿ", "�")):
        shakespeare(tmp_path, length)


@pytest.fixture
def url() -> Iterator[str]:
    """A web server on this machine that has one play."""

    class Play(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404 if self.path == "/absent.txt" else 200)
            if self.path == "/cut.txt":
                self.send_header("Content-Length", str(len(PLAY) + 1))
            self.end_headers()
            self.wfile.write(PLAY.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Play) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/play.txt"
        server.shutdown()
        thread.join()


def test_shakespeare_is_fetched_once(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedcore.data.datasets.SHAKESPEARE_SHA256", hashlib.sha256(PLAY.encode()).hexdigest())
    monkeypatch.setattr("fedcore.data.datasets.SHAKESPEARE_URL", url)
    monkeypatch.setenv("FEDCORE_DATA", str(tmp_path / "new"))
    fetched = shakespeare(length=4)
    assert os.listdir(tmp_path / "new") == ["shakespeare.txt"]
    monkeypatch.setattr("fedcore.data.datasets.SHAKESPEARE_URL", "http://127.0.0.1:1/")
    assert np.array_equal(shakespeare(length=4).train.x, fetched.train.x)


def test_another_text_than_the_pinned_one_is_not_kept(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedcore.data.datasets.SHAKESPEARE_URL", url)
    with pytest.raises(DataError, match=r"gave sha-256 [0-9a-f]{64}, expected 86c4e6aa"):
        shakespeare(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("place", ["/absent.txt", "/cut.txt", ""])
def test_shakespeare_without_file_and_network_says_both_ways(
    url: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fedcore.data.datasets.SHAKESPEARE_URL",
        url.replace("/play.txt", place) if place else "http://127.0.0.1:1/",
    )
    both = r"set FEDCORE_DATA to a folder that holds shakespeare\.txt, or run once where there is a network"
    with pytest.raises(DataError, match=both):
        shakespeare(tmp_path)


def test_without_any_folder_named_the_cache_of_the_user_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDCORE_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".cache" / "fedcore").mkdir(parents=True)
    (tmp_path / ".cache" / "fedcore" / "shakespeare.txt").write_text(PLAY)
    assert len(shakespeare(length=4).train) > 0


def test_the_real_files_where_there_are_some() -> None:
    if REAL and (REAL / "mnist.npz").exists():
        data = mnist(REAL)
        assert data.test is not None
        assert (data.train.x.shape, len(data.test)) == ((60_000, 1, 28, 28), 10_000)
        assert np.bincount(data.train.y).tolist()[:3] == [5923, 6742, 5958]
    if REAL and (REAL / "shakespeare.txt").exists():
        text = shakespeare(REAL)
        assert text.test is not None
        assert (len(text.train), len(text.test)) == (80_135, 18_784)
        assert len(np.unique(text.train.keys["speaker"])) == 247
        assert decode(text.train.x[0]).startswith("Before we proceed any further, hear me speak.\n")
