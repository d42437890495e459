"""Lossless coding of bytes by the coders of the standard library; the decoded size is known before decoding.

``HUFFMAN`` is the canonical Huffman code of DEFLATE (RFC 1951, section 3.2.2) without its search for repeats: one code
word per byte, with a new code for every 32 K symbols. ``DEFLATE`` and ``LZMA`` look for repeats as well.
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
"""No packed part decodes to more than this many times its own bytes (DEFLATE itself ends at 1032)."""
SLACK = 1 << 14
"""... and this many bytes, for tiny parts."""
REPEATS = 0.97
"""LZMA is tried if DEFLATE's repeats shorten the Huffman code at least to this share."""
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
_HEAD = struct.Struct("<BQ")


class Damaged(ValueError):
    """Packed bytes that cannot be decoded; the message is part of a sentence."""


def shrink(data: bytes, repeats: bool = True) -> bytes:
    """Encode bytes as a section: the number of the coding, the packed length, and the shortest coding.

    Args:
        data: The bytes.
        repeats: Also try codings that look for repeats.

    Returns:
        The section.
    """
    codings = [(STORED, data)]
    if data:
        huffman = _deflate(data, zlib.Z_HUFFMAN_ONLY)
        codings.append((HUFFMAN, huffman))
        if repeats:
            deflated = _deflate(data, zlib.Z_DEFAULT_STRATEGY)
            codings.append((DEFLATE, deflated))
            if len(deflated) < REPEATS * len(huffman):
                lzma_coded = lzma.compress(data, lzma.FORMAT_RAW, filters=_FILTERS)
                codings.append((LZMA, lzma_coded))
    allowed = [coding for coding in codings if within(len(data), len(coding[1]))]
    mode, packed = min(allowed, key=lambda coding: len(coding[1]))
    return _HEAD.pack(mode, len(packed)) + packed


def within(size: int, packed: int) -> bool:
    """Test whether a reader accepts a packed part; a writer makes no other.

    Args:
        size: Decoded size in bytes.
        packed: Packed size in bytes.

    Returns:
        True if the ratio is within the bounds.
    """
    return size <= RATIO * packed + SLACK


@dataclass
class Reader:
    """Reads a blob from front to back, and never past its end.

    Attributes:
        blob: The bytes.
        at: Position of the next byte.
    """

    blob: memoryview
    at: int = 0

    def take(self, size: int) -> memoryview:
        """Read bytes.

        Args:
            size: Number of bytes.

        Returns:
            The bytes.

        Raises:
            Damaged: Fewer are left.
        """
        left = len(self.blob) - self.at
        if not 0 <= size <= left:
            raise Damaged(f"{size} bytes are said to follow where {left} are left")
        self.at += size
        return self.blob[self.at - size : self.at]

    def numbers(self, dtype: np.dtype[np.generic], count: int) -> Array:
        """Read little-endian numbers.

        Args:
            dtype: Type of a number.
            count: Number of numbers.

        Returns:
            The numbers (count,).

        Raises:
            Damaged: Fewer are left.
        """
        stored = np.frombuffer(self.take(count * dtype.itemsize), dtype.newbyteorder("<"))
        return stored.astype(dtype, copy=False)

    def section(self, size: int) -> bytes:
        """Read and decode a section that :func:`shrink` encoded.

        Args:
            size: Decoded size in bytes.

        Returns:
            The decoded bytes.

        Raises:
            Damaged: The section does not decode to this size.
        """
        mode, length = _HEAD.unpack(self.take(_HEAD.size))
        return _expand(mode, bytes(self.take(length)), size)

    def end(self) -> None:
        """Check that all bytes were read.

        Raises:
            Damaged: Bytes are left.
        """
        if self.at != len(self.blob):
            raise Damaged(f"{len(self.blob) - self.at} bytes are left over")


def planes(words: Array) -> bytes:
    """Encode unsigned numbers byte by byte.

    Args:
        words: The numbers (n,).

    Returns:
        One section per byte of a number, the lowest byte first.
    """
    size = words.dtype.itemsize
    little = np.ascontiguousarray(words, words.dtype.newbyteorder("<"))
    octets = little.view(np.uint8).reshape(-1, size)
    return b"".join(shrink(octets[:, i].tobytes()) for i in range(size))


def read_planes(
    reader: Reader,
    dtype: np.dtype[np.generic],
    count: int,
) -> Array:
    """Read numbers that :func:`planes` encoded.

    Args:
        reader: Reader at their sections.
        dtype: Type of a number.
        count: Number of numbers.

    Returns:
        The numbers (count,).

    Raises:
        Damaged: The sections do not hold so many numbers.
    """
    octets = np.empty((count, dtype.itemsize), np.uint8)
    for i in range(dtype.itemsize):
        octets[:, i] = np.frombuffer(reader.section(count), np.uint8)
    little = octets.reshape(-1).view(dtype.newbyteorder("<"))
    return little.astype(dtype, copy=False)


def smallest_type(largest: int) -> np.dtype[np.generic]:
    """Find the smallest unsigned type that holds a number.

    Args:
        largest: The number.

    Returns:
        The type.
    """
    return np.dtype(np.min_scalar_type(largest))


def entropy(counts: Sequence[int] | Array) -> float:
    """Compute Shannon's bound for a code.

    Args:
        counts: Number of occurrences of each symbol.

    Returns:
        Bits per symbol.
    """
    occurrences = np.asarray(counts, np.float64)
    shares = occurrences[occurrences > 0] / occurrences.sum()
    # Adding 0.0 turns -0.0 into 0.0.
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def _deflate(data: bytes, strategy: int) -> bytes:
    coder = zlib.compressobj(6, zlib.DEFLATED, -15, 9, strategy)
    return coder.compress(data) + coder.flush()


def _expand(mode: int, packed: bytes, size: int) -> bytes:
    """Decode at most one byte more than ``size``, so that a damaged length cannot fill the memory."""
    if not within(size, len(packed)):
        raise Damaged(
            f"{len(packed)} bytes are said to stand for {size}, more than any packed part does"
        )
    data = packed
    ended = True
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
