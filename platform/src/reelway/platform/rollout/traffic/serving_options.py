"""Everything about a service that does not change during a rollout, as typed options.

`reelway serve` builds ``ServingOptions`` from its command line; the Helm chart renders them into a ConfigMap.
``serve_config`` composes Ray Serve's configuration from them. The ``*Args`` models are the arguments that this
configuration passes to the application builders of ``reelway.serving.deployments.applications``.

No option holds a secret: secrets are files or environment variables of Ray's processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from reelway.platform.errors import ConfigError
from reelway.platform.rollout.traffic.access_options import AccessOptions
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.validation_errors import explain_problem

Composition = Literal["staged", "fused"]
"""Where the three stages of a release run.

``staged``: each stage is a deployment of its own and scales on its own. A crash in a release's native code ends a
process of that release only. A request takes three hops.
``fused``: the stages run in the routers' processes, each release on a thread of its own. There are no hops (`make
bench-serving` prints their cost). All stages scale together with the routers; a canary shares the routers' cores with
stable, and a crash in a release's native code ends a router. See decision 0013.
"""


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ReleaseStoreArgs(_Options):
    """Where releases come from and whose signatures are trusted."""

    release_store: str = Field(description="URL or path of the release store")
    release_cache: Path = Field(description="local folder; releases that it lacks are fetched from the store")
    public_keys: Path = Field(description="folder with *.public.pem, or one PEM file")
    overlay: str | None = Field(
        default=None,
        description="path or fsspec URL of the overlay that updates the video table after the release was built; "
        "without it a release keeps the videos and features that it was built with",
    )

    def release_args(self, release: str, composition: Composition = "staged") -> ReleaseArgs:
        """Arguments for one release of this store."""
        return ReleaseArgs(
            **self.model_dump(include=set(ReleaseStoreArgs.model_fields)), release=release, composition=composition
        )


class ReleaseArgs(ReleaseStoreArgs):
    """Arguments of a release's application."""

    release: str = Field(min_length=1, description="full id; also the application's name")
    composition: Composition = "staged"
    ranker_address: str | None = Field(
        default=None,
        description="host:port of a remote ranker's gRPC endpoint; {release} stands for the short release id. Without "
        "it Ray Serve ranks",
    )
    events: str | None = Field(
        default=None,
        description="address of the event log (see eventlog.topics), whose takedowns retrieval follows; without it "
        "retrieval hides nothing",
    )

    @model_validator(mode="after")
    def _remote_ranker_needs_staged(self) -> ReleaseArgs:
        if self.ranker_address and self.composition == "fused":
            raise ValueError(
                "ranker_address: composition 'fused' runs stages on threads that must not wait for a remote ranker; "
                "use composition 'staged'"
            )
        return self


class BudgetsMs(_Options):
    """Time limits per stage in milliseconds, hop included. A request continues without a stage that is too slow."""

    viewer_row: float = Field(default=250.0, gt=0)
    retrieval: float = Field(default=500.0, gt=0)
    ranking: float = Field(default=500.0, gt=0)
    reranking: float = Field(default=250.0, gt=0)

    @property
    def path(self) -> float:
        """The limit for all stages together, used when they run as one."""
        return self.retrieval + self.ranking + self.reranking


def _check_queue_limits(maximum: int, sustained: int | None) -> None:
    if sustained is not None and sustained > maximum:
        raise ValueError(
            f"max_ongoing_sustained: {sustained} exceeds max_ongoing_requests, which is {maximum}; lower it"
        )


class RouterArgs(ReleaseStoreArgs):
    """Arguments of the router's application."""

    token_secrets: Path | None = Field(
        default=None, description="file with the token secrets; the environment variable takes precedence"
    )
    features_dir: Path | None = Field(
        default=None, description="folder of the feature store; without it every viewer is served as unknown"
    )
    vector_log: str | None = Field(default=None, description="file, folder or URL for the parity replay's sample")
    parity_ratio: float = Field(default=0.01, ge=0, le=1, description="share of requests that are logged for parity")
    budgets: BudgetsMs = BudgetsMs()
    composition: Composition = "staged"
    max_ongoing_requests: int = Field(
        default=64, ge=1, description="concurrent requests per router and release; further requests get 429"
    )
    max_ongoing_sustained: int | None = Field(
        default=None,
        ge=1,
        description="the same limit while the queue has not been empty for 0.5 s; default: max_ongoing_requests",
    )
    events: str | None = Field(
        default=None,
        description="address of the event log (see eventlog.topics), to which exposures and outcomes are appended and "
        "whose takedowns are followed; without it nothing is taken down",
    )
    log_keeper: str | None = Field(
        default=None, description="application that appends to its own event log for the routers, used without events"
    )

    access: AccessOptions = AccessOptions()

    @model_validator(mode="after")
    def _sustained_limit_is_not_larger(self) -> Self:
        _check_queue_limits(self.max_ongoing_requests, self.max_ongoing_sustained)
        return self


class OutcomesArgs(_Options):
    """Arguments of the application that sums exposures and outcomes."""

    token_secrets: Path | None = Field(default=None, description="as in RouterArgs")
    state: Path = Field(description="SQLite file with the sums; one process writes it")
    events: str = Field(description="address of the event log that is summed")
    require_authenticated: bool = Field(
        default=False, description="whether only viewers who proved their identity are evidence"
    )


class AutoscalingOptions(_Options):
    """Ray Serve's autoscaling of one deployment."""

    min_replicas: int = Field(ge=1)
    max_replicas: int = Field(ge=1)
    target_ongoing_requests: float = Field(gt=0)


class DeploymentOptions(_Options):
    """Replicas of one Serve deployment and what each replica reserves from Ray."""

    num_replicas: int = Field(default=1, ge=1, description="ignored with autoscaling")
    autoscaling: AutoscalingOptions | None = None
    num_cpus: float = Field(default=0.1, ge=0)
    num_gpus: float = Field(default=0, ge=0)
    memory_bytes: int = Field(default=0, ge=0, description="0 reserves no memory")
    resources: dict[str, float] = Field(default_factory=dict, description="custom Ray resources")


class Deployments(_Options):
    """Options per deployment.

    The default of 0.1 CPUs lets all deployments of several releases share one machine. Outcomes have one replica,
    because one process writes the file of their sums. With composition ``fused`` only ``router`` and ``outcomes`` are
    used.
    """

    router: DeploymentOptions = DeploymentOptions()
    retrieval: DeploymentOptions = DeploymentOptions()
    ranking: DeploymentOptions = DeploymentOptions()
    reranking: DeploymentOptions = DeploymentOptions()
    outcomes: DeploymentOptions = DeploymentOptions()

    @model_validator(mode="after")
    def _one_process_sums_outcomes(self) -> Deployments:
        if self.outcomes.num_replicas != 1 or self.outcomes.autoscaling:
            raise ValueError("outcomes: one process writes their file; use num_replicas 1 without autoscaling")
        return self

    @classmethod
    def with_replicas(cls, **counts: int) -> Deployments:
        """Returns the default options with these numbers of replicas by deployment."""
        return cls(**{name: DeploymentOptions(num_replicas=count) for name, count in counts.items()})


class InitialTraffic(_Options):
    """The routing of a service before its first rollout: all viewers on one release."""

    release: str = Field(min_length=1)
    salt: str = Field(default="reelway", min_length=1, description="salt of the viewer buckets")

    @property
    def routing(self) -> Routing:
        return Routing.single_release(self.release, salt=self.salt)


class ServingOptions(_Options):
    """One service."""

    releases: ReleaseStoreArgs
    metrics_dir: Path = Field(description="folder in which all processes of one machine count; new for every start")
    initial: InitialTraffic | None = Field(default=None, description="required where no routing exists yet")
    token_secrets: Path | None = None
    features_dir: Path | None = None
    vector_log: str | None = None
    parity_ratio: Annotated[float, Field(ge=0, le=1)] = 0.01
    outcomes: Path | None = Field(
        default=None, description="SQLite file of the outcomes' sums; without it none are kept"
    )
    events: str | None = Field(
        default=None,
        description="address of the event log: a folder, or kafka://host:port[/prefix]. Without it the outcomes "
        "application keeps the log in the folder of its file, and nothing is logged while that application is down",
    )
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    proxy_location: Literal["HeadOnly", "EveryNode"] = "EveryNode"
    deployments: Deployments = Deployments()
    budgets: BudgetsMs = BudgetsMs()
    composition: Composition = "staged"
    max_ongoing_requests: int = Field(default=64, ge=1)
    max_ongoing_sustained: int | None = Field(default=None, ge=1)
    ranker_address: str | None = None
    access: AccessOptions = AccessOptions()
    environment: dict[str, str] = Field(
        default_factory=lambda: {"OMP_NUM_THREADS": "1"}, description="environment of every replica"
    )

    @model_validator(mode="after")
    def _sustained_limit_is_not_larger(self) -> Self:
        _check_queue_limits(self.max_ongoing_requests, self.max_ongoing_sustained)
        return self

    @classmethod
    def parse(cls, text: str, *, source: str) -> ServingOptions:
        """Returns options from YAML.

        Args:
            source: name of the document, for error messages.

        Raises:
            ConfigError: if the text is not YAML or an option is unknown, missing or wrong.
        """
        try:
            loaded: Any = yaml.safe_load(text)
            return cls.model_validate(loaded)
        except yaml.YAMLError as error:
            raise ConfigError(f"{source}: not YAML: {error}; install the chart again") from error
        except ValidationError as error:
            problems = "\n".join(explain_problem(cls, problem, source) for problem in error.errors())
            raise ConfigError(f"{problems}; chart and operator image must be of the same version") from error
