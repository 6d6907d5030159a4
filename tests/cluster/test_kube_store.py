"""The memory of rollouts on a real API server: nothing is lost, nothing is written over, whoever writes meanwhile."""

from __future__ import annotations

import threading
import time

import pytest
from tests.cluster.conftest import Kubectl
from tests.cluster.fake_serve import GOOD, STABLE
from tests.cluster.made_rollout import QUICK, rollout

from reelway.platform.cluster.kube_api import KubeApi
from reelway.platform.cluster.resources import COMMANDS_LIMIT, EVIDENCE_LIMIT, HISTORY_LIMIT, Backend
from reelway.platform.cluster.rollout_store import LIVE, KubeRolloutStore
from reelway.platform.cluster.shelf import PATH, AskingShelf, ToldShelf
from reelway.platform.errors import ConfigError, KubernetesError, RolloutError
from reelway.platform.rollout.alerts import KnownAlert
from reelway.platform.rollout.policy import RolloutPolicy
from reelway.platform.rollout.records import HistoryEntry, Rollout, Sighting
from reelway.platform.rollout.state import Command, Phase, RolloutState

pytestmark = pytest.mark.cluster

POLICY = RolloutPolicy.model_validate(QUICK)
BACKEND = Backend.model_validate({"rayService": {"name": "reelway"}})


def people(api: KubeApi) -> KubeRolloutStore:
    return KubeRolloutStore(api, AskingShelf(api), made_for=BACKEND)


def entry(rollout_id: str, reason: str = "because", action: str = "step") -> HistoryEntry:
    return HistoryEntry(
        rollout_id=rollout_id, time=1.5, action=action, reason=reason, phase_before="pending", phase="stepping",
        step=0, canary_bp=100, evidence={"exposure": {"viewers": 3}},
    )  # fmt: skip


def begun(api: KubeApi, kubectl: Kubectl, name: str = "one") -> tuple[KubeRolloutStore, Rollout]:
    """A controller's store, with a rollout that has begun."""
    kubectl.apply(rollout(name))
    shelf = ToldShelf()
    for document in api.list(PATH):
        shelf.tell(document)
    store = KubeRolloutStore(api, shelf, backend=BACKEND.key)
    resource = next(one for one in shelf.all() if one.name == name)
    state = RolloutState(
        id=resource.rollout_id, stable_release=STABLE, canary_release=GOOD, started_at=5, changed_at=5, tick_at=5
    )
    return store, store.begin(resource, state, POLICY)


def moved(before: Rollout, phase: Phase) -> RolloutState:
    return before.state.model_copy(update={"phase": phase})


def test_what_is_recorded_is_read_back_by_everybody(api: KubeApi, kubectl: Kubectl) -> None:
    store, before = begun(api, kubectl)
    written = store.record(before, moved(before, Phase.PREPARING), entry(before.state.id))
    other = people(api)
    assert other.latest() == written
    assert other.get("one") == other.get(before.state.id[:5]) == written
    assert [known.reason for known in other.history("one")] == ["because"]
    assert written.version > before.version
    status = kubectl.read("one")["status"]
    assert (status["phase"], status["step"], status["weight"]) == ("Preparing", "0 of 2", "0 %")


def test_a_rollout_that_has_not_begun_is_pending_for_people_and_nothing_for_a_controller(
    api: KubeApi, kubectl: Kubectl
) -> None:
    kubectl.apply(rollout())
    latest = people(api).latest()
    assert latest is not None
    assert (latest.state.phase, latest.state.stable_release) == (Phase.PENDING, LIVE)
    assert latest.state.reason == "the operator has not seen it yet"
    assert KubeRolloutStore(api, AskingShelf(api), backend=BACKEND.key).latest() is None


def test_what_is_made_by_a_command_is_what_was_asked_for(api: KubeApi, kubectl: Kubectl) -> None:
    state = RolloutState(
        id="r-1", stable_release=LIVE, canary_release=GOOD, started_at=1, changed_at=1, tick_at=1, forced=True,
        reason="try it",
    )  # fmt: skip
    made = people(api).create(state, POLICY)
    assert (made.state.canary_release, made.state.forced, made.policy) == (GOOD, True, POLICY)
    spec = kubectl.read("r-1")["spec"]
    assert (spec["note"], spec["backend"]) == ("try it", {"rayService": {"name": "reelway"}})
    assert spec["policy"]["guardrails"]["parity_mismatches"] is None
    with pytest.raises(RolloutError, match="there is a rollout r-1 already"):
        people(api).create(state, POLICY)
    with pytest.raises(RolloutError, match=r"spec.release"):
        people(api).create(state.model_copy(update={"id": "r-2", "canary_release": "new"}), POLICY)


def test_a_writer_that_read_an_older_version_is_refused_and_writes_nothing(api: KubeApi, kubectl: Kubectl) -> None:
    store, before = begun(api, kubectl)
    late = KubeRolloutStore(api, AskingShelf(api), backend=BACKEND.key)
    store.record(before, moved(before, Phase.PREPARING), entry(before.state.id, "first"))
    with pytest.raises(RolloutError, match="somebody else changed it"):
        late.record(before, moved(before, Phase.SHADOW), entry(before.state.id, "second"))
    assert [known.reason for known in late.history()] == ["first"]


def test_an_old_copy_costs_a_refused_write_and_loses_nothing(api: KubeApi, kubectl: Kubectl) -> None:
    """The shelf has not heard that the object was touched: the write is done again on top of what is there."""
    store, before = begun(api, kubectl)
    kubectl.run("annotate", "releaserollout", "one", "who=me")
    written = store.record(before, moved(before, Phase.PREPARING), None)
    assert written.state.phase is Phase.PREPARING
    assert kubectl.read("one")["metadata"]["annotations"]["who"] == "me"


def test_a_command_asked_while_the_controller_decided_is_kept(api: KubeApi, kubectl: Kubectl) -> None:
    store, before = begun(api, kubectl)
    people(api).ask("one", Command(id="c1", verb="rollback", actor="ada", note="why"))
    written = store.record(before, moved(before, Phase.PREPARING), None)
    assert (written.state.phase, written.state.command) == (
        Phase.PREPARING, Command(id="c1", verb="rollback", actor="ada", note="why"),
    )  # fmt: skip
    done = written.state.model_copy(update={"command": None, "phase": Phase.ROLLING_BACK})
    assert store.record(written, done, None).state.command is None
    assert people(api).ask("one", Command(id="c1", verb="rollback")).state.command is None


def test_commands_of_many_people_at_once_are_all_seen(api: KubeApi, kubectl: Kubectl) -> None:
    begun(api, kubectl)
    threads = [
        threading.Thread(target=people(api).ask, args=("one", Command(id=f"c{i}", verb="pause"))) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(people(api).get("one").state.commands_seen) == {f"c{i}" for i in range(4)}


def test_the_list_of_commands_is_cut_but_never_one_that_waits(api: KubeApi, kubectl: Kubectl) -> None:
    store, _ = begun(api, kubectl)
    asking = people(api)
    asking.ask("one", Command(id="first", verb="rollback"))
    for i in range(COMMANDS_LIMIT - 1):
        asking.ask("one", Command(id=f"c{i}", verb="pause"))
    with pytest.raises(RolloutError, match="16 commands of one wait already"):
        asking.ask("one", Command(id="more", verb="pause"))
    newest = asking.get("one")
    assert newest.state.command == Command(id="first", verb="rollback")
    store.record(newest, newest.state.model_copy(update={"command": None}), None)
    asking.ask("one", Command(id="more", verb="pause"))
    assert asking.get("one").state.command == Command(id="more", verb="pause")
    assert len(kubectl.read("one")["spec"]["commands"]) == COMMANDS_LIMIT


def test_a_rollout_that_is_deleted_midway_is_asked_to_roll_back(api: KubeApi, kubectl: Kubectl) -> None:
    store, before = begun(api, kubectl)
    kubectl.run("patch", "releaserollout", "one", "--type=merge", "-p", '{"metadata":{"finalizers":["a.b/c"]}}')
    kubectl.run("delete", "releaserollout", "one", "--wait=false")
    written = store.record(before, moved(before, Phase.STEPPING), None)
    assert written.state.command is not None
    assert (written.state.command.verb, written.version > before.version) == ("rollback", True)


def test_a_rollout_that_is_gone_is_said_to_be(api: KubeApi, kubectl: Kubectl) -> None:
    store, before = begun(api, kubectl)
    kubectl.run("delete", "releaserollout", "one")
    with pytest.raises(RolloutError, match="was deleted meanwhile"):
        store.record(before, moved(before, Phase.PREPARING), None)


def test_history_is_bounded_and_the_deciding_evidence_stays(api: KubeApi, kubectl: Kubectl) -> None:
    store, before = begun(api, kubectl)
    resource = next(iter(store._shelf.all()))
    filled = tuple(
        entry(before.state.id, str(i), "roll_back" if i == 30 else "step").model_copy(update={"number": i + 1})
        for i in range(HISTORY_LIMIT + 20)
    )
    store._write(resource, lambda newest: newest.status.model_copy(update={"history": filled}))
    store.record(store.get("one"), moved(before, Phase.PREPARING), entry(before.state.id, "last"))
    history = people(api).history("one")
    assert (len(history), history[-1].reason, history[-1].number) == (HISTORY_LIMIT, "last", HISTORY_LIMIT + 21)
    with_evidence = [known for known in history if known.evidence]
    assert {known.action for known in with_evidence[:-EVIDENCE_LIMIT]} == {"roll_back"}


def test_alerts_about_the_rollout_survive_and_others_are_not_kept(api: KubeApi, kubectl: Kubectl) -> None:
    store, _ = begun(api, kubectl)

    def alert(release: str, starts_at: float) -> KnownAlert:
        labels = (("alertname", "a"), ("release", release))
        return KnownAlert(group_key="g", labels=labels, starts_at=starts_at, resolved=False, summary="s")

    mine = alert(GOOD[:12], 6)
    book = {one.key: one for one in (mine, alert(GOOD, 4), alert("f" * 64, 6))}
    store.replace_alerts(book)
    assert store.alerts() == people(api).alerts() == {mine.key: mine}
    before = kubectl.read("one")["metadata"]["resourceVersion"]
    store.replace_alerts(book)
    assert kubectl.read("one")["metadata"]["resourceVersion"] == before


def test_a_look_is_written_when_it_is_news_and_else_with_the_next_record(api: KubeApi, kubectl: Kubectl) -> None:
    store, before = begun(api, kubectl)

    def sighting(at: float, *, reached: bool = True) -> Sighting:
        return Sighting(
            rollout_id=before.state.id, time=at, action="wait", reason=f"{at}", traffic={"reached": reached}
        )

    store.see(sighting(1))
    store.see(sighting(2))
    seen = people(api).sighting("one")
    assert seen is not None
    assert seen.time == 1
    store.see(sighting(3, reached=False))
    conditions = {one["type"]: one["status"] for one in kubectl.read("one")["status"]["conditions"]}
    assert (conditions["Ready"], conditions["Progressing"]) == ("False", "True")
    store.see(sighting(4, reached=False))
    store.record(before, moved(before, Phase.PREPARING), None)
    seen = people(api).sighting("one")
    assert seen is not None
    assert seen.time == 4


def test_changes_of_others_are_told_from_ones_own(api: KubeApi, kubectl: Kubectl) -> None:
    store, before = begun(api, kubectl)
    shelf = store._shelf
    assert isinstance(shelf, ToldShelf)
    quiet, mine = store.changes(own=False), store.changes()
    store.record(before, moved(before, Phase.PREPARING), None)
    for document in api.list(PATH):
        shelf.tell(document)  # the watch's echo
    assert (store.changes(own=False), store.changes() > mine) == (quiet, True)
    asking = people(api)
    seen = asking.changes(own=False)
    assert asking.changes(own=False) == seen
    asking.ask("one", Command(id="c", verb="pause"))
    assert asking.changes(own=False) == seen
    for document in api.list(PATH):
        shelf.tell(document)
    assert store.changes(own=False) > quiet


def test_an_api_server_that_cannot_be_reached_is_an_error_of_ours(api: KubeApi) -> None:
    api.server = "https://127.0.0.1:1"
    began = time.monotonic()
    with pytest.raises(KubernetesError, match=r"cannot ask https://127.0.0.1:1"):
        people(api).latest()
    assert time.monotonic() - began < 5
    with pytest.raises(ConfigError, match="no way to context 'nowhere'"):
        KubeApi(context="nowhere")
