"""Decoded size of the columns of a Parquet file, from the headers of its pages.

A few bytes can stand for any number of values (runs of equal ones), and a reader does not rely on the sizes in the
footer. Headers are Thrift structures in the compact protocol; their fields have the numbers that ``parquet.thrift`` of
the format's specification assigns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO, Any, NamedTuple

DELTA_BYTE_ARRAY = 7
"""Encoding of texts by their difference to the previous one: their size is known only after decoding."""
MAX_HEADER_BYTES = 1 << 20
MAX_NESTING = 16
"""Levels of structures in a header."""
_UNCOMPRESSED_SIZE, _COMPRESSED_SIZE = 2, 3
"""Fields of a page header."""
_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = 5, 7, 8
"""Fields of a page header that hold the header of one kind of page."""
_NUM_VALUES, _ENCODING, _ENCODING_V2 = 1, 2, 4
"""Fields of these headers."""
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = (
    1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12,
)  # fmt: skip
"""Types of Thrift's compact protocol."""
_MALFORMED = "a page of it has a header that makes no sense"


class DecodedSize(NamedTuple):
    """Size of the pages of a column chunk after decoding.

    Attributes:
        bytes: Uncompressed bytes; texts in dictionaries count once.
        values: Number of values.
    """

    bytes: int
    values: int


def decoded_size(stream: IO[bytes], start: int, size: int) -> DecodedSize:
    """Add up the sizes of the pages of a column chunk.

    Args:
        stream: File that holds the chunk.
        start: Position of its first page.
        size: Number of stored bytes.

    Returns:
        Size after decoding.

    Raises:
        ValueError: The bytes are no pages, or use an encoding whose size is unknown.
    """
    total = 0
    values = 0
    position = start
    while position < start + size:
        stream.seek(position)
        reader = _CompactReader(stream.read(MAX_HEADER_BYTES))
        header = reader.struct()
        stored = _length(header.get(_COMPRESSED_SIZE))
        total += _length(header.get(_UNCOMPRESSED_SIZE))
        values += _page_values(header)
        position += reader.position + stored
    return DecodedSize(total, values)


def _page_values(header: dict[int, Any]) -> int:
    """Number of values of a page, 0 for a kind of page without values."""
    page = header.get(_DATA_PAGE) or header.get(_DATA_PAGE_V2) or header.get(_DICTIONARY_PAGE) or {}
    if not isinstance(page, dict):
        raise ValueError(_MALFORMED)
    count = _length(page.get(_NUM_VALUES, 0))
    encoding = page.get(_ENCODING_V2 if _DATA_PAGE_V2 in header else _ENCODING)
    if encoding == DELTA_BYTE_ARRAY:
        raise ValueError("it stores texts by what they share (DELTA_BYTE_ARRAY), which is not read")
    return count


def _length(value: Any) -> int:
    """A field that must be a non-negative number."""
    if not isinstance(value, int) or value < 0:
        raise ValueError(_MALFORMED)
    return value


@dataclass
class _CompactReader:
    """Reader of structures in Thrift's compact protocol. Raises ValueError for malformed data.

    Attributes:
        data: Bytes to read.
        position: Position of the next byte.
        depth: Level of nesting.
    """

    data: bytes
    position: int = 0
    depth: int = 0

    def struct(self) -> dict[int, Any]:
        """Integers and structures by field number; fields of other types are None."""
        self.depth += 1
        if self.depth > MAX_NESTING:
            raise ValueError("a page of it has a header without an end")
        values: dict[int, Any] = {}
        field = 0
        while True:
            head = self._byte()
            if not head:
                break
            delta = head >> 4
            kind = head & 15
            field = field + delta if delta else self._integer()
            values[field] = self._value(kind)
        self.depth -= 1
        return values

    def _value(self, kind: int) -> Any:
        if kind in (_I16, _I32, _I64):
            return self._integer()
        if kind == _STRUCT:
            return self.struct()
        if kind in (_TRUE, _FALSE):
            # The type is the value.
            return None
        if kind == _BYTE:
            self._skip(1)
        elif kind == _DOUBLE:
            self._skip(8)
        elif kind == _BINARY:
            self._skip(self._varint())
        elif kind in (_LIST, _SET):
            self._skip_list()
        else:
            raise ValueError(_MALFORMED)
        return None

    def _skip_list(self) -> None:
        head = self._byte()
        count = head >> 4
        kind = head & 15
        if count == 15:
            count = self._varint()
        for _ in range(count):
            if kind in (_TRUE, _FALSE):
                self._byte()
            else:
                self._value(kind)

    def _skip(self, size: int) -> None:
        self.position += size
        if self.position > len(self.data):
            raise ValueError("a page of it is cut off")

    def _byte(self) -> int:
        self._skip(1)
        return self.data[self.position - 1]

    def _varint(self) -> int:
        """Unsigned integer in groups of seven bits, the lowest first."""
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if not byte & 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError(_MALFORMED)

    def _integer(self) -> int:
        """Signed integer in zigzag encoding."""
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
