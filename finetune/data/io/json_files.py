"""JSON and JSON lines -> values, one at a time, so that a file of any size needs little memory."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from finetune.data.conversation import RecordError
from finetune.data.io.json_scan import is_deep, open_scan, too_many_values
from finetune.data.io.streams import BrokenFileError, open_text, read_lines, until_broken
from finetune.data.source import Record

CONTAINERS = ("data", "records", "samples", "examples", "annotations", "questions")
"""Keys under which an object holds the list of its records; the split's name is another."""

Scalar = str | int | float | bool | None


def read_json_lines(path: Path) -> Iterator[Record]:
    """One JSON object a line; blank lines are no records."""
    return until_broken(path, _json_lines(path))


def _json_lines(path: Path) -> Iterator[Record]:
    with open_text(path) as file:
        for number, line in enumerate(read_lines(file), start=1):
            if isinstance(line, RecordError):
                yield f"{path.name}:{number}", line
            elif line.strip():
                yield f"{path.name}:{number}", parse_record(line)


def parse_record(line: bytes) -> dict[str, Any] | RecordError:
    """A JSON object, or why it is none."""
    return as_record(parse_value(line))


def parse_value(line: bytes) -> object | RecordError:
    """Any JSON, or why it is none."""
    try:
        text = line.decode("utf-8-sig")
        if fault := too_many_values(text):
            return fault
        value = json.loads(text)
    except UnicodeDecodeError as error:
        return RecordError("not UTF-8", f"{error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return RecordError("not JSON", str(error))
    return is_deep(value, text, 0, len(text)) or value


def as_record(value: object) -> dict[str, Any] | RecordError:
    if isinstance(value, dict | RecordError):
        return value
    return RecordError("not an object", f"expected a JSON object, got {type(value).__name__}")


def read_json(path: Path, split: str) -> Iterator[Record]:
    """The objects of a list, at the top or under one of `split` and `CONTAINERS`; JSON lines; or a single object."""
    return until_broken(path, _json_records(path, (split, *CONTAINERS)))


def _json_records(path: Path, containers: tuple[str, ...]) -> Iterator[Record]:
    if _holds_lines(path):
        yield from _json_lines(path)
        return
    key = _find_list(path, containers)
    values = _whole(path) if key is None else _members(path, key, "[")
    for number, (_, value) in enumerate(values):
        yield f"{path.name}#{number}", as_record(value)


def _holds_lines(path: Path) -> bool:
    """Whether one of the first two lines is an object of its own, which it is not in one big object."""
    with open_text(path) as file:
        if not file.read1(1024).lstrip().startswith(b"{"):
            return False
    with open_text(path) as file:
        lines = list(islice((line for line in read_lines(file) if isinstance(line, RecordError) or line.strip()), 2))
    return len(lines) == 2 and any(isinstance(line, bytes) and isinstance(parse_record(line), dict) for line in lines)


def _find_list(path: Path, keys: tuple[str, ...]) -> str | None:
    """Where the list of records is: "" at the top, a key of the object there, None nowhere."""
    with open_scan(path) as scan:
        opening = scan.peek()
        if opening == "{":
            for key in scan.members():
                if key in keys and scan.peek() == "[":
                    return key
                scan.skip()
        return "" if opening == "[" else None


def read_items(path: Path, key: str) -> Iterator[tuple[str, object | RecordError]]:
    """(place, item) of the list under a key, "" being the top; the last may be what is wrong."""
    items = ((f"{path.name}#{number}", item) for number, (_, item) in enumerate(_members(path, key, "[")))
    return until_broken(path, items)


def read_pairs(path: Path, key: str) -> Iterator[tuple[str, str, object | RecordError]]:
    """(place, key, value) of the object under a key, "" being the top; the last may be what is wrong."""
    pairs = ((f"{path.name}/{name}", (name, value)) for name, value in _members(path, key, "{"))
    for place, pair in until_broken(path, pairs):
        yield (place, "", pair) if isinstance(pair, RecordError) else (place, str(pair[0]), pair[1])


def read_header(path: Path, key: str) -> Scalar:
    """The value of a scalar of a JSON file's top object, None if there is none; nothing after it is read."""
    try:
        with open_scan(path) as scan:
            for name in scan.members() if scan.peek() == "{" else ():
                if name == key and scan.peek() not in "[{":
                    value = scan.take()
                    return value if isinstance(value, Scalar) else None
                scan.skip()
    except BrokenFileError:
        pass  # what is wrong with it, the reader of its records says
    return None


def read_keys(path: Path) -> Iterator[str]:
    """The keys of a JSON file's top object, each before the value behind it is read. Raises BrokenFileError."""
    with open_scan(path) as scan:
        for key in scan.members() if scan.peek() == "{" else ():
            yield str(key)
            scan.skip()


def _whole(path: Path) -> Iterator[tuple[None, object]]:
    with open_scan(path) as scan:
        yield None, scan.take()
        scan.end()


def _members(path: Path, key: str, opening: str) -> Iterator[tuple[str | None, object]]:
    """(key, value) of an object, (None, value) of a list; it is at the top, or under a key there."""
    found = False
    with open_scan(path) as scan:
        first = scan.peek()
        if not key and first == opening:
            found = True
            for name in scan.members():
                yield name, scan.take()
        elif key and first == "{":
            for outer in scan.members():
                if outer == key and scan.peek() == opening:
                    found = True
                    for name in scan.members():
                        yield name, scan.take()
                else:
                    scan.skip()
        elif first:
            scan.skip()
        scan.end()
    if not found:
        kind = "a list" if opening == "[" else "an object"
        raise BrokenFileError("no records", f"expected {kind} at {key or 'the top'}", "nothing of the file was read")
