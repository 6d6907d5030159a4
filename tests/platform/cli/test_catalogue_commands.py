"""``reelway catalogue``: uploads and takedowns by command and over HTTP, with bad lines named and none lost."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.support.dimensions import DIMENSIONS
from typer.testing import CliRunner, Result

from reelway.platform.cli.catalogue.catalogue_api import catalogue_application
from reelway.platform.cli.catalogue.catalogue_target import CATALOGUE_TOKEN
from reelway.platform.cli.main import build_app
from reelway.platform.contracts.events import VIDEOS
from reelway.platform.eventlog.catalogue_events import VideoUpsert, decode_upserts
from reelway.platform.eventlog.catalogue_log import CataloguePublisher
from reelway.platform.eventlog.topics import Topic, open_topic
from reelway.platform.features.dimensions import write_dimensions
from reelway.platform.rollout.control.webhook import serve_in_thread

TOKEN = "catalogue-token-of-the-tests"
VIDEO: dict[str, Any] = {
    "video_id": 1, "creator_id": 3, "uploaded_at": "2024-06-10T06:13:20Z", "duration_ms": 15_000, "topic": 2,
    "visual": [0.5] * 32,
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_dimensions(tmp_path / "dataset", DIMENSIONS)
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / CATALOGUE_TOKEN).write_text(TOKEN + "\n")
    return tmp_path


@pytest.fixture
def url(run: Path) -> Iterator[str]:
    with (
        closing(CataloguePublisher(run / "events")) as publisher,
        serve_in_thread(catalogue_application(publisher, TOKEN, DIMENSIONS), "127.0.0.1", 0) as address,
    ):
        yield address


def catalogue(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(build_app(), ["catalogue", *arguments], input=stdin)


def uploaded(run: Path) -> list[VideoUpsert | None]:
    with closing(open_topic(run / "events", Topic.CATALOGUE)) as log:
        return decode_upserts(log.read({}, limit=100).records)[0]


def status(run: Path, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(catalogue("status", "--run", str(run), "--json", *arguments).stdout)
    return found


@pytest.mark.parametrize("by_url", [False, True])
def test_bad_lines_are_named_and_good_lines_uploaded(run: Path, url: str, by_url: bool) -> None:
    bad_topic, bad_width = VIDEO | {"video_id": 2, "topic": "cats"}, VIDEO | {"video_id": 3, "visual": [1.0]}
    lines = [json.dumps(VIDEO), "", json.dumps(bad_topic), "{broken", json.dumps(bad_width),
             json.dumps(VIDEO | {"video_id": 4, "version": 9})]  # fmt: skip
    target = ["--url", url] if by_url else []
    result = catalogue(
        "upsert", "--run", str(run), *target, "--rejected", str(run / "bad.jsonl"), "-", stdin="\n".join(lines)
    )
    assert str(result.exception) == "-: 3 of 5 lines were rejected; correct and upload them again"
    assert "line 3: topic: saw 'cats', expected a valid integer" in result.output
    assert "line 5: visual: saw 1 values, expected 32 or none" in result.output
    written = [json.loads(line) for line in (run / "bad.jsonl").read_text().splitlines()]
    assert [(one["line"], one["input"]) for one in written][1] == (4, "{broken")
    assert [upsert and upsert.video_id for upsert in uploaded(run)] == [1, 4]
    assert uploaded(run)[1].version == 9  # type: ignore[union-attr]


def test_service_checks_dimensions_that_the_client_lacks(run: Path, url: str, tmp_path: Path) -> None:
    lines = [json.dumps(VIDEO), "", json.dumps(VIDEO | {"video_id": 3, "visual": [1.0]})]
    token = str(run / "keys" / CATALOGUE_TOKEN)
    result = catalogue(
        "upsert", "--run", str(tmp_path / "no"), "--url", url, "--token-file", token, "-", stdin="\n".join(lines)
    )
    assert "line 3: visual: saw 1 values, expected 32 or none" in result.output
    assert [upsert and upsert.video_id for upsert in uploaded(run)] == [1]


def test_parquet_in_the_videos_schema_is_uploaded(run: Path) -> None:
    at = datetime(2024, 6, 10, tzinfo=UTC)
    rows = [
        dict.fromkeys(VIDEOS.names)
        | {"video_id": video, "creator_id": 1, "uploaded_at": at, "duration_ms": 5, "topic": 1, "text": [1.0] * 32}
        for video in (5, 6)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=VIDEOS), run / "videos.parquet")
    assert catalogue("upsert", "--run", str(run), str(run / "videos.parquet")).exit_code == 0
    assert [(one.video_id, one.uploaded_at, one.visual) for one in uploaded(run) if one] == [
        (5, at, None),
        (6, at, None),
    ]


@pytest.mark.parametrize("by_url", [False, True])
def test_takedowns_in_effect_are_listed_with_their_reason(run: Path, url: str, by_url: bool) -> None:
    place = ["--run", str(run), *(["--url", url] if by_url else [])]
    assert (
        catalogue("takedown", *place, "--video", "1", "--video", "2", "--creator", "7", "--reason", "law").exit_code
        == 0
    )
    assert catalogue("restore", *place, "--video", "2").exit_code == 0
    assert catalogue("restore", *place, "--video", "1", "--version", "5").exit_code == 0  # older: no effect
    found = {change.get("video_id", change.get("creator_id")): change["reason"] for change in status(run)["takedowns"]}
    assert found == {1: "law", 7: "law"}
    assert status(run, "--url", url) == status(run)


def test_request_without_the_token_is_rejected(run: Path, url: str) -> None:
    body = {"changes": [{"op": "takedown", "video_id": 1, "reason": "x"}]}
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
        assert httpx.post(f"{url}/v1/catalogue", json=body, headers=headers).status_code == 401
        assert httpx.get(f"{url}/v1/catalogue", headers=headers).status_code == 401
    assert httpx.get(f"{url}/healthz").status_code == 200
    assert status(run)["takedowns"] == []
    (run / "wrong").write_text("wrong")
    result = catalogue("status", "--url", url, "--token-file", str(run / "wrong"))
    assert "token was rejected" in str(result.exception)


@pytest.mark.parametrize(
    ("body", "code"),
    [(b"{", 422), (b"[]", 422), (b'{"changes": {}}', 422), (b'{"changes": [' + b"{}," * 1000 + b"{}]}", 422)],
)
def test_malformed_request_is_rejected(url: str, body: bytes, code: int) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    response = httpx.post(f"{url}/v1/catalogue", content=body, headers=headers)
    assert (response.status_code, "expected" in response.json()["error"]) == (code, True)


def test_takedown_names_an_entity_and_a_reason(run: Path) -> None:
    assert "at least one --video or --creator" in catalogue("takedown", "--run", str(run), "--reason", "x").output
    assert catalogue("takedown", "--run", str(run), "--video", "1").exit_code == 2
    assert "reason" in catalogue("takedown", "--run", str(run), "--video", "1", "--reason", "").output


def test_serve_command_answers_until_sigterm(run: Path) -> None:
    command = [sys.executable, "-m", "reelway.platform.cli", "catalogue", "serve", "--run", str(run), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        headers = {"Authorization": f"Bearer {TOKEN}"}
        body = {"changes": [VIDEO | {"op": "upsert"}, {"op": "takedown", "video_id": 1, "reason": "x"}, {"op": "no"}]}
        answer = httpx.post(f"{address}/v1/catalogue", json=body, headers=headers).json()
        assert (answer["accepted"], answer["refused"][0]["line"]) == (2, 2)
        assert 'result="accepted"} 2.0' in httpx.get(f"{address}/metrics").text
        process.terminate()
        assert process.wait(10) == 0
    assert len(uploaded(run)) == 1
