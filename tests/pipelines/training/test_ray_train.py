"""Ray Train with two workers, one of them killed, gives the result of two undisturbed processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
import torch
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines.training_row_fixtures import made_table, write_rows
from tests.support.pipelines.two_processes import fit_in_two_processes

from reelway.pipelines.training.config import load_config
from reelway.pipelines.training.fit import make_training_split
from reelway.pipelines.training.loop import EpochReport
from reelway.pipelines.training.negatives import impression_rows
from reelway.pipelines.training.ray_train import RayResources, fit_on_ray
from reelway.pipelines.training.rows import load_rows

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

SETTINGS = (
    "two_tower.dim=16", "two_tower_loop.epochs=3", "two_tower_loop.batch_size=64",
    "two_tower_loop.checkpoint_steps=1", "ranker_loop.epochs=2", "ranker_loop.batch_size=128",
)  # fmt: skip


@pytest.fixture
def ray_runtime() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.long
@pytest.mark.usefixtures("ray_runtime")
def test_run_with_a_killed_worker_equals_an_undisturbed_run(tmp_path: Path) -> None:
    rows_file = write_rows(tmp_path / "rows.parquet", made_table(requests=200))
    config = load_config("demo", overrides=SETTINGS)
    straight = fit_in_two_processes(rows_file, config, tmp_path)

    rows = load_rows(rows_file, DIMENSIONS)
    window = make_training_split(rows, config)
    learn = impression_rows(rows, window.training(rows))
    epochs: set[tuple[str, int]] = set()
    killed: list[int] = []

    def kill_a_worker_after_the_first_epoch(report: EpochReport) -> None:
        epochs.add((report.stage, report.epoch))
        if not killed:
            workers = [
                process.pid
                for process in psutil.Process().children(recursive=True)
                if "RayTrainWorker" in " ".join(process.cmdline())
            ]
            killed.append(workers[-1])
            os.kill(workers[-1], signal.SIGKILL)

    storage = tmp_path / "storage"
    fitted = fit_on_ray(
        rows, learn, window, config, RayResources(workers=2), storage=storage,
        on_epoch=kill_a_worker_after_the_first_epoch,
    )  # fmt: skip
    assert killed
    assert epochs == {*(("two_tower", epoch) for epoch in range(3)), *(("ranker", epoch) for epoch in range(2))}
    assert fitted.curves == straight.curves
    for actual, expected in ((fitted.two_tower, straight.two_tower), (fitted.ranker, straight.ranker)):
        for name, values in actual.state_dict().items():
            assert torch.equal(values, expected.state_dict()[name]), name
    assert not list(storage.iterdir()), "rows and checkpoints of a finished run are removed"
