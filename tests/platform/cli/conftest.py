"""A run directory with two real releases, built once; each test gets a copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.support.cli.rollout_fixtures import RunDirectoryEnvironment
from tests.support.release_files import make_release_folder

from reelway.platform.release.signing import create_keys, load_private_key
from reelway.platform.release.store import ReleaseStore


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[str, str]]:
    """A run directory with keys and two signed releases, and the release ids."""
    run = tmp_path_factory.mktemp("released")
    key = load_private_key(create_keys(run / "keys").private)
    store = ReleaseStore(str(run / "releases"))
    ids = []
    for seed in (0, 1):
        folder = run / f"made-{seed}"
        ids.append(str(store.write(folder, make_release_folder(folder, videos=60, seed=seed, key=key))))
        shutil.rmtree(folder)
    return run, (ids[0], ids[1])


@pytest.fixture
def run_with_releases(tmp_path: Path, released: tuple[Path, tuple[str, str]]) -> Path:
    """A copy of the run directory that a test may change."""
    run = tmp_path / "run"
    shutil.copytree(released[0], run)
    return run


@pytest.fixture
def releases(released: tuple[Path, tuple[str, str]]) -> tuple[str, str]:
    return released[1]


@pytest.fixture
def world(tmp_path: Path) -> RunDirectoryEnvironment:
    """A served run with a controller that reconciles when a test calls it."""
    environment = RunDirectoryEnvironment(tmp_path)
    environment.served()
    environment.controlled()
    return environment
