"""Forks operators that start within milliseconds: all modules are imported once, and each line on stdin forks one.

``python -m tests.support.cluster.forked_operator NAMESPACE TOKEN_FILE URL``; each line is answered with the
id of the new process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from reelway.platform.cluster.kube_api import KubeApi
from reelway.platform.cluster.operator_settings import OperatorSettings
from reelway.platform.cluster.rollout_operator import run_operator
from reelway.platform.settings import load_settings
from reelway.platform.telemetry import configure_logging


def main(namespace: str, token: Path, url: str) -> None:
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            configure_logging()
            document = {
                "identity": "operator-0",
                "interval_s": 0.1,
                "webhook": {"host": "127.0.0.1", "port": 0, "token_file": token},
                "ray": {"trusted_hosts": ["127.0.0.1"], "dashboard_url": url, "internal_url": url},
            }
            settings = load_settings(OperatorSettings, None, document)
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
