"""One traffic backend of a namespace and the rollout controller that manages it.

``BackendController`` builds the parts for its backend (store, evidence, alerts, traffic) and runs the ``Controller`` in
a thread. It is the same ``Controller`` that runs in local mode.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from reelway.platform.cluster.inference_service import InferenceServiceRankers, read_template
from reelway.platform.cluster.kube_api import KubeApi
from reelway.platform.cluster.kube_rollout_store import KubeRolloutStore
from reelway.platform.cluster.leader_election import LeaderElector
from reelway.platform.cluster.operator_settings import OperatorSettings
from reelway.platform.cluster.ray_service import RayServiceBackend
from reelway.platform.cluster.remote_rankers import RankerReconciler, RemoteRankerBackend
from reelway.platform.cluster.resources import Backend, RolloutResource
from reelway.platform.cluster.rollout_cache import RolloutCache
from reelway.platform.cluster.serve_address import serve_address
from reelway.platform.cluster.serve_config_reconciler import ServeConfigReconciler
from reelway.platform.rollout.control.alert_registry import AlertRegistry
from reelway.platform.rollout.control.controller import Controller
from reelway.platform.rollout.control.controller_metrics import ControllerMetrics
from reelway.platform.rollout.records import HistoryEntry
from reelway.platform.rollout.sources import SeriesEvidenceSource
from reelway.platform.rollout.sources.direct_scrape import DirectScrapeReader
from reelway.platform.rollout.sources.parity_findings import ParityFindings
from reelway.platform.rollout.sources.parity_store import ParityFindingsReader
from reelway.platform.rollout.sources.prometheus_reader import PrometheusReader
from reelway.platform.rollout.sources.series_reader import SeriesReader
from reelway.platform.rollout.traffic.serve_rest import ServeRestBackend
from reelway.platform.rollout.traffic.target import TrafficTarget, traffic_target
from reelway.platform.supervised_thread import SupervisedThread

log = logging.getLogger(__name__)


class BackendController:
    """The controller of one backend.

    Args:
        on_decision: called with each decision after it is recorded.
        lease: checked right before each write.
        on_failure: called if the controller's thread ends with an unexpected exception.

    Raises:
        RolloutError: if the backend is on a host that the operator may not send Ray's token to.
        KubernetesError: if the recorded alerts cannot be read.
    """

    def __init__(
        self,
        api: KubeApi,
        cache: RolloutCache,
        backend: Backend,
        settings: OperatorSettings,
        metrics: ControllerMetrics,
        on_decision: Callable[[RolloutResource, HistoryEntry], None],
        lease: LeaderElector,
        on_failure: Callable[[], None],
    ) -> None:
        address = serve_address(backend, api.namespace, settings.ray)
        self.key = backend.key
        require_lease = lease.require_valid
        self.store = KubeRolloutStore(
            api, cache, backend=backend.key, create_backend=backend, on_decision=on_decision,
            require_lease=require_lease,
        )  # fmt: skip
        serve = ServeRestBackend(address, before_write=require_lease, before_rollback=lease.require_last_holder)
        name = backend.ray_service.name if backend.ray_service else ""
        self.backend: RayServiceBackend | ServeRestBackend = serve
        self.serve_config: ServeConfigReconciler | None = None
        rankers: RankerReconciler | None = None
        if settings.ranker_template:
            rankers = RankerReconciler(
                InferenceServiceRankers(api, read_template(settings.ranker_template)),
                before_write=require_lease,
                on_failure=metrics.failures.labels("rankers").inc,
            )
        self._rankers = rankers
        if name:
            self.backend = RayServiceBackend(api, name, serve, before_write=require_lease)
            self.serve_config = ServeConfigReconciler(
                api, self.backend, rankers.prepare if rankers else lambda _: None, self._recorded_target
            )
        url = address.internal_url.rstrip("/")
        reader: SeriesReader
        if settings.prometheus.url:
            reader = PrometheusReader(settings.prometheus.url, access=settings.prometheus.access(api.namespace))
        else:
            reader = DirectScrapeReader(lambda: url)
        self._parity = ParityFindingsReader(settings.parity_findings) if settings.parity_findings else None
        self._source = SeriesEvidenceSource(reader, self._parity.findings if self._parity else _parity_unknown)
        self.wake = threading.Event()
        self.alerts = AlertRegistry(self.store, on_change=self.wake.set)
        self._stop = threading.Event()
        controller = Controller(
            self.store,
            RemoteRankerBackend(self.backend, rankers) if rankers else self.backend,
            self._source,
            self.alerts,
            alert_source=settings.alertmanager.source(api.namespace),
            poll_s=settings.alertmanager.poll_interval_s,
            metrics=metrics,
        )
        self._thread = SupervisedThread(
            controller.run,
            args=(self._stop, self.wake, settings.interval_s),
            name=f"controller {self.key}",
            kind="controller",
            on_failure=on_failure,
        )

    def start(self) -> None:
        """Starts the controller's thread."""
        log.info("controller of %s: started", self.key)
        self._thread.start()
        if self._rankers is not None:  # a request of its own may hang, so nothing waits for its end
            SupervisedThread(
                self._rankers.run,
                args=(self._stop,),
                name=f"rankers {self.key}",
                daemon=True,
                kind="rankers",
                stop=self._stop,
            ).start()

    @property
    def is_alive(self) -> bool:
        """Whether the controller's thread is running."""
        return self._thread.is_alive()

    def backend_deleted(self) -> bool:
        """Returns whether the RayService no longer exists, so that no traffic can be moved.

        Raises:
            KubernetesError: if the API server cannot be reached.
        """
        return isinstance(self.backend, RayServiceBackend) and not self.backend.exists()

    def _recorded_target(self) -> TrafficTarget | None:
        """Returns the traffic of the backend's newest rollout."""
        latest = self.store.latest()
        return traffic_target(latest.state) if latest else None

    def request_stop(self) -> None:
        """Lets the thread end after the current reconcile, without waiting for it."""
        self._stop.set()
        self.wake.set()
        if self._rankers is not None:
            self._rankers.wake()

    def stop(self) -> None:
        """Finishes the current reconcile and ends the thread."""
        self.request_stop()
        if self._thread.ident is not None:
            self._thread.join()
        self._source.close()
        if self._parity is not None:
            self._parity.close()
        self.backend.close()


def _parity_unknown() -> ParityFindings:
    return ParityFindings(problem="the operator has no parity findings; set parity_findings in its settings")
