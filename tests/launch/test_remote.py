"""Over ssh: which variables reach other machines, and that a signal goes to the ranks of each, once."""

import os
import subprocess
import sys
import time

import pytest

from seedling.launch.ranks import end_recorded, ends
from seedling.launch.remote import RollCall, check_forwarded, environment_for, signal_ranks


def test_what_ranks_depend_on_is_forwarded_and_credentials_are_not(tmp_path):
    environment = {
        "OMP_NUM_THREADS": "4",
        "NCCL_DEBUG": "WARN",
        "WANDB_API_KEY": "secret",
        "AWS_SECRET": "x",
        "HOME": "/h",
    }
    given = environment_for(tmp_path, environment)
    with open(given["DS_ENV_FILE"]) as file:
        sent = dict(line.rstrip("\n").split("=", 1) for line in file)
    assert sent == {"OMP_NUM_THREADS": "4", "NCCL_DEBUG": "WARN", "PYTHONPATH": ""}
    assert {name: given[name] for name in environment} == environment


def test_a_clusters_variable_that_would_be_lost_is_refused():
    check_forwarded({"NCCL_IB_HCA": "mlx5"})
    with pytest.raises(ValueError, match=r"cluster\.environment\.MY_CACHE does not go over ssh"):
        check_forwarded({"MY_CACHE": "/x"})


def test_a_signal_goes_to_each_machine_once_for_its_running_ranks(tmp_path, monkeypatch):
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
    (tmp_path / "ssh").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\n')
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with end_recorded(tmp_path, 1):
        pass  # has ended: its process number may be another's by now
    with end_recorded(tmp_path, 0), end_recorded(tmp_path, 2), end_recorded(tmp_path, 3):
        running = [end for end in ends(tmp_path, before=frozenset()) if end.code is None]
        signal_ranks(str(tmp_path / "hosts"), running, signum=15)
    me = os.getpid()
    calls = sorted((tmp_path / "calls").read_text().splitlines())
    assert calls == [f"-o BatchMode=yes a kill -TERM {me}", f"-o BatchMode=yes b kill -TERM {me} {me}"]


@pytest.fixture
def two_ranks(tmp_path, monkeypatch):
    """Processes of ranks 0 and 1, on machines `a` and `b`, which "ssh" finds here; files say which is slow or away."""
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    (tmp_path / "ssh").write_text(
        f"#!/bin/sh\ncd {tmp_path}\nfor command; do host=$last; last=$command; done\n"
        '[ -e slow.$host ] && exec sleep 60\n[ -e away.$host ] && exit 255\nexec sh -c "$command"\n'
    )
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program = (
        "import pathlib, sys; from seedling.launch.ranks import end_recorded\n"
        "with end_recorded(pathlib.Path(sys.argv[1]), int(sys.argv[2])): print(flush=True); sys.stdin.read()"
    )
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    ranks = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path), str(rank)], **pipe) for rank in (0, 1)]
    for rank in ranks:
        rank.stdout.readline()
    yield ranks
    for rank in ranks:
        rank.kill()
        rank.communicate()


def call(roll_call: RollCall, folder) -> list[int]:
    """Return the ranks that are lost, having waited for the answers to this call."""
    lost = roll_call.call([end for end in ends(folder, before=frozenset()) if end.code is None])
    for process, _ in roll_call.asked:
        if not list(folder.glob("slow.*")):
            process.wait()
    return [end.rank for end in lost]


def test_a_rank_without_a_process_and_without_a_word_is_lost_after_two_answers(two_ranks, tmp_path):
    roll_call = RollCall(str(tmp_path / "hosts"))
    assert [call(roll_call, tmp_path) for _ in range(3)] == [[], [], []]
    two_ranks[1].kill()
    two_ranks[1].wait()
    assert [call(roll_call, tmp_path) for _ in range(4)] == [[], [], [1], [1]]


def test_a_rank_that_has_noted_its_end_is_not_lost(two_ranks, tmp_path):
    roll_call = RollCall(str(tmp_path / "hosts"))
    two_ranks[1].communicate()
    assert [call(roll_call, tmp_path) for _ in range(3)] == [[], [], []]


@pytest.mark.parametrize("how", ["away", "slow"])
def test_a_machine_that_does_not_answer_has_lost_nothing_and_is_not_waited_for(two_ranks, tmp_path, how):
    roll_call = RollCall(str(tmp_path / "hosts"))
    (tmp_path / f"{how}.b").touch()
    for rank in two_ranks:
        rank.kill()
        rank.wait()
    began = time.monotonic()
    found = [call(roll_call, tmp_path) for _ in range(4)]
    assert not any(1 in ranks for ranks in found) and time.monotonic() - began < 30
    if how == "away":
        assert found == [[], [], [0], [0]]
