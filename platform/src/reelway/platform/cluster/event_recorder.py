"""Records each decision as a Kubernetes Event of its rollout, with the decision's reason verbatim.

Events are written after the decision is recorded and from a thread of their own, so that a slow API server never delays
a rollback. A failed write is logged; the history in the status has the decision in any case.
"""

from __future__ import annotations

import logging
import queue
import uuid
from typing import Any, Final

from reelway.platform.cluster.kube_api import KubeApi
from reelway.platform.cluster.resources import GROUP, ROLLOUT_KIND, VERSION, RolloutResource
from reelway.platform.cluster.status import format_time
from reelway.platform.errors import KubernetesError
from reelway.platform.rollout.records import HistoryEntry
from reelway.platform.supervised_thread import SupervisedThread

log = logging.getLogger(__name__)

_WARNINGS: Final = frozenset({"roll_back", "hold", "refuse", "pause", "refused"})
_MESSAGE_CHARACTERS: Final = 1024
_QUEUE_LIMIT: Final = 1000


class EventRecorder:
    """Writes Events about rollouts.

    Args:
        instance: name of this process in the Events.
    """

    def __init__(self, api: KubeApi, instance: str) -> None:
        self._api, self._instance = api, instance
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(_QUEUE_LIMIT)
        self._thread = SupervisedThread(self._write, name="events", daemon=True)
        self._thread.start()

    def record_decision(self, resource: RolloutResource, entry: HistoryEntry) -> None:
        self.record_event(resource, entry.action, entry.reason, entry.time)

    def record_event(self, resource: RolloutResource, action: str, message: str, at: float) -> None:
        """Queues an Event about a rollout without blocking."""
        when, name = format_time(at), f"{resource.name[:200]}.{uuid.uuid4().hex[:16]}"
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name},
            "involvedObject": {
                "apiVersion": f"{GROUP}/{VERSION}", "kind": ROLLOUT_KIND, "name": resource.name,
                "namespace": resource.namespace, "uid": resource.uid,
            },
            "reason": action.title().replace("_", ""),
            "message": message[:_MESSAGE_CHARACTERS],
            "type": "Warning" if action in _WARNINGS else "Normal",
            "source": {"component": "reelway-operator"},
            "reportingComponent": "reelway.dev/operator",
            "reportingInstance": self._instance,
            "firstTimestamp": when,
            "lastTimestamp": when,
            "count": 1,
        }  # fmt: skip
        try:
            self._waiting.put_nowait(event)
        except queue.Full:
            log.warning("event %s of %s dropped: the queue is full", event["reason"], resource.name)

    def close(self, timeout_s: float = 5.0) -> None:
        """Writes the queued Events and ends the thread."""
        self._waiting.put(None)
        self._thread.join(timeout_s)

    def _write(self) -> None:
        while (event := self._waiting.get()) is not None:
            try:
                self._api.create("v1/events", event)
            except KubernetesError as error:
                log.warning("event %s of %s not written: %s", event["reason"], event["involvedObject"]["name"], error)
