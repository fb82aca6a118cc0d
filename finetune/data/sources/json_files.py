"""JSON and JSON lines -> values, one at a time, so that a file of any size needs little memory."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import Any

from finetune.data.dialogue import RecordError
from finetune.data.sources import streams
from finetune.data.sources.source import Record
from finetune.data.sources.streams import open_text, read_lines, until_corrupt

MAX_DEPTH = 100
"""Of lists and objects in each other; no dataset comes near it, and Python fails at about a thousand."""

CONTAINERS = ("data", "records", "samples", "examples", "annotations", "questions")
"""Keys under which an object holds the list of its records; the split's name is another."""

Scalar = str | int | float | bool | None
Place = list[str | None]
"""Where a value stands in a JSON file: keys of objects, None for any place in a list."""


def read_json_lines(path: Path) -> Iterator[Record]:
    """One JSON object a line; blank lines are no records."""
    return until_corrupt(path.name, _json_lines(path))


def _json_lines(path: Path) -> Iterator[Record]:
    with open_text(path) as file:
        for number, line in enumerate(read_lines(file), start=1):
            if isinstance(line, RecordError):
                yield f"{path.name}:{number}", line
            elif line.strip():
                yield f"{path.name}:{number}", parse_record(line)


def parse_record(text: bytes) -> dict[str, Any] | RecordError:
    """A JSON object, or why it is none."""
    try:
        value = json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return RecordError("not UTF-8", f"{error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return RecordError("not JSON", str(error))
    if text.count(b"[") + text.count(b"{") > MAX_DEPTH and _is_deep(value):
        return RecordError("not JSON", f"nested over {MAX_DEPTH} deep")
    return as_record(value)


def as_record(value: object) -> dict[str, Any] | RecordError:
    if isinstance(value, dict | RecordError):
        return value
    return RecordError("not an object", f"expected a JSON object, got {type(value).__name__}")


def _is_deep(value: object) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _children(outer)]
    return any(isinstance(value, dict | list) for value in level)


def _children(value: object) -> list[object]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def read_json(path: Path, split: str) -> Iterator[Record]:
    """The objects of a list, at the top or under one of `split` and `CONTAINERS`; JSON lines; or a single object."""
    return until_corrupt(path.name, _json_records(path, (split, *CONTAINERS)))


def _json_records(path: Path, containers: tuple[str, ...]) -> Iterator[Record]:
    if _holds_lines(path):
        yield from _json_lines(path)
        return
    at = _find_list(path, containers)
    values = _whole(path) if at is None else _members(path, at, "start_array")
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


def _find_list(path: Path, keys: tuple[str, ...]) -> Place | None:
    """Where the list of records is: [] at the top, [key] in an object, None nowhere."""
    with _open_walk(path) as walk:
        for place, event, _ in walk:
            if event == "start_array" and (place == [] or (len(place) == 1 and place[0] in keys)):
                return list(place)
    return None


def read_items(path: Path, prefix: str) -> Iterator[tuple[str, object | RecordError]]:
    """(place, item) of the list at a prefix such as "item" (the top) or "data.item"; the last may be what is wrong."""
    at: Place = [None if step == "item" else step for step in prefix.split(".")][:-1]
    items = ((f"{path.name}#{number}", item) for number, (_, item) in enumerate(_members(path, at, "start_array")))
    return until_corrupt(path.name, items)


def read_pairs(path: Path, prefix: str) -> Iterator[tuple[str, str, object | RecordError]]:
    """(place, key, value) of the object at a prefix such as "data", "" being the top; the last may be what is wrong."""
    at: Place = [None if step == "item" else step for step in prefix.split(".")] if prefix else []
    pairs = ((f"{path.name}/{key}", (key, value)) for key, value in _members(path, at, "start_map"))
    for place, pair in until_corrupt(path.name, pairs):
        yield (place, "", pair) if isinstance(pair, RecordError) else (place, str(pair[0]), pair[1])


def read_header(path: Path, key: str) -> Scalar:
    """The value of a scalar of a JSON file's top object, None if there is none; nothing after it is read."""
    with _open_walk(path) as walk:
        return next((value for place, event, value in walk if place == [key] and event not in _NEW), None)


def _whole(path: Path) -> Iterator[tuple[None, object]]:
    with _open_walk(path) as walk:
        for _, event, value in walk:
            yield None, walk.take(event, value)


def _members(path: Path, at: Place, opening: str) -> Iterator[tuple[str | None, object]]:
    """(key, value) of an object, (None, value) of a list."""
    found = False
    with _open_walk(path) as walk:
        for place, event, value in walk:
            if place and place[:-1] == at and (place[-1] is None) == (opening == "start_array"):
                yield place[-1], walk.take(event, value)
            elif place == at and event == opening:
                found = True
    if not found:
        kind, where = "a list" if opening == "start_array" else "an object", ".".join(step or "item" for step in at)
        raise RecordError("no records", f"expected {kind} at {where or 'the top'}")


_NEW: dict[str, type[Any]] = {"start_map": dict, "start_array": list}


class _Walk:
    """(place, event, value) of each value of a JSON file, outermost first; inside of one that is taken, none."""

    def __init__(self, file: BufferedReader):
        import ijson

        self._metered = _Metered(file)
        self._events = ijson.basic_parse(self._metered, use_float=True)
        self._taken = False

    def __iter__(self) -> Iterator[tuple[Place, str, Any]]:
        place: Place = []
        for event, value in self._events:
            self._metered.count = 0
            if event == "map_key":
                place[-1] = value
            elif event in ("end_map", "end_array"):
                place.pop()
            else:
                self._taken = False
                yield place, event, value
                if event in _NEW and not self._taken:
                    place.append(None if event == "start_array" else "")
                    _check_depth(place)

    def take(self, event: str, value: Any) -> object:
        """The whole value that the latest event begins."""
        self._taken = True
        if event not in _NEW:
            return value
        outermost = _NEW[event]()
        open_values, key = [outermost], ""
        for event, value in self._events:
            if event == "map_key":
                key = value
            elif event in ("end_map", "end_array"):
                if open_values.pop() is outermost:
                    break
            else:
                inner = _NEW[event]() if event in _NEW else value
                innermost = open_values[-1]
                if isinstance(innermost, dict):
                    innermost[key] = inner
                else:
                    innermost.append(inner)
                if event in _NEW:
                    open_values.append(inner)
                    _check_depth(open_values)
        return outermost


def _check_depth(open_values: list[Any]) -> None:
    if len(open_values) > MAX_DEPTH:
        raise RecordError("not JSON", f"nested over {MAX_DEPTH} deep")


class _Metered:
    """A file that gives no more than `MAX_RECORD_BYTES` between two resets of `count`."""

    def __init__(self, file: BufferedReader):
        self._file, self.count = file, 0

    def read(self, size: int) -> bytes:
        piece = self._file.read1(size)  # what there is, even if the file breaks off after it
        self.count += len(piece)
        if self.count > streams.MAX_RECORD_BYTES + size:
            raise RecordError("record too large", f"over {streams.MAX_RECORD_BYTES:,} bytes")
        return piece


@contextmanager
def _open_walk(path: Path) -> Iterator[_Walk]:
    """Raises RecordError: no JSON."""
    import ijson

    with open_text(path) as file:
        try:
            yield _Walk(file)
        except (ijson.JSONError, UnicodeDecodeError) as error:
            text = error.args[0]
            message = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
            raise RecordError("not JSON", message.partition("\n")[0]) from error
