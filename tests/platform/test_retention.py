"""Retention: every setting reaches its store, and a wrong value is named."""

from __future__ import annotations

from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from tests.support.serving.viewer_store import make_store, write_rows

from reelway.platform.errors import ConfigError
from reelway.platform.eventlog import LogRecord
from reelway.platform.eventlog.parked_records import ParkedRecord, ParkedRecords
from reelway.platform.eventlog.sqlite_log import SqliteLog
from reelway.platform.eventlog.topics import Topic, open_topic
from reelway.platform.features.feast_store import write_store_config
from reelway.platform.features.viewer_row_erasure import delete_old_viewer_rows
from reelway.platform.features.viewer_rows import ViewerRowReader
from reelway.platform.retention import Retention, retention

NOW_S, HOUR_S, DAY_S = 1_750_000_000.0, 3_600.0, 86_400.0


def test_wrong_value_is_rejected_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert retention() == Retention()
    monkeypatch.setenv("REELWAY_RETENTION_EVENT_HOURS", "2")
    with pytest.raises(ConfigError, match="REELWAY_RETENTION_EVENT_HOURS"):
        retention()


@pytest.mark.parametrize(("hours", "kept"), [(None, [b"old", b"new"]), ("48", [b"new"])])
def test_events_are_kept_for_the_hours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: str | None, kept: list[bytes]
) -> None:
    if hours:
        monkeypatch.setenv("REELWAY_RETENTION_EVENT_HOURS", hours)
    now_s = NOW_S
    with closing(open_topic(tmp_path, Topic.EXPOSURES, lambda: now_s)) as log:
        assert isinstance(log, SqliteLog)
        log.append([LogRecord("1", 0, b"old")])
        now_s += 49 * HOUR_S
        log.append([LogRecord("2", 0, b"new")])
        log.apply_retention()
        assert [record.payload for record in log.read({}, limit=9).records] == kept


def test_parked_records_are_kept_for_the_days(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REELWAY_RETENTION_PARKED_DAYS", "3")
    with closing(ParkedRecords(tmp_path / "parked.db")) as parked:
        for day in range(6):
            parked.park([ParkedRecord("log", 0, day, int(day * DAY_S * 1e6), "empty", "", b"")])
        assert [record.offset for record in parked.records()] == [2, 3, 4, 5]


def test_rows_in_redis_expire_by_the_days(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REELWAY_RETENTION_ONLINE_ROW_DAYS", "5")
    written = yaml.safe_load(write_store_config(tmp_path, "redis://host:6379").read_text())
    assert written["online_store"]["key_ttl_seconds"] == 5 * DAY_S


@pytest.mark.slow
@pytest.mark.redis
def test_redis_gets_the_time_to_live(tmp_path: Path, redis_server: str) -> None:
    store = make_store(tmp_path / "features", f"redis://{redis_server}/6")
    write_rows(store, "viewer_profile", "viewer_id", {42: {"region": "eu"}}, NOW_S)
    client = store._get_provider().online_store._get_client(store.config.online_store)
    (key,) = client.scan_iter("*")
    assert 89 * DAY_S < client.ttl(key) <= 90 * DAY_S
    client.flushdb()


@pytest.mark.slow
def test_old_rows_leave_the_sqlite_store(tmp_path: Path) -> None:
    store = make_store(tmp_path / "features", "sqlite")
    write_rows(store, "viewer_profile", "viewer_id", {1: {"region": "eu"}}, NOW_S - 10 * DAY_S)
    write_rows(store, "viewer_profile", "viewer_id", {2: {"region": "us"}}, NOW_S - 8 * DAY_S)
    assert delete_old_viewer_rows(store, datetime.fromtimestamp(NOW_S, UTC) - timedelta(days=9)) == 1
    rows = ViewerRowReader(store)
    assert rows.read(1)["region"] is None
    assert rows.read(2)["region"] == "us"
