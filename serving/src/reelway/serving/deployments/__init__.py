"""The request path as Ray Serve applications: the only package that knows Ray.

- ``applications``: what Serve builds by import path, here and on Kubernetes alike: a release, the router, the outcomes;
- ``stages``: the deployments of a release, and the router's way to them;
- ``service``: Ray on this machine, told by Serve's REST API what to run.

What runs is a document (``traffic.serve_config``), never a call: writing another user configuration for the router
reconfigures its replicas in place, and a release comes and goes without touching the others. (``serve.run`` from
Python makes a new version of everything it is given, and replaces the replicas.)

A hop carries one small tuple of arrays (2 to 10 kB). A hop that fails or is late raises, and the path steps down.
"""

from reelway.serving.serve_settings import apply_settings

apply_settings()  # before Ray Serve is imported
