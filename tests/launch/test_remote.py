"""Over ssh: which variables reach other machines, and that a signal goes to the ranks of each, once."""

import os

import pytest

from seedling.launch.ranks import end_recorded, ends
from seedling.launch.remote import check_forwarded, environment_for, signal_ranks


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
