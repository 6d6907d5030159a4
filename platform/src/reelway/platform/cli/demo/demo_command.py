"""``reelway demo``: runs all steps from events to rollouts on one machine, and prints the result.

Each step is a ``reelway`` command in a child process. All child processes are terminated at the end.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import httpx
import typer

from reelway.platform.cli.demo import live, report, rollouts
from reelway.platform.cli.demo.demo_progress import DemoProgress
from reelway.platform.cli.processes import ChildProcesses, reelway_command, run_command
from reelway.platform.cli.supervisor import leave_processes_running, supervise
from reelway.platform.cli.terminal import print_status, stderr_console
from reelway.platform.errors import ConfigError, ServingError
from reelway.platform.run_directory import RunDirectory
from reelway.platform.stop_signals import STOP_LIMIT_S

SERVE_DEADLINE_S = 180.0


class DataChoice(StrEnum):
    """Data set of the demo."""

    SIMULATED = "simulated"
    ML_100K = "ml-100k"


@dataclass(frozen=True)
class DemoOptions:
    run: RunDirectory
    data: DataChoice
    data_dir: Path | None
    workers: int
    gpus: int
    seed: int
    keep: bool
    rollouts: bool = True

    @property
    def with_rollouts(self) -> bool:
        """Whether the demo rolls out releases, which requires simulated viewers."""
        return self.rollouts and self.data is DataChoice.SIMULATED

    @property
    def with_live(self) -> bool:
        """Whether the demo plays the live scenes, which require videos with durations and content vectors."""
        return self.data is DataChoice.SIMULATED


def register(app: typer.Typer) -> None:
    """Adds ``reelway demo``."""

    @app.command()
    def demo(
        run: Path = typer.Option(Path("runs/demo"), help="Run directory for all data of the demo."),
        data: DataChoice = typer.Option(
            DataChoice.SIMULATED, help="Data set: simulated short videos, or MovieLens-100K."
        ),
        data_dir: Path | None = typer.Option(None, help="Folder with MovieLens-100K; required by --data ml-100k."),
        workers: int = typer.Option(2, min=1, help="Number of Ray Train workers of the training step."),
        gpus: int = typer.Option(0, min=0, help="Number of GPUs for training; 0 trains on CPUs."),
        seed: int = typer.Option(0, help="Random seed for the simulation and the training."),
        keep: bool = typer.Option(False, help="Leave the service running when the demo has ended."),
        rollouts: bool = typer.Option(True, help="Also roll out releases under traffic; requires --data simulated."),
    ) -> None:
        """Run all steps on this machine: events, features, training, release, rollouts, recommendations.

        The service starts with a release that recommends popular videos. The trained release is rolled out over it and
        promoted. Then three bad releases are rolled out: viewers like the first less, the second fails, the third is
        slow. Each is rolled back on evidence without a failed request. With --no-rollouts the trained release is
        served directly. At the end, pages without repeats, outcomes, an upload, a takedown and a trend show what counts
        within seconds.

        Steps that were completed with the same inputs are skipped. Ctrl-C stops all processes that the demo started.

        Example: reelway demo --run runs/demo --keep
        """
        supervise(STOP_LIMIT_S)
        options = DemoOptions(RunDirectory(run), data, data_dir, workers, gpus, seed, keep, rollouts)
        if data is DataChoice.ML_100K and data_dir is None:
            raise ConfigError("--data ml-100k requires its folder; pass --data-dir DIR (make demo DATA_DIR=DIR)")
        with exclusive_run_lock(options.run):
            run_demo(options)


@contextmanager
def exclusive_run_lock(run: RunDirectory) -> Iterator[None]:
    """Locks the run directory for one demo at a time.

    Raises:
        ConfigError: if another demo holds the lock.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    with (run.path / "demo.lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{run.path}: another demo is running; wait until it has ended, "
                "or use another directory with --run (make demo RUN=DIR)"
            ) from None
        yield


def run_demo(options: DemoOptions) -> None:
    run, offline = options.run, offline_steps(options)
    progress = DemoProgress(
        len(offline) + 2 + options.with_live + (2 + len(rollouts.SCENARIOS) if options.with_rollouts else 0)
    )
    if options.rollouts and not options.with_rollouts:
        print_status(f"no rollouts: {options.data.value} has no simulated viewers; use --data simulated")
    rollouts.archive_previous_rollouts(run)
    for title, command in offline:
        progress.step(title, command)
        run_command(reelway_command(*command))
    serve = ["serve", "--run", str(run.path), "--port", "0"]
    if options.with_rollouts:
        commands = rollouts.drill_release_commands(run, options.seed)
        progress.step("Build the initial release and the bad releases", *commands)
        rollouts.build_drill_releases(commands)
        first, share = rollouts.initial_release(run)[:12], str(rollouts.PARITY_RATIO)
        serve += ["--release", first, "--parity-sample-ratio", share]
    else:
        serve += ["--release", str(run.record("release")["summary"]["release_id"])[:12]]
    progress.step("Deploy with Ray Serve", serve)
    with ExitStack() as stack:
        url = stack.enter_context(running_service(options, serve))
        played = rollouts.run_scenarios(run, progress) if options.with_rollouts else None
        progress.step("Recommendations over HTTP", ["recommend", "--url", url, "--viewer", "..."])
        report.print_demo_report(run, url)
        scenes = None
        if options.with_live:
            progress.step("Live: pages, outcomes, an upload, a takedown, a trend", ["catalogue", "upsert", "..."])
            scenes = live.play_live_scenes(run, url)
        if played:
            rollouts.print_scenario_results(*played)
        progress.show_times()
        print_status(f"\nThe demo took {progress.elapsed_s:.0f} s.")
        if played:
            rollouts.check_results(*played)
        if scenes:
            live.check_live_results(scenes)
        if options.keep:
            pid = _read_serving_record(run)["pid"]
            print_status(f"The service keeps running at {url}. Stop it with: kill {pid}")


def offline_steps(options: DemoOptions) -> list[tuple[str, list[str]]]:
    """Returns titles and commands of all steps before serving."""
    run, seed = ["--run", str(options.run.path)], ["--seed", str(options.seed)]
    if options.data is DataChoice.SIMULATED:
        events = ("Simulate a short-video service", ["simulate", *run, *seed])
        preset = "demo"
    else:
        events = ("Read MovieLens-100K", ["import", "ml-100k", str(options.data_dir), *run])
        preset = "ml-100k"
    workers = ["--workers", str(options.workers), "--gpus", str(options.gpus)]
    return [
        events,
        ("Features, point-in-time training rows, online store", ["features", *run]),
        ("Train retrieval and ranking with Ray Train", ["train", *run, *seed, *workers, "--preset", preset]),
        ("Evaluate on the later time slice", ["evaluate", *run]),
        ("Build and sign a release", ["release", "build", *run]),
        ("Verify the release", ["release", "verify", *run]),
    ]


@contextmanager
def running_service(options: DemoOptions, command: list[str]) -> Iterator[str]:
    """Runs the service as a child process and yields its URL once it responds.

    With ``keep`` the service stays when the block is left without an error.

    Raises:
        ServingError: if the service exits or does not respond in time; the message names its log.
    """
    log = options.run.path / "serving.log"
    (options.run.path / "serving.json").unlink(missing_ok=True)
    with ChildProcesses() as children:
        yield _wait_until_answering(options.run, children.start(reelway_command(*command), log), log)
        if options.keep:
            children.leave_running()
            leave_processes_running()


def _wait_until_answering(run: RunDirectory, process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + SERVE_DEADLINE_S
    with stderr_console.status(f"starting Ray Serve (log: {log})"):
        while time.monotonic() < deadline:
            if (code := process.poll()) is not None:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                raise ServingError(f"`reelway serve` exited with code {code} before it responded:\n{tail}")
            if (run.path / "serving.json").exists():
                url = str(_read_serving_record(run)["url"])
                if httpx.get(f"{url}/healthz", timeout=10).is_success:
                    print_status(f"serving release {_read_serving_record(run)['release'][:12]} at {url}")
                    return url
            time.sleep(0.1)
    raise ServingError(f"`reelway serve` did not respond within {SERVE_DEADLINE_S:g} s; see its log {log}")


def _read_serving_record(run: RunDirectory) -> dict[str, str]:
    record: dict[str, str] = json.loads((run.path / "serving.json").read_text())
    return record
