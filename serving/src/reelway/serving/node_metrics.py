"""Why: a node's proxy leads to any node's router, so who asks it for metrics would hear another node every time.

``python -m reelway.serving.node_metrics`` runs beside Ray in the same pod, reads the folder in which the pod's
processes count (``serving.metrics``) and answers ``/metrics`` for this pod alone. It refuses to start without one.
"""

from __future__ import annotations

import argparse
import signal
import threading

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector

from reelway.platform.errors import ConfigError
from reelway.serving.metrics import FOLDER_VARIABLE, shared_folder


def registry_of_this_node() -> CollectorRegistry:
    """A registry that adds up the counts of all processes that share the folder.

    Raises:
        ConfigError: no folder is named.
    """
    folder = shared_folder()
    if folder is None:
        raise ConfigError(f"{FOLDER_VARIABLE} is not set; set it to the folder that the pod's containers share")
    folder.mkdir(parents=True, exist_ok=True)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(folder))  # type: ignore[no-untyped-call]
    return registry


def main() -> None:
    """Answer until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m reelway.serving.node_metrics")
    parser.add_argument("--port", type=int, default=9100)
    options = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    server, thread = start_http_server(options.port, registry=registry_of_this_node())
    stop.wait()
    server.shutdown()
    thread.join()


if __name__ == "__main__":
    main()
