"""A thread that raises is counted and restarted, or its owner is told; no thread of Reelway is started otherwise."""

from __future__ import annotations

import ast
import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from tests.support.e2e.wait_until import until

from reelway.platform import supervised_thread
from reelway.platform.supervised_thread import SupervisedThread, export_failures, supervise_task

SOURCES = [Path(__file__).parents[2] / part / "src" for part in ("platform", "serving", "pipelines")]


def failures(name: str) -> float:
    registry = CollectorRegistry()
    export_failures(registry)
    return registry.get_sample_value("reelway_thread_failures_total", {"thread": name}) or 0.0


def failing(times: int, done: threading.Event, error: BaseException) -> Callable[[], None]:
    calls = iter(range(times))

    def target() -> None:
        for _ in calls:
            raise error
        done.set()

    return target


@pytest.mark.parametrize("error", [RecursionError("deep"), MemoryError(), SystemExit(1)])
def test_thread_that_raises_is_restarted_with_a_count(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervised_thread, "FIRST_RESTART_S", 0.01)
    before, done = failures("restarted"), threading.Event()
    thread = SupervisedThread(failing(2, done, error), name="restarted", daemon=True)
    thread.start()
    assert done.wait(10)
    thread.join(10)
    assert not thread.is_alive()
    assert failures("restarted") == before + 2


def test_owner_of_a_failed_thread_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    told: list[str] = []
    thread = SupervisedThread(
        failing(5, threading.Event(), ValueError("why")), name="once", on_failure=lambda: told.append("failed")
    )
    thread.start()
    thread.join(10)
    assert told == ["failed"]
    assert "why" in caplog.text
    assert failures("once") == 1


def test_thread_is_not_restarted_after_the_stop() -> None:
    stop, calls = threading.Event(), list[int]()

    def target() -> None:
        calls.append(1)
        raise ValueError

    thread = SupervisedThread(target, name="stopped", stop=stop)
    thread.start()
    until("the thread failed", lambda: bool(calls), 10)
    stop.set()
    thread.join(10)
    assert not thread.is_alive()
    assert len(calls) == 1


def test_count_exists_before_the_first_failure() -> None:
    SupervisedThread(print, name="a thread of any number", kind="quiet")
    assert failures("quiet") == 0.0
    registry = CollectorRegistry()
    export_failures(registry)
    assert registry.get_sample_value("reelway_thread_failures_total", {"thread": "quiet"}) == 0.0


def test_failed_task_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise ValueError("why")

    async def main() -> None:
        tasks = [asyncio.create_task(work) for work in (fail(), asyncio.sleep(0), asyncio.sleep(60))]
        for task in tasks:
            supervise_task(task, "a task")
        tasks[2].cancel()
        await asyncio.wait(tasks)

    asyncio.run(main())
    assert failures("a task") == 1
    assert "why" in caplog.text


def test_every_thread_of_the_sources_is_supervised() -> None:
    bare = []
    for path in (file for root in SOURCES for file in root.rglob("*.py") if file.name != "supervised_thread.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            used = node.bases if isinstance(node, ast.ClassDef) else [node.func] if isinstance(node, ast.Call) else []
            names = {one.attr if isinstance(one, ast.Attribute) else getattr(one, "id", "") for one in used}
            if names & {"Thread", "Timer", "start_new_thread"}:
                bare.append(f"{path.name}:{node.lineno}")
    assert not bare, f"use SupervisedThread: {bare}"
