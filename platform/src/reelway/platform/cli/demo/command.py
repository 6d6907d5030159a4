"""``reelway demo``: the whole path, each step the very command an ML engineer would type.

Nothing is done here that the other commands don't do; this one only puts them in a row, shows the result and
cleans up.
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

from reelway.platform.cli.demo import report, rollouts
from reelway.platform.cli.demo.walk import DemoWalk
from reelway.platform.cli.processes import child, reelway_command, run_to_end
from reelway.platform.cli.terminal import console, say
from reelway.platform.errors import ConfigError, ServingError
from reelway.platform.runs import RunDirectory

SERVE_DEADLINE_S = 180.0


class DataChoice(StrEnum):
    """What the demo learns from."""

    SIMULATED = "simulated"
    ML_100K = "ml-100k"


@dataclass(frozen=True)
class DemoOptions:
    """What the person asked for."""

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
        """Whether there are viewers who can be asked: those of a simulated service."""
        return self.rollouts and self.data is DataChoice.SIMULATED


def register(app: typer.Typer) -> None:
    """Add ``reelway demo``."""

    @app.command()
    def demo(
        run: Path = typer.Option(Path("runs/demo"), help="Where everything the demo makes is kept."),
        data: DataChoice = typer.Option(DataChoice.SIMULATED, help="Simulated short videos, or MovieLens-100K."),
        data_dir: Path | None = typer.Option(None, help="Folder of MovieLens-100K, for --data ml-100k."),
        workers: int = typer.Option(2, min=1, help="Ray Train workers."),
        gpus: int = typer.Option(0, min=0, help="GPUs for training; 0 trains on CPU."),
        seed: int = typer.Option(0, help="Seed of the simulation and of training."),
        keep: bool = typer.Option(False, help="Leave the service running at the end."),
        rollouts: bool = typer.Option(True, help="Also roll releases out under traffic; needs simulated viewers."),
    ) -> None:
        """Events -> features -> training -> release -> rollouts -> recommendations, for real, on this machine.

        The service begins with popular videos. The trained release is rolled out over it and promoted; then one that
        viewers like less, one that fails and one that is slow are rolled out, and each is taken back by its evidence,
        without a failed request. --no-rollouts ends with the trained release being served.

        Steps that were done before with the same inputs are skipped. Ctrl-C stops everything that was started.

        Example: reelway demo --run runs/demo --keep
        """
        options = DemoOptions(RunDirectory(run), data, data_dir, workers, gpus, seed, keep, rollouts)
        if data is DataChoice.ML_100K and data_dir is None:
            raise ConfigError("--data ml-100k needs the folder that holds it: --data-dir DIR (make demo DATA_DIR=DIR)")
        with only_one(options.run):
            run_demo(options)


@contextmanager
def only_one(run: RunDirectory) -> Iterator[None]:
    """Hold the run directory for one demo at a time.

    Raises:
        ConfigError: another one holds it.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    with (run.path / "demo.lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another demo is working in {run.path}; wait for it, "
                "or use another folder with --run (make demo RUN=DIR)"
            ) from None
        yield


def run_demo(options: DemoOptions) -> None:
    """All steps."""
    run, offline = options.run, offline_steps(options)
    walk = DemoWalk(len(offline) + 2 + (2 + len(rollouts.SCENES) if options.with_rollouts else 0))
    if options.rollouts and not options.with_rollouts:
        say(f"no rollouts: {options.data.value} has no viewers who could be asked; --data simulated has")
    rollouts.lay_aside_earlier_rollouts(run)
    for title, command in offline:
        walk.step(title, command)
        run_to_end(reelway_command(*command))
    serve = ["serve", "--run", str(run.path), "--port", "0"]
    if options.with_rollouts:
        commands = rollouts.rehearsal_commands(run, options.seed)
        walk.step("Releases to begin with and to take back", *commands)
        rollouts.make_rehearsals(commands)
        first, share = rollouts.first_release(run)[:12], str(rollouts.PARITY_RATIO)
        serve += ["--release", first, "--parity-sample-ratio", share]
    else:
        serve += ["--release", str(run.record("release")["summary"]["release_id"])[:12]]
    walk.step("Deploy with Ray Serve", serve)
    with ExitStack() as stack:
        url = stack.enter_context(serving(options, serve))
        played = rollouts.play(run, walk) if options.with_rollouts else None
        walk.step("Recommendations over HTTP", ["recommend", "--url", url, "--viewer", "..."])
        report.show(run, url)
        if played:
            rollouts.show(*played)
        walk.show_times()
        say(f"\nThe whole demo took {walk.elapsed_s:.0f} s.")
        if played:
            rollouts.assess(*played)
        if options.keep:
            stack.pop_all()
            pid = _serving_record(run)["pid"]
            say(f"The service stays up at {url}. Stop it with: kill {pid}")


def offline_steps(options: DemoOptions) -> list[tuple[str, list[str]]]:
    """Titles and commands of everything before serving."""
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
        ("Verify it", ["release", "verify", *run]),
    ]


@contextmanager
def serving(options: DemoOptions, command: list[str]) -> Iterator[str]:
    """The service as a child process, from answering until the block is left. Yields its URL.

    Raises:
        ServingError: it ended, or didn't answer in time; the message names its log.
    """
    log = options.run.path / "serving.log"
    (options.run.path / "serving.json").unlink(missing_ok=True)
    with child(reelway_command(*command), log=log) as process:
        yield _wait_until_answering(options.run, process, log)


def _wait_until_answering(run: RunDirectory, process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + SERVE_DEADLINE_S
    with console.status(f"starting Ray Serve (log: {log})"):
        while time.monotonic() < deadline:
            if (code := process.poll()) is not None:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                raise ServingError(f"`reelway serve` ended with exit code {code} before it answered:\n{tail}")
            if (run.path / "serving.json").exists():
                url = str(_serving_record(run)["url"])
                if httpx.get(f"{url}/healthz", timeout=10).is_success:
                    say(f"serving release {_serving_record(run)['release'][:12]} at {url}")
                    return url
            time.sleep(0.1)
    raise ServingError(f"`reelway serve` did not answer within {SERVE_DEADLINE_S:g} s; its log is {log}")


def _serving_record(run: RunDirectory) -> dict[str, str]:
    record: dict[str, str] = json.loads((run.path / "serving.json").read_text())
    return record
