"""Logging of a Ray Serve replica.

Ray Serve replaces ``sys.stderr`` in a replica by a stream that drops the lines of loggers without a handler. The
interpreter's own stream is the file ``worker-*.err`` of the Ray session.
"""

from __future__ import annotations

import logging
import sys
from typing import Final

_NAME: Final = "replica"


def log_to_replica_file(level: int = logging.INFO) -> None:
    """Writes the records of all ``reelway`` loggers to the replica's file. A second call does nothing."""
    logger = logging.getLogger("reelway")
    if any(handler.get_name() == _NAME for handler in logger.handlers):
        return
    handler = logging.StreamHandler(sys.__stderr__)
    handler.set_name(_NAME)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level)
