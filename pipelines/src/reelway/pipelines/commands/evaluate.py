"""``reelway evaluate``: evaluates a run's trained models, prints the result and records it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from reelway.platform.cli.terminal import print_status, progress, stdout_console
from reelway.platform.run_directory import RunDirectory

if TYPE_CHECKING:
    from reelway.pipelines.evaluation.metrics import BootstrapEstimate
    from reelway.pipelines.evaluation.report import EvaluationResult

_EXAMPLES = """
Evaluate a run's models on the events after their training window.

Retrieval with ranking, retrieval alone, popularity (all time and recent) and tuned ALS are compared on the same task:
recommend the unseen videos that the viewers watch after the end of the training window. Intervals are 95 %
confidence intervals over viewers.

\b
Examples:
  reelway evaluate --run runs/demo
  reelway evaluate --run runs/demo --max-viewers 500        faster, wider intervals
  reelway evaluate --run runs/demo --blend my-blend.yaml    other weights of the ranker's heads

Writes RUN/evaluation/evaluation.json with metrics, intervals, baselines and release gates. A failed gate is reported
but is not an error of this command; it prevents the release later.
"""


def register(app: typer.Typer) -> None:
    """Adds ``reelway evaluate``."""

    @app.command(help=_EXAMPLES)
    def evaluate(
        run: Path = typer.Option(Path("runs/default"), help="Run directory with trained models."),
        min_events: int = typer.Option(5, min=1, help="Minimum number of training impressions of an evaluated viewer."),
        max_viewers: int = typer.Option(
            2000, min=1, help="Maximum number of evaluated viewers; a larger number is sampled."
        ),
        blend: Path | None = typer.Option(
            None, help="YAML file with source quotas, value weights and slate rules; by default built-in values."
        ),
        seed: int = typer.Option(0, help="Random seed for the viewer sample, ALS and the bootstrap."),
        force: bool = typer.Option(False, help="Evaluate again even if the inputs have not changed."),
    ) -> None:
        evaluate_command(RunDirectory(run), min_events, max_viewers, blend, seed, force)


def evaluate_command(
    run: RunDirectory, min_events: int, max_viewers: int, blend: Path | None, seed: int, force: bool
) -> None:
    """Runs the step ``evaluate``, unless it was completed with the same inputs."""
    from reelway.pipelines.evaluation.report import EVALUATION_FILE, EvaluationSettings, evaluate_run
    from reelway.pipelines.release_builder import load_blend_file

    settings = EvaluationSettings(min_events=min_events, max_viewers=max_viewers, seed=seed)
    output = run.evaluation / EVALUATION_FILE
    identity = {"min_events": min_events, "max_viewers": max_viewers, "seed": seed}
    inputs = [blend] if blend is not None else []
    with run.step("evaluate", config=identity, after=("train",), inputs=inputs, outputs=[output], force=force) as step:
        if step.cached:
            print_status("evaluate: already done with the same inputs, skipped (use --force to redo)")
            return
        with progress() as bar:
            task = bar.add_task("evaluate", total=None)

            def print_progress(doing: str) -> None:
                bar.update(task, description=f"evaluate: {doing}")

            chosen = load_blend_file(blend) if blend is not None else None
            result = evaluate_run(run, settings, blend=chosen, report=print_progress)
        step.summary.update(
            {"gates_failed": [gate.name for gate in result.gates if not gate.passed], "output": str(output)}
        )
        _show(result)
        stdout_console.print(f"written to {output}", highlight=False)


def _show(result: EvaluationResult) -> None:
    _show_ranking(result)
    _show_heads(result)
    _show_gates(result)


def _show_ranking(result: EvaluationResult) -> None:
    from rich.table import Table

    split = result.split
    table = Table(
        title=f"Ranking of unseen videos: {len(split.viewer_ids):,} viewers, {len(split.videos):,} videos; "
        "95 % intervals over viewers",
        title_justify="left",
    )
    table.add_column("recommender")
    for column in ("recall@50", "NDCG@10", "MRR", "diversity@10", "coverage@50"):
        table.add_column(column, justify="right")
    for i, (name, metrics) in enumerate(result.ranking.items()):
        estimates = [metrics.estimates[key] for key in ("recall_at_50", "ndcg_at_10", "mrr", "diversity_at_10")]
        cells = [_interval(estimate) for estimate in estimates]
        table.add_row(name, *cells, f"{metrics.coverage:.1%}", style="bold" if i == 0 else "")
    stdout_console.print(table)


def _show_heads(result: EvaluationResult) -> None:
    from rich.table import Table

    table = Table(title="Ranker heads on impressions after the split", title_justify="left")
    table.add_column("head")
    for column in ("positives", "AUC", "calibration error before", "after"):
        table.add_column(column, justify="right")
    for head in result.heads:
        if head.defined:
            cells = [_interval(estimate) for estimate in (head.auc, head.error_before, head.error_after)]
        else:
            cells = ["one class only", "-", "-"]
        table.add_row(head.task, f"{head.positives:,} of {head.rows:,}", *cells)
    stdout_console.print(table)


def _show_gates(result: EvaluationResult) -> None:
    from rich.table import Table

    table = Table(title="Release gates", title_justify="left")
    for column in ("gate", "value", "bound", "", "detail"):
        table.add_column(column, justify="right" if column in ("value", "bound") else "left")
    for gate in result.gates:
        verdict = "[green]passed" if gate.passed else "[bold red]FAILED"
        table.add_row(gate.name, f"{gate.value:.4f}", f"{gate.comparison} {gate.bound:g}", verdict, gate.detail)
    stdout_console.print(table)


def _interval(estimate: BootstrapEstimate) -> str:
    if estimate.value != estimate.value:
        return "undefined"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
