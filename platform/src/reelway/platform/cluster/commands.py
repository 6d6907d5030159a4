"""Placeholder until the commands are written."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add nothing yet."""
    del app
