"""Releases of a store as resources, on a real API server."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
from tests.cluster.conftest import Kubectl
from tests.e2e.waiting import until
from tests.release_files import make_release_folder

from reelway.platform.cluster.kube_api import KubeApi
from reelway.platform.cluster.release_records import ReleaseRecords
from reelway.platform.contracts.manifest import MANIFEST_FILE
from reelway.platform.errors import ReelwayError
from reelway.platform.release.signing import create_keys, load_private_key
from reelway.platform.release.store import ReleaseStore

pytestmark = pytest.mark.cluster


@pytest.fixture
def store(tmp_path: Path) -> ReleaseStore:
    return ReleaseStore(str(tmp_path / "store"))


@pytest.fixture
def made(store: ReleaseStore, tmp_path: Path) -> tuple[str, str]:
    """Two releases in the store."""
    key = load_private_key(create_keys(tmp_path / "keys").private)
    first, second = (
        store.write(tmp_path / name, make_release_folder(tmp_path / name, seed=seed, key=key))
        for seed, name in enumerate(("first", "second"))
    )
    return first, second


def read(kubectl: Kubectl, release: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(kubectl.run("get", "releases.reelway.dev", release[:12], "-o", "json"))
    return found


def test_what_is_in_the_store_is_a_resource_with_what_its_manifest_says(
    kubectl: Kubectl, api: KubeApi, store: ReleaseStore, made: tuple[str, str]
) -> None:
    records = ReleaseRecords(api, store.url)
    records.look()
    for release in made:
        document, manifest = read(kubectl, release), store.manifest(release)  # type: ignore[arg-type]
        assert document["spec"] == {"id": release, "store": store.url, "note": ""}
        status = document["status"]
        assert isinstance(status, dict)
        assert (status["name"], status["gates"]) == (manifest.name, "hold")
        assert set(status["metrics"]) == set(manifest.metrics)
    kubectl.run("wait", "--for=condition=InStore", f"release.reelway.dev/{made[0][:12]}", "--timeout=5s")
    listed = kubectl.run("get", "releases.reelway.dev")
    assert made[1][:12] in listed
    assert "hold" in listed


def test_looking_again_writes_nothing(
    kubectl: Kubectl, api: KubeApi, store: ReleaseStore, made: tuple[str, str]
) -> None:
    records = ReleaseRecords(api, store.url)
    records.look()
    before = read(kubectl, made[0])["metadata"]
    records.look()
    assert read(kubectl, made[0])["metadata"] == before


def test_one_that_is_gone_from_the_store_says_so_and_is_found_again(
    kubectl: Kubectl, api: KubeApi, store: ReleaseStore, made: tuple[str, str], tmp_path: Path
) -> None:
    records = ReleaseRecords(api, store.url)
    records.look()
    shutil.move(tmp_path / "store" / made[0], tmp_path / "aside")
    records.look()
    kubectl.run("wait", "--for=condition=InStore=False", f"release.reelway.dev/{made[0][:12]}", "--timeout=5s")
    shutil.move(tmp_path / "aside", tmp_path / "store" / made[0])
    records.look()
    kubectl.run("wait", "--for=condition=InStore", f"release.reelway.dev/{made[0][:12]}", "--timeout=5s")


def test_a_damaged_manifest_is_told_of_and_keeps_no_other_release_back(
    kubectl: Kubectl, api: KubeApi, store: ReleaseStore, made: tuple[str, str], tmp_path: Path
) -> None:
    damaged, sound = sorted(made)
    path = tmp_path / "store" / damaged / MANIFEST_FILE
    path.write_text(path.read_text().replace('"seed"', '"seeds"'))
    with pytest.raises(ReelwayError, match=damaged[:12]):
        ReleaseRecords(api, store.url).look()
    assert read(kubectl, sound)["spec"]
    assert damaged[:12] not in kubectl.run("get", "releases.reelway.dev")


def test_a_release_that_comes_while_it_looks_is_recorded(
    kubectl: Kubectl, api: KubeApi, store: ReleaseStore, tmp_path: Path
) -> None:
    key = load_private_key(create_keys(tmp_path / "keys").private)
    stop = threading.Event()
    looking = threading.Thread(target=ReleaseRecords(api, store.url).run, args=(stop, 0.1))
    looking.start()
    try:
        release = store.write(tmp_path / "new", make_release_folder(tmp_path / "new", key=key))
        until("it is recorded", lambda: release[:12] in kubectl.run("get", "releases.reelway.dev"), 10)
    finally:
        stop.set()
        looking.join()
