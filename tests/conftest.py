"""Settings of the whole suite: metrics stay in the process that made them.

Importing Feast turns every metric of the process and its children into files (see ``features.store.import_feast``);
test modules that import Feast directly would do that to the others, depending on their order.
"""

from __future__ import annotations

import os

import prometheus_client  # noqa: F401  (settles how values are kept, before Feast can)


def pytest_collection_finish() -> None:
    """Undo what imports during collection did to the environment."""
    for name in ("PROMETHEUS_MULTIPROCESS_DIR", "PROMETHEUS_MULTIPROC_DIR"):
        os.environ.pop(name, None)
