"""Lossless coding of one tensor: all suitable methods are tried, and the shortest result is kept.

=========  ==========================================================================================================
``raw``    the words themselves
``planes`` byte by byte (floats rotated left by one bit, so that one plane is the exponent), each plane in its best
           coding; where there is no codebook, or where it would decode to too much from too few bytes
``index``  at most 256 distinct values, and for every entry its number among them in ``ceil(log2 k)`` bits
``ham``    the same with a canonical Huffman code over the numbers (HAM)
``lz``     the same with a search for repeats among the numbers, by DEFLATE or LZMA
``csc``    nonzero entries only, with row indices and column counts (see ``sparse``)
``sham``   the same with a codebook for the nonzero entries (sHAM)
=========  ==========================================================================================================

A tensor is seen as unsigned *words* of its item size, so that NaN payloads, the sign of zero and types that numpy does
not know are restored bit by bit. Weight sharing (``codebook``) makes ``ham`` short; it happens before.
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
"""Most distinct values in a codebook: a number among them is one byte."""
SPARSE = 0.25
"""Least share of zeros for which sparse coding is tried."""
_PROBE = 1 << 14
"""Words in which more distinct values than a codebook holds are looked for first."""


@dataclass(frozen=True)
class Coded:
    """A coded tensor.

    Attributes:
        method: Name of the coding.
        blob: The bytes.
        clusters: Number of distinct values, if the coding has a codebook.
    """

    method: str
    blob: bytes
    clusters: int | None = None


@dataclass(frozen=True)
class Form:
    """Properties of a tensor that a decoder needs.

    Attributes:
        dtype: Type of the words.
        count: Number of words.
        rows: Rows of the matrix; 0 if the tensor is none.
        floating: The words are floats.
    """

    dtype: np.dtype[np.generic]
    count: int
    rows: int
    floating: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the words."""
        return self.count * self.dtype.itemsize


def encode(words: Array, form: Form) -> Coded:
    """Encode a tensor in the fewest bytes.

    Args:
        words: Its words (count,).
        form: Its properties.

    Returns:
        The shortest coding.
    """
    return _shortest(candidates(words, form), words.nbytes)


def candidates(words: Array, form: Form) -> list[Coded]:
    """Encode a tensor by all methods that may be the shortest.

    Args:
        words: Its words (count,).
        form: Its properties.

    Returns:
        The codings.
    """
    codings = _dense(words, form)
    is_matrix = words.size and form.rows and words.size % form.rows == 0
    if is_matrix and np.mean(words == 0) >= SPARSE:
        nonzero, blob = sparse.split(words, form.rows)
        inner = _shortest(_dense(nonzero, _of_nonzeros(form, nonzero.size)), nonzero.nbytes)
        method = "sham" if inner.method in _SHARED else "csc"
        blob += bytes([METHODS.index(inner.method)]) + inner.blob
        # Zero is one more value than the codebook holds.
        if inner.clusters is None:
            clusters = None
        else:
            clusters = inner.clusters + 1
        codings.append(Coded(method, blob, clusters))
    return codings


def decode(method: str, blob: memoryview, form: Form) -> Array:
    """Decode a tensor.

    Args:
        method: Name of the coding.
        blob: The bytes.
        form: Properties of the tensor.

    Returns:
        Its words (count,).

    Raises:
        Damaged: The bytes do not hold such a tensor.
    """
    reader = Reader(blob)
    if method in ("csc", "sham"):
        places = sparse.places(reader, form.count, form.rows)
        inner = reader.take(1)[0]
        if inner >= METHODS.index("csc"):
            raise Damaged("what is not zero has a coding of its own that is sparse again")
        words = np.zeros(form.count, form.dtype)
        nonzeros = _of_nonzeros(form, places.size)
        words[places] = _decode_dense(METHODS[inner], reader, nonzeros)
    else:
        words = _decode_dense(method, reader, form)
    reader.end()
    return words


def distinct(words: Array) -> tuple[Array, Ints] | None:
    """Find the distinct values of a tensor.

    Args:
        words: Its words (n,).

    Returns:
        Values, and the number of each word among them (n,); None if there are more than a codebook holds.
    """
    if len(np.unique(words[:_PROBE])) > CODEBOOK:
        return None
    values, labels = np.unique(words, return_inverse=True)
    if len(values) > CODEBOOK:
        return None
    return (values, labels.reshape(-1))


def _of_nonzeros(form: Form, count: int) -> Form:
    return Form(form.dtype, count, 0, form.floating)


def _shortest(codings: list[Coded], nbytes: int) -> Coded:
    # A reader refuses codings that decode to too much; planes, HAM and raw never do.
    allowed = [coding for coding in codings if entropy.within(nbytes, len(coding.blob))]
    return min(allowed, key=lambda coding: len(coding.blob))


def _little_endian(words: Array) -> bytes:
    return np.ascontiguousarray(words, words.dtype.newbyteorder("<")).tobytes()


def _dense(words: Array, form: Form) -> list[Coded]:
    codings = [Coded("raw", _little_endian(words))]
    shared = distinct(words) if words.size else None
    if shared is not None:
        codings += _numbered(*shared)
    # A codebook is mostly shorter than planes, which are the substitute if a reader refuses it.
    if shared is None or not entropy.within(words.nbytes, len(codings[-1].blob)):
        rotated = _rotate(words, form, left=True)
        codings.append(Coded("planes", entropy.planes(rotated)))
    return codings


def _numbered(values: Array, labels: Ints) -> list[Coded]:
    """Codings by a codebook; the one that looks for repeats is the last."""
    count = len(values)
    table = bytes([count - 1]) + _little_endian(values)
    numbers = labels.astype(np.uint8).tobytes()
    return [
        Coded("index", table + _pack_bits(labels, _bits(count)), count),
        Coded("ham", table + entropy.shrink(numbers, repeats=False), count),
        Coded("lz", table + entropy.shrink(numbers), count),
    ]


def _decode_dense(method: str, reader: Reader, form: Form) -> Array:
    if method == "raw":
        return reader.numbers(form.dtype, form.count)
    if method == "planes":
        rotated = entropy.read_planes(reader, form.dtype, form.count)
        return _rotate(rotated, form, left=False)
    if method not in _SHARED:
        raise Damaged(f"no method is called {method!r}")
    clusters = reader.take(1)[0] + 1
    values = reader.numbers(form.dtype, clusters)
    if method == "index":
        bits = _bits(clusters)
        packed = reader.take(-(-form.count * bits // 8))
        labels = _unpack_bits(packed, form.count, bits)
    else:
        labels = np.frombuffer(reader.section(form.count), np.uint8)
    if labels.size and int(labels.max()) >= clusters:
        raise Damaged(f"a codebook of {clusters} values is asked for number {int(labels.max())}")
    return np.asarray(values[labels])


def _rotate(words: Array, form: Form, *, left: bool) -> Array:
    """Floats rotated by one bit: to the left, the exponent fills a byte and the sign joins the mantissa."""
    if not form.floating or form.dtype.itemsize < 2:
        return words
    one = words.dtype.type(1)
    last = words.dtype.type(8 * form.dtype.itemsize - 1)
    by, back = (one, last) if left else (last, one)
    return np.asarray((words << by) | (words >> back))


def _bits(count: int) -> int:
    return (count - 1).bit_length()


def _pack_bits(labels: Ints, bits: int) -> bytes:
    places = np.arange(bits - 1, -1, -1, dtype=np.uint8)
    by_bit = (labels.astype(np.uint8)[:, None] >> places) & 1
    return np.packbits(by_bit).tobytes()


def _unpack_bits(packed: memoryview, count: int, bits: int) -> Array:
    if not bits:
        return np.zeros(count, np.uint8)
    by_bit = np.unpackbits(np.frombuffer(packed, np.uint8), count=count * bits)
    octets = np.zeros((count, 8), np.uint8)
    octets[:, 8 - bits :] = by_bit.reshape(count, bits)
    return np.packbits(octets, axis=1).reshape(-1)
