"""``reelway erase``: removes viewers from every store of a service."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path

import typer
from rich.markup import escape
from rich.table import Table

from reelway.platform.cli.rollout.location import open_run
from reelway.platform.cli.terminal import print_status, stdout_console
from reelway.platform.contracts.ids import MAX_ID
from reelway.platform.erasure.request import ErasedStore, ErasureRequest, ErasureState
from reelway.platform.errors import ConfigError
from reelway.platform.viewer_pseudonyms import use_secret_of_run, viewer_pseudonym

ENTRY_POINT_GROUP = "reelway.erasers"
_MEMBERS = ("platform", "pipelines", "serving")


def register(app: typer.Typer) -> None:
    """Adds ``reelway erase``."""
    app.command()(erase)


def erase(
    viewer: list[int] = typer.Option(
        ..., min=0, max=MAX_ID, help="Id of a viewer to erase, as in requests; repeat the option for more viewers."
    ),
    run: Path = typer.Option(Path("runs/default"), "--run", help="Run directory of the service."),
    events: str = typer.Option(
        "", "--events", help="Event log: a folder or kafka://host:port\\[/prefix]. Defaults to RUN/events."
    ),
    vector_log: str = typer.Option(
        "", "--vector-log", help="Parity log: a file, folder or URL. Defaults to RUN/serving/vectors.jsonl."
    ),
    outcomes: Path | None = typer.Option(
        None, "--outcomes", help="File of the outcome collector. Defaults to RUN/serving/outcomes.db."
    ),
    state: Path | None = typer.Option(
        None, "--state", help="Folder of the stream's state. Defaults to RUN/stream."
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="Report what would be removed, and remove nothing."),
    yes: bool = typer.Option(False, "--yes", "-y", help="Erase without a question."),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:  # fmt: skip
    """Remove viewers from the event log, the online store, the collector, the stream, the parity logs and data sets.

    The report shows hashed ids. A second run finds nothing; after an interruption, run the command again. A store that
    a running process holds is erased by that process when it reads the event log; the report says so. Models and
    releases contain no rows of viewers; the next training leaves the erased viewers out.

    \b
    Examples:
      reelway erase --viewer 4711 --run runs/demo --dry-run
      reelway erase --viewer 4711 --run /data/run --events kafka://kafka:9092 --vector-log s3://logs/parity --yes
    """
    directory = open_run(run)
    use_secret_of_run(directory.keys)
    request = ErasureRequest(directory, tuple(sorted(set(viewer))), dry_run, events, vector_log, outcomes, state)
    names = ", ".join(viewer_pseudonym(one) for one in request.viewer_ids)
    if not dry_run and not yes:
        _confirm(names, str(directory.path))
    erased = []
    for store in _erase(request):
        erased.append(store)
        print_status(escape(_line(store)))
    if as_json:
        stdout_console.print_json(json.dumps(_report(request, erased)))
    else:
        stdout_console.print(_table(names, erased))
    if any(store.state is ErasureState.PENDING for store in erased):
        print_status("erase: pending stores are erased by the processes that hold them; if they do not run, repeat it")


def _confirm(names: str, run: str) -> None:
    if not sys.stdin.isatty():
        raise ConfigError(
            "erase: standard input is not a terminal, so the confirmation cannot be asked; pass --yes to erase, or "
            "--dry-run to report only"
        )
    typer.confirm(f"Remove {names} from all stores of {run} for good?", abort=True)


def _erase(request: ErasureRequest) -> Iterator[ErasedStore]:
    """Calls the erasers of all installed members, the platform's first: its event log informs running processes."""
    registered = {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
    for name in (*_MEMBERS, *sorted(set(registered) - set(_MEMBERS))):
        if name in registered:
            yield from registered[name].load()(request)
        else:
            print_status(f"erase: reelway-{name} is not installed; its stores are not looked at")


def _line(store: ErasedStore) -> str:
    note = f" ({store.note})" if store.note else ""
    return f"erase: {store.store}: found {store.found}, removed {store.removed}, {store.state}{note}"


def _report(request: ErasureRequest, erased: Sequence[ErasedStore]) -> dict[str, object]:
    return {
        "viewers": [viewer_pseudonym(one) for one in request.viewer_ids],
        "dry_run": request.dry_run,
        "found": sum(store.found for store in erased),
        "removed": sum(store.removed for store in erased),
        "stores": [{name: getattr(store, name) for name in store.__dataclass_fields__} for store in erased],
    }


def _table(names: str, erased: Sequence[ErasedStore]) -> Table:
    table = Table(title=f"erasure of {names}", title_justify="left")
    for column in ("store", "found", "removed", "state"):
        table.add_column(column, justify="right" if column in ("found", "removed") else "left")
    for store in erased:
        read = store.state is not ErasureState.PENDING
        table.add_row(store.store, *(str(n) if read else "-" for n in (store.found, store.removed)), store.state)
    return table
