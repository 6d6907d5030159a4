"""Progress output of the demo: numbered headings, the commands of each step, and a table of durations."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.rule import Rule
from rich.table import Table

from reelway.platform.cli.terminal import stderr_console, stdout_console


class DemoProgress:
    """Numbers the steps of a demo and measures their durations."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._began = time.monotonic()
        self._steps: list[tuple[str, float]] = []

    def step(self, title: str, *commands: Sequence[str]) -> None:
        """Ends the current step and starts the next one."""
        self._steps.append((title, time.monotonic()))
        stderr_console.print(Rule(f"[bold]{len(self._steps)}/{self._total} {title}", align="left"))
        for command in commands:
            stderr_console.print(f"$ reelway {' '.join(command)}", highlight=False, markup=False, soft_wrap=True)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start of the demo."""
        return time.monotonic() - self._began

    def show_times(self) -> None:
        """Prints the seconds per step."""
        ends = [*(began for _, began in self._steps[1:]), time.monotonic()]
        table = Table(title="durations", title_justify="left", box=None, pad_edge=False)
        table.add_column("step")
        table.add_column("s", justify="right")
        for (title, began), end in zip(self._steps, ends, strict=True):
            table.add_row(title, f"{end - began:.0f}")
        table.add_row("total", f"{self.elapsed_s:.0f}", style="bold")
        stdout_console.print(table)
