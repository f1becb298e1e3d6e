"""Just enough of Thrift's compact protocol to look into a Parquet footer before pyarrow does.

pyarrow 26 ends the whole process, with no exception to catch, at a column whose histograms of levels have the wrong length.
Format: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md and parquet.thrift.
"""

from __future__ import annotations

from typing import Any

_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 12
MAX_BYTES = 64 << 10  # of a footer that is looked into: Python takes 25 ms for it; a larger one is trusted
MAX_DEPTH = 20
# Field numbers in parquet.thrift.
ROW_GROUPS, COLUMNS, META_DATA, SIZE_STATISTICS, REPETITION, DEFINITION = 4, 1, 3, 16, 2, 3


def wrong_histogram(footer: bytes, column: int, max_repetition: int, max_definition: int) -> int | None:
    """The first row group whose `column` has a histogram of levels that is too long or too short; None where there is none."""
    if len(footer) > MAX_BYTES:
        return None
    try:
        groups = _Reader(footer).struct(0).get(ROW_GROUPS, [])
        for number, group in enumerate(groups):
            found = group[COLUMNS][column].get(META_DATA, {}).get(SIZE_STATISTICS, {})
            for field, most in ((REPETITION, max_repetition), (DEFINITION, max_definition)):
                if len(found.get(field, ())) not in (0, most + 1):
                    return number
    except (LookupError, AttributeError, TypeError, ValueError):
        return None  # pyarrow's business, which says so
    return None


class _Reader:
    def __init__(self, data: bytes):
        self._data, self._at = data, 0

    def struct(self, depth: int) -> dict[int, Any]:
        """Its fields by number."""
        if depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            kind = head & 15
            number = number + (head >> 4) if head >> 4 else self._varint()  # of a long form only the end of the struct counts
            fields[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind in (_LIST, _SET):
            head = self._byte()
            count, inner = head >> 4, head & 15
            count = self._varint() if count == 15 else count
            if count > len(self._data):
                raise ValueError("a list longer than its footer")
            return [self._value(inner, depth) for _ in range(count)]
        if kind == _BINARY:
            return self._skip(self._varint())
        if kind == _DOUBLE:
            return self._skip(8)
        return self._byte() if kind in (_TRUE, _FALSE, _BYTE) else self._varint()

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _skip(self, count: int) -> None:
        if count < 0 or self._at + count > len(self._data):
            raise ValueError("longer than its footer")
        self._at += count

    def _varint(self) -> int:
        result = shift = 0
        while True:
            byte = self._byte()
            result |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return result
