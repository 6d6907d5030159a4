"""Release resources for the releases of a store, on a real API server."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
from tests.support.cluster.kubectl import Kubectl
from tests.support.e2e.wait_until import until
from tests.support.release_files import make_release_folder

from reelway.platform.cluster.kube_api import KubeApi
from reelway.platform.cluster.release_reconciler import ReleaseReconciler
from reelway.platform.contracts.manifest import MANIFEST_FILE
from reelway.platform.errors import ReelwayError
from reelway.platform.release.signing import create_keys, load_private_key
from reelway.platform.release.store import ReleaseStore

pytestmark = pytest.mark.cluster


@pytest.fixture
def store(tmp_path: Path) -> ReleaseStore:
    return ReleaseStore(str(tmp_path / "store"))


@pytest.fixture
def release_ids(store: ReleaseStore, tmp_path: Path) -> tuple[str, str]:
    """Ids of two releases in the store."""
    key = load_private_key(create_keys(tmp_path / "keys").private)
    first, second = (
        store.write(tmp_path / name, make_release_folder(tmp_path / name, seed=seed, key=key))
        for seed, name in enumerate(("first", "second"))
    )
    return first, second


def read(kubectl: Kubectl, release: str) -> dict[str, object]:
    resource: dict[str, object] = json.loads(kubectl.run("get", "releases.reelway.dev", release[:12], "-o", "json"))
    return resource


def test_stored_release_becomes_a_resource_with_its_metrics(
    kubectl: Kubectl, api: KubeApi, store: ReleaseStore, release_ids: tuple[str, str]
) -> None:
    records = ReleaseReconciler(api, store.url)
    records.reconcile()
    for release in release_ids:
        document, manifest = read(kubectl, release), store.manifest(release)  # type: ignore[arg-type]
        assert document["spec"] == {"id": release, "store": store.url, "note": ""}
        status = document["status"]
        assert isinstance(status, dict)
        assert (status["name"], status["gates"]) == (manifest.name, "hold")
        assert set(status["metrics"]) == set(manifest.metrics)
    kubectl.run("wait", "--for=condition=InStore", f"release.reelway.dev/{release_ids[0][:12]}", "--timeout=5s")
    listed = kubectl.run("get", "releases.reelway.dev")
    assert release_ids[1][:12] in listed
    assert "hold" in listed


def test_second_reconcile_writes_nothing(
    kubectl: Kubectl, api: KubeApi, store: ReleaseStore, release_ids: tuple[str, str]
) -> None:
    records = ReleaseReconciler(api, store.url)
    records.reconcile()
    before = read(kubectl, release_ids[0])["metadata"]
    records.reconcile()
    assert read(kubectl, release_ids[0])["metadata"] == before


def test_condition_in_store_follows_the_store(
    kubectl: Kubectl, api: KubeApi, store: ReleaseStore, release_ids: tuple[str, str], tmp_path: Path
) -> None:
    records = ReleaseReconciler(api, store.url)
    records.reconcile()
    shutil.move(tmp_path / "store" / release_ids[0], tmp_path / "aside")
    records.reconcile()
    kubectl.run("wait", "--for=condition=InStore=False", f"release.reelway.dev/{release_ids[0][:12]}", "--timeout=5s")
    shutil.move(tmp_path / "aside", tmp_path / "store" / release_ids[0])
    records.reconcile()
    kubectl.run("wait", "--for=condition=InStore", f"release.reelway.dev/{release_ids[0][:12]}", "--timeout=5s")


def test_damaged_manifest_does_not_block_other_releases(
    kubectl: Kubectl, api: KubeApi, store: ReleaseStore, release_ids: tuple[str, str], tmp_path: Path
) -> None:
    damaged, sound = sorted(release_ids)
    path = tmp_path / "store" / damaged / MANIFEST_FILE
    path.write_text(path.read_text().replace('"seed"', '"seeds"'))
    with pytest.raises(ReelwayError, match=damaged[:12]):
        ReleaseReconciler(api, store.url).reconcile()
    assert read(kubectl, sound)["spec"]
    assert damaged[:12] not in kubectl.run("get", "releases.reelway.dev")


def test_new_release_is_recorded_while_running(
    kubectl: Kubectl, api: KubeApi, store: ReleaseStore, tmp_path: Path
) -> None:
    key = load_private_key(create_keys(tmp_path / "keys").private)
    stop = threading.Event()
    looking = threading.Thread(target=ReleaseReconciler(api, store.url).run, args=(stop, 0.1))
    looking.start()
    try:
        release = store.write(tmp_path / "new", make_release_folder(tmp_path / "new", key=key))
        until("the release is recorded", lambda: release[:12] in kubectl.run("get", "releases.reelway.dev"), 10)
    finally:
        stop.set()
        looking.join()
