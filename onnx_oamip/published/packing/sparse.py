"""Where a matrix is not zero, column by column (CSC): row numbers in the smallest type, and how many are in a column.

A row number is kept as the rows skipped since the one before it in its column, which repeat more than the numbers do.
A tensor is the matrix of its first axis by all others. Zero is the word without a bit set: minus zero is kept.
"""

from __future__ import annotations

import struct

import numpy as np

from onnx_oamip.core.records import Array, Ints
from onnx_oamip.published.packing import entropy
from onnx_oamip.published.packing.entropy import Damaged, Reader

_COUNT = struct.Struct("<Q")


def split(words: Array, rows: int) -> tuple[Array, bytes]:
    """(what is not zero, column after column; where it is) of a matrix of ``rows`` rows, given row after row."""
    columns = words.reshape(rows, -1).T.reshape(-1)
    at = np.flatnonzero(columns)
    column, row = np.divmod(at, rows)
    before = np.where(np.diff(column, prepend=-1) > 0, -1, np.roll(row, 1))
    skipped = (row - before - 1).astype(entropy.smallest_type(rows - 1))
    count = np.bincount(column, minlength=words.size // rows).astype(entropy.smallest_type(rows))
    return columns[at], _COUNT.pack(at.size) + entropy.planes(count) + entropy.planes(skipped)


def places(reader: Reader, size: int, rows: int) -> Ints:
    """Places, in row order of a tensor of ``size`` words, of what :func:`split` kept. Raises Damaged."""
    if rows < 1 or size % rows:
        raise Damaged(f"{size} entries are no matrix of {rows} rows")
    columns = size // rows
    (kept,) = _COUNT.unpack(reader.take(_COUNT.size))
    if kept > size:
        raise Damaged(f"{kept} of {size} entries are said not to be zero")
    count = entropy.read_planes(reader, entropy.smallest_type(rows), columns).astype(np.int64)
    if int(count.sum()) != kept:
        raise Damaged(f"columns hold {int(count.sum())} entries where {kept} are not zero")
    skipped = entropy.read_planes(reader, entropy.smallest_type(rows - 1), kept).astype(np.int64)
    passed = np.concatenate([[0], np.cumsum(skipped + 1)])
    row = passed[1:] - 1 - np.repeat(passed[np.cumsum(count) - count], count)
    if kept and int(row.max()) >= rows:
        raise Damaged(f"a matrix of {rows} rows is asked for row {int(row.max())}")
    return np.asarray(row * columns + np.repeat(np.arange(columns), count), np.int64)
