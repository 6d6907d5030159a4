"""The whole loop as processes: what a viewer likes changes the next slate in seconds, and is served as it is offline.

``reelway serve`` answers and logs outcomes, ``reelway stream`` makes features of them; it is also killed and told to
stop. The models have random weights: what is shown is no good, but it follows from the viewer's history all the same.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.pipelines.trained_run import make_trained_run

from reelway.pipelines.build import build_release
from reelway.pipelines.features.batch import last_moment_us
from reelway.pipelines.features.online import materialise
from reelway.pipelines.features.parity import replay
from reelway.pipelines.features.stream.processor import StreamSettings
from reelway.pipelines.features.stream.replay import replay_log
from reelway.pipelines.features.stream.state import StreamState
from reelway.pipelines.features.training_rows import LABELS_FILE, read_artifact
from reelway.pipelines.features.views import ViewSettings
from reelway.platform.cli.processes import reelway_command
from reelway.platform.durable import write_json
from reelway.platform.eventlog import open_event_log
from reelway.platform.release.signing import create_keys, load_private_key
from reelway.platform.runs import RunDirectory

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.timeout(600)]
READY_S = 180.0
VIEWER = 505


@contextmanager
def process(log: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command of ours, ended with the block; given as SIGTERM the time to end well."""
    with log.open("ab") as sink:
        running = subprocess.Popen(reelway_command(*words), stdout=sink, stderr=sink, stdin=subprocess.DEVNULL)
    try:
        yield running
    finally:
        running.terminate()
        try:
            running.wait(60)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


@dataclass
class Live:
    """The run, its service and how the stream is started."""

    run: RunDirectory
    client: httpx.Client

    def ask(self, viewer: int = VIEWER, count: int = 10) -> list[dict[str, Any]]:
        answer = self.client.post("/v1/recommend", json={"viewer_id": viewer, "count": count})
        assert answer.status_code == 200, answer.text
        videos: list[dict[str, Any]] = answer.json()["videos"]
        return videos

    def like(self, *videos: dict[str, Any]) -> None:
        outcomes = [{"token": video["token"], "type": "like"} for video in videos]
        answer = self.client.post("/v1/outcomes", json={"outcomes": outcomes})
        assert answer.status_code == 200, answer.text
        assert answer.json()["accepted"] == len(videos)

    def seconds_until_seen(self, liked: list[dict[str, Any]], viewer: int = VIEWER) -> float:
        """Until no slate shows them again and one says that it is because of one of them."""
        began, titles = time.monotonic(), {video["title"] for video in liked}
        while True:
            slate = self.ask(viewer, 20)
            shown_again = {video["video_id"] for video in slate} & {video["video_id"] for video in liked}
            because = [video for video in slate if any(title in video["reason"] for title in titles)]
            if because and not shown_again:
                return time.monotonic() - began
            assert time.monotonic() - began < 60, slate
            time.sleep(0.05)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    run = make_trained_run(tmp_path_factory.mktemp("live") / "run")
    write_json(run.record_path("features"), {"config": {"views": asdict(ViewSettings())}})
    until_s = last_moment_us(read_artifact(run.features / LABELS_FILE)) / 1e6
    materialise(run.features, until_s)
    build_release(run, name="live", key=load_private_key(create_keys(run.keys).private))
    log, record = run.path / "serve.log", run.path / "serving.json"
    with process(log, "serve", "--run", str(run.path), "--port", "0", "--parity-ratio", "1", "--no-controller") as it:
        deadline = time.monotonic() + READY_S
        while not record.exists():
            assert it.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        with httpx.Client(base_url=json.loads(record.read_text())["url"], timeout=30) as client:
            yield Live(run, client)


def wait_for(what: str, path: Path, log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while not path.exists():
        assert time.monotonic() < deadline, f"{what}: {log.read_text()}"
        time.sleep(0.1)


def test_new_likes_change_the_next_slate_within_seconds_and_are_served_as_they_are_offline(live: Live) -> None:
    run, log = live.run, live.run.path / "stream.log"
    words = ("stream", "--run", str(run.path))
    with process(log, *words) as stream:
        first = live.ask()[:3]
        live.like(*first)
        wait_for("the stream began", run.path / "overlay" / "00000000000000000001.arrow", log)
        live.seconds_until_seen(first)  # from here on it runs
        taken = []
        for viewer in (506, 507, 508):
            some = live.ask(viewer)[:2]
            live.like(*some)
            taken.append(live.seconds_until_seen(some, viewer))
        print(f"like -> slate: {', '.join(f'{seconds:.1f} s' for seconds in taken)}")
        assert sorted(taken)[1] < 10
        stream.send_signal(signal.SIGKILL)
        stream.wait()

    missed = live.ask(509)[:2]
    live.like(*missed)  # nobody reads it now
    with process(log, *words) as stream:
        live.seconds_until_seen(missed, 509)
        stream.send_signal(signal.SIGTERM)
        assert stream.wait(60) == 0, log.read_text()
    assert "nothing is left undone" in " ".join(log.read_text().split())

    state = StreamState(run.path / "stream" / "state.db")
    assert list(state.outbox()) == []
    behind_us = int(state.get("behind_us"))
    state.close()
    events = open_event_log(run.event_log)
    rows = replay_log(run, events, run.path / "offline", behind_us, StreamSettings())
    events.close()
    report = replay(run.path / "offline", run.path / "serving" / "vectors.jsonl")
    assert rows > 5
    assert report.vectors > 20
    assert [str(miss) for miss in report.mismatches[:5]] == []
