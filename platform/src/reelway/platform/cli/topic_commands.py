"""``reelway topics create``: creates the topics of an event log on Kafka."""

from __future__ import annotations

import typer

from reelway.platform.cli.terminal import print_status


def register(app: typer.Typer) -> None:
    """Adds ``reelway topics``."""
    group = typer.Typer(no_args_is_help=True)
    group.command()(create)
    group.callback()(lambda: None)
    app.add_typer(group, name="topics", help="Create the topics of an event log on Kafka.")


def create(
    events: str = typer.Option(..., "--events", help="Event log: kafka://host:port or kafka://host:port/prefix."),
    viewer_partitions: int = typer.Option(12, min=1, help="Partitions of new topics that are keyed by viewer."),
    video_partitions: int = typer.Option(3, min=1, help="Partitions of new topics that are keyed by video."),
    replication: int = typer.Option(3, min=1, help="Replicas of each partition of new topics."),
    min_in_sync: int = typer.Option(
        2, min=1, help="Replicas that must have a record before it is acknowledged, for new topics."
    ),
    retention_hours: int = typer.Option(
        168, min=24, help="Hours for which new topics keep exposures and outcomes. Compacted topics keep all keys."
    ),
) -> None:
    """Create the topics that are missing. Existing topics are checked and not changed.

    Fails if an existing topic does not have the brokers' append time, has the wrong cleanup policy, or if exposures and
    outcomes have different numbers of partitions. Credentials are read from REELWAY_KAFKA_SETTINGS.

    \b
    Example:
      reelway topics create --events kafka://kafka:9092
    """
    from reelway.platform.eventlog.kafka_topics import TopicSizes, create_missing_topics

    sizes = TopicSizes(viewer_partitions, video_partitions, replication, min_in_sync, retention_hours)
    created, existing = create_missing_topics(events, sizes)
    print_status(f"topics: created {', '.join(created) or 'none'}; existing {', '.join(existing) or 'none'}")
