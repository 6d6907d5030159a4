"""Training on Ray: two workers on two CPUs, and a worker that is killed leaves no trace in the result."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
import torch
from tests.pipelines.training.made_rows import made_table, write_rows

from reelway.pipelines.training.config import TrainingConfig, load_config
from reelway.pipelines.training.fit import Fitted, Window, fit, window_of
from reelway.pipelines.training.loop import EpochReport
from reelway.pipelines.training.negatives import RankerRows, shown_rows
from reelway.pipelines.training.ray_train import RayResources, fit_on_ray
from reelway.pipelines.training.rows import TrainingRows, load_rows

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

Inputs = tuple[TrainingRows, RankerRows, Window, TrainingConfig]


@pytest.fixture(scope="module", autouse=True)
def ray_runtime() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    rows = load_rows(write_rows(tmp_path_factory.mktemp("rows") / "r.parquet", made_table(requests=200)))
    overrides = (
        "two_tower.dim=16", "two_tower_loop.epochs=3", "two_tower_loop.batch_size=64",
        "two_tower_loop.checkpoint_steps=1", "ranker_loop.epochs=2", "ranker_loop.batch_size=128",
    )  # fmt: skip
    config = load_config("demo", overrides=overrides)
    window = window_of(rows, config)
    return rows, shown_rows(rows, window.training(rows)), window, config


@pytest.fixture(scope="module")
def straight(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    return fit_on_ray(*inputs, RayResources(workers=2), storage=tmp_path_factory.mktemp("straight"))


def assert_same(one: Fitted, other: Fitted) -> None:
    assert one.curves == other.curves
    for ours, theirs in ((one.two_tower, other.two_tower), (one.ranker, other.ranker)):
        for name, values in ours.state_dict().items():
            assert torch.equal(values, theirs.state_dict()[name]), name


def test_a_killed_worker_is_replaced_and_the_result_is_that_of_an_undisturbed_run(
    inputs: Inputs, straight: Fitted, tmp_path: Path
) -> None:
    reports: list[EpochReport] = []
    killed: list[int] = []

    def kill_a_worker_after_the_first_epoch(report: EpochReport) -> None:
        reports.append(report)
        if not killed:
            workers = [
                process.pid
                for process in psutil.Process().children(recursive=True)
                if "RayTrainWorker" in " ".join(process.cmdline())
            ]
            killed.append(workers[-1])
            os.kill(workers[-1], signal.SIGKILL)

    fitted = fit_on_ray(
        *inputs, RayResources(workers=2), storage=tmp_path, on_epoch=kill_a_worker_after_the_first_epoch
    )
    assert killed
    assert_same(fitted, straight)
    assert {(report.stage, report.epoch) for report in reports} == {
        *(("two_tower", epoch) for epoch in range(3)), *(("ranker", epoch) for epoch in range(2))
    }  # fmt: skip
    assert not list(tmp_path.iterdir()), "rows and checkpoints of a finished run are taken away"


def test_one_worker_on_ray_computes_what_the_loop_computes_without_it(inputs: Inputs, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)  # as the one worker has them
    try:
        alone = fit(*inputs)
    finally:
        torch.set_num_threads(threads)
    assert_same(fit_on_ray(*inputs, RayResources(workers=1), storage=tmp_path), alone)
