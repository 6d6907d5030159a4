"""The operator's check of a release before its rollout starts, alone and within a running operator."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import fsspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fsspec.implementations.memory import MemoryFileSystem
from tests.support.cluster.fake_api_server import FakeApiServer
from tests.support.cluster.fake_serve import FakeServe
from tests.support.cluster.rollout_manifests import rollout
from tests.support.e2e.wait_until import until
from tests.support.release_files import make_release_folder, sign_manifest, write_manifest

from reelway.platform.cluster.admission import Refused, Waiting
from reelway.platform.cluster.kube_api import KubeApi
from reelway.platform.cluster.operator_settings import (
    LeaseSettings,
    OperatorSettings,
    OperatorWebhookSettings,
    RaySettings,
)
from reelway.platform.cluster.release_checks import ReleaseChecks
from reelway.platform.cluster.release_reconciler import PATH, ReleaseReconciler
from reelway.platform.cluster.rollout_operator import RolloutOperator
from reelway.platform.contracts.manifest import MANIFEST_FILE
from reelway.platform.release.signing import KeyPair, create_keys, load_private_key
from reelway.platform.release.store import ReleaseStore
from reelway.platform.supervised_thread import SupervisedThread

FAILED = [{"name": "recall_at_50", "value": 0.1, "bound": 0.3, "comparison": ">=", "passed": False}]
RESOURCES: Final = f"/apis/{PATH.replace('/releases', '')}/namespaces/test/releases"
WAIVER = {"gate": "recall_at_50", "reason": "a new catalogue", "by": "ada"}


class Releases:
    """A store, its trusted key, and the running checks."""

    def __init__(self, folder: Path, url: str, *, wait_s: float = 30.0) -> None:
        self.keys: KeyPair = create_keys(folder / "keys")
        self.key = load_private_key(self.keys.private)
        self._folder = folder
        self.store = ReleaseStore(url)
        self.checks = ReleaseChecks(url, folder / "keys", wait_s=wait_s)

    def add(self, name: str, key: Ed25519PrivateKey | None = None, **fields: Any) -> str:
        manifest = sign_manifest(make_release_folder(self._folder / name, videos=64, **fields), key or self.key)
        write_manifest(self._folder / name, manifest)
        return str(self.store.write(self._folder / name, manifest))


@pytest.fixture
def releases(tmp_path: Path) -> Iterator[Releases]:
    with running(Releases(tmp_path, str(tmp_path / "store"))) as made:
        yield made


@contextmanager
def running(releases: Releases) -> Iterator[Releases]:
    """Runs the checks while the block runs."""
    stop = threading.Event()
    thread = SupervisedThread(releases.checks.run, args=(stop,), name="checks", stop=stop)
    thread.start()
    try:
        yield releases
    finally:
        stop.set()
        thread.join(20)


def test_sound_release_may_start(releases: Releases) -> None:
    assert releases.checks.problem(releases.add("sound")) is None


def test_failed_gate_is_refused_unless_it_is_waived(releases: Releases) -> None:
    refused = releases.checks.problem(releases.add("failed", gates=FAILED))
    assert isinstance(refused, Refused)
    assert "recall_at_50 is 0.1, expected >= 0.3" in refused.reason
    assert releases.checks.problem(releases.add("waived", gates=FAILED, waivers=[WAIVER])) is None


def test_release_of_another_key_is_refused(releases: Releases) -> None:
    foreign = releases.checks.problem(releases.add("foreign", Ed25519PrivateKey.generate()))
    assert isinstance(foreign, Refused)
    assert "signed by none of the trusted keys" in foreign.reason


def test_release_for_another_version_is_refused(releases: Releases) -> None:
    made = make_release_folder(releases.keys.public.parent.parent / "other", videos=64)
    dimensions = made.dimensions.model_copy(update={"tasks": ("like",)})
    refused = releases.checks.problem(releases.add("other", seed=3, dimensions=dimensions.model_dump()))
    assert isinstance(refused, Refused)
    assert "build it again" in refused.reason


def test_hostile_manifest_is_refused_while_others_start(releases: Releases, tmp_path: Path) -> None:
    sound, hostile = releases.add("sound"), "e" * 64
    (tmp_path / "store" / hostile).mkdir()
    (tmp_path / "store" / hostile / MANIFEST_FILE).write_bytes(b"[" * 5_000 + b"]" * 5_000)
    assert isinstance(releases.checks.problem(hostile), Refused)
    assert releases.checks.problem(sound) is None


def test_unknown_release_waits(releases: Releases) -> None:
    waiting = releases.checks.problem("f" * 64)
    assert isinstance(waiting, Waiting)
    assert "is not in" in waiting.reason


def test_missing_keys_wait_until_they_are_mounted(releases: Releases) -> None:
    release = releases.add("sound")
    kept = releases.keys.public.read_bytes()
    releases.keys.public.unlink()
    waiting = releases.checks.problem(release)
    assert isinstance(waiting, Waiting)
    assert "releases cannot be verified" in waiting.reason
    releases.keys.public.write_bytes(kept)
    assert releases.checks.problem(release) is None


class _HangingFiles(MemoryFileSystem):  # type: ignore[misc]
    """An object store that answers reads only after ``answering`` is set."""

    protocol = "hanging"
    cachable = False
    store: dict[str, Any] = {}  # noqa: RUF012 - MemoryFileSystem keeps its content on the class
    pseudo_dirs = [""]  # noqa: RUF012
    answering = threading.Event()

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "rb":
            self.answering.wait(30)
        return super()._open(path, mode, **options)


def test_store_that_hangs_delays_the_operator_briefly(tmp_path: Path) -> None:
    fsspec.register_implementation("hanging", _HangingFiles, clobber=True)
    _HangingFiles.answering.set()
    made = Releases(tmp_path, "hanging://releases", wait_s=0.5)
    release = made.add("sound")
    _HangingFiles.answering.clear()
    with running(made):
        began = time.monotonic()
        waiting = made.checks.problem(release)
        assert time.monotonic() - began < 5
        assert isinstance(waiting, Waiting)
        assert "has not answered yet" in waiting.reason
        _HangingFiles.answering.set()
        deadline = time.monotonic() + 20
        while made.checks.problem(release) is not None:
            assert time.monotonic() < deadline


@pytest.fixture
def server() -> Iterator[FakeApiServer]:
    fake = FakeApiServer()
    fake.put(RESOURCES, {"metadata": {}, "items": []})
    yield fake
    fake.close()


@pytest.fixture
def api(server: FakeApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KubeApi:
    monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig")))
    return KubeApi()


def phases(server: FakeApiServer) -> dict[str, str]:
    return {name: one.get("status", {}).get("phase", "") for name, one in server.objects.items()}


def test_operator_starts_no_rollout_of_a_release_whose_gate_failed(
    server: FakeApiServer, api: KubeApi, releases: Releases, tmp_path: Path
) -> None:
    """A sound release of the same backend starts after it."""
    (tmp_path / "token").write_text("a-token-of-this-test")
    settings = OperatorSettings(
        identity="operator-0",
        interval_s=0.1,
        webhook=OperatorWebhookSettings(token_file=tmp_path / "token"),
        lease=LeaseSettings(duration_s=5),
        ray=RaySettings(trusted_hosts=("127.0.0.1",)),
        release_store=releases.store.url,
        public_keys=releases.keys.public.parent,
    )
    serve = FakeServe()
    backend = {"serve": {"api": serve.url, "url": serve.url}}
    server.apply(rollout("failed", releases.add("failed", gates=FAILED), backend=backend))
    operator, stop = RolloutOperator(api, settings), threading.Event()
    thread = threading.Thread(target=operator.run, args=(stop,))
    thread.start()
    try:
        until("the rollout is refused", lambda: phases(server)["failed"] == "Refused", 20)
        assert "recall_at_50" in server.objects["failed"]["status"]["reason"]
        server.apply(rollout("sound", releases.add("sound", seed=4), backend=backend))
        until("the sound release starts", lambda: phases(server)["sound"] not in ("", "Waiting", "Refused"), 20)
    finally:
        stop.set()
        thread.join(20)
        serve.close()
    assert not thread.is_alive()


def test_hostile_manifest_does_not_end_the_records_of_releases(
    server: FakeApiServer, api: KubeApi, releases: Releases, tmp_path: Path
) -> None:
    hostile = tmp_path / "store" / ("0" * 64)  # read before every other release
    hostile.mkdir(parents=True)
    (hostile / MANIFEST_FILE).write_bytes(b"[" * 5_000 + b"]" * 5_000)
    stop = threading.Event()
    records = SupervisedThread(ReleaseReconciler(api, releases.store.url).run, args=(stop, 0.05), name="records")
    records.start()
    try:
        for name in ("first", "second"):
            path = f"{RESOURCES}/{releases.add(name, seed=len(name))[:12]}"
            until(f"release {name} is recorded", partial(server.other.__contains__, path), 20)
        assert records.is_alive()
    finally:
        stop.set()
        records.join(20)
