"""Builds drill releases from a good release: broken, slow or worse ones, and a popularity baseline.

A drill release is a real release: signed, verified, stored and served by the same code. Its fault is in its files. Its
name starts with ``rehearsal-``. It was not evaluated and has a waiver that states this. ``latest`` never selects it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from reelway.pipelines.features.training_rows import LABELS_FILE
from reelway.pipelines.ranker_faults import fail_known_viewers, slow_down_busy_viewers
from reelway.pipelines.release_builder import sign_verify_and_store, staging_directory
from reelway.platform.contracts import manifest as names
from reelway.platform.contracts.blend import Blend
from reelway.platform.contracts.calibration import Calibration
from reelway.platform.contracts.ids import ReleaseId
from reelway.platform.contracts.manifest import GateResult, Manifest, Waiver
from reelway.platform.release.folder import describe_files
from reelway.platform.release.store import ReleaseStore
from reelway.platform.release.verify import read_blend
from reelway.platform.run_directory import RunDirectory


class DrillReleaseKind(StrEnum):
    """Kinds of drill releases. ``POPULAR`` has no fault: it is the baseline of a service without models."""

    ERRORS = "errors"
    SLOW = "slow"
    WORSE = "worse"
    POPULAR = "popular"


DESCRIPTIONS: Final = {
    DrillReleaseKind.ERRORS: "the ranker's graph fails for every viewer with a history",
    DrillReleaseKind.SLOW: "the ranker's graph does useless work for the busiest viewers",
    DrillReleaseKind.WORSE: "the ranker was trained on shuffled labels",
    DrillReleaseKind.POPULAR: "all viewers get popular videos; no model ranks them",
}
WAIVED_GATE: Final = "evaluated"
SLOW_MS: Final = 350.0
"""Well above the default limit on the 99th percentile, below the ranking stage's time budget."""
BUSY_SHARE: Final = 0.12
"""Share of the log's impressions that belong to the busiest viewers, hence of the requests that are slow."""
SHUFFLED_ROWS: Final = 60_000
SHUFFLED_STEPS: Final = 25

Report = Callable[[str], None]


@dataclass(frozen=True)
class _BuildContext:
    """Input of the builders: a copy of the good release, and its run."""

    folder: Path
    run: RunDirectory
    seed: int
    report: Report


def build_drill_release(
    run: RunDirectory,
    kind: DrillReleaseKind,
    *,
    of: ReleaseId,
    key: Ed25519PrivateKey,
    by: str,
    seed: int = 0,
    report: Report = lambda _: None,
) -> tuple[ReleaseId, Path]:
    """Builds a drill release from a good release of the run's store, and stores it there.

    Args:
        of: the good release; it must have been built from the run's models.
        key: signing key.
        by: person responsible for the waiver.
        seed: random seed for the label shuffle.
        report: called with a description of each step.

    Returns:
        the id of the drill release, and its folder in the store.

    Raises:
        ReleaseError: if the good release is missing or incomplete, or the drill release fails verification.
        StorageError: if the disk is full; no partial release is visible.
    """
    store = ReleaseStore(str(run.release_store.absolute()))
    with staging_directory(run.path) as staging:
        folder = store.fetch(of, staging / "fetched")
        good = Manifest.model_validate_json((folder / names.MANIFEST_FILE).read_bytes())
        (folder / names.MANIFEST_FILE).unlink()
        changed = _BUILDERS[kind](_BuildContext(folder, run, seed, report))
        report("verifying")
        manifest = _manifest(good, kind, by, folder, changed | {"seed": seed})
        release_id = sign_verify_and_store(folder, manifest, key, store)
    return release_id, run.release_store / release_id


def _manifest(good: Manifest, kind: DrillReleaseKind, by: str, folder: Path, changed: dict[str, Any]) -> Manifest:
    """Returns the good release's manifest with the fields of the drill release, without metrics and gate results."""
    gate = GateResult(name=WAIVED_GATE, value=0, bound=1, comparison=">=", passed=False, detail=DESCRIPTIONS[kind])
    return good.model_copy(
        update={
            "name": names.REHEARSAL_PREFIX + kind.value,
            "parent": good.release_id,
            "created_at": datetime.now(UTC),
            "code_version": version("reelway-platform"),
            "metrics": {},
            "gates": (gate,),
            "waivers": (Waiver(gate=WAIVED_GATE, reason=f"drill release: {DESCRIPTIONS[kind]}", by=by),),
            "files": describe_files(folder),
            "config": good.config | {"rehearsal": {"kind": kind.value, **changed}},
            "signature": None,
        }
    )


def _build_failing(context: _BuildContext) -> dict[str, Any]:
    fail_known_viewers(context.folder / names.RANKER_FILE)
    return {}


def _build_slow(context: _BuildContext) -> dict[str, Any]:
    viewers = pq.read_table(context.run.features / LABELS_FILE, columns=["viewer_id"])["viewer_id"].to_numpy()
    limit = busy_viewer_threshold(np.unique(viewers, return_counts=True)[1])
    context.report("calibrating the useless work")
    slow_down_busy_viewers(context.folder / names.RANKER_FILE, above=limit, slow_ms=SLOW_MS)
    return {"slow_ms": SLOW_MS, "busy_above": limit}


def busy_viewer_threshold(impressions: np.ndarray[Any, np.dtype[np.int64]]) -> float:
    """Returns the number of impressions above which viewers together have ``BUSY_SHARE`` of all impressions."""
    rising = np.sort(impressions)
    share = np.cumsum(rising) / rising.sum()
    return float(rising[np.searchsorted(share, 1.0 - BUSY_SHARE)])


def _build_worse(context: _BuildContext) -> dict[str, Any]:
    """Trains a ranker on labels that are shuffled over impressions, as a wrong join would do."""
    import dataclasses

    from reelway.pipelines.training.artifacts import load_models
    from reelway.pipelines.training.config import TrainingConfig
    from reelway.pipelines.training.export import export_ranker
    from reelway.pipelines.training.fit import fit_ranker, make_training_split
    from reelway.pipelines.training.inference import embed_videos, embed_viewers, ranker_inputs
    from reelway.pipelines.training.negatives import impression_rows
    from reelway.pipelines.training.rows import load_rows
    from reelway.pipelines.training.train_run import ROWS_FILE

    context.report("reading the training rows")
    models = load_models(context.run.models)
    config = TrainingConfig(ranker=models.ranker.config, two_tower=models.two_tower.config, seed=context.seed)
    loop = config.ranker_loop.model_copy(update={"epochs": 1, "max_steps_per_epoch": SHUFFLED_STEPS})
    config = config.model_copy(update={"ranker_loop": loop})
    rows = load_rows(context.run.features / ROWS_FILE, models.dimensions)
    learn = impression_rows(rows, make_training_split(rows, config).training(rows)[-SHUFFLED_ROWS:])
    shuffled = np.random.default_rng([context.seed, 13]).permutation(learn.labels)
    context.report("training a ranker on shuffled labels")
    ranker = fit_ranker(models.two_tower, rows, dataclasses.replace(learn, labels=shuffled), config)
    context.report("exporting the ranker")
    sample = slice(0, 256)
    viewer = dataclasses.replace(rows.viewers, **{n: v[:1] for n, v in vars(rows.viewers).items()})
    videos = dataclasses.replace(rows.videos, **{n: v[sample] for n, v in vars(rows.videos).items()})
    viewer_1D, video_CD = embed_viewers(models.two_tower, viewer), embed_videos(models.two_tower, videos)
    export_ranker(ranker, context.folder / names.RANKER_FILE, ranker_inputs(viewer, viewer_1D, videos, video_CD))
    (context.folder / names.CALIBRATION_FILE).write_text(Calibration(curves={}).model_dump_json(indent=2) + "\n")
    return {"rows": len(learn)}


def _build_popular(context: _BuildContext) -> dict[str, Any]:
    good = read_blend(context.folder)
    blend = Blend(
        retrieval=good.retrieval.model_copy(update={"quotas": {"popular": 1.0}}),
        ranking=good.ranking.model_copy(update={"value_weights": {}, "retrieval_weight": 0.0}),
        reranking=good.reranking,
    )
    text = yaml.safe_dump(blend.model_dump(mode="json"), sort_keys=False)
    (context.folder / names.BLEND_FILE).write_text(text)
    return {}


_BUILDERS: Final[dict[DrillReleaseKind, Callable[[_BuildContext], dict[str, Any]]]] = {
    DrillReleaseKind.ERRORS: _build_failing,
    DrillReleaseKind.SLOW: _build_slow,
    DrillReleaseKind.WORSE: _build_worse,
    DrillReleaseKind.POPULAR: _build_popular,
}
