"""Masks: pseudorandom words that are added to a vector and cancel in a sum.

The keystream of AES-256-CTR from a zero counter block, so a key is for one mask and never used again. Read
as little-endian words of the array that it is added to; modulo 2^b is the arithmetic of those words.
"""

from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

KEY = 32  # bytes of a key
BLOCK = 1 << 17  # bytes; a block of the words, its keystream and the zeros stay in a core's L2 cache together

Words = NDArray[np.uint16] | NDArray[np.uint32] | NDArray[np.uint64]


class Masks:
    """The streams of some keys, those in `plus` to be added and those in `minus` to be subtracted.

    Keys have 32 bytes, all of which count; raises ValueError for other lengths. Holds no more than one block
    of keystream, however many keys there are and however long the words.
    """

    def __init__(self, plus: Sequence[bytes], minus: Sequence[bytes] = ()) -> None:
        self._streams = [(_stream(key), np.add) for key in plus] + [
            (_stream(key), np.subtract) for key in minus
        ]
        self._zeros = memoryview(bytes(BLOCK))
        self._key_stream = memoryview(bytearray(BLOCK))

    def add_to(self, words: Words) -> None:
        """Add the next words of every stream, in place; shape (d,), dtype uint16, uint32 or uint64.

        The streams go on from call to call, so a vector can be worked in pieces, all of one dtype.
        """
        if words.ndim != 1 or words.dtype.kind != "u" or words.itemsize < 2:
            raise ValueError(f"expected a vector of uint16, uint32 or uint64, not {words.dtype}{words.shape}")
        step = BLOCK // words.itemsize
        for start in range(0, len(words), step):
            block = words[start : start + step]
            zeros, key_stream = self._zeros[: block.nbytes], self._key_stream[: block.nbytes]
            mask = np.frombuffer(key_stream, words.dtype.newbyteorder("<"))
            for stream, combine in self._streams:
                stream.update_into(zeros, key_stream)
                combine(block, mask, out=block)


def _stream(key: bytes) -> CipherContext:
    """Return an encryptor whose output for zeros is the keystream."""
    if len(key) != KEY:
        raise ValueError(f"a mask's key has {len(key)} bytes, expected {KEY}")
    return Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
