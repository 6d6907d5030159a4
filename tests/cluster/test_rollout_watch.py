"""The operator's watch and finalizer against an in-process API server: list, resume, expiry, outage, deletion."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.support.cluster.fake_api_server import FakeApiServer
from tests.support.cluster.fake_serve import FakeServe
from tests.support.cluster.rollout_manifests import QUICK, rollout

from reelway.platform.cluster.finalizer import set_finalizer
from reelway.platform.cluster.kube_api import ExpiredError, KubeApi, WatchEvent
from reelway.platform.cluster.leader_election import LeaderElector
from reelway.platform.cluster.operator_settings import (
    LeaseSettings,
    OperatorSettings,
    OperatorWebhookSettings,
    RaySettings,
)
from reelway.platform.cluster.resources import FINALIZER, RolloutResource
from reelway.platform.cluster.rollout_cache import PATH, InformerCache
from reelway.platform.cluster.rollout_operator import RolloutOperator
from reelway.platform.cluster.rollout_watch import RolloutWatch
from reelway.platform.errors import KubernetesError, RolloutError


@pytest.fixture
def server() -> Iterator[FakeApiServer]:
    fake = FakeApiServer()
    yield fake
    fake.close()


@pytest.fixture
def api(server: FakeApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KubeApi:
    monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig")))
    return KubeApi()


@contextmanager
def watching(api: KubeApi, request_timeout_s: float = 20.0) -> Iterator[InformerCache]:
    """A running watch and the cache that it fills."""
    cache, stop = InformerCache(), threading.Event()
    thread = threading.Thread(
        target=RolloutWatch(api, cache, request_timeout_s=request_timeout_s).run, args=(stop,), daemon=True
    )
    thread.start()
    try:
        yield cache
    finally:
        stop.set()


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.01)


def names(cache: InformerCache) -> set[str]:
    return {resource.name for resource in cache.all()}


def test_watch_applies_additions_changes_and_deletions(server: FakeApiServer, api: KubeApi) -> None:
    server.apply(rollout("one"))
    with watching(api) as cache:
        wait_for(lambda: names(cache) == {"one"})
        server.apply(rollout("two"))
        wait_for(lambda: names(cache) == {"one", "two"})
        before = cache.revision(include_own=False)
        server.apply(rollout("two", commands=[{"id": "1", "verb": "pause"}]))
        wait_for(lambda: cache.revision(include_own=False) > before)
        assert [len(one.spec.commands) for one in cache.all() if one.name == "two"] == [1]
        server.delete("one")
        wait_for(lambda: names(cache) == {"two"})
    assert server.requests("GET") == 1


def test_watch_resumes_without_a_list_after_the_server_ends_it(server: FakeApiServer, api: KubeApi) -> None:
    with watching(api, request_timeout_s=1.0) as cache:
        wait_for(lambda: server.requests("GET", watch=True) == 3)
        server.apply(rollout("one"))
        wait_for(lambda: names(cache) == {"one"})
    assert server.requests("GET") == 1


def test_watch_resumes_after_a_cut_connection(server: FakeApiServer, api: KubeApi) -> None:
    server.apply(rollout("one"))
    with watching(api) as cache:
        wait_for(lambda: server.requests("GET", watch=True) == 1)
        with server.changed:
            server.cut_watches += 1
            server.changed.notify_all()
        server.apply(rollout("two"))
        server.delete("one")
        wait_for(lambda: names(cache) == {"two"})
    assert server.requests("GET") == 1


def test_watch_lists_again_after_its_version_expired(server: FakeApiServer, api: KubeApi) -> None:
    server.apply(rollout("one"))
    with watching(api, request_timeout_s=1.0) as cache:
        wait_for(lambda: names(cache) == {"one"})
        server.apply(rollout("two"))
        server.delete("one")
        server.forget_changes()
        wait_for(lambda: names(cache) == {"two"})
        wait_for(lambda: server.requests("GET") == 2)


def test_watch_continues_from_the_version_of_a_bookmark(server: FakeApiServer, api: KubeApi) -> None:
    with watching(api, request_timeout_s=1.0):
        wait_for(lambda: server.requests("GET", watch=True) == 1)
        version = server.bookmark()
        wait_for(lambda: server.requests("GET", watch=True) >= 2)
        assert f"resourceVersion={version}" in server.log[-1][1]


def test_watch_survives_an_outage_and_logs_it_once(
    server: FakeApiServer, api: KubeApi, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "reelway.platform.cluster.rollout_watch")
    with watching(api, request_timeout_s=1.0) as cache:
        wait_for(lambda: server.requests("GET", watch=True) == 1)
        server.unavailable = True
        wait_for(lambda: server.requests("GET", watch=True) >= 5)
        server.unavailable = False
        server.apply(rollout("one"))
        wait_for(lambda: names(cache) == {"one"})
        wait_for(lambda: [one.levelname for one in caplog.records] == ["WARNING", "INFO"])
    assert "the server is shutting down" in caplog.text


def test_sync_fails_if_the_server_is_unavailable(server: FakeApiServer, api: KubeApi) -> None:
    server.unavailable = True
    with pytest.raises(KubernetesError, match="answered 503"):
        RolloutWatch(api, InformerCache()).sync()


def test_expired_version_is_an_error_of_its_own(server: FakeApiServer, api: KubeApi) -> None:
    server.forget_changes()
    with pytest.raises(ExpiredError, match="answered 410: too old resource version: 5"):
        list(api.watch(PATH, "5", timeout_s=1))


def test_cache_ignores_an_object_that_cannot_be_parsed(
    server: FakeApiServer, api: KubeApi, caplog: pytest.LogCaptureFixture
) -> None:
    server.apply({**rollout("odd"), "spec": {"release": 5}})
    server.apply(rollout("one"))
    with watching(api) as cache:
        wait_for(lambda: names(cache) == {"one"})
    assert "rollout odd ignored" in caplog.text


def test_cache_ignores_an_own_write_that_arrives_after_the_deletion(server: FakeApiServer) -> None:
    resource = RolloutResource.from_document(server.apply(rollout("one")))
    cache = InformerCache()
    cache.apply_event(server.objects["one"])
    cache.apply_event(server.objects["one"], deleted=True)
    cache.store_written(resource)
    assert names(cache) == set()


def test_replace_keeps_a_copy_that_is_newer_than_the_list(server: FakeApiServer) -> None:
    old = server.apply(rollout("one"))
    newer = server.apply(rollout("one", note="newer"))
    cache = InformerCache()
    cache.apply_event(newer)
    cache.replace([old])
    assert [one.spec.note for one in cache.all()] == ["newer"]


class ScriptedWatches(KubeApi):
    """Watch requests in virtual time: each stays open for the next duration of a script and delivers one bookmark."""

    def __init__(self, open_for_s: list[float]) -> None:
        self.now = 0.0
        self.stop = VirtualStop(self)
        self.pauses_s: list[float] = []
        """Time from the end of each request to the beginning of the next one."""
        self._script = open_for_s
        self._ended_at = 0.0

    def list_at(self, path: str) -> tuple[list[dict[str, Any]], str]:
        del path
        return [], "1"

    def watch(self, path: str, resource_version: str, *, timeout_s: float) -> Iterator[WatchEvent]:
        del path, timeout_s
        self.pauses_s.append(self.now - self._ended_at)
        if not self._script:
            self.stop.set()
        yield WatchEvent("BOOKMARK", {"metadata": {"resourceVersion": resource_version}})
        self.now += self._script.pop(0) if self._script else 0.0
        self._ended_at = self.now


class VirtualStop(threading.Event):
    """A stop event whose waits advance the clock of the watches."""

    def __init__(self, watches: ScriptedWatches) -> None:
        super().__init__()
        self._watches = watches

    def wait(self, timeout: float | None = None) -> bool:
        self._watches.now += timeout or 0.0
        return self.is_set()


def test_watch_that_is_closed_at_once_is_reopened_ever_more_slowly() -> None:
    """The pause doubles up to 10 s with a jitter of 50 %, and begins anew after a request that stayed open."""
    api = ScriptedWatches([0.0] * 10 + [20.0] + [0.0] * 2)
    RolloutWatch(api, InformerCache(), clock=lambda: api.now).run(api.stop)
    first, *pauses = api.pauses_s
    assert first == 0
    bounds = [min(10.0, 0.1 * 2**failures) for failures in range(10)] + [0.0, 0.1, 0.2]
    assert len(pauses) == len(bounds)
    assert all(bound / 2 <= pause <= bound for pause, bound in zip(pauses, bounds, strict=True)), pauses


def finalized(api: KubeApi, cache: InformerCache, document: dict[str, Any], *, present: bool) -> RolloutResource | None:
    cache.apply_event(document)
    return set_finalizer(api, cache, RolloutResource.from_document(document), present=present)


def test_finalizer_keeps_those_of_others(server: FakeApiServer, api: KubeApi) -> None:
    document = rollout("one")
    document["metadata"]["finalizers"] = ["example.com/other"]
    cache = InformerCache()
    written = finalized(api, cache, server.apply(document), present=True)
    assert written is not None
    assert written.finalizers == ("example.com/other", FINALIZER)
    assert cache.all() == [written]
    again = set_finalizer(api, cache, written, present=False)
    assert again is not None
    assert again.finalizers == ("example.com/other",)


def test_finalizer_is_not_written_over_a_newer_version(server: FakeApiServer, api: KubeApi) -> None:
    outdated = server.apply(rollout("one"))
    server.apply(rollout("one", note="newer"))
    assert finalized(api, InformerCache(), outdated, present=True) is None
    assert "finalizers" not in server.objects["one"]["metadata"]


def test_removing_the_last_finalizer_of_a_deleted_rollout_empties_the_cache(
    server: FakeApiServer, api: KubeApi
) -> None:
    cache = InformerCache()
    finalized(api, cache, server.apply(rollout("one")), present=True)
    server.delete("one")
    finalized(api, cache, server.objects["one"], present=False)
    assert names(cache) == set()
    assert server.objects == {}


@pytest.fixture
def serve() -> Iterator[FakeServe]:
    fake = FakeServe()
    yield fake
    fake.close()


@contextmanager
def operating(api: KubeApi, tmp_path: Path) -> Iterator[RolloutOperator]:
    (tmp_path / "token").write_text("a-token-of-this-test")
    settings = OperatorSettings(
        identity="operator-0",
        interval_s=0.1,
        webhook=OperatorWebhookSettings(token_file=tmp_path / "token"),
        lease=LeaseSettings(duration_s=5),
        ray=RaySettings(trusted_hosts=("127.0.0.1",)),
    )
    operator, stop = RolloutOperator(api, settings), threading.Event()
    thread = threading.Thread(target=operator.run, args=(stop,))
    thread.start()
    try:
        yield operator
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


def held_rollout(serve: FakeServe, name: str = "one") -> dict[str, Any]:
    """A rollout that stays at its first step."""
    policy = {**QUICK, "steps": [{"weight_percent": 10, "hold_s": 3600}]}
    return rollout(name, policy=policy, backend={"serve": {"api": serve.url, "url": serve.url}})


def finalizers(server: FakeApiServer, name: str = "one") -> list[str]:
    return list(server.objects.get(name, {}).get("metadata", {}).get("finalizers") or ())


def test_rollout_has_the_finalizer_before_its_traffic_moves(
    server: FakeApiServer, api: KubeApi, serve: FakeServe, tmp_path: Path
) -> None:
    server.apply(held_rollout(serve))
    with operating(api, tmp_path):
        wait_for(lambda: len(serve.routing.arms) == 2)
        assert finalizers(server) == [FINALIZER]
        states = [one["object"] for one in server.events if one["object"].get("status", {}).get("state")]
        assert all(FINALIZER in one["metadata"]["finalizers"] for one in states)


def test_deleted_rollout_is_removed_after_its_traffic_is_on_stable(
    server: FakeApiServer, api: KubeApi, serve: FakeServe, tmp_path: Path
) -> None:
    server.apply(held_rollout(serve))
    with operating(api, tmp_path):
        wait_for(lambda: len(serve.routing.arms) == 2)
        server.delete("one")
        wait_for(lambda: "one" not in server.objects)
        assert len(serve.routing.arms) == 1


def test_deletion_during_an_outage_of_the_operator_is_handled_at_its_start(
    server: FakeApiServer, api: KubeApi, serve: FakeServe, tmp_path: Path
) -> None:
    server.apply(held_rollout(serve))
    with operating(api, tmp_path):
        wait_for(lambda: len(serve.routing.arms) == 2)
    server.delete("one")
    assert finalizers(server) == [FINALIZER]
    with operating(api, tmp_path):
        wait_for(lambda: "one" not in server.objects)
        assert len(serve.routing.arms) == 1


def test_rollout_at_rest_has_no_finalizer(
    server: FakeApiServer, api: KubeApi, serve: FakeServe, tmp_path: Path
) -> None:
    server.apply(held_rollout(serve))
    with operating(api, tmp_path):
        wait_for(lambda: len(serve.routing.arms) == 2)
        server.apply({**held_rollout(serve, "two")})
        wait_for(lambda: server.objects["two"].get("status", {}).get("phase") == "Waiting")
        assert finalizers(server, "two") == []
        spec = {**server.objects["one"]["spec"], "commands": [{"id": "1", "verb": "rollback"}]}
        server.apply({**server.objects["one"], "spec": spec})
        wait_for(lambda: server.objects["one"]["status"]["phase"] == "RolledBack" and not finalizers(server))


def test_operator_without_a_valid_lease_moves_no_traffic(
    server: FakeApiServer,
    api: KubeApi,
    serve: FakeServe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def expired(_: LeaderElector) -> None:
        raise RolloutError("the lease has expired")

    monkeypatch.setattr(LeaderElector, "require_valid", expired)
    server.apply(held_rollout(serve))
    with operating(api, tmp_path):
        wait_for(lambda: "status not written: the lease has expired" in caplog.text)
    assert serve.written == []
    assert "status" not in server.objects["one"]
