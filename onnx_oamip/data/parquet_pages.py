"""What a column of a Parquet file takes once it is decoded, by the headers of its pages.

A few bytes can stand for any number of values (runs of equal ones), and what the footer says of that is not what a
reader goes by. Headers are Thrift structures in the compact protocol; their fields have the numbers that
``parquet.thrift`` of the format's specification gives them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO, Any

PREFIXED = 7
"""DELTA_BYTE_ARRAY: texts as what they do not share with the one before, so that sizes are known by decoding alone."""
_LARGEST = 1 << 20
"""Most bytes of one header."""
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 12


def decoded(stream: IO[bytes], start: int, size: int) -> tuple[int, int]:
    """(bytes, values) of the pages of a column chunk at ``start`` of ``size`` bytes, texts in dictionaries once.

    Raises ValueError for what are no pages.
    """
    total, values, at = 0, 0, start
    while at < start + size:
        stream.seek(at)
        reader = _Compact(stream.read(_LARGEST))
        header = reader.struct()
        here, packed = header.get(2), header.get(3)
        about = header.get(5) or header.get(8) or header.get(7) or {}
        count = about.get(1, 0) if isinstance(about, dict) else None
        if not all(isinstance(n, int) and n >= 0 for n in (here, packed, count)):
            raise ValueError("a page of it has a header that makes no sense")
        if isinstance(about, dict) and about.get(4 if 8 in header else 2) == PREFIXED:
            raise ValueError(
                "it stores texts by what they share (DELTA_BYTE_ARRAY), which is not read"
            )
        total += int(here or 0)
        values += int(count or 0)
        at += reader.at + int(packed or 0)
    return total, values


@dataclass
class _Compact:
    """Reads structures of Thrift's compact protocol. Raises ValueError."""

    data: bytes
    at: int = 0
    depth: int = 0

    def struct(self) -> dict[int, Any]:
        """Values of whole numbers and of structures by their fields' numbers; anything else is passed over."""
        self.depth += 1
        if self.depth > 16:
            raise ValueError("a page of it has a header without an end")
        found: dict[int, Any] = {}
        field = 0
        while kind := self._byte():
            field = field + (kind >> 4) if kind >> 4 else self._whole()
            found[field] = self._value(kind & 15)
        self.depth -= 1
        return found

    def _value(self, kind: int) -> Any:
        if kind in (_TRUE, _FALSE):
            return None
        if kind == _STRUCT:
            return self.struct()
        if kind in (_BYTE, _DOUBLE, _BINARY):
            self._skip({_BYTE: 1, _DOUBLE: 8}.get(kind) or self._varint())
            return None
        if kind in (_LIST, _SET):
            head = self._byte()
            for _ in range(head >> 4 if head >> 4 < 15 else self._varint()):
                self._byte() if head & 15 in (_TRUE, _FALSE) else self._value(head & 15)
            return None
        if kind not in (4, 5, 6):
            raise ValueError("a page of it has a header that makes no sense")
        return self._whole()

    def _skip(self, size: int) -> None:
        self.at += size
        if self.at > len(self.data):
            raise ValueError("a page of it is cut off")

    def _byte(self) -> int:
        self._skip(1)
        return self.data[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 128:
            value |= (byte & 127) << shift
            shift += 7
            if shift > 63:
                raise ValueError("a page of it has a header that makes no sense")
        return value | byte << shift

    def _whole(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
