"""How commands speak to people: progress and notes on standard error, results on standard output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

console = Console(stderr=True)
"""Progress, notes, errors."""
out = Console()
"""Results: what a script may want to read."""


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress display for long work; plain lines where there is no terminal."""
    with Progress(
        SpinnerColumn(),
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=not console.is_terminal,
    ) as bar:
        yield bar


def say(message: str) -> None:
    """One line to the person watching."""
    console.print(message, highlight=False)
