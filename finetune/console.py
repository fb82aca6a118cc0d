"""What is printed: results on stdout; messages, progress bars and errors on stderr.

Text from data, names and models passes `visible` here, whichever way it comes, and markup in it is text.
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Table
from rich.text import Span, Text

from modeling.errors import UserError

MINUTE = 60.0
"""Seconds between two progress lines of the same task in a log file."""


class _Console(Console):
    """A console that makes all text visible and parses no markup in it."""

    def __init__(self, *, stderr: bool):
        quiet = os.environ.get("RANK", "0") != "0"  # of several processes, the first one prints
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False, quiet=quiet)

    def render_str(self, text: str, **options: Any) -> Text:
        """Render a plain string: a cell, a title, a line."""
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render any part of what is printed."""
        return super().render(_visible_text(renderable) if isinstance(renderable, Text) else renderable, options)


console, results = _Console(stderr=True), _Console(stderr=False)


# Messages and results


def log(message: str) -> None:
    """Print a message on stderr; its lines are not wrapped."""
    console.print(message, soft_wrap=True)


def log_error(message: str) -> None:
    """Print why the command ends, in whichever process this is."""
    console.quiet = False
    console.print(Text(visible(message), style="red"), soft_wrap=True)


def display(what: RenderableType, style: str = "") -> None:
    """Print a result on stdout: text, a table, a panel."""
    results.print(Text(visible(what), style) if isinstance(what, str) else what, soft_wrap=isinstance(what, str))


def print_text(text: str) -> None:
    """Print a result on stdout unchanged, except for invisible characters and those that stdout cannot encode."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(visible(text).encode(encoding, "backslashreplace").decode(encoding) + "\n")
    sys.stdout.flush()


def print_json(result: Any) -> None:
    """Print a result on stdout as JSON."""
    print_text(to_json(result, indent=2))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Return a table with its first column to the left and the others to the right; None is shown as n/a."""

    def cell(value: object) -> str:
        if value is None:
            return "n/a"
        if isinstance(value, bool) or not isinstance(value, int | float):
            return str(value)
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"

    built = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        built.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        built.add_row(*map(cell, row))
    return built


def panel(body: RenderableType, *, title: str, subtitle: str = "") -> Panel:
    """Return a frame with its titles on the left, as Text: rich parses markup in a title that is a string."""
    above, below = Text(visible(title)), Text(visible(subtitle))
    return Panel(body, title=above, subtitle=below if subtitle else None, title_align="left", subtitle_align="left")


# Progress


Track = Callable[[Iterable[Any], str], Iterable[Any]]
"""(items, description) -> the items, their progress shown as they are taken: `track`, or `silently`."""


def silently(items: Iterable[Any], description: str) -> Iterable[Any]:
    return items


def track(items: Iterable[Any], description: str, *, total: int | None = None) -> Iterable[Any]:
    """Iterate over items with a progress bar; `total` is taken from a sequence's length where it is not given."""
    with bar() as progress:
        if total is None and isinstance(items, Sequence):
            total = len(items)
        task = progress.add_task(description.replace("\n", " "), total=total, note="")
        for item in items:
            yield item
            progress.advance(task)


def bar() -> Progress:
    """Return rich's progress bars on a terminal, and progress lines where stderr is a file."""
    if not console.is_terminal:
        return _Lines(console=console, disable=True, get_time=time.monotonic)
    columns = (
        _VisibleColumn("{task.description:32.32}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        _VisibleColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=console.quiet)


class _VisibleColumn(TextColumn):
    """A text column of visible characters: its width is measured on what is shown."""

    def render(self, task: Task) -> Text:
        """Render the text of a task."""
        return _visible_text(super().render(task))


class _Lines(Progress):
    """Progress without a terminal: each task logs a line a minute and one at the end. Nothing is drawn."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._due = time.monotonic() + MINUTE

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Count one more item of a task."""
        super().advance(task_id, advance)
        self._log_if_due()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Set the fields of a task."""
        super().update(task_id, **changes)
        self._log_if_due()

    def stop(self) -> None:
        """Log how far each task has come."""
        self._log_tasks()
        super().stop()

    def _log_if_due(self) -> None:
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + MINUTE
            self._log_tasks()

    def _log_tasks(self) -> None:
        for task in self.tasks:
            done = f"{task.completed:,.0f}" + ("" if task.total is None else f"/{task.total:,.0f}")
            elapsed = timedelta(seconds=int(task.elapsed or 0))
            log(" ".join(filter(None, (task.description, done, task.fields["note"], str(elapsed)))))


# Text that is safe to show


def visible(value: Any) -> Any:
    r"""Return a value with all its text safe to show: control, bidi and other invisible characters are spelt out.

    Newlines, tabs and the joiners of emoji stay.

    >>> visible("\x1b[2Jaé\u202e\n")
    '␛[2Jaé[U+202E]\n'
    """
    if isinstance(value, str):
        return value.translate(_SPELT_OUT)
    if isinstance(value, dict):
        return {visible(key): visible(item) for key, item in value.items()}
    return [visible(item) for item in value] if isinstance(value, list | tuple) else value


def to_json(value: Any, *, indent: int | None = None) -> str:
    r"""Return strict JSON that no terminal obeys: invisible characters as \uXXXX, NaN and infinity as null.

    >>> to_json({"loss": float("nan"), "name": "\u202e"})
    '{"loss": null, "name": "\\u202e"}'
    """

    def finite(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        return [finite(item) for item in value] if isinstance(value, list | tuple) else value

    text = json.dumps(finite(value), ensure_ascii=False, allow_nan=False, indent=indent)
    return _INVISIBLE.sub(lambda found: json.dumps(found[0])[1:-1], text)


def _visible_text(text: Text) -> Text:
    """Return a rich text in visible characters, its styles on the same characters as before."""
    if visible(text.plain) == text.plain:
        return text
    pieces, starts = [visible(character) for character in text.plain], [0]
    for piece in pieces:
        starts.append(starts[-1] + len(piece))
    shown = text.blank_copy("".join(pieces))
    shown.spans = [Span(starts[span.start], starts[min(span.end, len(pieces))], span.style) for span in text.spans]
    return shown


_SURROGATES = range(0xD800, 0xE000)
_INVISIBLE_CODES = (
    *range(0x7F, 0xA0),
    *(0xAD, 0x34F, 0x61C, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180E, 0x200B, 0x200E, 0x200F),
    *range(0x2028, 0x202F),
    *range(0x2060, 0x2070),
    *(0x3164, 0xFEFF, 0xFFA0),
    *range(0xFDD0, 0xFDF0),
    *range(0xFFF9, 0xFFFC),
    *(0xFFFE, 0xFFFF),
    *range(0x1D173, 0x1D17B),
    *range(0xE0000, 0xE0080),
)
"""Characters that have no width, change the direction of writing, or control a terminal; those below U+0020 are added
below."""

_SPELT_OUT = {
    **{code: f"[U+{code:04X}]" for code in _INVISIBLE_CODES},
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"},
    **dict.fromkeys(_SURROGATES, "\N{REPLACEMENT CHARACTER}"),
    0x7F: "\N{SYMBOL FOR DELETE}",
}

_INVISIBLE = re.compile(f"[{''.join(map(chr, (*_INVISIBLE_CODES, *_SURROGATES)))}]")


# Sizes of memory and disk

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(option: str, text: str) -> int:
    """Return a size in bytes. Raises UserError, which names the option.

    >>> parse_size("--gpu", "24GiB")
    25769803776
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)", text.strip())
    size = float(match[1]) * UNITS.get(match[2].upper(), 0) if match else 0.0
    if not 1 <= size < 2**63:
        raise UserError(f"{option}: expected a size with its unit, such as 5GB or 24GiB, got {text!r:.80}")
    return int(size)


def show_size(nbytes: int) -> str:
    """Return a size as text, in GiB from one GiB on, else in MiB.

    >>> show_size(3 * 2**29)
    '1.50 GiB'
    """
    return f"{nbytes / 2**30:,.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:,.1f} MiB"
