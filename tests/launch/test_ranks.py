"""Ranks leave their output and their end behind, and the first error of all is the one that is shown."""

import subprocess
import sys
import time

import pytest

from seedling.launch.ranks import end_recorded, ends, explain, first_failure, log_of
from seedling.stages.runtime.signals import Interrupted


def end(logs, rank: int, error: BaseException | None = None) -> None:
    """Run a rank to its end."""
    try:
        with end_recorded(logs, rank):
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error


def test_the_first_error_is_shown_with_its_traceback_and_its_exit_code_counts(tmp_path, capsys):
    began = time.time()
    end(tmp_path, 3, RuntimeError("the cause"))
    end(tmp_path, 0, RuntimeError("Connection closed by peer"))
    assert explain(tmp_path, since=began, code=247) == 1
    shown = capsys.readouterr().err
    assert "RuntimeError: the cause" in shown and "Traceback" in shown and "closed by peer" not in shown
    assert "rank 3" in shown.splitlines()[-1] and str(log_of(tmp_path, 3)) in shown.splitlines()[-1]


@pytest.mark.parametrize("error, code", [(ValueError("a mistake"), 2), (SystemExit(7), 7), (KeyboardInterrupt(), 130)])
def test_every_kind_of_end_has_its_exit_code(tmp_path, error, code, capsys):
    end(tmp_path, 1, error)
    assert explain(tmp_path, since=0, code=1) == code
    if code == 2:  # a user's mistake is a line, not a traceback
        assert capsys.readouterr().err.splitlines()[0] == "a mistake"


def test_a_stop_on_request_is_no_failure_and_wins_over_the_launchers_code(tmp_path):
    end(tmp_path, 0, Interrupted())
    end(tmp_path, 1)
    assert first_failure(tmp_path, since=0) is None
    assert explain(tmp_path, since=0, code=1) == 75


def test_failures_of_an_earlier_start_do_not_count(tmp_path):
    end(tmp_path, 0, RuntimeError("earlier"))
    end(tmp_path, 1, RuntimeError("earlier"))
    began = time.time()
    end(tmp_path, 0)
    assert first_failure(tmp_path, since=began) is None
    assert first_failure(tmp_path, since=0).rank == 1  # rank 0 has taken its own back


def test_a_rank_that_a_signal_ended_is_named_with_the_end_of_its_log(tmp_path, capsys):
    program = (
        "import os, pathlib; from seedling.launch.ranks import end_recorded, keep_output\n"
        f"logs = pathlib.Path({str(tmp_path)!r}); keep_output(logs, 2)\n"
        "with end_recorded(logs, 2): print('last words', flush=True); os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert [each.code for each in ends(tmp_path, since=0)] == [None]
    assert explain(tmp_path, since=0, code=247) == 247
    shown = capsys.readouterr().err
    assert "last words" in shown and "rank 2" in shown and "ended without a word" in shown


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
    deadline = time.monotonic() + 10
    while (text := log_of(tmp_path, rank).read_text()).count("from a child") < 2 and time.monotonic() < deadline:
        time.sleep(0.05)  # rank 0's copy is written by another process
    assert text.count("out\n") == text.count("err\n") == text.count("== rank") == 2
