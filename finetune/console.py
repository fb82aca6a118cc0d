"""All that is printed: results on stdout; messages, bars and errors on stderr.

Text from data, names and models passes `visible` here, whichever way it comes, and markup in it is text.
"""

import os
import sys
import time
from collections.abc import Iterable, Sequence
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

from finetune.visible import to_json, visible

MINUTE = 60.0
"""Seconds between two lines about the same work in a log."""


class _Console(Console):
    """A console that shows what data says, and obeys none of it."""

    def __init__(self, *, stderr: bool):
        quiet = os.environ.get("RANK", "0") != "0"  # of several processes, the first one speaks
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False, quiet=quiet)

    def render_str(self, text: str, **options: Any) -> Text:
        """The text of a cell, a title or a line."""
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """A part of anything that is printed."""
        return super().render(_seen(renderable) if isinstance(renderable, Text) else renderable, options)


console, results = _Console(stderr=True), _Console(stderr=False)


def _seen(text: Text) -> Text:
    """The same in visible characters, with its styles where they were."""
    if visible(text.plain) == text.plain:
        return text
    pieces, places = [visible(character) for character in text.plain], [0]
    for piece in pieces:
        places.append(places[-1] + len(piece))
    seen = text.blank_copy("".join(pieces))
    seen.spans = [Span(places[span.start], places[min(span.end, len(pieces))], span.style) for span in text.spans]
    return seen


def say(message: str) -> None:
    """A message in plain text on stderr; its lines are not broken."""
    console.print(message, soft_wrap=True)


def complain(message: str) -> None:
    """Say why all ends, whichever process this is."""
    console.quiet = False
    console.print(Text(visible(message), style="red"), soft_wrap=True)


def display(what: RenderableType, style: str = "") -> None:
    """A result on stdout: text, a table, a panel."""
    results.print(Text(visible(what), style) if isinstance(what, str) else what, soft_wrap=isinstance(what, str))


def write(text: str) -> None:
    """A result on stdout as it is, but for characters that cannot be seen, or that stdout's encoding does not have."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(visible(text).encode(encoding, "backslashreplace").decode(encoding) + "\n")
    sys.stdout.flush()


def write_figures(figures: Any) -> None:
    """A result on stdout as JSON."""
    write(to_json(figures, indent=2))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """First column left, the others right; None shows as n/a."""
    made = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        made.add_row(*[_cell(value) for value in row])
    return made


def panel(body: RenderableType, *, title: str, subtitle: str = "") -> Panel:
    """A frame with its title on the left; rich would parse markup in a title that is no Text."""
    above, below = Text(visible(title)), Text(visible(subtitle))
    return Panel(body, title=above, subtitle=below if subtitle else None, title_align="left", subtitle_align="left")


def _cell(value: object) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def bar() -> Progress:
    """Bars on a terminal, lines in a log."""
    if not console.is_terminal:
        return _Lines(console=console, disable=True, get_time=time.monotonic)
    columns = (
        _Words("{task.description:32.32}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        _Words("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=console.quiet)


class _Words(TextColumn):
    """A column whose width is that of what is shown."""

    def render(self, task: Task) -> Text:
        """The text of a task."""
        return _seen(super().render(task))


class _Lines(Progress):
    """Progress without a terminal: a line a minute for each task, and one in the end. Nothing is drawn."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._due = time.monotonic() + MINUTE

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """One more is done."""
        super().advance(task_id, advance)
        self._say_if_due()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """So many are done."""
        super().update(task_id, **changes)
        self._say_if_due()

    def stop(self) -> None:
        """Say how far each task has come."""
        for task in self.tasks:
            self._say(task)
        super().stop()

    def _say_if_due(self) -> None:
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + MINUTE
            for task in self.tasks:
                self._say(task)

    def _say(self, task: Task) -> None:
        total = "" if task.total is None else f"/{task.total:,.0f}"
        elapsed = timedelta(seconds=int(task.elapsed or 0))
        say(
            " ".join(
                filter(None, (task.description, f"{task.completed:,.0f}{total}", task.fields["note"], str(elapsed)))
            )
        )


def track(items: Iterable[Any], description: str, *, total: int | None = None) -> Iterable[Any]:
    """Iterate with a bar; of `total` items, or as many as there are where they have a length."""
    with bar() as progress:
        if total is None and isinstance(items, Sequence):
            total = len(items)
        task = progress.add_task(description.replace("\n", " "), total=total, note="")
        for item in items:
            yield item
            progress.advance(task)
