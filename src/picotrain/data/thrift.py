"""Just enough of Thrift's compact protocol to read a Parquet footer without pyarrow's `row_group(i).column(j)`.

pyarrow 26 ends the whole process, with no exception to catch, where that call meets a column that is encrypted, or one whose
histograms of levels have the wrong length. What reads pages raises instead.
Format: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md and parquet.thrift.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 12
_NUMBERS = (4, 5, 6)
MAX_DEPTH = 20
# Most fields are short numbers. One look takes a run of them: a footer of a million bytes is read in 0.2 s, and in a second without.
_NUMBER = rb"[\x80-\xff]{0,9}[\x00-\x7f]"
_NUMBER_HEADS, _BOOL_HEADS = (re.escape(bytes(high << 4 | kind for high in range(1, 16) for kind in kinds)) for kinds in (_NUMBERS, (1, 2)))
_NUMBER_FIELDS = re.compile(rb"(?:[%b]%b|[%b])*" % (_NUMBER_HEADS, _NUMBER, _BOOL_HEADS))
_NUMBER_LISTS = [re.compile(rb"(?:%b){%d}" % (_NUMBER, count)) for count in range(16)]

# Field numbers in parquet.thrift: of the file, a row group, a column chunk, its metadata and its statistics of sizes.
_ROW_GROUPS = 4
_COLUMNS, _ROWS = 1, 3
_META_DATA, _CRYPTO, _ENCRYPTED = 3, 8, 9
_VALUES, _TEXT_BYTES, _STORED_BYTES, _SIZES = 5, 6, 7, 16
_REPETITION, _DEFINITION = 2, 3


class Chunk(NamedTuple):
    """One column in one row group, by the footer. `encrypted`: the rest is not to be known."""

    rows: int  # of the row group
    values: int = 0
    text_bytes: int = 0  # uncompressed
    stored_bytes: int = 0
    encrypted: bool = False
    levels: tuple[int, int] = (0, 0)  # that the histograms of repetition and definition count; 0: there is none


def chunks(footer: bytes, column: int) -> list[Chunk]:
    """The column of that index in each row group. Raises ValueError where the footer is damaged."""
    try:
        return _Reader(footer, column).row_groups()
    except (IndexError, KeyError, TypeError, AttributeError) as error:  # AttributeError: a pattern that does not match
        raise ValueError("its footer is damaged: what stands there is cut off, or is none of what Parquet has there") from error


class _Reader:
    def __init__(self, data: bytes, column: int):
        self._data, self._at, self._column = data, 0, column

    def row_groups(self) -> list[Chunk]:
        found: list[Chunk] = []
        for number, kind in self._fields():
            if number == _ROW_GROUPS:
                found = [self._row_group() for _ in range(self._list(kind))]
            else:
                self._pass(kind, 0)
        return found

    def _row_group(self) -> Chunk:
        chunk, rows = None, None
        for number, kind in self._fields():
            if number == _COLUMNS:
                for index in range(self._list(kind)):
                    if index == self._column:
                        chunk = self._chunk()
                    else:
                        self._pass(_STRUCT, 0)
            elif number == _ROWS:
                rows = self._number(kind)
            else:
                self._pass(kind, 0)
        if chunk is None:
            raise ValueError("a row group in its footer has fewer columns than the schema")
        if rows is None:
            raise KeyError(_ROWS)
        return chunk._replace(rows=rows)

    def _chunk(self) -> Chunk:
        meta: Chunk | None = None
        encrypted = False
        for number, kind in self._fields():
            if number == _META_DATA and kind == _STRUCT:
                meta = self._meta_data()
            else:
                encrypted |= number in (_CRYPTO, _ENCRYPTED)
                self._pass(kind, 0)
        if encrypted:
            return Chunk(0, encrypted=True)
        if meta is None:
            raise KeyError(_META_DATA)
        return meta

    def _meta_data(self) -> Chunk:
        sizes: dict[int, int] = {}
        levels = (0, 0)
        for number, kind in self._fields():
            if number in (_VALUES, _TEXT_BYTES, _STORED_BYTES):
                sizes[number] = self._number(kind)
            elif number == _SIZES and kind == _STRUCT:
                levels = self._levels()
            else:
                self._pass(kind, 0)
        return Chunk(0, sizes[_VALUES], sizes[_TEXT_BYTES], sizes[_STORED_BYTES], False, levels)

    def _levels(self) -> tuple[int, int]:
        counts = {_REPETITION: 0, _DEFINITION: 0}
        for number, kind in self._fields():
            before = self._at
            self._pass(kind, 0)
            if number in counts and kind in (_LIST, _SET):
                after, self._at = self._at, before
                counts[number] = self._length()[0]
                self._at = after
        return counts[_REPETITION], counts[_DEFINITION]

    def _fields(self) -> Any:
        """Number and kind of each field of a struct; who iterates reads each field, or passes it."""
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._varint() >> 1
            yield number, head & 15

    def _list(self, kind: int) -> int:
        """The length of a list of structs."""
        if kind != _LIST:
            raise TypeError
        count, inner = self._length()
        if inner != _STRUCT or count > len(self._data):
            raise TypeError
        return count

    def _length(self) -> tuple[int, int]:
        """The length of a list, and the kind of what is in it."""
        head = self._byte()
        return (self._varint() if head >> 4 == 15 else head >> 4), head & 15

    def _number(self, kind: int) -> int:
        if kind not in _NUMBERS:
            raise TypeError
        value = self._varint()
        return value >> 1 ^ -(value & 1)  # zigzag

    def _pass(self, kind: int, depth: int) -> None:
        """Read over a value."""
        if depth > MAX_DEPTH:
            raise ValueError("its footer is damaged: what stands there is nested too deeply")
        if kind == _STRUCT:
            data = self._data
            while True:
                self._at = at = _NUMBER_FIELDS.match(data, self._at).end()  # pyright: ignore[reportOptionalMemberAccess]
                head = data[at]
                self._at = at + 1
                if not head:
                    return
                if not head >> 4:
                    self._varint()
                self._pass(head & 15, depth + 1)
        elif kind == _BINARY:
            length = self._varint()  # which moves on, too
            self._at += length  # beyond the end the next look fails
        elif kind in (_LIST, _SET):
            self._pass_list(depth)
        elif kind in _NUMBERS:
            self._varint()
        elif kind in (_BYTE, _DOUBLE):
            self._at += 1 if kind == _BYTE else 8
        elif kind not in (_TRUE, _FALSE):
            raise TypeError

    def _pass_list(self, depth: int) -> None:
        count, kind = self._length()
        if kind in _NUMBERS and count < len(_NUMBER_LISTS):
            self._at = _NUMBER_LISTS[count].match(self._data, self._at).end()  # pyright: ignore[reportOptionalMemberAccess]
        elif kind in (_TRUE, _FALSE, _BYTE, _DOUBLE):
            self._at += count * (8 if kind == _DOUBLE else 1)
        else:
            for _ in range(count):
                self._pass(kind, depth + 1)

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _varint(self) -> int:
        result = 0
        for shift in range(0, 70, 7):  # of 64 bits
            byte = self._byte()
            result |= (byte & 127) << shift
            if byte < 128:
                return result
        raise ValueError("its footer is damaged: a number in it is too long")
