"""Prometheus alerting rules for canaries and an example scrape configuration, loaded by Prometheus and the chart."""

from __future__ import annotations

from importlib.resources import files


def canary_rules() -> str:
    """Returns the Prometheus alerting rules for canaries as YAML."""
    return (files(__name__) / "canary.rules.yaml").read_text()


def scrape_example() -> str:
    """Returns a Prometheus configuration with the scrape jobs that rules and evidence require, as YAML."""
    return (files(__name__) / "scrape.example.yaml").read_text()
