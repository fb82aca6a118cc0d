"""What a person watches while work goes on: bars and tables on the terminal, results on stdout left clean.

Of several processes, which launchers number in RANK, the first one talks.
"""

import os
import time
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

RANK = os.environ.get("RANK", "0")

FIRST_WORD = 5.0
"""Seconds for which a process that ends by a mistake leaves the word to the first one, whose mistake it mostly is, too:
once that one has told it, the launcher ends all."""


def talks() -> bool:
    """Whether this is the process that people and scripts hear."""
    return RANK == "0"


console = Console(stderr=True, highlight=False, quiet=not talks())


def bar() -> Progress:
    columns = (
        TextColumn("{task.description:32.32}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not talks())


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


def tell_mistake(message: str) -> None:
    """In red, whichever process it is: a mistake that one meets alone would not be heard of otherwise."""
    if talks():
        console.print(Text(message, style="red"))
    else:
        time.sleep(FIRST_WORD)
        Console(stderr=True, highlight=False).print(Text(f"process {RANK}: {message}", style="red"))


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
