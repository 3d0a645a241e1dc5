"""A real Slurm on this machine: munged, slurmctld and one slurmd from Debian's packages, in a folder of their own.

Nothing of the system is used but the programs: keys, sockets, ports, state and logs are the folder's. It must run as
root, which slurmd needs to be. As a script: `python local_slurm.py FOLDER COMMAND...` runs a command beside it.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from seedling.stages.runtime.rendezvous import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
# A requeued job starts again only once its old credential is void, by default after two minutes; 5 s is the least.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=3,batch_sched_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=30
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Say why it cannot run here; "" where it can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "slurmd has to run as root"


@contextmanager
def running(folder: Path) -> Iterator[dict[str, str]]:
    """Start it in `folder`, yield the environment in which its commands work, and end it."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    controller_port = node_port = free_port()
    while node_port == controller_port:
        node_port = free_port()
    host = socket.gethostname().partition(".")[0]
    values = {"folder": folder, "host": host, "controller_port": controller_port, "node_port": node_port}
    (folder / "slurm.conf").write_text(CONFIG.format(**values, cpus=os.cpu_count()))
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
    munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    daemons = [
        # --force: a folder below /tmp may be written by others, which munge does not like
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-N", host],
    ]
    started: list[subprocess.Popen] = []
    try:
        for command in daemons:
            with (folder / f"{command[0]}.out").open("wb") as out:
                started.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
            if command[0] == "munged":
                wait_for(lambda: (folder / "munge.socket").exists(), what="munged", folder=folder)
        wait_for(lambda: "idle" in node_state(environment), what="an idle node", folder=folder)
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, stderr=subprocess.DEVNULL, timeout=60)
        for process in reversed(started):
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def node_state(environment: dict[str, str]) -> str:
    return subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True).stdout


def wait_for(condition, *, what: str, folder: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            logs = "\n".join(file.read_text(errors="replace")[-1500:] for file in sorted(folder.glob("*.[lo][ou][gt]")))
            raise TimeoutError(f"{what} after {seconds:.0f} s; {logs}")
        time.sleep(0.5)


if __name__ == "__main__":
    if missing():
        sys.exit(missing())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with running(Path(sys.argv[1]).resolve()) as environment:
        sys.exit(subprocess.run(sys.argv[2:], env=environment).returncode)
