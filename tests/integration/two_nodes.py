"""Two machines on this one: network namespaces with addresses of their own, joined by a cable (veth).

What runs in one sees its own end and its own loopback only, so a job that would meet at 127.0.0.1 or listen on the
wrong interface fails here as it does on a cluster. The files are shared. Needs root and iproute2.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

INTERFACE = "cable"
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


class Node(NamedTuple):
    """A machine: its namespace and its address on the cable."""

    name: str
    address: str

    def command(self, *words: str) -> list[str]:
        """Return a command as it is started on this machine."""
        return ["ip", "netns", "exec", self.name, *words]


def missing() -> str:
    """Say why it cannot run here; "" where it can."""
    if shutil.which("ip") is None:
        return "no ip: apt-get install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return ""


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Make both, yield them, and take them down with whatever still runs in them."""
    nodes = (Node(f"a{os.getpid()}", "10.77.0.1"), Node(f"b{os.getpid()}", "10.77.0.2"))
    try:
        for node in nodes:
            _ip("netns", "add", node.name)
        ends = [("name", INTERFACE, "netns", node.name) for node in nodes]
        _ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for node in nodes:
            inside = ("-n", node.name)
            _ip(*inside, "address", "add", f"{node.address}/24", "dev", INTERFACE)
            _ip(*inside, "link", "set", INTERFACE, "up")
            _ip(*inside, "link", "set", "lo", "up")
        yield nodes
    finally:
        for node in nodes:
            inside = subprocess.run(["ip", "netns", "pids", node.name], capture_output=True, text=True).stdout.split()
            for pid in inside:
                subprocess.run(["kill", "-9", pid], stderr=subprocess.DEVNULL)
            subprocess.run(["ip", "netns", "del", node.name], stderr=subprocess.DEVNULL)


def ssh_missing() -> str:
    """Say why machines here could not be reached over ssh as DeepSpeed does; "" where they can."""
    absent = [name for name in ("sshd", "ssh", "ssh-keygen", "pdsh") if shutil.which(name, path=PATH) is None]
    return f"no {', '.join(absent)}: apt-get install openssh-server pdsh" if absent else ""


@contextmanager
def reachable_by_ssh(nodes: Sequence[Node], folder: Path) -> Iterator[dict[str, str]]:
    """Run sshd on every machine, with keys and settings of its own in `folder`; yield what PATH has to be to use it."""
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/user_key.pub\nStrictModes no\nUsePAM no\n"
        "PermitRootLogin yes\nPidFile none\n"
    )
    (folder / "ssh_config").write_text(
        f"IdentityFile {folder}/user_key\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
    )
    (folder / "bin").mkdir()
    (folder / "bin/ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    (folder / "bin/ssh").chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)  # where sshd gives up its rights
    servers = []
    try:
        for node in nodes:
            command = [str(shutil.which("sshd", path=PATH)), "-D", "-f", str(folder / "sshd_config")]
            log = folder / f"{node.name}.log"
            servers.append(subprocess.Popen(node.command(*command, "-E", str(log))))
            _wait_for_ssh(node, servers[-1], log)
        yield {"PATH": os.pathsep.join([str(folder / "bin"), PATH])}
    finally:
        for server in servers:
            server.terminate()
            server.wait()


def _wait_for_ssh(node: Node, server: subprocess.Popen, log: Path) -> None:
    deadline, knock = time.monotonic() + 120, node.command("bash", "-c", f": </dev/tcp/{node.address}/22")
    while subprocess.run(knock, stderr=subprocess.DEVNULL).returncode:
        assert time.monotonic() < deadline and server.poll() is None, f"no sshd on {node.name}: {log.read_text()}"
        time.sleep(0.1)


def _ip(*words: str) -> None:
    command: Sequence[str] = ["ip", *words]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, f"{' '.join(command)}: {ended.stderr}"
