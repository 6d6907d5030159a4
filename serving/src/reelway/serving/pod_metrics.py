"""Exports the metrics of one Ray pod: ``python -m reelway.serving.pod_metrics``, in a container beside Ray.

A scrape through Ray Serve's proxy would reach the router of any node. This program reads the folder in which the pod's
processes count (``serving.metrics``) and serves ``/metrics`` for its pod only.
"""

from __future__ import annotations

import argparse
import threading

from prometheus_client import CollectorRegistry, start_http_server

from reelway.platform.errors import ConfigError
from reelway.platform.listen_address import all_interfaces
from reelway.platform.stop_signals import exit_on_stop_signals, stopped_by_signals
from reelway.serving.metric_files import NodeCollector
from reelway.serving.metrics import FOLDER_VARIABLE, multiprocess_dir


def pod_registry() -> CollectorRegistry:
    """A registry that sums the counts of all processes that share the folder.

    Raises:
        ConfigError: if the environment variable of the folder is not set.
    """
    folder = multiprocess_dir()
    if folder is None:
        raise ConfigError(f"{FOLDER_VARIABLE}: not set; set it to the folder that the pod's containers share")
    folder.mkdir(parents=True, exist_ok=True)
    registry = CollectorRegistry()
    NodeCollector(registry, folder)
    return registry


def main() -> None:
    """Serves metrics until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m reelway.serving.pod_metrics")
    parser.add_argument("--port", type=int, default=9100)
    options = parser.parse_args()
    stop = threading.Event()
    exit_on_stop_signals()
    with stopped_by_signals(stop.set):
        server, thread = start_http_server(options.port, all_interfaces(), registry=pod_registry())
        stop.wait()
    server.shutdown()
    thread.join()


if __name__ == "__main__":
    main()
