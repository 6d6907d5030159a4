"""Why: what Kopf does for the operator: it watches rollouts, and holds a deleted one until its traffic is on stable.

Nothing is decided in a handler and nothing is kept by Kopf: what it sees goes to the shelf, and the finalizer is all
that it writes. It watches one namespace, so that no right beyond it is needed.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any, Final

import kopf

from reelway.platform.cluster.kube_api import KubeApi
from reelway.platform.cluster.resources import FINALIZER, GROUP, ROLLOUTS, VERSION
from reelway.platform.cluster.shelf import ToldShelf
from reelway.platform.cluster.status import may_move_traffic

log = logging.getLogger(__name__)

_PREFIX: Final = "operator.reelway.dev"
_LOOK_S: Final = 0.25


def watch(api: KubeApi, shelf: ToldShelf, may_go: Callable[[str], bool], stop: threading.Event) -> None:
    """Watch until stopped.

    Args:
        may_go: whether a deleted rollout, by its uid, may go.
    """
    logging.getLogger("kopf._core.reactor.running").setLevel(logging.ERROR)  # signals are handled by who calls this
    registry = kopf.OperatorRegistry()
    _register(registry, api, shelf, may_go, stop)
    asyncio.run(
        kopf.operator(
            registry=registry, settings=_settings(), namespaces=[api.namespace], standalone=True, stop_flag=stop
        )
    )


def _register(
    registry: kopf.OperatorRegistry,
    api: KubeApi,
    shelf: ToldShelf,
    may_go: Callable[[str], bool],
    stop: threading.Event,
) -> None:
    @kopf.on.login(registry=registry)
    def login(**_: Any) -> kopf.ConnectionInfo:
        return kopf.ConnectionInfo(**api.connection())

    @kopf.on.event(GROUP, VERSION, ROLLOUTS, registry=registry)
    async def told(event: kopf.RawEvent, **_: Any) -> None:
        shelf.tell(event["object"], gone=event["type"] == "DELETED")

    # One at rest has no finalizer: whoever deletes it needs no operator, and an uninstall leaves nothing that is held.
    @kopf.daemon(GROUP, VERSION, ROLLOUTS, registry=registry, when=lambda status, **_: may_move_traffic(status))
    async def hold(uid: str, name: str, stopped: kopf.DaemonStopped, **_: Any) -> None:
        while not stopped:
            await stopped.wait(60)
        while not stop.is_set() and not await _may_go(uid, name):  # at the end of this process it stays held
            await asyncio.sleep(_LOOK_S)

    async def _may_go(uid: str, name: str) -> bool:
        try:
            return await asyncio.to_thread(may_go, uid)
        except Exception:
            log.exception("whether %s may go is not known; it stays", name)
            return False


def _settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.scanning.disabled = True  # needs the right to watch CRDs
    settings.posting.enabled = False  # events are the decisions', written by ``announcements``
    settings.persistence.finalizer = FINALIZER
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=_PREFIX)
    settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=_PREFIX)
    settings.background.cancellation_polling = 1.0
    settings.networking.request_timeout = 10
    settings.watching.server_timeout = 60
    settings.watching.client_timeout = 75
    return settings
