"""The training loop: a plain torch function without Ray, files or model code.

All randomness of a step follows from (seed, epoch, step, worker). A run that resumes from a checkpoint therefore ends
with the same bits as an uninterrupted run. The loop is data-parallel if ``torch.distributed`` is initialised.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from reelway.pipelines.training.batches import Batches, Worker, to_device
from reelway.pipelines.training.config import LoopConfig
from reelway.platform.errors import TrainingError

State = dict[str, Any]


@dataclass(frozen=True)
class EpochReport:
    """Metrics of one epoch, averaged over its steps and the workers."""

    stage: str
    epoch: int  # from 0
    epochs: int
    metrics: dict[str, float]
    elapsed_s: float
    """Time of the steps alone."""
    steps: int
    ended_at_s: float
    """Unix seconds. The time between two epochs' ends includes checkpoint and report."""


OnEpoch = Callable[[EpochReport], None]


class Checkpoints(Protocol):
    """Storage of a run's state. All workers call both methods; the state of worker 0 is stored."""

    def save(self, state: State, metrics: dict[str, float]) -> None: ...

    def load(self) -> State | None: ...


class NoCheckpoints:
    """Stores nothing, for runs that are short enough to start again."""

    def save(self, state: State, metrics: dict[str, float]) -> None:
        """Does nothing."""

    def load(self) -> State | None:
        """Returns None."""
        return None


def current_worker() -> Worker:
    """Returns this process's rank among the data-parallel workers."""
    if dist.is_available() and dist.is_initialized():
        return Worker(dist.get_rank(), dist.get_world_size())
    return Worker()


def train(
    objective: nn.Module,
    batches: Batches,
    config: LoopConfig,
    *,
    seed: int,
    stage: str,
    device: torch.device | None = None,
    checkpoints: Checkpoints | None = None,
    on_epoch: OnEpoch | None = None,
) -> list[dict[str, float]]:
    """Fits ``objective`` in place and returns each epoch's metrics.

    Args:
        objective: module whose ``forward(batch)`` returns a mapping with ``loss`` and other scalars to report.
        batches: this worker's batches, with the same number of steps on every worker.
        seed: seed of all randomness, together with epoch, step and worker.
        stage: name of the model in reports and messages.
        checkpoints: source of the state to resume from; receives a state after every epoch and every
            ``config.checkpoint_steps`` steps.

    Raises:
        TrainingError: if the loss is no longer finite, or the checkpoint is of another model.
    """
    device = device or torch.device("cpu")
    checkpoints = checkpoints or NoCheckpoints()
    worker = current_worker()
    objective.to(device).train()
    wrapped = _data_parallel(objective, device)
    optimizer = _optimizer(objective, config)
    progress = _Progress()
    if (state := checkpoints.load()) is not None:
        progress = _restore(state, objective, optimizer, stage)

    with _deterministic():
        while progress.epoch < config.epochs:
            started = time.perf_counter()
            first = progress.step
            for step in range(first, batches.steps):
                _set_lr(optimizer, config, progress.epoch * batches.steps + step, config.epochs * batches.steps)
                torch.manual_seed(_step_seed(seed, stage, progress.epoch, step, worker.rank))
                progress.add(_step(wrapped, optimizer, batches.batch(progress.epoch, step), config, device))
                progress.step = step + 1
                if _is_due(progress.step, batches.steps, config):
                    checkpoints.save(_state(objective, optimizer, progress, stage), {})
            metrics = _averaged(progress, stage, optimizer)
            progress.curve.append(metrics)
            progress.next_epoch()
            elapsed_s = time.perf_counter() - started
            if on_epoch is not None:
                report = EpochReport(
                    stage, progress.epoch - 1, config.epochs, metrics, elapsed_s, batches.steps - first, time.time()
                )
                on_epoch(report)
            checkpoints.save(_state(objective, optimizer, progress, stage), metrics)
    objective.eval()
    return progress.curve


def _is_due(step: int, steps: int, config: LoopConfig) -> bool:
    """Whether a checkpoint within the epoch is due; the end of an epoch always saves one."""
    return bool(config.checkpoint_steps) and step < steps and step % (config.checkpoint_steps or 1) == 0


class _Progress:
    """Progress of a run: next step, metric sums of this epoch, metrics of finished epochs."""

    def __init__(self) -> None:
        self.epoch, self.step = 0, 0
        self.sums: dict[str, Tensor] = {}
        self.curve: list[dict[str, float]] = []

    def add(self, metrics: dict[str, Tensor]) -> None:
        for name, value in metrics.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def next_epoch(self) -> None:
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}


def _step(
    wrapped: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    config: LoopConfig,
    device: torch.device,
) -> dict[str, Tensor]:
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        metrics: dict[str, Tensor] = wrapped(to_device(batch, device))
    optimizer.zero_grad(set_to_none=True)
    metrics["loss"].backward()  # type: ignore[no-untyped-call]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(parameters, config.grad_clip)
    optimizer.step()
    return metrics


def _data_parallel(objective: nn.Module, device: torch.device) -> nn.Module:
    if current_worker().world == 1:
        return objective
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(objective, device_ids=devices, forward_sync_buffers=False)


def _optimizer(objective: nn.Module, config: LoopConfig) -> torch.optim.Optimizer:
    embeddings = {id(m.weight) for m in objective.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in objective.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1 and id(p) not in embeddings]
    not_decayed = [p for p in trained if p.ndim <= 1 or id(p) in embeddings]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": not_decayed, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def _set_lr(optimizer: torch.optim.Optimizer, config: LoopConfig, step: int, steps: int) -> None:
    warmup = max(1, round(steps * config.warmup_ratio))
    if step < warmup:
        ratio = (step + 1) / warmup
    else:
        fall = (step - warmup) / max(1, steps - warmup)
        ratio = config.final_lr_ratio + (1 - config.final_lr_ratio) * 0.5 * (1 + math.cos(math.pi * fall))
    for group in optimizer.param_groups:
        group["lr"] = config.lr * ratio


def _step_seed(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")


@contextmanager
def _deterministic() -> Iterator[None]:
    """Uses deterministic kernels where torch has them, and preserves the caller's random state."""
    strict, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    kernels: Any = torch.utils.deterministic
    fill = kernels.fill_uninitialized_memory
    with torch.random.fork_rng(enabled=True):
        torch.use_deterministic_algorithms(True, warn_only=True)
        kernels.fill_uninitialized_memory = False  # a debugging aid that slows every step
        try:
            yield
        finally:
            kernels.fill_uninitialized_memory = fill
            torch.use_deterministic_algorithms(strict, warn_only=warn)


def _averaged(progress: _Progress, stage: str, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    names = sorted(progress.sums)
    means = torch.stack([progress.sums[name] for name in names]) / progress.step
    if current_worker().world > 1:
        dist.all_reduce(means)
        means = means / current_worker().world
    metrics = dict(zip(names, means.tolist(), strict=True))
    if not all(math.isfinite(value) for value in metrics.values()):
        raise TrainingError(
            f"{stage}: epoch {progress.epoch + 1} ended with {metrics}, expected finite numbers; lower the learning "
            f"rate (last was {optimizer.param_groups[0]['lr']:.2g}) or check for extreme feature values"
        )
    return metrics


def _state(objective: nn.Module, optimizer: torch.optim.Optimizer, progress: _Progress, stage: str) -> State:
    return {
        "stage": stage,
        "objective": objective.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": progress.epoch,
        "step": progress.step,
        "sums": _all_gather(progress.sums),
        "curve": progress.curve,
    }


def _restore(state: State, objective: nn.Module, optimizer: torch.optim.Optimizer, stage: str) -> _Progress:
    if state["stage"] != stage:
        raise TrainingError(f"checkpoint is of stage {state['stage']!r}, expected {stage!r}; remove the checkpoints")
    try:
        objective.load_state_dict(state["objective"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise TrainingError(
            f"{stage}: the checkpoint does not fit the model ({error}); another configuration wrote it; "
            "remove the checkpoints and train again"
        ) from error
    progress = _Progress()
    progress.epoch, progress.step = state["epoch"], state["step"]
    progress.sums, progress.curve = _local_share(state["sums"]), list(state["curve"])
    return progress


def _all_gather(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the sums of all workers, ``[workers]`` each, because worker 0 writes the checkpoint for all."""
    world = current_worker().world
    names = sorted(sums)
    if not names:
        return {}
    worker_sums = torch.stack([sums[name] for name in names])
    all_of = [torch.empty_like(worker_sums) for _ in range(world)]
    if world > 1:
        dist.all_gather(all_of, worker_sums)
    else:
        all_of = [worker_sums]
    return dict(zip(names, torch.stack(all_of, dim=1), strict=True))


def _local_share(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns this worker's sums, or the mean over workers if their number differs from the checkpoint's."""
    worker = current_worker()
    return {
        name: values[worker.rank] if len(values) == worker.world else values.mean() for name, values in sums.items()
    }
