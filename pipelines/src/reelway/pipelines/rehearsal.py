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

from reelway.pipelines.build import release_aside, seal
from reelway.pipelines.features.training_rows import LABELS_FILE
from reelway.pipelines.ranker_faults import fail_known_viewers, slow_down_busy_viewers
from reelway.platform.contracts import manifest as names
from reelway.platform.contracts.blend import Blend
from reelway.platform.contracts.calibration import Calibration
from reelway.platform.contracts.ids import ReleaseId
from reelway.platform.contracts.manifest import GateResult, Manifest, Waiver
from reelway.platform.release.folder import describe_files
from reelway.platform.release.store import ReleaseStore
from reelway.platform.release.verify import read_blend
from reelway.platform.runs import RunDirectory


class Rehearsal(StrEnum):
    """Kinds of drill releases. ``POPULAR`` has no fault: it is the baseline of a service without models."""

    ERRORS = "errors"
    SLOW = "slow"
    WORSE = "worse"
    POPULAR = "popular"


ABOUT: Final = {
    Rehearsal.ERRORS: "the ranker's graph fails for every viewer with a history",
    Rehearsal.SLOW: "the ranker's graph does useless work for the busiest viewers",
    Rehearsal.WORSE: "the ranker was trained on shuffled labels",
    Rehearsal.POPULAR: "all viewers get popular videos; no model ranks them",
}
NOT_EVALUATED: Final = "evaluated"
SLOW_MS: Final = 350.0
"""Well above the default limit on the 99th percentile, below the ranking stage's time budget."""
BUSY_SHARE: Final = 0.12
"""Share of the log's impressions that belong to the busiest viewers, hence of the requests that are slow."""
SHUFFLED_ROWS: Final = 60_000
SHUFFLED_STEPS: Final = 25

Report = Callable[[str], None]


@dataclass(frozen=True)
class _Making:
    """Input of the builders: a copy of the good release, and its run."""

    folder: Path
    run: RunDirectory
    seed: int
    report: Report


def rehearse(
    run: RunDirectory,
    kind: Rehearsal,
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
    with release_aside(run.path) as place:
        folder = store.fetch(of, place / "fetched")
        good = Manifest.model_validate_json((folder / names.MANIFEST_FILE).read_bytes())
        (folder / names.MANIFEST_FILE).unlink()
        changed = _MAKERS[kind](_Making(folder, run, seed, report))
        report("verifying")
        manifest = _manifest(good, kind, by, folder, changed | {"seed": seed})
        release_id = seal(folder, manifest, key, store)
    return release_id, run.release_store / release_id


def _manifest(good: Manifest, kind: Rehearsal, by: str, folder: Path, changed: dict[str, Any]) -> Manifest:
    """Returns the good release's manifest with the fields of the drill release, without metrics and gate results."""
    gate = GateResult(name=NOT_EVALUATED, value=0, bound=1, comparison=">=", passed=False, detail=ABOUT[kind])
    return good.model_copy(
        update={
            "name": names.REHEARSAL_PREFIX + kind.value,
            "parent": good.release_id,
            "created_at": datetime.now(UTC),
            "code_version": version("reelway-platform"),
            "metrics": {},
            "gates": (gate,),
            "waivers": (Waiver(gate=NOT_EVALUATED, reason=f"drill release: {ABOUT[kind]}", by=by),),
            "files": describe_files(folder),
            "config": good.config | {"rehearsal": {"kind": kind.value, **changed}},
            "signature": None,
        }
    )


def _make_errors(making: _Making) -> dict[str, Any]:
    fail_known_viewers(making.folder / names.RANKER_FILE)
    return {}


def _make_slow(making: _Making) -> dict[str, Any]:
    viewers = pq.read_table(making.run.features / LABELS_FILE, columns=["viewer_id"])["viewer_id"].to_numpy()
    limit = busy_above(np.unique(viewers, return_counts=True)[1])
    making.report("calibrating the useless work")
    slow_down_busy_viewers(making.folder / names.RANKER_FILE, above=limit, slow_ms=SLOW_MS)
    return {"slow_ms": SLOW_MS, "busy_above": limit}


def busy_above(impressions: np.ndarray[Any, np.dtype[np.int64]]) -> float:
    """Returns the number of impressions above which viewers together have ``BUSY_SHARE`` of all impressions."""
    rising = np.sort(impressions)
    share = np.cumsum(rising) / rising.sum()
    return float(rising[np.searchsorted(share, 1.0 - BUSY_SHARE)])


def _make_worse(making: _Making) -> dict[str, Any]:
    """Trains a ranker on labels that are shuffled over impressions, as a wrong join would do."""
    import dataclasses

    from reelway.pipelines.training.artifacts import load_models
    from reelway.pipelines.training.config import TrainingConfig
    from reelway.pipelines.training.export import export_ranker
    from reelway.pipelines.training.fit import fit_ranker, window_of
    from reelway.pipelines.training.inference import embed_videos, embed_viewers, ranker_inputs
    from reelway.pipelines.training.negatives import shown_rows
    from reelway.pipelines.training.rows import load_rows
    from reelway.pipelines.training.step import ROWS_FILE

    making.report("reading the training rows")
    models = load_models(making.run.models)
    config = TrainingConfig(ranker=models.ranker.config, two_tower=models.two_tower.config, seed=making.seed)
    loop = config.ranker_loop.model_copy(update={"epochs": 1, "max_steps_per_epoch": SHUFFLED_STEPS})
    config = config.model_copy(update={"ranker_loop": loop})
    rows = load_rows(making.run.features / ROWS_FILE, models.dimensions)
    learn = shown_rows(rows, window_of(rows, config).training(rows)[-SHUFFLED_ROWS:])
    shuffled = np.random.default_rng([making.seed, 13]).permutation(learn.labels)
    making.report("training a ranker on shuffled labels")
    ranker = fit_ranker(models.two_tower, rows, dataclasses.replace(learn, labels=shuffled), config)
    making.report("exporting the ranker")
    some = slice(0, 256)
    one = dataclasses.replace(rows.viewers, **{n: v[:1] for n, v in vars(rows.viewers).items()})
    videos = dataclasses.replace(rows.videos, **{n: v[some] for n, v in vars(rows.videos).items()})
    viewer_1D, video_CD = embed_viewers(models.two_tower, one), embed_videos(models.two_tower, videos)
    export_ranker(ranker, making.folder / names.RANKER_FILE, ranker_inputs(one, viewer_1D, videos, video_CD))
    (making.folder / names.CALIBRATION_FILE).write_text(Calibration(curves={}).model_dump_json(indent=2) + "\n")
    return {"rows": len(learn)}


def _make_popular(making: _Making) -> dict[str, Any]:
    good = read_blend(making.folder)
    blend = Blend(
        retrieval=good.retrieval.model_copy(update={"quotas": {"popular": 1.0}}),
        ranking=good.ranking.model_copy(update={"value_weights": {}, "retrieval_weight": 0.0}),
        reranking=good.reranking,
    )
    text = yaml.safe_dump(blend.model_dump(mode="json"), sort_keys=False)
    (making.folder / names.BLEND_FILE).write_text(text)
    return {}


_MAKERS: Final[dict[Rehearsal, Callable[[_Making], dict[str, Any]]]] = {
    Rehearsal.ERRORS: _make_errors,
    Rehearsal.SLOW: _make_slow,
    Rehearsal.WORSE: _make_worse,
    Rehearsal.POPULAR: _make_popular,
}
