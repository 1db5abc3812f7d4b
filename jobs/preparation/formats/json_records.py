"""Read JSON: one object a line, or one array of objects, an object at a time."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from graft.errors import DataError

from .records import BadRecord, Record

MOST_LINE_BYTES = 64 * 2**20
"""Longest line or object; a file without line ends is refused instead of held."""
NOT_JSON = "not JSON"
_BLOCK_CHARS = 2**18
_ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[\s*(?:\{|\]|$)")
_SPACE = re.compile(r"[\s,]*")


def read_json(file: BinaryIO, place: str) -> Iterator[Record | BadRecord]:
    """Read a file's objects in their order. `place` is what messages call it.

    Raises DataError where no line is JSON, a line or object is longer than MOST_LINE_BYTES, and at damage in an array.
    """
    head = file.peek(64) if hasattr(file, "peek") else b""
    if _ARRAY.match(head):
        yield from _read_array(file, place)
        return
    count, is_json = 0, False
    for number, line in enumerate(_lines(file, place), start=1):
        if not line.strip():
            continue
        count += 1
        record = _parse_line(line, number)
        is_json |= not (isinstance(record, BadRecord) and record.reason == NOT_JSON)
        yield record
    if not is_json:
        raise DataError(f"manifest {place}: none of its {count} lines is JSON: wants one object a line")


def _lines(file: BinaryIO, place: str) -> Iterator[bytes]:
    while block := file.readline(MOST_LINE_BYTES):
        if len(block) == MOST_LINE_BYTES and not block.endswith(b"\n"):
            raise DataError(f"manifest {place}: has a line of over {MOST_LINE_BYTES:,} bytes: wants one object a line")
        yield from block.splitlines()


def _parse_line(line: bytes, number: int) -> Record | BadRecord:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadRecord(number, NOT_JSON, str(error))
    return _record(values, number)


def _record(values: Any, number: int) -> Record | BadRecord:
    try:
        json.dumps(values, ensure_ascii=False).encode()  # fails for half of a surrogate pair, which is no text
    except (ValueError, RecursionError) as error:
        return BadRecord(number, NOT_JSON, str(error))
    if not isinstance(values, dict):
        return BadRecord(number, NOT_JSON, f"a {type(values).__name__}, wants an object")
    return Record(number, values)


def _read_array(file: BinaryIO, place: str) -> Iterator[Record | BadRecord]:
    reader = codecs.getreader("utf-8-sig")(file)
    decoder = json.JSONDecoder()
    buffer, number, is_at_end = "", 0, False

    def more() -> None:
        nonlocal buffer, is_at_end
        block = reader.read(_BLOCK_CHARS)
        buffer, is_at_end = buffer + block, not block

    try:
        more()
        position = buffer.index("[") + 1
        while True:
            position = _SPACE.match(buffer, position).end()  # type: ignore[union-attr]  # it matches everywhere
            if position == len(buffer) and not is_at_end:
                buffer, position = "", 0
                more()
                continue
            if buffer[position : position + 1] == "]":
                break
            try:
                values, end = decoder.raw_decode(buffer, position)
                if end == len(buffer) and not is_at_end:  # a number may go on
                    raise ValueError("cut")
            except ValueError as error:
                buffer, position = buffer[position:], 0
                if is_at_end or len(buffer) > MOST_LINE_BYTES:
                    where = f"after its object {number}" if number else "at its first object"
                    raise DataError(f"manifest {place}: its array is damaged {where} ({error}): mend it") from error
                more()
                continue
            number, position = number + 1, end
            yield _record(values, number)
    except UnicodeDecodeError as error:
        raise DataError(
            f"manifest {place}: not UTF-8 ({error.reason}, after object {number}): save it as UTF-8"
        ) from error
    except RecursionError as error:
        raise DataError(f"manifest {place}: object {number + 1} is nested too deeply: flatten it") from error
    if (buffer[position + 1 :] + reader.read(_BLOCK_CHARS)).strip():
        raise DataError(f"manifest {place}: goes on after the end of its array: wants one array, or one object a line")
