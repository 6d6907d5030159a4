"""The ReleaseRollout and Release resources as types. ``crds`` generates the CRDs from them.

No I/O. Fields at the top of ``spec`` and ``status`` are camelCase, as everywhere in Kubernetes. Policies, states,
history entries and reconciles keep their snake_case fields, so that a policy file, the JSON output and the resource
agree.

Users write ``spec``; the operator writes ``status``. Commands are part of ``spec`` (``spec.commands``, each with an
id), because then the right to pause is the right to patch rollouts and not the right to write verdicts. The schema
checks them, and a command that is written twice has one id. The state of a rollout is the recorded one plus all
commands that it does not contain yet, so a command needs one write and is never lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from reelway.platform.cluster.service_url import DNS_LABEL, URL
from reelway.platform.errors import ConfigError
from reelway.platform.rollout.alerts import KnownAlert
from reelway.platform.rollout.policy import RolloutPolicy, parse_policy
from reelway.platform.rollout.records import HistoryEntry, LastReconcile
from reelway.platform.rollout.state import MAX_REMEMBERED_COMMANDS, Command, RolloutState

GROUP: Final = "reelway.dev"
VERSION: Final = "v1alpha1"
ROLLOUT_KIND: Final = "ReleaseRollout"
ROLLOUTS: Final = "releaserollouts"
RELEASE_KIND: Final = "Release"
RELEASES: Final = "releases"
FINALIZER: Final = "reelway.dev/traffic-on-stable"

MAX_COMMANDS: Final = MAX_REMEMBERED_COMMANDS // 2
"""Commands in a spec. Fewer than a state remembers, so that a processed command is never taken for a new one."""
HISTORY_LIMIT: Final = 100
"""History entries in a status; the newest are kept. An object in etcd must stay well under 1 MiB."""
MAX_ENTRIES_WITH_EVIDENCE: Final = 10
"""How many of the newest entries keep their evidence; entries that ended the ramp always keep it."""
ALERTS_LIMIT: Final = 100

ReleaseId = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the release's manifest")]


class _Model(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True, alias_generator=to_camel)

    def document(self) -> dict[str, Any]:
        """Returns the JSON object for the API server."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class PolicyReference(_Model):
    """A policy file in a ConfigMap of the same namespace, read once when the rollout starts."""

    name: Annotated[str, Field(min_length=1, max_length=253)]
    key: Annotated[str, Field(min_length=1, max_length=253)] = "policy.yaml"


class RayServiceReference(_Model):
    """A KubeRay RayService of the same namespace."""

    name: Annotated[str, Field(pattern=f"^{DNS_LABEL}$", max_length=47)]


class ServeEndpoint(_Model):
    """A Ray Serve without KubeRay. Ray's token is sent to Services of this namespace and to trusted hosts only."""

    api: Annotated[str, Field(pattern=f"^{URL}$", max_length=512, description="base URL of the Ray dashboard")]
    url: Annotated[str, Field(pattern=f"^{URL}$", max_length=512, description="base URL of the internal API")]


class Backend(_Model):
    """Where the traffic is: a RayService or a Serve endpoint. One rollout of a backend runs at a time."""

    ray_service: RayServiceReference | None = None
    serve: ServeEndpoint | None = None

    @property
    def key(self) -> str:
        """Identifies the backend."""
        return f"rayservice/{self.ray_service.name}" if self.ray_service else f"serve/{self.serve and self.serve.api}"


class CommandRequest(_Model):
    """A user's command. ``actor`` is not verified; the API server's audit log has the authenticated user."""

    id: Annotated[
        str, Field(min_length=1, max_length=64, description="a second command with the same id has no effect")
    ]
    verb: Literal["pause", "resume", "promote", "rollback"]
    actor: Annotated[str, Field(max_length=128)] = "unknown"
    force: bool = Field(default=False, description="promote without sufficient evidence")
    note: Annotated[str, Field(max_length=1024, description="reason, shown in the history")] = ""

    @property
    def to_command(self) -> Command:
        return Command(**self.model_dump())


class ReleaseRolloutSpec(_Model):
    """Immutable except for ``commands``."""

    release: ReleaseId
    stable_release: ReleaseId | None = Field(
        default=None,
        description="release to replace; the rollout is refused if another one is live. Default: the live release",
    )
    policy: RolloutPolicy | None = Field(
        default=None,
        description="default policy if neither this nor policyRef is set. `kubectl apply` without --server-side drops "
        "a null in it, and the field then has its default: use --server-side, `kubectl create` or policyRef",
    )
    policy_ref: PolicyReference | None = None
    backend: Backend
    force: bool = Field(default=False, description="start despite a cooldown or an earlier rollback of the release")
    note: Annotated[str, Field(max_length=1024)] = ""
    commands: Annotated[tuple[CommandRequest, ...], Field(max_length=MAX_COMMANDS)] = ()


class Condition(_Model):
    """A condition for ``kubectl wait --for=condition=...``."""

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str = ""
    last_transition_time: str
    observed_generation: int = 0


class EvidenceSummary(_Model):
    """The latest evidence in sentences; the numbers are in ``lastReconcile`` and ``history``."""

    viewers: int = 0
    impressions: int = 0
    age_s: float | None = None
    outcomes: tuple[str, ...] = ()
    guardrails: tuple[str, ...] = ()


class ReleaseRolloutStatus(_Model):
    """Decisions are based on ``state`` and ``policy``; the other fields are derived or recorded for people."""

    observed_generation: int = 0
    version: int = Field(default=0, ge=0, description="number of writes of the state")
    phase: str = Field(default="", description="Waiting or Refused before the start, then the phase of the state")
    release: str = Field(default="", description="first characters of the release id")
    step: str = Field(default="", description="current step, such as 2 of 5")
    weight: str = Field(default="", description="share of viewers that the release serves")
    weights: dict[str, int] = Field(default_factory=dict, description="traffic weight of each arm in basis points")
    verdict: str = Field(
        default="", description="worst verdict of the last reconcile: bad, telemetry_down, insufficient or ok"
    )
    reason: str = Field(default="", description="reason of the last decision, verbatim")
    waits_for: str = Field(default="", description="what the next step waits for")
    evidence: EvidenceSummary | None = None
    conditions: tuple[Condition, ...] = ()
    state: RolloutState | None = Field(default=None, description="absent before the rollout starts")
    policy: RolloutPolicy | None = Field(default=None, description="policy in effect, with all defaults")
    history: tuple[HistoryEntry, ...] = ()
    last_reconcile: LastReconcile | None = None
    alerts: tuple[KnownAlert, ...] = ()
    superseded_by: str = Field(
        default="",
        description="id of the rollout that started after this one; this one is no longer reconciled",
    )


class ReleaseSpec(_Model):
    """Where a release is stored. Its content is described by its manifest only."""

    id: ReleaseId
    store: Annotated[str, Field(min_length=1, max_length=1024, description="URL of the release store")]
    parent: ReleaseId | None = None
    note: Annotated[str, Field(max_length=1024)] = ""


class ReleaseStatus(_Model):
    """A summary of the manifest, and whether the store has the release. Written by the operator."""

    name: str = Field(default="", description="name of the run that built the release")
    created_at: str = ""
    gates: str = Field(default="", description="hold (all passed), waived (by a named person) or failed")
    failed_gates: tuple[str, ...] = ()
    metrics: dict[str, str] = Field(default_factory=dict, description="metrics of the evaluation, as text")
    conditions: tuple[Condition, ...] = ()


class RolloutResource(BaseModel):
    """A ReleaseRollout from the API server."""

    model_config = ConfigDict(frozen=True)

    name: str
    namespace: str
    uid: str
    resource_version: str
    generation: int
    created_at: str
    deleting: bool
    finalizers: tuple[str, ...]
    spec: ReleaseRolloutSpec
    policy_problem: str = ""
    """Why ``spec.policy`` is invalid. The CRD's schema cannot express all rules of a policy."""
    status: ReleaseRolloutStatus

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> RolloutResource:
        """Parses an object. Raises pydantic's ValidationError if it is of another version of the CRD."""
        metadata, spec, problem = document["metadata"], dict(document["spec"]), ""
        if spec.get("policy") is not None:
            try:
                parse_policy(yaml.safe_dump(spec["policy"]), source="spec.policy")
            except ConfigError as error:
                problem = str(error)
                del spec["policy"]
        return cls(
            name=metadata["name"],
            namespace=metadata["namespace"],
            uid=metadata["uid"],
            resource_version=metadata["resourceVersion"],
            generation=metadata.get("generation", 1),
            created_at=str(metadata["creationTimestamp"]),
            deleting="deletionTimestamp" in metadata,
            finalizers=tuple(metadata.get("finalizers", ())),
            spec=ReleaseRolloutSpec.model_validate(spec),
            policy_problem=problem,
            status=ReleaseRolloutStatus.model_validate(document.get("status") or {}),
        )

    @property
    def rollout_id(self) -> str:
        """A unique id, unlike the name: it labels the metrics and is in every impression token."""
        return f"{self.name}-{self.uid[:8]}"

    @property
    def version(self) -> int:
        """A number that grows with every write of the state and of the spec."""
        return self.status.version + self.generation
