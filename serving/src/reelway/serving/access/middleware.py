"""ASGI middleware that admits requests before they are read, and hides internal paths."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Final

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from reelway.serving.access.errors import AccessError
from reelway.serving.access.internal_credential import InternalCredential
from reelway.serving.access.viewer_access import ANYONE, Caller, ViewerAccess

_CALLER: Final = "reelway.caller"


def caller_of(scope: Any) -> Caller:
    """Returns who sent an admitted request."""
    caller: Caller = scope.get(_CALLER, ANYONE)
    return caller


class AccessMiddleware:
    """Admits requests to guarded paths. Paths that are neither guarded nor public are the service's own.

    Args:
        guarded: paths whose callers are admitted by ``access``.
        public: paths that anyone may call.
        deny: counts a refused request and returns the response.
        hide: counts a request to a path of the service's own and returns the response, as if it did not exist.
    """

    def __init__(
        self,
        app: ASGIApp,
        access: ViewerAccess,
        *,
        guarded: Collection[str],
        public: Collection[str],
        deny: Callable[[AccessError], Response],
        hide: Callable[[], Response],
    ) -> None:
        self._app = app
        self._access = access
        self._guarded = frozenset(guarded)
        self._public = frozenset(public)
        self._deny = deny
        self._hide = hide

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            if path in self._guarded:
                try:
                    scope[_CALLER] = await self._access.admit(scope)
                except AccessError as error:
                    await self._deny(error)(scope, receive, send)
                    return
            elif path not in self._public and not self._access.is_internal(scope):
                await self._hide()(scope, receive, send)
                return
        await self._app(scope, receive, send)


class InternalOnlyMiddleware:
    """Hides a whole application from everybody but the service itself."""

    def __init__(self, app: ASGIApp, credential: InternalCredential, hide: Callable[[], Response]) -> None:
        self._app = app
        self._credential = credential
        self._hide = hide

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._credential.is_in(scope):
            await self._hide()(scope, receive, send)
            return
        await self._app(scope, receive, send)
