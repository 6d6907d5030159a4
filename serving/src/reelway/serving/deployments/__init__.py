"""The request path as Ray Serve applications. This is the only package of ``serving`` that imports Ray.

- ``applications``: builders that Serve calls by import path, in local mode and on Kubernetes;
- ``stages``: the deployments of a release, and ``StageHandles``, which calls them from the router;
- ``local_serve``: Ray on this machine, configured through Serve's REST API.

The Serve config (``traffic.serve_config``) decides what runs, never a call of ``serve.run``. A new user config
reconfigures the router's replicas in place, and a release is added or removed without a change to the others.
``serve.run`` would create a new version of all deployments it is given and replace their replicas.

A call between replicas carries one array container (2 to 10 kB). A call that fails or is late raises an exception, and
the request path uses the stage's fallback.
"""

from reelway.serving.serve_settings import apply_settings

apply_settings()  # must run before Ray Serve is imported
