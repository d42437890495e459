"""Bytes <-> fewer bytes, by the standard library's coders; the size to expect is always known before expanding.

``HUFFMAN`` is the canonical Huffman code of DEFLATE (RFC 1951, section 3.2.2) without its search for repeats: one code
word for each byte, with a code made anew for every 32 K symbols. ``DEFLATE`` and ``LZMA`` look for repeats as well.
"""

from __future__ import annotations

import lzma
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnx_oamip.core.records import Array

STORED, HUFFMAN, DEFLATE, LZMA = range(4)
RATIO = 1040
"""No packed part stands for more than this many times its own bytes (DEFLATE itself ends at 1032)."""
SLACK = 1 << 14
"""... and this many bytes, for what is tiny."""
REPEATS = 0.97
"""LZMA is tried where DEFLATE's repeats bring the Huffman code at least down to this."""
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
_HEAD = struct.Struct("<BQ")


class Damaged(ValueError):
    """Packed bytes that do not say what they should; the message is part of a sentence."""


def shrink(data: bytes, repeats: bool = True) -> bytes:
    """A section: how the bytes are coded, their packed length, and the shortest coding; perhaps Huffman's alone."""
    found = [(STORED, data)]
    if data:
        found.append((HUFFMAN, _deflate(data, zlib.Z_HUFFMAN_ONLY)))
    if data and repeats:
        found.append((DEFLATE, _deflate(data, zlib.Z_DEFAULT_STRATEGY)))
        if len(found[2][1]) < REPEATS * len(found[1][1]):
            found.append((LZMA, lzma.compress(data, lzma.FORMAT_RAW, filters=_FILTERS)))
    mode, packed = min((f for f in found if within(len(data), len(f[1]))), key=lambda f: len(f[1]))
    return _HEAD.pack(mode, len(packed)) + packed


def within(size: int, packed: int) -> bool:
    """Whether ``packed`` bytes may stand for ``size`` bytes: what a reader allows, a writer keeps to."""
    return size <= RATIO * packed + SLACK


@dataclass
class Reader:
    """Takes a blob apart from front to back; raises Damaged instead of reading past its end."""

    blob: memoryview
    at: int = 0

    def take(self, size: int) -> memoryview:
        """The next ``size`` bytes."""
        if not 0 <= size <= len(self.blob) - self.at:
            raise Damaged(
                f"{size} bytes are said to follow where {len(self.blob) - self.at} are left"
            )
        self.at += size
        return self.blob[self.at - size : self.at]

    def numbers(self, dtype: np.dtype[np.generic], count: int) -> Array:
        """The next ``count`` little-endian numbers."""
        return np.frombuffer(self.take(count * dtype.itemsize), dtype.newbyteorder("<")).astype(
            dtype, copy=False
        )

    def section(self, size: int) -> bytes:
        """What :func:`shrink` made of ``size`` bytes."""
        mode, length = _HEAD.unpack(self.take(_HEAD.size))
        return _expand(mode, bytes(self.take(length)), size)

    def end(self) -> None:
        """Nothing may be left."""
        if self.at != len(self.blob):
            raise Damaged(f"{len(self.blob) - self.at} bytes are left over")


def planes(words: Array) -> bytes:
    """Sections of unsigned numbers (n,), one for each of their bytes, the lowest first."""
    octets = (
        np.ascontiguousarray(words, words.dtype.newbyteorder("<"))
        .view(np.uint8)
        .reshape(-1, words.dtype.itemsize)
    )
    return b"".join(shrink(octets[:, i].tobytes()) for i in range(words.dtype.itemsize))


def read_planes(reader: Reader, dtype: np.dtype[np.generic], count: int) -> Array:
    """What :func:`planes` coded."""
    octets = np.empty((count, dtype.itemsize), np.uint8)
    for i in range(dtype.itemsize):
        octets[:, i] = np.frombuffer(reader.section(count), np.uint8)
    return octets.reshape(-1).view(dtype.newbyteorder("<")).astype(dtype, copy=False)


def smallest_type(largest: int) -> np.dtype[np.generic]:
    """The smallest unsigned type that holds a number."""
    return np.dtype(np.min_scalar_type(largest))


def entropy(counts: Sequence[int] | Array) -> float:
    """Shannon's bound, in bits for a symbol, of symbols that occur this often."""
    seen = np.asarray(counts, np.float64)
    share = seen[seen > 0] / seen.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0


def _deflate(data: bytes, strategy: int) -> bytes:
    coder = zlib.compressobj(6, zlib.DEFLATED, -15, 9, strategy)
    return coder.compress(data) + coder.flush()


def _expand(mode: int, packed: bytes, size: int) -> bytes:
    if not within(size, len(packed)):
        raise Damaged(
            f"{len(packed)} bytes are said to stand for {size}, more than any packed part does"
        )
    data, ended = packed, True
    try:
        if mode in (HUFFMAN, DEFLATE):
            inflate = zlib.decompressobj(-15)
            data = inflate.decompress(packed, size + 1)
            ended = inflate.eof and not inflate.unused_data
        elif mode == LZMA:
            decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_FILTERS)
            data = decoder.decompress(packed, size + 1)
            ended = decoder.eof and not decoder.unused_data
        elif mode != STORED:
            raise Damaged(f"no coding has the number {mode}")
    except (zlib.error, lzma.LZMAError, EOFError) as error:
        raise Damaged(f"a packed part does not expand ({error})") from error
    if len(data) != size or not ended:
        raise Damaged(f"a packed part does not expand to the {size} bytes that it should")
    return data
