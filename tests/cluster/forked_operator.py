"""Operators that begin in milliseconds: everything is imported once, and each line on standard input forks one.

``python -m tests.cluster.forked_operator NAMESPACE TOKEN_FILE URL``; a line answered with the new process's id.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from reelway.platform.cluster.kube_api import KubeApi
from reelway.platform.cluster.lanes import LaneSettings
from reelway.platform.cluster.rollout_operator import OperatorSettings, run_operator
from reelway.platform.telemetry import configure_logging


def main(namespace: str, token: Path, url: str) -> None:
    import kopf  # noqa: F401  (what an operator would import when it begins)

    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            configure_logging()
            lanes = LaneSettings(interval_s=0.1, trusted_hosts=("127.0.0.1",), head_url=url, router_url=url)
            settings = OperatorSettings(
                webhook_token_file=token, identity="operator-0", host="127.0.0.1", port=0, lanes=lanes
            )
            try:
                run_operator(KubeApi(namespace), settings)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        print(child, flush=True)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
