"""Masks: the published keystream, laws of addition, and pieces that fit together."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.crypto.prg import BLOCK, KEY, Masks, Words

KEYS = st.lists(st.binary(min_size=KEY, max_size=KEY), max_size=4)
TYPES = st.sampled_from(["uint16", "uint32", "uint64"])
SIZES = st.one_of(st.integers(0, 200), st.sampled_from([BLOCK // 8, BLOCK // 4 + 1, BLOCK // 2 - 1]))


def masked(words: Words, plus: Sequence[bytes], minus: Sequence[bytes] = ()) -> Words:
    copy = words.copy()
    Masks(plus, minus).add_to(copy)
    return copy


def test_the_stream_is_aes_256_in_counter_mode() -> None:
    """Under the zero key: H and E(K, Y0) of test case 13 of the GCM specification (McGrew and Viega 2005)."""
    first, second = "dc95c078a2408989ad48a21492842087", "530f8afbc74536b9a963b4f1c4cb738b"
    expected = np.frombuffer(bytes.fromhex(first + second), "<u4")
    assert np.array_equal(masked(np.zeros(8, "uint32"), [bytes(KEY)]), expected)


@given(TYPES, SIZES, KEYS, KEYS)
def test_masks_cancel(dtype: str, size: int, plus: list[bytes], minus: list[bytes]) -> None:
    words = np.arange(size).astype(dtype)
    assert np.array_equal(masked(masked(words, plus, minus), minus, plus), words)
    assert np.array_equal(masked(words, plus + minus, minus + plus), words)


@given(TYPES, SIZES, KEYS, KEYS)
def test_masks_add_up_in_any_order(dtype: str, size: int, plus: list[bytes], minus: list[bytes]) -> None:
    words = np.arange(size).astype(dtype)
    alone = [masked(np.zeros(size, dtype), [key]) for key in plus]
    taken = [masked(np.zeros(size, dtype), [key]) for key in minus]
    total = sum(alone, words) - sum(taken, np.zeros(size, dtype))
    assert np.array_equal(masked(words, plus[::-1], minus), total)


@given(TYPES, st.lists(st.integers(0, BLOCK // 4), min_size=1, max_size=5), KEYS)
def test_pieces_continue_the_streams(dtype: str, sizes: list[int], keys: list[bytes]) -> None:
    words = np.zeros(sum(sizes), dtype)
    masks, start = Masks(keys), 0
    for size in sizes:
        masks.add_to(words[start : start + size])
        start += size
    assert np.array_equal(words, masked(np.zeros_like(words), keys))


@pytest.mark.parametrize("bit", [0, 7, 100, 255])
def test_every_bit_of_the_key_counts(bit: int) -> None:
    key = (1 << bit).to_bytes(KEY, "little")
    streams = [masked(np.zeros(1000, "uint64"), [k]) for k in (bytes(KEY), key)]
    assert not np.any(streams[0] == streams[1])


def test_words_look_uniform() -> None:
    """Chi-square of the 256 bytes' counts: 255 +- 8 standard deviations of 22.6; and no word repeats."""
    words = masked(np.zeros(1 << 17, "uint64"), [b"k" * KEY])
    counts = np.bincount(words.view(np.uint8), minlength=256)
    expected = 8 * len(words) / 256
    assert abs(((counts - expected) ** 2 / expected).sum() - 255) < 8 * 22.6
    assert len(np.unique(words)) == len(words)


@pytest.mark.parametrize("size", [0, 4, 16, 31, 33])
def test_short_keys_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"{size} bytes, expected 32"):
        Masks([bytes(size)])


@pytest.mark.parametrize("words", [np.zeros(4, "int32"), np.zeros(4, "uint8"), np.zeros((2, 2), "uint32")])
def test_other_arrays_are_refused(words: Words) -> None:
    with pytest.raises(ValueError, match="expected a vector of uint16, uint32 or uint64"):
        Masks([bytes(KEY)]).add_to(words)
