"""ReleaseRollout objects for tests."""

from __future__ import annotations

from typing import Any

from tests.support.cluster.fake_serve import GOOD

QUICK: dict[str, Any] = {
    "name": "quick",
    "steps": [
        {"weight_percent": weight, "hold_s": 0.3, "minimum_viewers": 10, "minimum_impressions": 10}
        for weight in (10, 50)
    ],
    "guardrails": {
        "error_ratio": None, "empty_slate_ratio": None, "p99_ms": None, "parity_mismatches": None,
    },
    "outcomes": [{"name": "long_watch_rate", "margin": 0.1, "minimum_viewers": 50}],
    "cooldown_s": 0,
    "retention_s": 3600,
}  # fmt: skip


def rollout(name: str = "one", release: str = GOOD, **spec: Any) -> dict[str, Any]:
    """Returns a ReleaseRollout. Fields of ``spec`` that are None are left out."""
    spec_fields = {"release": release, "policy": QUICK, "backend": {"rayService": {"name": "reelway"}}, **spec}
    return {
        "apiVersion": "reelway.dev/v1alpha1",
        "kind": "ReleaseRollout",
        "metadata": {"name": name},
        "spec": {key: value for key, value in spec_fields.items() if value is not None},
    }
