"""``python infra/cluster up|down|status|load|...``: a real one-node Kubernetes in one folder, without Docker."""

from __future__ import annotations

import argparse
import sys
import time

from build import KSERVE, MONITORING, TOOLS, BuildError, build_tools
from kserve import install_kserve, remove_kserve
from layout import default_layout
from monitoring import install_monitoring, remove_monitoring
from node import Node, NodeError

_BEGAN = time.monotonic()


def print_progress(line: str) -> None:
    print(f"[{time.monotonic() - _BEGAN:6.1f} s] {line}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python infra/cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start the node; components that already run are not restarted")
    up.add_argument("--without-kuberay", action="store_true", help="do not start the KubeRay operator")
    commands.add_parser("down", help="remove every process, mount, namespace and interface of the node")
    commands.add_parser("status", help="print the node's processes and whether each runs")
    load = commands.add_parser("load", help="import images from OCI or Docker archives into containerd")
    load.add_argument("archives", nargs="+")
    build = commands.add_parser("build", help="build programs without starting anything")
    build.add_argument("tools", nargs="+", choices=[*TOOLS, *MONITORING, *KSERVE])
    monitoring = commands.add_parser("monitoring", help="start Prometheus and Alertmanager on a running node")
    monitoring.add_argument(
        "--remove", action="store_true", help="remove Prometheus and Alertmanager, with all monitors and rules"
    )
    kserve = commands.add_parser("kserve", help="start KServe's controller on a running node")
    kserve.add_argument("--remove", action="store_true", help="remove KServe's controller, with every InferenceService")
    options = parser.parse_args()
    layout = default_layout()
    node = Node(layout, print_progress)
    try:
        if options.command == "up":
            node.up()
            if not options.without_kuberay:
                node.install_kuberay()
        elif options.command == "down":
            node.down()
        elif options.command == "load":
            for archive in options.archives:
                node.import_image(archive)
        elif options.command == "build":
            build_tools(layout, print_progress, options.tools)
        elif options.command == "monitoring":
            remove_monitoring(node, layout) if options.remove else install_monitoring(node, layout, print_progress)
        elif options.command == "kserve":
            remove_kserve(node, layout) if options.remove else install_kserve(node, layout, print_progress)
        else:
            for name, runs in node.status().items():
                print(f"{name:20} {'running' if runs else 'ended'}")
    except (NodeError, BuildError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
