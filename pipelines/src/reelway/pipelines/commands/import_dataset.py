"""``reelway import``: somebody else's data into the event schema, checked, as the run's data set.

It only wires: parsing is in ``datasets.movielens``, ``datasets.kuairand`` and ``datasets.generic``, judging in
``datasets.checks``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import pyarrow as pa

    from reelway.pipelines.datasets.checks import CheckLimits

Imported = tuple["dict[str, pa.Table]", dict[str, Any], "Mapping[str, pa.Table]"]

_RUN = typer.Option(Path("runs/default"), "--run", help="Run directory; the data set goes to RUN/dataset.")
_FORCE = typer.Option(False, "--force", help="Import again even if the same files were imported here before.")
_BAD = typer.Option(0.05, "--max-bad-ratio", min=0, max=1, help="Stop when a larger share of a table's rows is bad.")


def register(app: typer.Typer) -> None:
    """Add ``reelway import``."""
    group = typer.Typer(
        help="Read MovieLens, KuaiRand or your own events into RUN/dataset. Bad rows are set aside in "
        "RUN/dataset/rejected.parquet with the reason; a file that is not what it should be is refused.",
        no_args_is_help=True,
    )
    group.command("ml-100k")(import_ml_100k)
    group.command("movielens")(import_movielens)
    group.command("kuairand")(import_kuairand)
    group.command("events")(import_events)
    app.add_typer(group, name="import")


def import_ml_100k(
    path: Path = typer.Argument(..., help="Folder with u.data and u.item, or with RecBole's ml-100k.inter and .item."),
    run: Path = _RUN,
    max_bad_ratio: float = _BAD,
    force: bool = _FORCE,
) -> None:
    """MovieLens-100K, as GroupLens or RecBole publish it.

    Example: reelway import ml-100k ~/data/ml-100k --run runs/films
    """
    import_movielens(path, run, max_bad_ratio, force)


def import_movielens(
    path: Path = typer.Argument(..., help="Folder of MovieLens 100K, 1M, 10M, 20M or 25M, or in RecBole's layout."),
    run: Path = _RUN,
    max_bad_ratio: float = _BAD,
    force: bool = _FORCE,
) -> None:
    """MovieLens of any size; the layout is told by the files.

    A rating becomes an impression that was fully watched; a like from 4 stars, not_interested at 1 star or less.

    Example: reelway import movielens ~/data/ml-25m --run runs/films
    """
    from reelway.pipelines.datasets.movielens import files_of
    from reelway.pipelines.datasets.movielens import import_movielens as read

    def load() -> Imported:
        tables, info = read(path)
        return tables, info, {}

    _import("movielens", files_of(path), load, run, max_bad_ratio, force, ratings=True)


def import_kuairand(
    path: Path = typer.Argument(..., help="Folder with the published CSV files (the data folder of KuaiRand-*)."),
    run: Path = _RUN,
    max_bad_ratio: float = _BAD,
    force: bool = _FORCE,
) -> None:
    """KuaiRand (1K, 27K or Pure): log_*.csv, user_features_*.csv, video_features_basic_*.csv.

    Example: reelway import kuairand ~/data/KuaiRand-Pure/data --run runs/kuairand
    """
    from reelway.pipelines.datasets.kuairand import files_of
    from reelway.pipelines.datasets.kuairand import import_kuairand as read

    def load() -> Imported:
        tables, info = read(path)
        return tables, info, {}

    _import("kuairand", files_of(path), load, run, max_bad_ratio, force)


def import_events(
    path: Path = typer.Argument(..., help="A .parquet or .csv file, one row per impression shown."),
    videos: Path | None = typer.Option(None, "--videos", help="Optional .parquet or .csv file about the videos."),
    run: Path = _RUN,
    max_bad_ratio: float = _BAD,
    force: bool = _FORCE,
) -> None:
    """Your own events, one row per impression.

    \b
    Required columns: viewer_id, video_id, event_time (RFC 3339, or Unix seconds; UTC where no zone is given).
    Optional columns: impression_id, request_id, position, release, arm, source, propensity, device,
      watch_ms, like, share, save, follow, comment, skip, not_interested, report (0 or 1).
    Optional in --videos, by video_id: creator_id, uploaded_at, duration_ms, topic, language, title,
      visual, audio, text (lists, Parquet only).
    Ids that are not integers are numbered; RUN/dataset/id_map.parquet says which is which.

    Example: reelway import events shown.parquet --videos videos.csv --run runs/mine
    """
    from reelway.pipelines.datasets.generic import import_events as read

    def load() -> Imported:
        return read(path, videos)

    files = [path, *([videos] if videos else [])]
    _import("events", files, load, run, max_bad_ratio, force)


def _import(
    kind: str,
    files: Sequence[Path],
    load: Callable[[], Imported],
    run: Path,
    max_bad_ratio: float,
    force: bool,
    *,
    ratings: bool = False,
) -> None:
    from dataclasses import asdict, replace

    from reelway.pipelines.datasets.checks import RATING_LIMITS, CheckLimits
    from reelway.pipelines.datasets.dataset_step import write_checked
    from reelway.platform.cli.terminal import console, say
    from reelway.platform.errors import MalformedFileError
    from reelway.platform.runs import RunDirectory

    for file in files:
        if not file.is_file():
            raise MalformedFileError(file, "a file", seen="no such file")
    limits: CheckLimits = replace(RATING_LIMITS if ratings else CheckLimits(), max_bad_ratio=max_bad_ratio)
    directory = RunDirectory(run)
    config = {"kind": kind, "limits": asdict(limits)}
    outputs = [directory.dataset / "dataset.json"]
    with directory.step("dataset", config=config, inputs=files, outputs=outputs, force=force) as step:
        if step.done:
            say("dataset: already imported from the same files, skipped (use --force to redo)")
            return
        with console.status(f"reading {', '.join(file.name for file in files)}"):
            tables, info, extras = load()
            step.summary |= write_checked(directory.dataset, tables, info, limits, extras=extras)
    say(f"written to {directory.dataset}")
