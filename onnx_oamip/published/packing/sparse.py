"""Positions of the nonzero entries of a matrix, column by column (CSC), as compact bytes.

A row index is stored as the number of rows skipped since the previous one in its column, which repeats more often than
the index. The matrix of a tensor has the first axis as rows and all others as columns. Zero is the word without a bit
set: minus zero counts as nonzero.
"""

from __future__ import annotations

import struct

import numpy as np

from onnx_oamip.core.records import Array, Ints
from onnx_oamip.published.packing import entropy
from onnx_oamip.published.packing.entropy import Damaged, Reader

_COUNT = struct.Struct("<Q")


def split(words: Array, rows: int) -> tuple[Array, bytes]:
    """Separate the nonzero words of a matrix from their positions.

    Args:
        words: Words of the matrix (n,), row after row.
        rows: Number of rows.

    Returns:
        Nonzero words, column after column, and the bytes of their positions.
    """
    by_column = words.reshape(rows, -1).T.reshape(-1)
    nonzero = np.flatnonzero(by_column)
    column, row = np.divmod(nonzero, rows)
    begins_column = np.diff(column, prepend=-1) > 0
    previous = np.where(begins_column, -1, np.roll(row, 1))
    skipped = (row - previous - 1).astype(entropy.smallest_type(rows - 1))
    columns = words.size // rows
    counts = np.bincount(column, minlength=columns).astype(entropy.smallest_type(rows))
    positions = _COUNT.pack(nonzero.size) + entropy.planes(counts) + entropy.planes(skipped)
    return by_column[nonzero], positions


def places(reader: Reader, size: int, rows: int) -> Ints:
    """Read the positions that :func:`split` stored.

    Args:
        reader: Reader at the bytes of the positions.
        size: Number of words of the tensor.
        rows: Number of rows.

    Returns:
        Indices into the words of the tensor, row after row.

    Raises:
        Damaged: The bytes do not describe positions in such a matrix.
    """
    if rows < 1 or size % rows:
        raise Damaged(f"{size} entries are no matrix of {rows} rows")
    columns = size // rows
    (kept,) = _COUNT.unpack(reader.take(_COUNT.size))
    if kept > size:
        raise Damaged(f"{kept} of {size} entries are said not to be zero")
    counts = entropy.read_planes(reader, entropy.smallest_type(rows), columns).astype(np.int64)
    total = int(counts.sum())
    if total != kept:
        raise Damaged(f"columns hold {total} entries where {kept} are not zero")
    skipped = entropy.read_planes(reader, entropy.smallest_type(rows - 1), kept).astype(np.int64)
    # Rows passed over all columns so far; the row in a column is the difference to the column's begin.
    passed = np.concatenate([[0], np.cumsum(skipped + 1)])
    begins = np.cumsum(counts) - counts
    row = passed[1:] - 1 - np.repeat(passed[begins], counts)
    if kept and int(row.max()) >= rows:
        raise Damaged(f"a matrix of {rows} rows is asked for row {int(row.max())}")
    column = np.repeat(np.arange(columns), counts)
    return np.asarray(row * columns + column, np.int64)
