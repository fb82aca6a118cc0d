"""A JSON file, value by value: each as Python's json reads it, any size of file in bounded memory."""

import codecs
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.data.conversation import RecordError
from finetune.data.io import streams
from finetune.data.io.streams import BrokenFileError, lost_after, open_text

MAX_DEPTH = 100
"""Of lists and objects in each other; no dataset comes near it, and Python fails at about a thousand."""

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*+")
_NAME = re.compile(r'[^\s"\[\]{},:]++')
_STRING = re.compile(r'(?:[^"\\]++|\\.)*+', re.DOTALL)
"""Of a string, what is there of it without its quotes."""
_FLAT = r'(?:[^"\[\]{}]++|"(?:[^"\\]++|\\.)*+")'
_NESTED = rf"(?:{_FLAT}|\[{_FLAT}*+\]|\{{{_FLAT}*+\}})"
_WITHIN = re.compile(rf"(?:{_NESTED}|\[{_NESTED}*+\]|\{{{_NESTED}*+\}})++", re.DOTALL)
"""What can be passed over inside of brackets at once: all but brackets three deep, and what the window cuts."""
_AT_THE_END = 16
"""An error so near to the window's end may be one of a value that goes on; the longest word is -Infinity."""


class Scan:
    """A window of a JSON file's text, moved on as it is read. Each method that reads on raises BrokenFileError."""

    def __init__(self, path: Path, file: io.BufferedReader):
        self._path, self._file = path, file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at = "", 0
        self._passed = 0
        """Bytes before the window."""
        self._ended = False
        self._fault: BrokenFileError | UnicodeDecodeError | None = None
        """What comes after the window."""

    def peek(self) -> str:
        """The first character of what comes next, "" at the end of the file."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_on():
                return ""

    def members(self) -> Iterator[str | None]:
        """Go through the list or object that comes next: for each member its key, None in a list.

        The value comes next then: `take` it or `skip` it before asking for another.
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
        """The whole value that comes next; a RecordError where it is larger or deeper than a record may be."""
        self.peek()
        while True:
            if (fault := too_many_values(self._text, self._at)) is not None:
                self.skip()
                return fault
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                if self._text[end - 1] in '}]"' or end + _AT_THE_END < len(self._text) or not self._read_on():
                    size, deep = end - self._at, is_deep(value, self._text, self._at, end)
                    self._at = end
                    return _too_large(size) if size > streams.MAX_RECORD_BYTES else deep or value
            except json.JSONDecodeError as error:
                cut = error.pos + _AT_THE_END >= len(self._text) or error.msg.startswith("Unterminated")
                if not (cut and self._read_on()):
                    raise self._broken(error.msg, at=error.pos) from error
            except (ValueError, RecursionError) as error:  # a number of over 4,300 digits; a thousand brackets
                self.skip()
                return RecordError("not JSON", str(error))
            if len(self._text) - self._at > streams.MAX_RECORD_BYTES:
                start = self._passed
                self.skip()
                return _too_large(self._passed + self._at - start)

    def skip(self) -> None:
        """Pass over the value that comes next, of any size; of its text only brackets and quotes are looked at."""
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
                self._pass_over(_NAME)
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
        """Move on as long as the pattern goes on."""
        while found := pattern.match(self._text, self._at):
            moved, self._at = found.end() > self._at, found.end()
            if not (moved and self._at == len(self._text) and self._read_on()):
                return

    def end(self) -> None:
        if self.peek():
            raise self._broken("something follows after the end of the JSON")

    def _read_on(self) -> bool:
        """Make the window longer, and let it begin at the next value; False at the end of the file."""
        if self._fault:
            raise self._what_comes()
        held = len(self._text) - self._at
        wanted = max(2**16, min(held, streams.MAX_RECORD_BYTES - held))
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
            raise self._what_comes()
        if more:
            self._passed += _size(self._text[: self._at])
            self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)

    def _what_comes(self) -> BrokenFileError:
        if isinstance(self._fault, UnicodeDecodeError):
            return self._broken(self._fault.reason, reason="not UTF-8", at=len(self._text))
        assert self._fault
        return self._fault

    def _broken(self, detail: str, *, reason: str = "not JSON", at: int | None = None) -> BrokenFileError:
        """What is wrong, at a place in the window, and how much of the file comes after the last whole value."""
        place = self._at if at is None else at
        detail = f"{detail} at byte {self._passed + _size(self._text[:place]):,}"
        if self._path.suffix.lower() in streams.COMPRESSIONS:
            return BrokenFileError(reason, f"{detail} of the unpacked text")
        size, good = self._path.stat().st_size, self._passed + _size(self._text[: self._at])
        cut = self._ended and (detail.startswith("Unterminated") or not self._text[place:].strip())
        return BrokenFileError(reason, detail, lost_after(size if cut else good, size))


def _size(text: str) -> int:
    """Bytes of a text in its file."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _too_large(size: int) -> RecordError:
    return RecordError("record too large", f"about {size:,} bytes, over {streams.MAX_RECORD_BYTES:,}")


def too_many_values(text: str, at: int = 0) -> RecordError | None:
    """Whether the value that begins at a place holds more values than a record may: known before any is made."""
    most = streams.MAX_VALUES
    if len(text) - at <= most or sum(text.count(sign, at) for sign in ",[{") <= most:
        return None
    count = depth = 0
    while count <= most:
        found = _TO_SIGN.match(text, at)
        if not found:
            return None
        at = found.end()
        sign = text[at - 1]
        depth += (sign in "[{") - (sign in "]}")
        count += sign in ",[{"
        if depth <= 0:
            return None
    return RecordError("record too large", f"over {most:,} values")


_TO_SIGN = re.compile(r'(?:[^",\[\]{}]++|"(?:[^"\\]++|\\.)*+")*+[,\[\]{}]', re.DOTALL)


def is_deep(value: object, text: str, start: int, end: int) -> RecordError | None:
    """Whether lists and objects stand in each other over `MAX_DEPTH` deep, in a value and where it is written."""
    if text.count("[", start, end) + text.count("{", start, end) <= MAX_DEPTH:
        return None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _children(outer)]
    deep = any(isinstance(inner, dict | list) for inner in level)
    return RecordError("not JSON", f"nested over {MAX_DEPTH} deep") if deep else None


def _children(value: object) -> list[object]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


@contextmanager
def open_scan(path: Path) -> Iterator[Scan]:
    with open_text(path) as file:
        yield Scan(path, file)
