"""What a run leaves behind to read: metrics.jsonl, ledger.jsonl, an offline W&B run."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from seedling.stages.runtime.logs import RunLog, start_wandb
from seedling.stages.runtime.train_config import WandbConfig


def open_log(run_dir, *, step=0, mode="disabled", is_main=True):
    cfg = WandbConfig(mode=mode)
    return RunLog(run_dir, cfg=cfg, is_main=is_main, step=step, total_steps=9, config={"seed": 1})


def test_a_resume_cuts_the_files_back_to_its_step(tmp_path):
    log = open_log(tmp_path)
    for step in (1, 2, 3):
        log.advance(step, epoch=0, utterances=[[0, step]])
        log.metrics(step, {"valid/dev/loss": 1 / step})
    log.close()
    with (tmp_path / "ledger.jsonl").open("a") as f:
        f.write('{"step": 4, "utt')  # killed in the middle of a line
    log = open_log(tmp_path, step=2)
    log.advance(3, epoch=0, utterances=[[0, 33]])
    log.close()
    ledger = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [line["utterances"] for line in ledger] == [[[0, 1]], [[0, 2]], [[0, 33]]]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("torn", [b"", b'{"step": 10, "utt', b"\0" * 5000])
def test_whatever_a_run_ended_with_a_resume_leaves_the_lines_up_to_its_step(tmp_path, torn):
    """Lines of 0 to 2000 utterances; some steps have no line, as in metrics.jsonl."""
    steps = [1, 2, 3, 5, 6, 7, 9]
    lines = [json.dumps({"step": s, "utterances": [[0, s]] * (s * 997 % 2000)}).encode() + b"\n" for s in steps]
    path = tmp_path / "ledger.jsonl"
    for last in range(11):
        path.write_bytes(b"".join(lines) + torn)
        open_log(tmp_path, step=last).close()
        assert path.read_bytes() == b"".join(line for step, line in zip(steps, lines) if step <= last), last


def test_a_resume_reads_little_of_a_long_ledger(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with path.open("w") as file:
        for step in range(1, 4001):
            file.write(json.dumps({"step": step, "utterances": [[0, 1]] * 200}) + "\n")
    before, size = _bytes_read(), path.stat().st_size
    open_log(tmp_path, step=3000).close()
    assert _bytes_read() - before < size / 10
    assert json.loads(path.read_text().splitlines()[-1])["step"] == 3000


def _bytes_read() -> int:
    """That this process has asked the system for."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def test_other_ranks_write_nothing(tmp_path):
    log = open_log(tmp_path, is_main=False)
    log.say("hello")
    log.advance(1, epoch=0, utterances=[])
    log.metrics(1, {"train/loss": 1.0})
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_an_offline_wandb_run_reads_back(tmp_path):
    log = open_log(tmp_path, mode="offline")
    for step in (1, 2):
        log.metrics(step, {"train/loss": 0.5 / step, "train/audio_hours_per_s": 0.1})
    log.close()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    wandb = shutil.which("wandb", path=str(Path(sys.executable).parent))
    assert wandb, "the wandb command lies beside the interpreter"
    done = subprocess.run(
        [wandb, "leet", "inspect", "--json", str(run)], capture_output=True, text=True, check=True, timeout=600
    )
    assert "train/loss" in done.stdout and "global_step" in done.stdout


def test_a_silent_wandb_server_means_offline_with_a_warning(tmp_path):
    """In a process of its own: W&B reads its environment once."""
    code = (
        "import sys; from pathlib import Path; from seedling.stages.runtime.logs import start_wandb\n"
        "from seedling.stages.runtime.train_config import WandbConfig\n"
        "run = start_wandb(Path(sys.argv[1]), WandbConfig(mode='auto', init_timeout_seconds=2), {})\n"
        "run.log({'global_step': 1, 'train/loss': 0.5}); run.finish()"
    )
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()  # accepts, and never answers
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        environment = {**os.environ, "WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40}
        command = [sys.executable, "-c", code, str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "W&B is not reachable" in done.stderr
    assert len(list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))) == 1


def test_disabled_means_no_wandb_at_all(tmp_path):
    assert start_wandb(tmp_path, WandbConfig(mode="disabled"), {}) is None
    assert list(tmp_path.iterdir()) == []
