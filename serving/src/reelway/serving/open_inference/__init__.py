"""A release's ranker behind the Open Inference Protocol (v2), served by KServe's own model server.

``server`` runs ``kserve.ModelServer`` and ``kserve_model`` is the ``kserve.Model``. ``ranker_service`` holds the ONNX
model with its bounded queue, and ``client`` is the request path's side. README.md has the life cycle and all statuses.

Only ``kserve_model``, ``data_plane``, ``grpc_server``, ``rest_server`` and ``server`` import ``kserve``. The import
adds 124 MB of resident memory. Serve replicas import ``client`` alone and do without it.
"""
