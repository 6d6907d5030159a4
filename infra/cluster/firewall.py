"""Firewall chains that the node's programs create, and their removal."""

from __future__ import annotations

import shlex
import subprocess
from typing import Final

TABLES: Final = ("filter", "nat", "mangle")
_PREFIXES: Final = ("KUBE-", "CNI-")


def node_chains() -> list[str]:
    """Returns ``table chain`` of every chain with a name that Kubernetes or CNI uses."""
    found = []
    for table in TABLES:
        rules = _iptables(table, "-S")
        chains = [line.split()[1] for line in rules.splitlines() if line.startswith("-N ")]
        found += [f"{table} {chain}" for chain in chains if chain.startswith(_PREFIXES)]
    return found


def remove_chains(chains: list[str]) -> None:
    """Removes the chains and every rule that jumps to them."""
    for table in TABLES:
        in_table = {chain for chain_table, chain in (entry.split() for entry in chains) if chain_table == table}
        for line in _iptables(table, "-S").splitlines():
            args = line.split()
            if args[0] == "-A" and args[1] not in in_table and in_table & set(args):
                _iptables(table, "-D", *shlex.split(line)[1:])
        for chain in in_table:
            _iptables(table, "-F", chain)
        for chain in in_table:
            _iptables(table, "-X", chain)


def _iptables(table: str, *args: str) -> str:
    command = ["iptables", "-w", "5", "-t", table, *args]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout
