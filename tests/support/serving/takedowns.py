"""Takedowns for tests: an event log in a folder, and followers that tests poll themselves."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from prometheus_client import CollectorRegistry

from reelway.platform.eventlog.catalogue_events import Restore, Takedown, VideoUpsert
from reelway.platform.eventlog.catalogue_log import CataloguePublisher
from reelway.platform.eventlog.topics import Topic, open_topic
from reelway.serving.metrics import TakedownMetrics
from reelway.serving.takedown_follower import TakedownFollower


def publish(events: Path, *changes: VideoUpsert | Takedown | Restore) -> None:
    """Appends changes to the event log."""
    with closing(CataloguePublisher(events)) as publisher:
        publisher.publish(changes)


def takedown(*, videos: Sequence[int] = (), creators: Sequence[int] = (), version: int = 1) -> list[Takedown]:
    return [
        *(Takedown(video_id=int(video), reason="test", version=version) for video in videos),
        *(Takedown(creator_id=int(creator), reason="test", version=version) for creator in creators),
    ]


def follower(events: Path, registry: CollectorRegistry | None = None) -> TakedownFollower:
    """Returns a follower whose thread is not started."""
    return TakedownFollower(
        lambda: open_topic(events, Topic.TAKEDOWNS), TakedownMetrics(registry or CollectorRegistry())
    )
