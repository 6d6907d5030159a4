"""The ``reelway`` executable: exit codes, messages without tracebacks, Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from reelway.platform.cli import main
from reelway.platform.cli.release_commands import release_group
from reelway.platform.errors import CommandFailedError, MalformedFileError, ReelwayError

REELWAY = Path(sys.executable).with_name("reelway")


def reelway(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(REELWAY), *(str(one) for one in arguments)],
        capture_output=True, text=True, timeout=120, check=False, cwd=cwd,
    )  # fmt: skip


def test_members_share_the_release_command_group() -> None:
    from importlib.metadata import version

    assert reelway("--version").stdout.strip() == version("reelway-platform")
    shown = reelway("release", "--help").stdout
    for command in ("build", "fetch", "keys", "list", "show", "verify"):
        assert f" {command} " in shown


def test_unknown_option_exits_with_code_2() -> None:
    ended = reelway("release", "list", "--no-such-flag")
    assert ended.returncode == 2
    assert "no-such-flag" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("release", "show"), 6, "has no release; build one with"),
        (("release", "verify"), 6, "reelway release keys"),
        (("release", "list", "--store", "nosuch://x"), 2, "nosuch"),
        (("release", "build", "--run", "nothing"), 2, "step 'evaluate' has not finished"),
    ],
)
def test_error_prints_one_line_and_exits_with_its_code(
    tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    ended = reelway(*arguments, cwd=tmp_path)
    assert ended.returncode == code
    assert ended.stderr.startswith("error:")
    assert message in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


class Member:
    """An installed member with a command that raises the given error."""

    name = "act"

    def __init__(self, error: Exception) -> None:
        self.error = error

    def load(self) -> Callable[[typer.Typer], None]:
        def register(app: typer.Typer) -> None:
            @app.command("act")
            def act() -> None:
                raise self.error

            @app.command("other")
            def other() -> None:
                """A second command, because Typer gives an application with one command no subcommands."""

        return register


def run_main(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "entry_points", lambda group: [Member(error)] if group == main.ENTRY_POINT_GROUP else [])
    monkeypatch.setattr(sys, "argv", ["reelway", "act"])
    main.main()


def branches(kind: type[ReelwayError] = ReelwayError) -> list[type[ReelwayError]]:
    """Returns the error classes of the platform whose only argument is a message."""
    below = [one for child in kind.__subclasses__() if child.__module__ == kind.__module__ for one in branches(child)]
    return [*([] if kind in (MalformedFileError, CommandFailedError) else [kind]), *below]


@pytest.mark.parametrize("kind", branches(), ids=lambda kind: kind.__name__)
def test_each_error_class_exits_with_its_code_and_message(
    kind: type[ReelwayError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_main(kind("weight [bold]130[/] is outside 0..100"), monkeypatch)
    assert ended.value.code == kind.exit_code
    assert capsys.readouterr().err == "error: weight [bold]130[/] is outside 0..100\n"


def test_unexpected_exception_is_not_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        run_main(ZeroDivisionError("a bug"), monkeypatch)


WORKING = """
import sys, time, typer
from pathlib import Path
from reelway.platform.cli import main as cli
from reelway.platform.atomic_files import atomic_directory
from reelway.platform.run_directory import RunDirectory

def register(app: typer.Typer) -> None:
    @app.command("work")
    def work(path: Path) -> None:
        run = RunDirectory(path)
        with run.step("work", config={}), atomic_directory(run.features) as aside:
            (aside / "half").write_text("half")
            print("ready", flush=True)
            time.sleep(60)

    @app.command("other")
    def other() -> None: ...

class Entry:
    name = "work"
    def load(self): return register

cli.entry_points = lambda group: [Entry()]
sys.argv = ["reelway", "work", sys.argv[1]]
cli.main()
"""


def test_ctrl_c_exits_with_130_and_leaves_no_partial_output(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", WORKING, str(run)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        child.wait(timeout=30)
        message = child.stderr.read()
    assert child.returncode == 130
    assert "Traceback" not in message
    assert list(run.rglob("*")) == []


def test_release_group_is_created_once() -> None:
    app = typer.Typer()
    first = release_group(app)
    assert release_group(app) is first
    assert [group.name for group in app.registered_groups] == ["release"]
