"""The node's programs share library versions, so that Go compiles each library once."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "infra" / "cluster" / "tools"
AT_KUBERNETES = ("coredns", "helm", "kubernetes", "prometheus")
AT_KSERVE = ("kserve", "kuberay", "prometheus-operator")
OWN = {
    "github.com/KimMachineGun/automemlimit": "the operator's code is of before 1.0",
    "github.com/prometheus/alertmanager": "the operator's own pin",
    "github.com/prometheus/prometheus": "the operator's own pin",
}
"""Modules whose versions differ between programs, with the reason."""


def versions(tool: str) -> dict[str, tuple[str, str]]:
    """Selected and replacing version of every module. Both identify a compiled package."""
    text = (TOOLS / tool / "go.mod").read_text()
    chosen: dict[str, str] = dict(re.findall(r"^\s*(?:require )?([\w.-]+\.[\w./-]+) (v\S+)", text, re.MULTILINE))
    taken: dict[str, str] = dict(re.findall(r"^\s*(?:replace )?(\S+) => \S+ (v\S+)$", text, re.MULTILINE))
    return {module: (version, taken.get(module, version)) for module, version in chosen.items()}


@pytest.mark.parametrize(("one", "other"), list(combinations(sorted(AT_KUBERNETES + AT_KSERVE), 2)))
def test_shared_module_has_one_version(one: str, other: str) -> None:
    ours, theirs = versions(one), versions(other)
    assert len(ours.keys() & theirs.keys()) > 20, "no go.mod was read"
    apart = (one in AT_KSERVE) != (other in AT_KSERVE)
    different = {
        module: (ours[module], theirs[module])
        for module in ours.keys() & theirs.keys() - OWN.keys()
        if ours[module] != theirs[module] and not (apart and module.startswith(("k8s.io/", "sigs.k8s.io/")))
    }
    assert not different


@pytest.mark.parametrize("tool", AT_KUBERNETES + AT_KSERVE)
def test_program_has_the_kubernetes_release_of_its_group(tool: str) -> None:
    _, taken = versions(tool)["k8s.io/api"]
    assert taken == ("v0.36.3" if tool in AT_KUBERNETES else "v0.34.5")
