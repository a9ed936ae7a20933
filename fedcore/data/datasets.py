"""The data sets of the examples: read from a folder, fetched into it once where there is a network.

The folder is the argument `folder`, else the environment variable FEDCORE_DATA, else ~/.cache/fedcore.
"""

import hashlib
import logging
import os
import re
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcore.data.arrays import ArrayDataset, Split, load_split, replacing, save_split
from fedcore.errors import DataError, MissingExtra

ALPHABET = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
"""The 65 characters of `shakespeare`, ascending; a character's code is its place here."""

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

# LEAF's windows start at every character: 640 bytes of int64 for each, and neighbours that share 79 of 80.
STRIDE = 10

_log = logging.getLogger(__name__)


def digits() -> Split[ArrayDataset]:
    """Return scikit-learn's 1,797 handwritten digits, in a fixed 80/20 split.

    x: float32 in [0, 1], shape (n, 1, 8, 8). y: int64, shape (n,).
    Source: UCI Optical Recognition of Handwritten Digits (doi:10.24432/C50P49), its test part.

    Raises:
        MissingExtra: without scikit-learn.
    """
    pixels, labels = _raw_digits()
    x, y = (pixels.reshape(-1, 1, 8, 8) / 16).astype(np.float32), labels.astype(np.int64)
    order = np.random.RandomState(0).permutation(len(y))
    train, test = np.split(order, [int(0.8 * len(y))])
    return Split(ArrayDataset(x[train], y[train]), ArrayDataset(x[test], y[test]))


def mnist(folder: Path | None = None) -> Split[ArrayDataset]:
    """Return MNIST, 60,000 handwritten digits to train on and 10,000 to test.

    x: float32 in [0, 1], shape (n, 1, 28, 28). y: int64, shape (n,).
    Read from `mnist.npz` (as `load_split` does; pixels 0 to 255, shape (n, 28, 28)); fetched from
    OpenML when missing.
    Source: LeCun et al. 1998, "Gradient-based learning applied to document recognition".

    Raises:
        DataError: when the file is missing and cannot be fetched, or does not fit.
        MissingExtra: when it has to be fetched, without scikit-learn.
    """
    pixels = mnist_pixels(folder)
    assert pixels.test is not None
    return Split(images(pixels.train), images(pixels.test))


def mnist_pixels(folder: Path | None = None) -> Split[ArrayDataset]:
    """Return MNIST as bytes, in a quarter of the memory: x of shape (n, 28, 28) and y, both uint8.

    `images` makes of a part what `mnist` returns, which also says where it is read and what raises.
    """
    path = _file("mnist.npz", folder, _fetch_mnist)
    pixels = load_split(path)
    if pixels.test is None:
        raise DataError(f"{path} has no arrays x_test and y_test; delete it to fetch it anew")
    for part in (pixels.train, pixels.test):
        if part.x.shape[1:] != (28, 28):
            raise DataError(
                f"{path}: pixels have shape {part.x.shape}, expected (n, 28, 28); delete it to fetch anew"
            )
    return pixels


def images(pixels: ArrayDataset) -> ArrayDataset:
    """Return images of bytes, (n, height, width), as float32 in [0, 1], (n, 1, height, width)."""
    x = np.divide(pixels.x[:, None], 255, dtype=np.float32)  # without a second copy, of 188 MB for MNIST
    return ArrayDataset(x, pixels.y.astype(np.int64))


def shakespeare(folder: Path | None = None, length: int = 80) -> Split[ArrayDataset]:
    """Return next-character prediction on Shakespeare; the natural clients are the values of key "speaker".

    x: int64, shape (n, length), places in `ALPHABET`. y: int64, shape (n,), the character after each row.
    A speaker's lines, joined by newlines, are cut in time: the first 80 % train, the rest test. Windows begin
    every 10 characters, in order of time; none crosses speakers or the cut, so that a speaker whose part is
    too short has none in it. Read from `shakespeare.txt`, fetched from karpathy/char-rnn when missing.
    Source: Caldas et al. 2018, LEAF (arXiv:1812.01097), whose clients are the roles of each play.

    Raises:
        DataError: when the file is missing and cannot be fetched, or does not fit.
    """
    path = _file("shakespeare.txt", folder, _fetch_shakespeare)
    # What is no UTF-8 becomes a character outside of the alphabet, which is refused with its surroundings.
    text = path.read_text(encoding="utf-8", errors="replace")
    lines: dict[str, list[str]] = {}
    for speaker, speech in _speeches(path, text):
        lines.setdefault(speaker, []).append(speech)
    codes = {speaker: _encode(path, "\n".join(speeches)) for speaker, speeches in lines.items()}
    train = {speaker: code[: int(0.8 * len(code))] for speaker, code in codes.items()}
    test = {speaker: code[int(0.8 * len(code)) :] for speaker, code in codes.items()}
    return Split(_windows(path, train, length), _windows(path, test, length))


DATASETS: Mapping[str, Callable[..., Split[ArrayDataset]]] = MappingProxyType(
    {"digits": digits, "mnist": mnist, "shakespeare": shakespeare}
)
"""The data sets by name."""


def _raw_digits() -> tuple[NDArray[Any], NDArray[Any]]:
    """Return pixels, 0 to 16, shape (n, 64), and digits: from scikit-learn's file, or at last from itself.

    To import it takes a second, most of it for SciPy: a quarter of the time to a first round.
    """
    package = find_spec("sklearn")
    file = Path((package and package.origin) or "").parent / "datasets" / "data" / "digits.csv.gz"
    if not file.exists():
        pixels, labels = _sklearn_datasets().load_digits(return_X_y=True)
        return pixels, labels
    table = np.loadtxt(file, delimiter=",")
    return table[:, :-1], table[:, -1]


def _sklearn_datasets() -> Any:
    try:
        import sklearn.datasets
    except ImportError as error:
        raise MissingExtra("scikit-learn", "simulation") from error
    return sklearn.datasets


def _file(name: str, folder: Path | None, fetch: Callable[[Path], None]) -> Path:
    path = (folder or Path(os.environ.get("FEDCORE_DATA") or Path.home() / ".cache" / "fedcore")) / name
    if not path.exists():
        _log.info("fetching %s", path)
        try:
            fetch(path)
        except (OSError, HTTPException, ValueError) as error:
            raise DataError(
                f"{path} does not exist and could not be fetched ({error}); set FEDCORE_DATA to a folder "
                f"that holds {name}, or run once where there is a network and the folder can be written"
            ) from error
    return path


def _fetch_mnist(path: Path) -> None:
    # The parser "auto" would ask for pandas.
    x, y = _sklearn_datasets().fetch_openml(
        "mnist_784", version=1, as_frame=False, parser="liac-arff", return_X_y=True
    )
    digits = ArrayDataset(x.reshape(-1, 28, 28).astype(np.uint8), y.astype(np.uint8))
    save_split(path, Split(digits.take(np.arange(60_000)), digits.take(np.arange(60_000, len(digits)))))


def _fetch_shakespeare(path: Path) -> None:
    with urllib.request.urlopen(SHAKESPEARE_URL, timeout=60) as response:
        text = response.read()
    found = hashlib.sha256(text).hexdigest()
    if found != SHAKESPEARE_SHA256:
        raise ValueError(f"{SHAKESPEARE_URL} gave sha-256 {found}, expected {SHAKESPEARE_SHA256}")
    with replacing(path) as file:
        file.write(text)


def _speeches(path: Path, text: str) -> Iterator[tuple[str, str]]:
    for block in re.split(r"\n{2,}", text.strip()):
        speaker, _, speech = block.partition("\n")
        if not speaker.endswith(":"):
            raise DataError(f"{path}: a paragraph starts with {speaker[:60]!r}; expected a line 'SPEAKER:'")
        yield speaker[:-1], speech


def _encode(path: Path, text: str) -> NDArray[np.int64]:
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    alphabet = np.frombuffer(ALPHABET.encode("utf-32-le"), np.uint32)
    codes = np.searchsorted(alphabet, points).clip(max=len(alphabet) - 1)
    if foreign := np.flatnonzero(alphabet[codes] != points).tolist():
        at = foreign[0]
        around = text[max(at - 20, 0) : at + 20]
        raise DataError(f"{path}: {text[at]!r} in {around!r} is not in fedcore.data.ALPHABET; replace it")
    return codes.astype(np.int64, copy=False)


def _windows(path: Path, codes: Mapping[str, NDArray[np.int64]], length: int) -> ArrayDataset:
    windows = {
        speaker: np.lib.stride_tricks.sliding_window_view(code, length + 1)[::STRIDE]
        for speaker, code in codes.items()
        if len(code) > length
    }
    if length < 1 or not windows:
        longest = max(map(len, codes.values())) - 1
        raise DataError(
            f"{path}: length = {length}; expected 1 to {longest}, for the longest part of a speaker"
        )
    speaker = np.repeat(list(windows), [len(window) for window in windows.values()])
    examples = np.concatenate(list(windows.values()))
    return ArrayDataset(examples[:, :-1], examples[:, -1], {"speaker": speaker})
