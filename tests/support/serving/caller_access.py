"""Who may ask a service under test."""

from __future__ import annotations

from typing import Final

from reelway.platform.rollout.traffic.access_options import AccessOptions
from reelway.serving.access import InternalCredential, ViewerAccess, build_viewer_access

SECRET: Final = b"a token secret of a test"
CREDENTIAL: Final = InternalCredential([SECRET])
INTERNAL: Final = CREDENTIAL.headers
"""Headers of a request that the service sends to itself."""


def open_access() -> ViewerAccess:
    """Returns the access of a service on a laptop: nobody proves an identity."""
    return build_viewer_access(AccessOptions(), CREDENTIAL, lambda: None, behind_haproxy=False)
