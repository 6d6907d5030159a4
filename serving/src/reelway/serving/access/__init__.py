"""Decides who may ask: proof of identity, request rates, and the internal API. Imports no Ray.

A request passes these checks before its body is read, in this order:

1. ``internal_credential``: the service itself, for internal paths and its own warm-up; nothing else is checked;
2. the rate of the client's address (429);
3. ``assertions``: the proof of the viewer's identity (401; 503 while there are no keys);
4. the rate of the proven viewer (429).

The viewer id in the body is then compared with the proven viewer (403).
"""

from reelway.serving.access.errors import AccessError, ForbiddenError
from reelway.serving.access.internal_credential import InternalCredential
from reelway.serving.access.viewer_access import ANYONE, Caller, ViewerAccess, build_viewer_access, describe_access

__all__ = [
    "ANYONE",
    "AccessError",
    "Caller",
    "ForbiddenError",
    "InternalCredential",
    "ViewerAccess",
    "build_viewer_access",
    "describe_access",
]
