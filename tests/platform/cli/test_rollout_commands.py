"""``pause``, ``resume``, ``promote`` and ``rollback``: their effects, messages and exit codes."""

from __future__ import annotations

import pytest
from tests.support.cli.rollout_fixtures import (
    SWIFT,
    RunDirectoryEnvironment,
    SyntheticEvidence,
    controlling,
    dead_pid,
    reelway,
    weights_of,
)

from reelway.platform.contracts.events import Arm
from reelway.platform.rollout.state import Command, Phase

VERBS = ("pause", "resume", "promote", "rollback")


@pytest.fixture
def stepping(world: RunDirectoryEnvironment) -> RunDirectoryEnvironment:
    """A rollout at the first step of a policy that holds it for a minute."""
    world.source = SyntheticEvidence(viewers=2_400)  # type: ignore[assignment]
    world.restart()
    world.begin()
    assert world.tick(2) == ["prepare", "step"]
    world.catch_up()
    return world


def send(world: RunDirectoryEnvironment, verb: str, *more: object) -> tuple[int, str]:
    ended = reelway("rollout", verb, "--run", world.run, *more)
    assert ended.out == ""
    return ended.code, ended.err


def test_pause_and_resume_wait_for_their_effect(stepping: RunDirectoryEnvironment) -> None:
    with controlling(stepping):
        code, output = send(stepping, "pause", "--wait", "--note", "looking")
        assert (code, stepping.state.phase) == (0, Phase.PAUSED)
        assert ": looking" in output
        code, output = send(stepping, "resume", "--wait")
        assert (code, stepping.state.phase) == (0, Phase.STEPPING)


def test_repeated_command_succeeds_without_a_change(stepping: RunDirectoryEnvironment) -> None:
    with controlling(stepping):
        assert send(stepping, "resume")[0] == 0
        assert send(stepping, "pause", "--wait")[0] == 0
        entries = len(stepping.store.history())
        code, output = send(stepping, "pause", "--wait")
        assert (code, len(stepping.store.history())) == (0, entries)
        assert "is already paused" in output
        assert send(stepping, "rollback", "--wait")[0] == 0
        entries = len(stepping.store.history())
        assert send(stepping, "rollback", "--wait")[0] == 0
        assert len(stepping.store.history()) == entries


def test_promotion_can_be_rolled_back_while_the_old_release_is_warm(stepping: RunDirectoryEnvironment) -> None:
    with controlling(stepping):
        assert send(stepping, "promote", "--wait", "--force")[0] == 0
        assert weights_of(stepping)[Arm.STABLE] == 0
        assert send(stepping, "promote")[0] == 0
        code, output = send(stepping, "rollback", "--wait", "--note", "complaints")
        assert (code, weights_of(stepping)[Arm.CANARY]) == (0, 0)
        assert "complaints" in output


def test_controller_rejection_is_printed_verbatim_with_exit_code_9(stepping: RunDirectoryEnvironment) -> None:
    stepping.source.viewers = 60  # type: ignore[attr-defined]
    with controlling(stepping):
        for more in ((), ("--wait",)):
            code, output = send(stepping, "promote", *more)
            assert code == 9
            assert output.rstrip().endswith(stepping.store.history()[-1].reason)
            assert "--force promotes anyway" in output


def test_promote_exits_with_10_if_a_rollback_comes_first(stepping: RunDirectoryEnvironment) -> None:
    stepping.source.drop = 0.5  # type: ignore[attr-defined]
    with controlling(stepping, after_s=0.5):
        code, output = send(stepping, "promote", "--wait")
    assert (code, stepping.state.phase) == (10, Phase.ROLLED_BACK)
    assert "came too late" in output


def test_command_without_a_controller_is_stored_with_a_warning(stepping: RunDirectoryEnvironment) -> None:
    stepping.controlled(dead_pid())
    code, output = send(stepping, "rollback")
    assert code == 0
    assert "has exited" in output
    assert f"rollouts do not advance until `reelway rollout controller --run {stepping.run}` runs" in output
    waiting = stepping.state.command
    assert waiting is not None
    assert (waiting.verb, waiting.actor != "") == ("rollback", True)
    code, output = send(stepping, "rollback", "--wait", "--timeout", 0.3)
    assert code == 11
    assert "is still stepping after 0.3 s" in output
    with controlling(stepping):
        assert send(stepping, "rollback", "--wait")[0] == 0


def test_pending_rollback_is_not_replaced_by_a_pause(stepping: RunDirectoryEnvironment) -> None:
    stepping.store.submit_command(stepping.state.id, Command(id="1", verb="rollback"))
    code, output = send(stepping, "pause")
    assert code == 9
    assert "a rollback is pending" in output


@pytest.mark.parametrize("verb", ["pause", "resume", "promote"])
def test_rolled_back_rollout_accepts_no_command(stepping: RunDirectoryEnvironment, verb: str) -> None:
    with controlling(stepping):
        send(stepping, "rollback", "--wait")
    code, output = send(stepping, verb)
    assert code == 9
    assert "start cccccccccccc --force" in output


def test_retired_rollout_cannot_be_rolled_back(world: RunDirectoryEnvironment) -> None:
    world.begin()
    world.tick(40)
    assert world.state.retired
    code, output = send(world, "rollback")
    assert code == 9
    assert "reelway rollout start aaaaaaaaaaaa" in output


@pytest.mark.parametrize("verb", VERBS)
def test_only_the_latest_rollout_accepts_commands(stepping: RunDirectoryEnvironment, verb: str) -> None:
    with controlling(stepping):
        send(stepping, "rollback", "--wait")
    first = stepping.state.id
    stepping.begin("r-second")
    ended = reelway("rollout", verb, first, "--run", stepping.run)
    assert ended.code == (0 if verb == "rollback" else 9)
    assert verb == "rollback" or "only r-second accepts commands" in ended.err
    assert stepping.state.command is None


@pytest.mark.parametrize("verb", VERBS)
def test_command_fails_without_a_matching_rollout_or_run(world: RunDirectoryEnvironment, verb: str) -> None:
    none = reelway("rollout", verb, "--run", world.run)
    assert (none.code, "no rollout exists" in none.err) == (9, True)
    unknown = reelway("rollout", verb, "r-nothing", "--run", world.run)
    assert (unknown.code, "r-nothing" in unknown.err) == (9, True)
    wrong = reelway("rollout", verb, "--run", world.run / "nowhere")
    assert (wrong.code, "is not a run directory" in wrong.err) == (2, True)
    assert not (world.run / "nowhere").exists()


def test_watch_prints_plain_lines_without_a_terminal(world: RunDirectoryEnvironment) -> None:
    world.source, world.policy = SyntheticEvidence(viewers=2_400), SWIFT  # type: ignore[assignment]
    with controlling(world):
        world.begin()
        ended = reelway("rollout", "watch", "--run", world.run, "--timeout", 20)
    assert ended.code == 0
    lines = ended.out.splitlines()
    decided = [line.split(": ")[1] for line in lines if not line.split(" ", 1)[1].startswith("waiting")]
    assert decided == ["prepare", "step", "step", "promote", "complete promotion"]
    reasons = [entry.reason for entry in world.store.history()]
    assert all(any(line.endswith(reason) for line in lines) for reason in reasons)


def test_watch_warns_without_a_controller_and_exits_with_11(world: RunDirectoryEnvironment) -> None:
    world.begin()
    (world.run / "rollout" / "controller.json").unlink()
    ended = reelway("rollout", "watch", "--run", world.run, "--timeout", 0.5)
    assert ended.code == 11
    assert ended.out.count("WARNING: no controller is running") == 1
