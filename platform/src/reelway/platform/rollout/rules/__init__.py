"""Why: a rollout's alerts belong to its release of Reelway, so they ship with it; Prometheus and the chart load them.

Text only; refuses to evaluate anything.
"""

from __future__ import annotations

from importlib.resources import files


def canary_rules() -> str:
    """Prometheus' alerting rules about a canary, as YAML."""
    return (files(__name__) / "canary.rules.yaml").read_text()


def scrape_example() -> str:
    """A Prometheus configuration with the scrape jobs that rules and evidence rely on, as YAML."""
    return (files(__name__) / "scrape.example.yaml").read_text()
