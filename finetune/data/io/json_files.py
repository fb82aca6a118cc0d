"""JSON files of any size -> values, one at a time in bounded memory, each as Python's json reads it."""

import codecs
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from finetune.data.conversation import RecordError
from finetune.data.io import byte_streams
from finetune.data.io.byte_streams import (
    BrokenFileError,
    OnBroken,
    Record,
    lost_after,
    open_text,
    read_lines,
    until_broken,
)
from finetune.data.io.jsonl_csv import as_record, parse_json, read_json_lines, too_deep, too_many_values

CONTAINERS = ("data", "records", "samples", "examples", "annotations", "questions")
"""Keys under which an object holds the list of its records; the split's name is another."""

Scalar = str | int | float | bool | None


def read_json(path: Path, split: str) -> Iterator[Record]:
    """Yield the objects of a list, at the top or under `split` or a key of CONTAINERS; of lines; or the only object.

    Raises BrokenFileError.
    """
    if _holds_lines(path):
        yield from read_json_lines(path)
        return
    key = _find_list(path, (split, *CONTAINERS))
    if key is not None:
        for number, (_, value) in enumerate(_members(path, key, "[")):
            yield f"{path.name}#{number}", as_record(value)
        return
    with open_scan(path) as scan:
        yield f"{path.name}#0", as_record(scan.take())
        scan.end()


def _holds_lines(path: Path) -> bool:
    """Return whether one of the first two lines is an object by itself, which no line of one big object is."""
    with open_text(path) as file:
        if not file.read1(1024).lstrip().startswith(b"{"):
            return False
    with open_text(path) as file:
        lines = list(islice((line for line in read_lines(file) if isinstance(line, RecordError) or line.strip()), 2))
    return len(lines) == 2 and any(isinstance(line, bytes) and isinstance(parse_json(line), dict) for line in lines)


def _find_list(path: Path, keys: tuple[str, ...]) -> str | None:
    """Return where the list of records is: "" at the top, the key of the top object that holds it, or None."""
    with open_scan(path) as scan:
        opening = scan.peek()
        if opening == "{":
            for key in scan.members():
                if key in keys and scan.peek() == "[":
                    return key
                scan.skip()
        return "" if opening == "[" else None


def _members(path: Path, key: str, opening: str) -> Iterator[tuple[str | None, object]]:
    """Yield (key, value) of an object, (None, value) of a list, at the top (`key` is "") or under a key there."""
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


def read_items(path: Path, key: str, on_broken: OnBroken = "keep") -> Iterator[tuple[str, object | RecordError]]:
    """Yield (id, item) of the list under a key, or at the top for ""; the last item may be a BrokenFileError."""
    items = ((f"{path.name}#{number}", item) for number, (_, item) in enumerate(_members(path, key, "[")))
    return until_broken(path, items, on_broken)


def read_pairs(path: Path, key: str, on_broken: OnBroken = "keep") -> Iterator[tuple[str, str, object | RecordError]]:
    """Yield (id, key, value) of the object under a key, or at the top for ""; the last may be a BrokenFileError."""
    pairs = ((f"{path.name}/{name}", (name, value)) for name, value in _members(path, key, "{"))
    for record_id, pair in until_broken(path, pairs, on_broken):
        yield (record_id, "", pair) if isinstance(pair, RecordError) else (record_id, str(pair[0]), pair[1])


def read_header(path: Path, key: str) -> Scalar:
    """Return the scalar under a key of the top object, or None; what follows it in the file is not read."""
    try:
        with open_scan(path) as scan:
            for name in scan.members() if scan.peek() == "{" else ():
                if name == key and scan.peek() not in "[{":
                    value = scan.take()
                    return value if isinstance(value, Scalar) else None
                scan.skip()
    except BrokenFileError:
        pass  # the reader of the file's records reports what is wrong with it
    return None


def read_keys(path: Path) -> Iterator[str]:
    """Yield the keys of the top object, each before its value is read. Raises BrokenFileError."""
    with open_scan(path) as scan:
        for key in scan.members() if scan.peek() == "{" else ():
            yield str(key)
            scan.skip()


@contextmanager
def open_scan(path: Path) -> Iterator["Scan"]:
    """Open a JSON file to be scanned value by value. Raises BrokenFileError: not UTF-8."""
    with open_text(path) as file:
        yield Scan(path, file)


_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*+")
_WORD = re.compile(r'[^\s"\[\]{},:]++')
_STRING = re.compile(r'(?:[^"\\]++|\\.)*+', re.DOTALL)
"""The part of a string that is in the window, without its quotes."""
_FLAT = r'(?:[^"\[\]{}]++|"(?:[^"\\]++|\\.)*+")'
_NESTED = rf"(?:{_FLAT}|\[{_FLAT}*+\]|\{{{_FLAT}*+\}})"
_WITHIN = re.compile(rf"(?:{_NESTED}|\[{_NESTED}*+\]|\{{{_NESTED}*+\}})++", re.DOTALL)
"""Text inside brackets that is skipped at once: all but brackets three deep, and values that the window cuts."""
_NEAR_END = 16
"""A value that ends within this distance of the window's end may continue after it; the longest word is -Infinity."""


class Scan:
    """A window over a JSON file's text that moves on as it is read. A method that reads on raises BrokenFileError."""

    def __init__(self, path: Path, file: io.BufferedReader):
        self._path, self._file = path, file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at = "", 0
        """The window, and the position in it."""
        self._passed = 0
        """Bytes of the file before the window."""
        self._ended = False
        self._fault: BrokenFileError | UnicodeDecodeError | None = None
        """The error that follows the window."""

    def peek(self) -> str:
        """Return the first character of the next value, "" at the end of the file."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_on():
                return ""

    def members(self) -> Iterator[str | None]:
        """Go through the list or object that comes next: yield each member's key, None in a list.

        The member's value comes next then: `take` or `skip` it before asking for another member.
        """
        opening = self.peek()
        closing = {"[": "]", "{": "}"}[opening]
        self._at += 1
        if self.peek() == closing:
            self._at += 1
            return
        while True:
            yield self._key() if opening == "{" else None
            following = self.peek()
            if following not in (",", closing):
                raise self._broken(f"expected , or {closing}, got {following!r}")
            self._at += 1
            if following == closing:
                return

    def _key(self) -> str:
        key = self.take() if self.peek() == '"' else None
        if not isinstance(key, str) or self.peek() != ":":
            raise self._broken('expected "key": value')
        self._at += 1
        return key

    def take(self) -> object | RecordError:
        """Return the whole next value; a RecordError where it is larger or deeper than a record may be."""
        self.peek()
        while True:
            if (fault := too_many_values(self._text, self._at)) is not None:
                self.skip()
                return fault
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                if self._text[end - 1] in '}]"' or end + _NEAR_END < len(self._text) or not self._read_on():
                    size, deep = end - self._at, too_deep(value, self._text, self._at, end)
                    self._at = end
                    return _too_large(size) if size > byte_streams.MAX_RECORD_BYTES else deep or value
            except json.JSONDecodeError as error:
                cut = error.pos + _NEAR_END >= len(self._text) or error.msg.startswith("Unterminated")
                if not (cut and self._read_on()):
                    raise self._broken(error.msg, at=error.pos) from error
            except (ValueError, RecursionError) as error:  # a number of over 4,300 digits; a thousand brackets
                self.skip()
                return RecordError("not JSON", str(error))
            if len(self._text) - self._at > byte_streams.MAX_RECORD_BYTES:
                start = self._passed
                self.skip()
                return _too_large(self._passed + self._at - start)

    def skip(self) -> None:
        """Pass over the next value, of any size; only its brackets and quotes are read."""
        depth = 0
        while True:
            sign = self.peek()
            if not sign:
                raise self._broken("the file ends within a value")
            if depth == 0 and sign in "]},:":
                raise self._broken("expected a value")
            if sign == '"':
                self._skip_string()
            elif sign in "[]{},:":
                depth += (sign in "[{") - (sign in "]}")
                self._at += 1
            else:
                self._pass_over(_WORD)
            if depth <= 0:
                return
            if within := _WITHIN.match(self._text, self._at):
                self._at = within.end()

    def _skip_string(self) -> None:
        self._at += 1
        self._pass_over(_STRING)
        while self._text[self._at : self._at + 1] != '"':
            if not self._read_on():
                raise self._broken("the file ends within a string")
            self._pass_over(_STRING)
        self._at += 1

    def _pass_over(self, pattern: re.Pattern[str]) -> None:
        """Move on as long as the text matches a pattern."""
        while found := pattern.match(self._text, self._at):
            moved, self._at = found.end() > self._at, found.end()
            if not (moved and self._at == len(self._text) and self._read_on()):
                return

    def end(self) -> None:
        """Raises BrokenFileError: text follows after the value at the top."""
        if self.peek():
            raise self._broken("something follows after the end of the JSON")

    def _read_on(self) -> bool:
        """Extend the window, and cut off what was read; return False at the end of the file."""
        if self._fault:
            raise self._following_error()
        unread = len(self._text) - self._at
        wanted = max(2**16, min(unread, byte_streams.MAX_RECORD_BYTES - unread))
        pieces: list[bytes] = []
        while wanted > 0 and not self._ended:
            try:
                pieces.append(self._file.read1(wanted))
            except BrokenFileError as error:
                self._fault = error
                break
            self._ended = not pieces[-1]
            wanted -= len(pieces[-1])
        try:
            more = self._decoder.decode(b"".join(pieces), final=self._ended)
        except UnicodeDecodeError as error:
            more, self._fault = error.object[: error.start].decode(), error
        if not more and self._fault:
            raise self._following_error()
        if more:
            self._passed += _bytes_of(self._text[: self._at])
            self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)

    def _following_error(self) -> BrokenFileError:
        if isinstance(self._fault, UnicodeDecodeError):
            return self._broken(self._fault.reason, reason="not UTF-8", at=len(self._text))
        assert self._fault
        return self._fault

    def _broken(self, detail: str, *, reason: str = "not JSON", at: int | None = None) -> BrokenFileError:
        """Return the error at a position of the window, with how much of the file follows the last whole value."""
        position = self._at if at is None else at
        detail = f"{detail} at byte {self._passed + _bytes_of(self._text[:position]):,}"
        if self._path.suffix.lower() in byte_streams.COMPRESSIONS:
            return BrokenFileError(reason, f"{detail} of the unpacked text")
        size, good = self._path.stat().st_size, self._passed + _bytes_of(self._text[: self._at])
        cut = self._ended and (detail.startswith("Unterminated") or not self._text[position:].strip())
        return BrokenFileError(reason, detail, lost_after(size if cut else good, size))


def _bytes_of(text: str) -> int:
    """Return how many bytes a text takes in its file."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _too_large(size: int) -> RecordError:
    return RecordError("record too large", f"about {size:,} bytes, over {byte_streams.MAX_RECORD_BYTES:,}")
