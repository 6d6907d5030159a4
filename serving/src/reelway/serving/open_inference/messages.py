"""KServe's generated protobuf messages of the Open Inference Protocol, loaded without the ``kserve`` package.

``import kserve`` takes seconds and 124 MB of memory, because the package imports pandas and a Kubernetes client. The
generated module needs protobuf alone. It is therefore loaded from its file, which a Serve replica can afford.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Final

from reelway.platform.errors import ConfigError

SERVICE: Final = "inference.GRPCInferenceService"
MODEL: Final = "ranker"
"""Name of the model on every rank server. Its version is the release's id."""
_GENERATED: Final = "kserve.protocol.grpc.grpc_predict_v2_pb2"


@cache
def load_messages() -> ModuleType:
    """Returns the module with ``ModelInferRequest`` and the protocol's other messages.

    Raises:
        ConfigError: if KServe's package is not installed.
    """
    if _GENERATED in sys.modules:
        return sys.modules[_GENERATED]
    package = find_spec("kserve")
    if package is None or not package.submodule_search_locations:
        raise ConfigError(
            "a ranker behind KServe: package kserve is not installed; install `reelway-serving[rank-server]`"
        )
    path = Path(package.submodule_search_locations[0], "protocol", "grpc", "grpc_predict_v2_pb2.py")
    spec = spec_from_file_location("reelway_grpc_predict_v2_pb2", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: no Python module; install the kserve version of constraints.txt")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
