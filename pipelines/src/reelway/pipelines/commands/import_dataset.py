"""``reelway import``: writes another source's data as the run's data set, in the event schema and checked.

``datasets.movielens``, ``datasets.kuairand`` and ``datasets.event_files`` parse. ``datasets.checks`` validates the
rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import pyarrow as pa

    from reelway.pipelines.datasets.checks import CheckLimits
    from reelway.pipelines.datasets.content_dimensions import DimensionSettings

ImportResult = tuple["dict[str, pa.Table]", dict[str, Any], "Mapping[str, pa.Table]"]

Run = Annotated[Path, typer.Option("--run", help="Run directory; the data set is written to RUN/dataset.")]
Force = Annotated[bool, typer.Option("--force", help="Import again even if the same files were imported before.")]
MaxBadRatio = Annotated[
    float,
    typer.Option("--max-bad-ratio", min=0, max=1, help="Largest accepted share of bad rows per table, from 0 to 1."),
]
HistoryLength = Annotated[
    int | None,
    typer.Option(min=1, help="Number of latest impressions in a viewer's history; by default 50."),
]
IdBuckets = Annotated[
    int | None, typer.Option(min=2, help="Number of hash buckets for ids in the models; by default 32768.")
]
CategoryBuckets = Annotated[
    int | None,
    typer.Option(min=2, help="Number of hash buckets for categories such as regions; by default 64."),
]
Topics = Annotated[
    int | None, typer.Option(min=1, help="Number of video topics; by default the largest topic number plus one.")
]
DEFAULT_RUN = Path("runs/default")


def register(app: typer.Typer) -> None:
    """Adds ``reelway import``."""
    group = typer.Typer(
        help="Import MovieLens, KuaiRand or your own events as RUN/dataset. Bad rows are set aside in "
        "RUN/dataset/rejected.parquet with the reason. A malformed file fails the import. RUN/dataset/schema.json "
        "records the widths and vocabulary sizes that features, models and releases use.",
        no_args_is_help=True,
    )
    group.command("ml-100k")(import_ml_100k)
    group.command("movielens")(import_movielens)
    group.command("kuairand")(import_kuairand)
    group.command("events")(import_events)
    app.add_typer(group, name="import")


def import_ml_100k(
    path: Path = typer.Argument(..., help="Folder with u.data and u.item, or with RecBole's ml-100k.inter and .item."),
    run: Run = DEFAULT_RUN,
    max_bad_ratio: MaxBadRatio = 0.05,
    history_length: HistoryLength = None,
    force: Force = False,
) -> None:
    """Import MovieLens-100K, as GroupLens or RecBole publish it.

    Example: reelway import ml-100k ~/data/ml-100k --run runs/films
    """
    import_movielens(path, run, max_bad_ratio, history_length, force)


def import_movielens(
    path: Path = typer.Argument(..., help="Folder of MovieLens 100K, 1M, 10M, 20M or 25M, or in RecBole's layout."),
    run: Run = DEFAULT_RUN,
    max_bad_ratio: MaxBadRatio = 0.05,
    history_length: HistoryLength = None,
    force: Force = False,
) -> None:
    """Import MovieLens of any size; the files in the folder determine the layout.

    A rating becomes an impression that was fully watched: a like from 4 stars, not_interested at 1 star or less.

    Example: reelway import movielens ~/data/ml-25m --run runs/films
    """
    from reelway.pipelines.datasets.content_dimensions import DimensionSettings
    from reelway.pipelines.datasets.movielens import files_of
    from reelway.pipelines.datasets.movielens import import_movielens as read

    def load() -> ImportResult:
        tables, info = read(path)
        return tables, info, {}

    settings = DimensionSettings(history_length=history_length)
    _import("movielens", files_of(path), load, run, max_bad_ratio, settings, force, ratings=True)


def import_kuairand(
    path: Path = typer.Argument(..., help="Folder with the published CSV files (the data folder of KuaiRand-*)."),
    run: Run = DEFAULT_RUN,
    max_bad_ratio: MaxBadRatio = 0.05,
    history_length: HistoryLength = None,
    force: Force = False,
) -> None:
    """Import KuaiRand (1K, 27K or Pure): log_*.csv, user_features_*.csv, video_features_basic_*.csv.

    Example: reelway import kuairand ~/data/KuaiRand-Pure/data --run runs/kuairand
    """
    from reelway.pipelines.datasets.content_dimensions import DimensionSettings
    from reelway.pipelines.datasets.kuairand import files_of
    from reelway.pipelines.datasets.kuairand import import_kuairand as read

    def load() -> ImportResult:
        tables, info = read(path)
        return tables, info, {}

    settings = DimensionSettings(history_length=history_length)
    _import("kuairand", files_of(path), load, run, max_bad_ratio, settings, force)


def import_events(
    path: Path = typer.Argument(
        ..., help="Parquet or CSV file, or a folder of parts (.parquet, .csv), with one row per shown impression."
    ),
    videos: Path | None = typer.Option(
        None,
        "--videos",
        help="Parquet or CSV file, or a folder of parts (.parquet, .csv), with one row per video. "
        "By default video properties are unknown.",
    ),
    run: Run = DEFAULT_RUN,
    max_bad_ratio: MaxBadRatio = 0.05,
    topics: Topics = None,
    history_length: HistoryLength = None,
    id_buckets: IdBuckets = None,
    category_buckets: CategoryBuckets = None,
    force: Force = False,
) -> None:
    """Import your own events, one row per impression.

    \b
    Required columns: viewer_id, video_id, event_time (a time as 2025-01-31T12:00:00Z, a date, or Unix seconds;
      a time without a zone is UTC).
    Optional columns: impression_id, request_id, position, release, arm, source, propensity, device,
      watch_ms, like, share, save, follow, comment, skip, not_interested, report (0 or 1).
    Optional in --videos, by video_id: creator_id, uploaded_at, duration_ms, topic, language, title,
      visual, audio, text (lists of one width per column, Parquet only; an absent column has width 0).
    Ids are kept if all are integers in 0..2^53-1 without leading zeros. Otherwise they are numbered by their text, and
      RUN/dataset/id_map.parquet maps the numbers to the original ids.

    Example: reelway import events shown.parquet --videos videos.csv --run runs/mine
    """
    from reelway.pipelines.datasets.content_dimensions import DimensionSettings
    from reelway.pipelines.datasets.event_files import import_events as read
    from reelway.pipelines.datasets.source_table import part_files

    files = [*part_files(path), *(part_files(videos) if videos else [])]
    settings = DimensionSettings(topics, history_length, category_buckets, id_buckets)
    _import("events", files, lambda: read(path, videos), run, max_bad_ratio, settings, force)


def _import(
    kind: str,
    files: Sequence[Path],
    load: Callable[[], ImportResult],
    run: Path,
    max_bad_ratio: float,
    settings: DimensionSettings,
    force: bool,
    *,
    ratings: bool = False,
) -> None:
    from dataclasses import asdict, replace

    from reelway.pipelines.datasets.checks import RATING_LIMITS, CheckLimits
    from reelway.pipelines.datasets.content_dimensions import infer_dimensions
    from reelway.pipelines.datasets.dataset_step import write_checked_dataset
    from reelway.platform.cli.terminal import print_status, stderr_console
    from reelway.platform.errors import MalformedFileError
    from reelway.platform.run_directory import RunDirectory

    for file in files:
        if not file.is_file():
            raise MalformedFileError(file, "a file", seen="no such file")
    limits: CheckLimits = replace(RATING_LIMITS if ratings else CheckLimits(), max_bad_ratio=max_bad_ratio)
    directory = RunDirectory(run)
    config = {"kind": kind, "limits": asdict(limits), "dimensions": settings.given()}
    outputs = [directory.dataset / "dataset.json"]
    with directory.step("dataset", config=config, inputs=files, outputs=outputs, force=force) as step:
        if step.cached:
            print_status("dataset: already imported from the same files, skipped (use --force to import again)")
            return
        with stderr_console.status(f"reading {', '.join(file.name for file in files)}"):
            tables, info, extras = load()
            dimensions = infer_dimensions(tables, settings)
            step.summary |= write_checked_dataset(
                directory.dataset, tables, info, limits, dimensions=dimensions, extras=extras
            )
        step.summary["dimensions"] = asdict(dimensions)
    print_status(f"dataset: written to {directory.dataset}")
