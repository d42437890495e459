"""One tensor's bits <-> a blob, always exact; of all ways the one that takes the fewest bytes is kept.

=========  ==========================================================================================================
``raw``    as they are
``planes`` byte by byte (floats turned left by a bit, so that one plane is the exponent), each plane in its best coding
           where there is no codebook, or where it would say too much in too few bytes
``index``  at most 256 distinct values, and for every entry its number among them in ``ceil(log2 k)`` bits
``ham``    the same with a canonical Huffman code over the numbers (HAM)
``lz``     the same where what repeats among the numbers is found first, by DEFLATE or LZMA
``csc``    only what is not zero, with row numbers and column counts (see ``sparse``)
``sham``   the same where what is not zero has a codebook (sHAM)
=========  ==========================================================================================================

A tensor is seen as unsigned *words* of its item size, so that NaN payloads, the sign of zero and types that numpy does
not know come back bit by bit. Weight sharing (``codebook``) is what makes ``ham`` short; it happens before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_oamip.core.records import Array, Ints
from onnx_oamip.published.packing import entropy, sparse
from onnx_oamip.published.packing.entropy import Damaged, Reader

METHODS = ("raw", "planes", "index", "ham", "lz", "csc", "sham")
_SHARED = ("index", "ham", "lz")
CODEBOOK = 256
"""Distinct values that a codebook may hold: a number among them is one byte."""
SPARSE = 0.25
"""Least share of zeros for which leaving them out is tried."""
_PROBE = 1 << 14


@dataclass(frozen=True)
class Coded:
    """A blob, how it was made, and the number of distinct values where it holds a codebook."""

    method: str
    blob: bytes
    clusters: int | None = None


@dataclass(frozen=True)
class Form:
    """What a decoder has to know: type of the words, their number, rows of the matrix, and whether they are floats."""

    dtype: np.dtype[np.generic]
    count: int
    rows: int
    floating: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the words."""
        return self.count * self.dtype.itemsize


def encode(words: Array, form: Form) -> Coded:
    """The shortest blob that gives the words (count,) back."""
    return _shortest(candidates(words, form), words.nbytes)


def candidates(words: Array, form: Form) -> list[Coded]:
    """Every blob that is worth a try; each of them gives the words (count,) back."""
    found = _dense(words, form)
    if words.size and form.rows and words.size % form.rows == 0 and np.mean(words == 0) >= SPARSE:
        left, blob = sparse.split(words, form.rows)
        inner = _shortest(_dense(left, _of_nonzeros(form, left.size)), left.nbytes)
        shared = inner.method in _SHARED
        blob += bytes([METHODS.index(inner.method)]) + inner.blob
        clusters = None if inner.clusters is None else inner.clusters + 1
        found.append(Coded("sham" if shared else "csc", blob, clusters))
    return found


def decode(method: str, blob: memoryview, form: Form) -> Array:
    """The words (count,) that a blob stands for. Raises Damaged."""
    reader = Reader(blob)
    if method in ("csc", "sham"):
        places = sparse.places(reader, form.count, form.rows)
        inner = reader.take(1)[0]
        if inner >= METHODS.index("csc"):
            raise Damaged("what is not zero has a coding of its own that is sparse again")
        words = np.zeros(form.count, form.dtype)
        words[places] = _decode_dense(METHODS[inner], reader, _of_nonzeros(form, places.size))
    else:
        words = _decode_dense(method, reader, form)
    reader.end()
    return words


def distinct(words: Array) -> tuple[Array, Ints] | None:
    """(values, number of each word among them), or None where there are more than a codebook holds."""
    if len(np.unique(words[:_PROBE])) > CODEBOOK:
        return None
    values, labels = np.unique(words, return_inverse=True)
    return None if len(values) > CODEBOOK else (values, labels.reshape(-1))


def _of_nonzeros(form: Form, count: int) -> Form:
    return Form(form.dtype, count, 0, form.floating)


def _shortest(found: list[Coded], nbytes: int) -> Coded:
    # What stands for more than a reader allows is no choice; planes, HAM and raw never do.
    return min((c for c in found if entropy.within(nbytes, len(c.blob))), key=lambda c: len(c.blob))


def _dense(words: Array, form: Form) -> list[Coded]:
    little = np.ascontiguousarray(words, words.dtype.newbyteorder("<")).tobytes()
    found = [Coded("raw", little)]
    shared = distinct(words) if words.size else None
    if shared is not None:
        found += _numbered(*shared)
    # Where a codebook says more in its bytes than is allowed, planes come next; mostly it says less, and is shorter.
    if shared is None or not entropy.within(words.nbytes, len(found[-1].blob)):
        found.append(Coded("planes", entropy.planes(_turn(words, form, 1))))
    return found


def _numbered(values: Array, labels: Ints) -> list[Coded]:
    """Codings by a codebook, the one that finds repeats at the end."""
    k = len(values)
    table = bytes([k - 1]) + np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()
    numbers = labels.astype(np.uint8).tobytes()
    return [
        Coded("index", table + _pack_bits(labels, _bits(k)), k),
        Coded("ham", table + entropy.shrink(numbers, repeats=False), k),
        Coded("lz", table + entropy.shrink(numbers), k),
    ]


def _decode_dense(method: str, reader: Reader, form: Form) -> Array:
    if method == "raw":
        return reader.numbers(form.dtype, form.count)
    if method == "planes":
        return _turn(entropy.read_planes(reader, form.dtype, form.count), form, -1)
    if method not in _SHARED:
        raise Damaged(f"no method is called {method!r}")
    k = reader.take(1)[0] + 1
    values = reader.numbers(form.dtype, k)
    if method == "index":
        labels = _unpack_bits(reader.take(-(-form.count * _bits(k) // 8)), form.count, _bits(k))
    else:
        labels = np.frombuffer(reader.section(form.count), np.uint8)
    if labels.size and int(labels.max()) >= k:
        raise Damaged(f"a codebook of {k} values is asked for number {int(labels.max())}")
    return np.asarray(values[labels])


def _turn(words: Array, form: Form, by: int) -> Array:
    """Floats turned left (1) or right (-1) by one bit: the exponent fills a byte, the sign joins the mantissa."""
    if not form.floating or form.dtype.itemsize < 2:
        return words
    last = words.dtype.type(8 * form.dtype.itemsize - 1)
    one = words.dtype.type(1)
    return np.asarray(
        (words << one) | (words >> last) if by > 0 else (words >> one) | (words << last)
    )


def _bits(k: int) -> int:
    return (k - 1).bit_length()


def _pack_bits(labels: Ints, bits: int) -> bytes:
    places = np.arange(bits - 1, -1, -1, dtype=np.uint8)
    return np.packbits((labels.astype(np.uint8)[:, None] >> places) & 1).tobytes()


def _unpack_bits(packed: memoryview, count: int, bits: int) -> Array:
    if not bits:
        return np.zeros(count, np.uint8)
    wide = np.zeros((count, 8), np.uint8)
    wide[:, 8 - bits :] = np.unpackbits(
        np.frombuffer(packed, np.uint8), count=count * bits
    ).reshape(count, bits)
    return np.packbits(wide, axis=1).reshape(-1)
