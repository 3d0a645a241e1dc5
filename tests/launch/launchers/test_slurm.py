"""sbatch scripts: what Slurm reads, what the shell makes of it, and what happens after each kind of end."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from seedling.launch.launchers import slurm
from seedling.launch.launchers.cluster import ClusterConfig, SlurmConfig
from seedling.launch.launchers.jobs import step_jobs

STUBS = {
    # What a script calls, each noting that it was called. SRUN_CODE is how srun ends.
    "srun": """trap "" USR1
        for _ in $SRUN_SIGNALS; do kill -USR1 $PPID; /bin/sleep 0.3; done
        shift 3; "$@"; echo >>srun.ended; exit ${SRUN_CODE:-0}""",
    "scontrol": """if [ "$1" = show ]; then printf "node7\\nnode8\\n"
        else echo "$@ after $(wc -l <srun.ended) ends" >>scontrol.calls; fi""",
    "sleep": 'echo "$@" >>sleep.calls; /bin/sleep 0.3',
    "print_arguments": 'printf "%s\\n" "$@" >arguments',
}


@pytest.fixture
def jobs(folder):
    cluster = ClusterConfig(nodes=2, nproc=4)
    return {job.name: job for job in step_jobs("toy", overrides=["spread.text='*'"], cluster=cluster)}


def script(job, cluster=None, *, max_restarts: int = 2) -> str:
    return slurm.render(job, cluster or ClusterConfig(nodes=2, nproc=4), max_restarts=max_restarts)


def options(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def run(job, folder: Path, *, cluster=None, **environment: str) -> subprocess.CompletedProcess:
    """Run a job's script with stubs for Slurm's commands and for Python."""
    stubs = folder / "bin"
    stubs.mkdir(exist_ok=True)
    for name, text in STUBS.items():
        (stubs / name).write_text(f"#!/bin/bash\n{text}\n")
        (stubs / name).chmod(0o755)
    job.logs.mkdir(parents=True, exist_ok=True)
    text = script(job, cluster).replace(slurm.sys.executable, str(stubs / "print_arguments"))
    given = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_NODEID": "1"}
    path = f"{stubs}:{os.environ['PATH']}"
    command = ["bash", "-c", text]
    return subprocess.run(
        command, env={**given, "PATH": path, "SRUN_SIGNALS": "", **environment}, capture_output=True, text=True
    )


def lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines() if Path(file).exists() else []


def test_what_slurm_reads(jobs):
    assert options(script(jobs["spread"])) == [
        "--job-name=spread",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gres=gpu:4",
        "--time=24:00:00",
        "--signal=B:USR1@300",
        "--requeue",
        "--open-mode=append",
        "--output=runs/toy/logs/slurm_spread_%j.log",
    ]
    settings = SlurmConfig(account="a", partition="p", qos="q", memory="0", options=["--exclusive"], setup=["true x"])
    cluster = ClusterConfig(nodes=2, nproc=4, cpus=8, gpus=False, slurm=settings)
    text = script(jobs["spread"], cluster)
    assert {"--account=a", "--partition=p", "--qos=q", "--mem=0", "--exclusive", "--cpus-per-task=8"} < {*options(text)}
    assert "true x" in text.splitlines()
    assert "srun --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0 --cpus-per-task=8 " in text


def test_a_command_that_is_no_stage_asks_for_no_gpu_and_is_not_placed(jobs):
    text = script(jobs["shards"])
    assert not any("gres" in option for option in options(text)) and "--nodes=1" in options(text)
    assert "--nproc" not in text and "--node_rank" not in text


def test_every_line_of_the_script_is_sound(jobs, tmp_path):
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck: apt-get install shellcheck")
    for job in jobs.values():
        (tmp_path / "x.sbatch").write_text(script(job))
        ended = subprocess.run(["shellcheck", "-S", "warning", tmp_path / "x.sbatch"], capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout


def test_every_machine_gets_the_arguments_as_they_were_typed_and_its_number(jobs, folder):
    assert run(jobs["spread"], folder).returncode == 0
    port = str(20000 + 41)
    assert lines("arguments") == [
        *("-m", "seedling.launch.cli", "pipeline", "toy", "spread.text='*'", "--only", "spread"),
        *("--nproc", "4", "--nnodes", "2", "--master_addr", "node7", "--master_port", port, "--node_rank", "1"),
    ]


@pytest.mark.parametrize("code", ["0", "2"])
def test_a_job_that_is_done_or_mistaken_is_not_requeued(jobs, folder, code):
    assert run(jobs["spread"], folder, SRUN_CODE=code).returncode == int(code)
    assert not lines("scontrol.calls")


@pytest.mark.parametrize("code", ["75", "1"])
def test_a_job_whose_time_is_up_is_requeued_as_often_as_it_needs(jobs, folder, code):
    for again in range(1, 5):
        ended = run(jobs["spread"], folder, SRUN_CODE=code, SRUN_SIGNALS="yes")
        assert ended.returncode == int(code) and "the time is up" in ended.stdout, ended.stderr
        assert lines("scontrol.calls") == [f"requeue 41 after {n + 1} ends" for n in range(again)]


def test_signals_while_a_checkpoint_is_written_do_not_requeue_over_the_running_ranks(jobs, folder):
    ended = run(jobs["spread"], folder, SRUN_CODE="75", SRUN_SIGNALS="first second third")
    assert ended.returncode == 75 and "the time is up (exit code 75)" in ended.stdout, ended.stderr
    assert lines("scontrol.calls") == ["requeue 41 after 1 ends"]


def test_lines_of_setup_may_name_what_is_not_set(jobs, folder):
    setup = ['if [ -n "$CONDA_EXE_OF_NOBODY" ]; then exit 9; fi', "export SET_UP=yes"]
    cluster = ClusterConfig(nodes=2, nproc=4, slurm=SlurmConfig(setup=setup))
    ended = run(jobs["spread"], folder, cluster=cluster)
    assert ended.returncode == 0 and not ended.stderr


def test_a_job_that_ends_well_while_its_time_is_up_is_done(jobs, folder):
    assert run(jobs["spread"], folder, SRUN_CODE="0", SRUN_SIGNALS="yes").returncode == 0
    assert not lines("scontrol.calls")


def test_a_crash_is_requeued_later_each_time_until_none_is_left(jobs, folder):
    codes = [run(jobs["spread"], folder, SRUN_CODE="1") for _ in range(3)]
    assert [ended.returncode for ended in codes] == [1, 1, 1] and "no restart is left" in codes[-1].stdout
    assert lines("scontrol.calls") == ["requeue 41 after 1 ends", "requeue 41 after 2 ends"]
    assert lines("sleep.calls") == ["15", "30"]


def test_a_new_checkpoint_ends_a_row_of_crashes(jobs, folder):
    job = jobs["spread"]
    assert job.checkpoints == [Path("runs/toy/spread/checkpoints")]
    for steps in ([], [], ["0000000", "000900"], ["000900", "1000000"], ["1000000"], [".step_2000000.partial"]):
        shutil.rmtree(job.checkpoints[0], ignore_errors=True)
        for step in steps:
            (job.checkpoints[0] / (step if step.startswith(".") else f"step_{step}")).mkdir(parents=True)
        assert run(job, folder, SRUN_CODE="1").returncode == 1
    assert "no restart is left" in run(job, folder, SRUN_CODE="1").stdout
    assert lines("sleep.calls") == ["15", "30", "15", "15", "30"]


def test_jobs_are_submitted_to_wait_for_one_another(jobs, folder, monkeypatch):
    (folder / "bin").mkdir()
    sbatch = folder / "bin/sbatch"
    sbatch.write_text('#!/bin/bash\necho "$@" >>sbatch.calls; echo "$(wc -l <sbatch.calls);cluster"\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
    numbers = slurm.submit(list(jobs.values()), ClusterConfig(nodes=2, nproc=4), max_restarts=1)
    assert numbers == {"shards": "1", "spread": "2", "alone": "3"}
    waits = [[word for word in line.split() if word.startswith("--dependency")] for line in lines("sbatch.calls")]
    assert waits == [[], ["--dependency=afterok:1"], ["--dependency=afterok:2"]]
    assert Path("runs/toy/launch/alone.sbatch").read_text() == script(jobs["alone"], max_restarts=1)


def test_what_sbatch_says_is_passed_on(jobs, folder, monkeypatch):
    monkeypatch.setenv("PATH", str(folder / "bin"))
    with pytest.raises(ValueError, match="no sbatch on PATH"):
        slurm.submit(list(jobs.values()), ClusterConfig(), max_restarts=1)
    (folder / "bin").mkdir()
    (folder / "bin/sbatch").write_text("#!/bin/sh\necho 'invalid account' >&2; exit 1\n")
    (folder / "bin/sbatch").chmod(0o755)
    with pytest.raises(ValueError, match=r"refused runs/toy/launch/shards\.sbatch: invalid account"):
        slurm.submit(list(jobs.values()), ClusterConfig(), max_restarts=1)
