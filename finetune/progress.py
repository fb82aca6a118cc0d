"""What a person watches while work goes on: bars and tables on the terminal, results on stdout left clean."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

console = Console(stderr=True, highlight=False, quiet=os.environ.get("RANK", "0") != "0")
"""Of several processes, the first one speaks."""


def bar() -> Progress:
    columns = (
        TextColumn("{task.description:32.32}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=console.quiet)


def track(items: Iterable[Any], description: str) -> Iterable[Any]:
    """Iterate with a bar; of a length where the items have one."""
    with bar() as progress:
        total = len(items) if isinstance(items, Sequence) else None
        task = progress.add_task(description, total=total, note="")
        for item in items:
            yield item
            progress.advance(task)


def say(message: str) -> None:
    """Plain text: brackets in a file's name are no markup."""
    console.print(message, markup=False)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """First column left, the others right; None shows as n/a."""
    made = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        made.add_row(*[_cell(value) for value in row])
    return made


def _cell(value: object) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
