"""How the processes of a job find one another: the environment variables of a rank, and a port to meet at.

Without torch, so that whoever only starts jobs need not wait for its import.
"""

from __future__ import annotations

import random
import socket

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Below those that the kernel gives to whoever asks for any, and to every connection: seconds pass until a rank listens.
PORTS = range(10_000, 20_000)
TRIES = 100


def free_port() -> int:
    """Return a TCP port that was free a moment ago, so that two jobs on one machine do not meet."""
    for port in random.SystemRandom().sample(PORTS, TRIES):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"of {TRIES} ports between {PORTS.start} and {PORTS.stop} none is free")
