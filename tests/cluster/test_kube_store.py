"""``KubeRolloutStore`` on a real API server: concurrent writes, commands, history, alerts."""

from __future__ import annotations

import threading
import time

import pytest
from tests.support.cluster.fake_serve import GOOD, STABLE
from tests.support.cluster.kubectl import Kubectl
from tests.support.cluster.rollout_manifests import QUICK, rollout

from reelway.platform.cluster.kube_api import KubeApi
from reelway.platform.cluster.kube_rollout_store import LIVE, KubeRolloutStore
from reelway.platform.cluster.resources import HISTORY_LIMIT, MAX_COMMANDS, MAX_ENTRIES_WITH_EVIDENCE, Backend
from reelway.platform.cluster.rollout_cache import PATH, InformerCache, UncachedRollouts
from reelway.platform.errors import ConfigError, KubernetesError, RolloutError
from reelway.platform.rollout.alerts import KnownAlert
from reelway.platform.rollout.policy import RolloutPolicy
from reelway.platform.rollout.records import HistoryEntry, LastReconcile, Rollout
from reelway.platform.rollout.state import Command, Phase, RolloutState

pytestmark = pytest.mark.cluster

POLICY = RolloutPolicy.model_validate(QUICK)
BACKEND = Backend.model_validate({"rayService": {"name": "reelway"}})


def command_store(api: KubeApi) -> KubeRolloutStore:
    return KubeRolloutStore(api, UncachedRollouts(api), create_backend=BACKEND)


def entry(rollout_id: str, reason: str = "because", action: str = "step") -> HistoryEntry:
    return HistoryEntry(
        rollout_id=rollout_id, time=1.5, action=action, reason=reason, phase_before="pending", phase="stepping",
        step=0, canary_bp=100, evidence={"exposure": {"viewers": 3}},
    )  # fmt: skip


def started_rollout(api: KubeApi, kubectl: Kubectl, name: str = "one") -> tuple[KubeRolloutStore, Rollout]:
    """A controller's store with a started rollout."""
    kubectl.apply(rollout(name))
    cache = InformerCache()
    for document in api.list(PATH):
        cache.apply_event(document)
    store = KubeRolloutStore(api, cache, backend=BACKEND.key)
    resource = next(one for one in cache.all() if one.name == name)
    state = RolloutState(
        id=resource.rollout_id, stable_release=STABLE, canary_release=GOOD, started_at=5, changed_at=5, tick_at=5
    )
    return store, store.begin(resource, state, POLICY)


def moved(before: Rollout, phase: Phase) -> RolloutState:
    return before.state.model_copy(update={"phase": phase})


def test_recorded_state_is_read_back(api: KubeApi, kubectl: Kubectl) -> None:
    store, before = started_rollout(api, kubectl)
    written = store.record(before, moved(before, Phase.PREPARING), entry(before.state.id))
    other = command_store(api)
    assert other.latest() == written
    assert other.get("one") == other.get(before.state.id[:5]) == written
    assert [known.reason for known in other.history("one")] == ["because"]
    assert written.version > before.version
    status = kubectl.read("one")["status"]
    assert (status["phase"], status["step"], status["weight"]) == ("Preparing", "0 of 2", "0 %")


def test_waiting_rollout_is_visible_to_commands_only(api: KubeApi, kubectl: Kubectl) -> None:
    kubectl.apply(rollout())
    latest = command_store(api).latest()
    assert latest is not None
    assert (latest.state.phase, latest.state.stable_release) == (Phase.PENDING, LIVE)
    assert latest.state.reason == "the operator has not observed the rollout yet"
    assert KubeRolloutStore(api, UncachedRollouts(api), backend=BACKEND.key).latest() is None


def test_created_rollout_has_the_requested_spec(api: KubeApi, kubectl: Kubectl) -> None:
    state = RolloutState(
        id="r-1", stable_release=LIVE, canary_release=GOOD, started_at=1, changed_at=1, tick_at=1, forced=True,
        reason="try it",
    )  # fmt: skip
    created = command_store(api).create(state, POLICY)
    assert (created.state.canary_release, created.state.forced, created.policy) == (GOOD, True, POLICY)
    spec = kubectl.read("r-1")["spec"]
    assert (spec["note"], spec["backend"]) == ("try it", {"rayService": {"name": "reelway"}})
    assert spec["policy"]["guardrails"]["parity_mismatches"] is None
    with pytest.raises(RolloutError, match="cannot create rollout r-1: it exists"):
        command_store(api).create(state, POLICY)
    with pytest.raises(RolloutError, match=r"spec.release"):
        command_store(api).create(state.model_copy(update={"id": "r-2", "canary_release": "new"}), POLICY)


def test_outdated_writer_is_rejected(api: KubeApi, kubectl: Kubectl) -> None:
    store, before = started_rollout(api, kubectl)
    late = KubeRolloutStore(api, UncachedRollouts(api), backend=BACKEND.key)
    store.record(before, moved(before, Phase.PREPARING), entry(before.state.id, "first"))
    with pytest.raises(RolloutError, match="another writer changed it"):
        late.record(before, moved(before, Phase.SHADOW), entry(before.state.id, "second"))
    assert [known.reason for known in late.history()] == ["first"]


def test_outdated_cache_loses_no_write(api: KubeApi, kubectl: Kubectl) -> None:
    """The cache lacks a change of the object, so the write is rejected and repeated on the latest version."""
    store, before = started_rollout(api, kubectl)
    kubectl.run("annotate", "releaserollout", "one", "who=me")
    written = store.record(before, moved(before, Phase.PREPARING), None)
    assert written.state.phase is Phase.PREPARING
    assert kubectl.read("one")["metadata"]["annotations"]["who"] == "me"


def test_command_during_a_decision_is_kept(api: KubeApi, kubectl: Kubectl) -> None:
    store, before = started_rollout(api, kubectl)
    command_store(api).submit_command("one", Command(id="c1", verb="rollback", actor="ada", note="why"))
    written = store.record(before, moved(before, Phase.PREPARING), None)
    assert (written.state.phase, written.state.command) == (
        Phase.PREPARING, Command(id="c1", verb="rollback", actor="ada", note="why"),
    )  # fmt: skip
    updated = written.state.model_copy(update={"command": None, "phase": Phase.ROLLING_BACK})
    assert store.record(written, updated, None).state.command is None
    assert command_store(api).submit_command("one", Command(id="c1", verb="rollback")).state.command is None


def test_concurrent_commands_are_all_recorded(api: KubeApi, kubectl: Kubectl) -> None:
    started_rollout(api, kubectl)
    threads = [
        threading.Thread(target=command_store(api).submit_command, args=("one", Command(id=f"c{i}", verb="pause")))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(command_store(api).get("one").state.commands_seen) == {f"c{i}" for i in range(4)}


def test_pending_commands_are_never_dropped(api: KubeApi, kubectl: Kubectl) -> None:
    store, _ = started_rollout(api, kubectl)
    asking = command_store(api)
    asking.submit_command("one", Command(id="first", verb="rollback"))
    for i in range(MAX_COMMANDS - 1):
        asking.submit_command("one", Command(id=f"c{i}", verb="pause"))
    with pytest.raises(RolloutError, match="16 of at most 16 commands wait"):
        asking.submit_command("one", Command(id="more", verb="pause"))
    newest = asking.get("one")
    assert newest.state.command == Command(id="first", verb="rollback")
    store.record(newest, newest.state.model_copy(update={"command": None}), None)
    asking.submit_command("one", Command(id="more", verb="pause"))
    assert asking.get("one").state.command == Command(id="more", verb="pause")
    assert len(kubectl.read("one")["spec"]["commands"]) == MAX_COMMANDS


def test_deleted_active_rollout_gets_a_rollback_command(api: KubeApi, kubectl: Kubectl) -> None:
    store, before = started_rollout(api, kubectl)
    kubectl.run("patch", "releaserollout", "one", "--type=merge", "-p", '{"metadata":{"finalizers":["a.b/c"]}}')
    kubectl.run("delete", "releaserollout", "one", "--wait=false")
    written = store.record(before, moved(before, Phase.STEPPING), None)
    assert written.state.command is not None
    assert (written.state.command.verb, written.version > before.version) == ("rollback", True)


def test_write_to_a_deleted_rollout_fails(api: KubeApi, kubectl: Kubectl) -> None:
    store, before = started_rollout(api, kubectl)
    kubectl.run("delete", "releaserollout", "one")
    with pytest.raises(RolloutError, match="cannot write rollout one: it was deleted"):
        store.record(before, moved(before, Phase.PREPARING), None)


def test_bounded_history_keeps_the_deciding_evidence(api: KubeApi, kubectl: Kubectl) -> None:
    store, before = started_rollout(api, kubectl)
    resource = next(iter(store._cache.all()))
    filled = tuple(
        entry(before.state.id, str(i), "roll_back" if i == 30 else "step").model_copy(update={"number": i + 1})
        for i in range(HISTORY_LIMIT + 20)
    )
    store._write(resource, lambda newest: newest.status.model_copy(update={"history": filled}))
    store.record(store.get("one"), moved(before, Phase.PREPARING), entry(before.state.id, "last"))
    history = command_store(api).history("one")
    assert (len(history), history[-1].reason, history[-1].number) == (HISTORY_LIMIT, "last", HISTORY_LIMIT + 21)
    with_evidence = [known for known in history if known.evidence]
    assert {known.action for known in with_evidence[:-MAX_ENTRIES_WITH_EVIDENCE]} == {"roll_back"}


def test_only_alerts_about_the_rollout_are_stored(api: KubeApi, kubectl: Kubectl) -> None:
    store, before = started_rollout(api, kubectl)

    def alert(release: str, starts_at: float, rollout_id: str) -> KnownAlert:
        labels = (("alertname", "a"), ("release", release))
        return KnownAlert(
            group_key="g", labels=labels, starts_at=starts_at, resolved=False, summary="s", rollout=rollout_id
        )

    mine = alert(GOOD[:12], 6, before.state.id)
    alerts = {one.key: one for one in (mine, alert(GOOD, 7, "r-0"), alert("f" * 64, 6, before.state.id))}
    store.replace_alerts(alerts)
    assert store.alerts() == command_store(api).alerts() == {mine.key: mine}
    version = kubectl.read("one")["metadata"]["resourceVersion"]
    store.replace_alerts(alerts)
    assert kubectl.read("one")["metadata"]["resourceVersion"] == version


def test_reconcile_is_written_only_if_its_outcome_changed(api: KubeApi, kubectl: Kubectl) -> None:
    store, before = started_rollout(api, kubectl)

    def sighting(at: float, *, reached: bool = True) -> LastReconcile:
        return LastReconcile(
            rollout_id=before.state.id, time=at, action="wait", reason=f"{at}", traffic={"reached": reached}
        )

    store.save_last_reconcile(sighting(1))
    store.save_last_reconcile(sighting(2))
    last_reconcile = command_store(api).last_reconcile("one")
    assert last_reconcile is not None
    assert last_reconcile.time == 1
    store.save_last_reconcile(sighting(3, reached=False))
    conditions = {one["type"]: one["status"] for one in kubectl.read("one")["status"]["conditions"]}
    assert (conditions["Ready"], conditions["Progressing"]) == ("False", "True")
    store.save_last_reconcile(sighting(4, reached=False))
    store.record(before, moved(before, Phase.PREPARING), None)
    last_reconcile = command_store(api).last_reconcile("one")
    assert last_reconcile is not None
    assert last_reconcile.time == 4


def test_revision_distinguishes_foreign_changes(api: KubeApi, kubectl: Kubectl) -> None:
    store, before = started_rollout(api, kubectl)
    cache = store._cache
    assert isinstance(cache, InformerCache)
    quiet, mine = store.revision(include_own=False), store.revision()
    store.record(before, moved(before, Phase.PREPARING), None)
    for document in api.list(PATH):
        cache.apply_event(document)  # the watch event of the own write
    assert (store.revision(include_own=False), store.revision() > mine) == (quiet, True)
    asking = command_store(api)
    last_reconcile = asking.revision(include_own=False)
    assert asking.revision(include_own=False) == last_reconcile
    asking.submit_command("one", Command(id="c", verb="pause"))
    assert asking.revision(include_own=False) == last_reconcile
    for document in api.list(PATH):
        cache.apply_event(document)
    assert store.revision(include_own=False) > quiet


def test_unreachable_api_server_is_a_kubernetes_error(api: KubeApi) -> None:
    api.server = "https://127.0.0.1:1"
    began = time.monotonic()
    with pytest.raises(KubernetesError, match=r"cannot reach https://127.0.0.1:1"):
        command_store(api).latest()
    assert time.monotonic() - began < 5
    with pytest.raises(ConfigError, match="cannot connect to context 'nowhere'"):
        KubeApi(context="nowhere")
