"""``reelway catalogue upsert|takedown|restore|status|serve``: what may be shown, changed within seconds.

A change is durable in the event log when its command ends. The newest version of a video or creator wins, in whatever
order the changes arrive, so every command may be repeated.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape

from reelway.platform.cli.terminal import print_status, stderr_console, stdout_console
from reelway.platform.errors import DataError

if TYPE_CHECKING:
    from reelway.platform.cli.catalogue.catalogue_files import RefusedChange
    from reelway.platform.eventlog.catalogue_events import Restore, Takedown

RUN = typer.Option(Path("runs/default"), "--run", help="Run directory.")
EVENTS = typer.Option(
    "", "--events", help="Event log: a folder, kafka://host:port or kafka://host:port/prefix. Defaults to RUN/events."
)
URL = typer.Option("", "--url", help="URL of the catalogue's HTTP API. By default changes go to the event log itself.")
TOKEN_FILE = typer.Option(
    None, "--token-file", help="File with the API's bearer token. Defaults to RUN/keys/catalogue.token."
)
VIDEO = typer.Option(None, "--video", min=0, help="Id of a video; repeat the option for several.")
CREATOR = typer.Option(None, "--creator", min=0, help="Id of a creator; repeat the option for several.")
VERSION = typer.Option(
    None, min=0, help="Version of the change; newer versions win. Defaults to the present time in microseconds."
)


def register(app: typer.Typer) -> None:
    """Adds ``reelway catalogue``."""
    group = typer.Typer(no_args_is_help=True)
    group.command()(upsert)
    group.command()(takedown)
    group.command()(restore)
    group.command()(status)
    group.command()(serve)
    app.add_typer(group, name="catalogue", help="Upload, update, take down and restore videos.")


def upsert(
    file: str = typer.Argument(..., help="File of videos, JSON lines or Parquet (*.parquet); '-' reads JSON lines."),
    run: Path = RUN,
    events: str = EVENTS,
    url: str = URL,
    token_file: Path | None = TOKEN_FILE,
    rejected: Path | None = typer.Option(
        None, help="File to write rejected lines to, as JSON lines with the problem. By default they are only printed."
    ),
) -> None:
    """Upload or update videos.

    A line has the columns of the data set's videos: video_id, creator_id, uploaded_at, duration_ms, topic, language,
    title, the content vectors visual, audio and text, and optionally version. Lines that are invalid are printed with
    their number and the problem; all others are uploaded. The exit code is 3 if a line was rejected.

    \b
    Examples:
      reelway catalogue upsert --run runs/demo uploads.jsonl
      export-uploads | reelway catalogue upsert --url http://catalogue:8085 --token-file token -
    """
    from reelway.platform.cli.catalogue.catalogue_files import check_changes, read_parquet_upserts, read_upserts
    from reelway.platform.cli.catalogue.catalogue_target import open_target, run_dimensions

    lines = read_parquet_upserts(Path(file)) if file.endswith(".parquet") else read_upserts(_read_lines(file))
    numbered: list[tuple[int, Any]] = list(lines)
    checked = check_changes(numbered, run_dimensions(run))
    bad_lines = {refused.line for refused in checked.refused}
    good_lines = [(number, value) for number, value in numbered if number not in bad_lines]
    with open_target(run, events, url, token_file) as target:
        by_service = target.publish(checked.accepted)
    refused = [
        *checked.refused,
        *(
            change.model_copy(update={"line": good_lines[change.line][0], "input": good_lines[change.line][1]})
            for change in by_service
        ),
    ]
    print_status(f"catalogue: {len(checked.accepted) - len(by_service)} videos uploaded")
    if refused:
        _report_refused(sorted(refused, key=lambda change: change.line), rejected)
        raise DataError(f"{file}: {len(refused)} of {len(numbered)} lines were rejected; correct and upload them again")


def takedown(
    video: list[int] | None = VIDEO,
    creator: list[int] | None = CREATOR,
    reason: str = typer.Option(..., help="Why the video or creator is taken down; it is stored with the takedown."),
    version: int | None = VERSION,
    run: Path = RUN,
    events: str = EVENTS,
    url: str = URL,
    token_file: Path | None = TOKEN_FILE,
) -> None:
    """Take down videos, or all videos of creators, in every release.

    \b
    Example:
      reelway catalogue takedown --run runs/demo --video 123 --reason "court order"
    """
    from reelway.platform.eventlog.catalogue_events import Takedown

    _change_status(Takedown, video, creator, reason, version, (run, events, url, token_file))


def restore(
    video: list[int] | None = VIDEO,
    creator: list[int] | None = CREATOR,
    reason: str = typer.Option("", help="Why the takedown is taken back."),
    version: int | None = VERSION,
    run: Path = RUN,
    events: str = EVENTS,
    url: str = URL,
    token_file: Path | None = TOKEN_FILE,
) -> None:
    """Take back takedowns. A video stays hidden while its creator is taken down.

    \b
    Example:
      reelway catalogue restore --run runs/demo --creator 7
    """
    from reelway.platform.eventlog.catalogue_events import Restore

    _change_status(Restore, video, creator, reason, version, (run, events, url, token_file))


def status(
    run: Path = RUN,
    events: str = EVENTS,
    url: str = URL,
    token_file: Path | None = TOKEN_FILE,
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
) -> None:
    """Print the takedowns in effect and the number of records in the catalogue's topics."""
    from rich.table import Table

    from reelway.platform.cli.catalogue.catalogue_target import open_target

    with open_target(run, events, url, token_file) as target:
        found = target.status()
    if as_json:
        typer.echo(found.model_dump_json(indent=2, exclude_none=True))
        return
    table = Table(title=f"{len(found.takedowns)} takedowns", title_justify="left")
    for column in ("what", "version", "reason"):
        table.add_column(column)
    for change in found.takedowns:
        table.add_row(change.key, str(change.version), escape(change.reason))
    stdout_console.print(table)
    print_status(f"end of the log: catalogue {found.catalogue_end}, takedowns {found.takedowns_end}")


def serve(
    run: Path = RUN,
    events: str = EVENTS,
    token_file: Path | None = typer.Option(
        None,
        help="File with the bearer token that clients must send. Defaults to RUN/keys/catalogue.token, which is "
        "created if it does not exist.",
    ),
    host: str = typer.Option("127.0.0.1", help="IP address to listen on; * listens on all interfaces."),
    port: int = typer.Option(8085, min=0, max=65535, help="Port to listen on; 0 chooses a free port."),
    schema: Path | None = typer.Option(
        None, help="Folder of the data set, whose schema.json content vectors must fit. Defaults to RUN/dataset."
    ),
) -> None:
    """Serve the catalogue's HTTP API until Ctrl-C or SIGTERM. The port is for internal clients only.

    \b
    Example:
      reelway catalogue serve --events kafka://kafka:9092 --token-file /secrets/token --host '*' --port 8085
    """
    import threading
    from contextlib import closing

    from reelway.platform.cli.catalogue.catalogue_api import catalogue_application
    from reelway.platform.cli.catalogue.catalogue_target import (
        CATALOGUE_TOKEN,
        event_address,
        read_token,
        run_dimensions,
    )
    from reelway.platform.eventlog.catalogue_log import CataloguePublisher
    from reelway.platform.features.dimensions import read_dimensions
    from reelway.platform.rollout.control.bearer_token import ensure_bearer_token
    from reelway.platform.rollout.control.webhook import serve_in_thread
    from reelway.platform.run_directory import RunDirectory
    from reelway.platform.stop_signals import stopped_by_signals

    directory = RunDirectory(run)
    address = event_address(directory, events)
    token = read_token(token_file) if token_file else ensure_bearer_token(directory.keys / CATALOGUE_TOKEN)
    dimensions = read_dimensions(schema) if schema else run_dimensions(run)
    stop = threading.Event()
    with stopped_by_signals(stop.set), closing(CataloguePublisher(address)) as publisher:
        application = catalogue_application(publisher, token, dimensions)
        with serve_in_thread(application, host, port) as url:
            stdout_console.print(f"catalogue of {address} at {url}", highlight=False, soft_wrap=True)
            stop.wait()


def _change_status(
    kind: type[Takedown] | type[Restore],
    videos: list[int] | None,
    creators: list[int] | None,
    reason: str,
    version: int | None,
    place: tuple[Path, str, str, Path | None],
) -> None:
    from pydantic import ValidationError

    from reelway.platform.cli.catalogue.catalogue_target import open_target
    from reelway.platform.eventlog.catalogue_events import explain_first_problem

    entities = [*({"video_id": video} for video in videos or ()), *({"creator_id": one} for one in creators or ())]
    if not entities:
        raise typer.BadParameter("name at least one --video or --creator")
    fields: dict[str, Any] = {"reason": reason} | ({} if version is None else {"version": version})
    try:
        changes = [kind.model_validate({**fields, **entity}) for entity in entities]
    except ValidationError as error:
        raise typer.BadParameter(explain_first_problem(error)) from error
    with open_target(*place) as target:
        refused = target.publish(changes)
    if refused:
        raise DataError(f"the service refused {changes[refused[0].line].key}: {refused[0].problem}")
    for change in changes:
        print_status(f"{change.op} of {change.key}, version {change.version}")


def _read_lines(file: str) -> Iterable[str]:
    if file == "-":
        return sys.stdin
    try:
        return Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot read it: {error}; expected JSON lines, or *.parquet") from error


def _report_refused(refused: Iterable[RefusedChange], path: Path | None) -> None:
    from reelway.platform.atomic_files import atomic_file

    changes = list(refused)
    for change in changes:
        stderr_console.print(f"line {change.line}: {escape(change.problem)}", highlight=False, soft_wrap=True)
    if path is not None:
        with atomic_file(path) as temporary:
            temporary.write_text("".join(change.model_dump_json() + "\n" for change in changes))
        print_status(f"rejected lines: {path}")
