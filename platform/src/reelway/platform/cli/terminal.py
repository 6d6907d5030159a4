"""Terminal output of the commands: progress and notes on standard error, results on standard output."""

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

stderr_console = Console(stderr=True)
"""Standard error: progress, notes and errors."""
stdout_console = Console()
"""Standard output: results, which scripts can read."""


@contextmanager
def progress() -> Iterator[Progress]:
    """Shows a progress display for long work; plain lines without a terminal."""
    with Progress(
        SpinnerColumn(),
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=stderr_console,
        transient=not stderr_console.is_terminal,
    ) as bar:
        yield bar


def print_status(message: str) -> None:
    """Prints one line on standard error."""
    stderr_console.print(message, highlight=False)
