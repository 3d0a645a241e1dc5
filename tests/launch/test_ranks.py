"""Ranks leave their output and their end behind, and the first error of all is the one that is shown."""

import shutil
import subprocess
import sys
import time

import pytest

from seedling.data.host import HostDown, HostError
from seedling.launch import ranks
from seedling.launch.errors import report_errors
from seedling.launch.ranks import end_recorded, ends, explain, failures, log_of, note_lost, starts
from seedling.stages.runtime.signals import Interrupted
from seedling.stages.runtime.watchdog import stacks_file

NOBODY: frozenset = frozenset()


def end(logs, rank: int, error: BaseException | None = None) -> None:
    """Run a rank to its end."""
    try:
        with end_recorded(logs, rank):
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error


def explained(logs, *, code: int = 247, before=NOBODY, rank_0_shown: bool = True) -> int:
    return explain(logs, before=before, code=code, rank_0_shown=rank_0_shown)


def killed(logs, rank: int) -> None:
    """Run a rank that a signal ends."""
    program = (
        "import os, pathlib; from seedling.launch.ranks import end_recorded, keep_output\n"
        f"logs = pathlib.Path({str(logs)!r}); keep_output(logs, {rank})\n"
        f"with end_recorded(logs, {rank}): print('last words', flush=True); os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL).returncode == -9


def test_the_first_error_is_shown_with_its_traceback_and_its_exit_code_counts(tmp_path, capsys):
    end(tmp_path, 3, RuntimeError("the cause"))
    end(tmp_path, 0, RuntimeError("Connection closed by peer"))
    assert explained(tmp_path) == 1
    shown = capsys.readouterr().err
    assert "RuntimeError: the cause" in shown and "Traceback" in shown and "closed by peer" not in shown
    assert "rank 3" in shown.splitlines()[-1] and str(log_of(tmp_path, 3)) in shown.splitlines()[-1]


@pytest.mark.parametrize("rank_0_shown", [True, False])
def test_rank_0s_error_is_shown_on_the_machines_that_have_not_shown_its_output(tmp_path, capsys, rank_0_shown):
    end(tmp_path, 0, RuntimeError("the cause"))
    assert explained(tmp_path, rank_0_shown=rank_0_shown) == 1
    shown = capsys.readouterr().err
    assert ("RuntimeError: the cause" in shown) is not rank_0_shown and "rank 0" in shown


@pytest.mark.parametrize(
    "error, code",
    [
        (ValueError("a mistake"), 2),
        (HostError("a mistake"), 2),
        (HostDown("a mistake"), 1),
        (SystemExit(7), 7),
        (KeyboardInterrupt(), 130),
    ],
)
def test_every_kind_of_end_has_its_exit_code(tmp_path, error, code, capsys):
    end(tmp_path, 1, error)
    assert explained(tmp_path, code=1) == code
    if isinstance(error, ValueError):  # a user's mistake is a line, not a traceback
        assert capsys.readouterr().err.splitlines()[0] == "a mistake"


def test_a_stop_on_request_is_no_failure_and_wins_over_the_launchers_code(tmp_path):
    end(tmp_path, 0, Interrupted())
    end(tmp_path, 1)
    assert not failures(tmp_path, before=NOBODY)
    assert explained(tmp_path, code=1) == 75


def test_failures_of_an_earlier_start_do_not_count(tmp_path):
    end(tmp_path, 0, RuntimeError("earlier"))
    end(tmp_path, 1, RuntimeError("earlier"))
    before = starts(tmp_path)
    end(tmp_path, 0)
    assert not failures(tmp_path, before=before) and [each.rank for each in ends(tmp_path, before=before)] == [0]
    assert [each.rank for each in failures(tmp_path, before=NOBODY)] == [1]  # rank 0 has taken its own back


@pytest.mark.parametrize("ahead", [-3600, 3600])
def test_a_clock_that_is_an_hour_off_changes_nothing(tmp_path, monkeypatch, ahead):
    now = time.time
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(ranks.time, "time", lambda: now() + ahead)
        end(tmp_path, 1, RuntimeError("earlier"))
    before = starts(tmp_path)
    assert not failures(tmp_path, before=before)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(ranks.time, "time", lambda: now() + ahead)
        end(tmp_path, 2, RuntimeError("the cause"))
    time.sleep(0.05)
    end(tmp_path, 0, RuntimeError("its peer has gone"))
    assert [each.rank for each in failures(tmp_path, before=before)] == [2, 0]


def test_a_rank_that_a_signal_ended_is_named_with_the_end_of_its_log(tmp_path, capsys):
    killed(tmp_path, 2)
    assert [each.code for each in ends(tmp_path, before=NOBODY)] == [None]
    assert explained(tmp_path) == 247
    shown = capsys.readouterr().err
    assert "last words" in shown and "rank 2" in shown and "ended without a word" in shown


def test_a_rank_that_a_signal_ended_is_a_failure_once_its_machine_has_noted_it(tmp_path, capsys):
    killed(tmp_path, 2)
    with end_recorded(tmp_path, 0):  # on another machine
        (gone,) = [each for each in ends(tmp_path, before=NOBODY) if each.rank == 2]
        note_lost(tmp_path, gone, asked=False)
        assert [(each.rank, each.code) for each in failures(tmp_path, before=NOBODY)] == [(2, None)]
        assert explained(tmp_path) == 247
    shown = capsys.readouterr().err
    assert "last words" in shown and "rank 2" in shown and "rank 0" not in shown


@pytest.mark.parametrize("noted", [True, False])
def test_a_rank_that_hung_is_not_blamed_on_a_signal(tmp_path, capsys, noted):
    stacks_file(tmp_path, 3).write_text("of an earlier start\n")
    time.sleep(0.05)
    killed(tmp_path, 3)
    (gone,) = ends(tmp_path, before=NOBODY)
    time.sleep(0.05)
    stacks_file(tmp_path, 3).write_text("rank 3: no progress for 10 s while training step 7\nthen stacks\n")
    if noted:
        note_lost(tmp_path, gone, asked=False)
    assert explained(tmp_path) == 70
    shown = capsys.readouterr().err
    assert "while training step 7" in shown and "then stacks" not in shown and "signal" not in shown


def test_a_rank_lost_while_it_was_asked_to_stop_ends_the_others_as_stopped(tmp_path):
    killed(tmp_path, 1)
    (gone,) = ends(tmp_path, before=NOBODY)
    note_lost(tmp_path, gone, asked=True)
    assert failures(tmp_path, before=NOBODY) and explained(tmp_path) == 75


def test_where_an_end_cannot_be_written_the_error_is_still_the_runs_own(tmp_path, capsys):
    logs = tmp_path / "logs"

    def run() -> None:
        with end_recorded(logs, 0):
            shutil.rmtree(logs)
            raise ValueError("no room left; make some")

    assert report_errors(run) == 2
    shown = capsys.readouterr().err
    assert "error: no room left; make some" in shown and "could not be written" in shown


def test_a_full_disk_under_its_log_does_not_change_a_ranks_exit_code():
    program = (
        "import sys; from seedling.launch.errors import report_errors\n"
        "def run(): raise ValueError('no room left; make some')\n"
        "sys.exit(report_errors(run))\n"
    )
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-u", "-c", program], stderr=full).returncode == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_the_log_of_a_rank_has_all_of_its_output_and_rank_0_is_shown_as_well(tmp_path, rank):
    program = (
        "import pathlib, subprocess, sys; from seedling.launch.ranks import keep_output\n"
        f"keep_output(pathlib.Path({str(tmp_path)!r}), {rank})\n"
        "print('out'); print('err', file=sys.stderr); subprocess.run(['echo', 'from a child'])\n"
    )
    for _ in range(2):
        ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        shown = ended.stdout + ended.stderr
        assert all((words in shown) == (rank == 0) for words in ("out\n", "err\n", "from a child\n"))
    deadline = time.monotonic() + 600
    while (text := log_of(tmp_path, rank).read_text()).count("from a child") < 2 and time.monotonic() < deadline:
        time.sleep(0.05)  # rank 0's copy is written by another process
    assert text.count("out\n") == text.count("err\n") == text.count("== rank") == 2
