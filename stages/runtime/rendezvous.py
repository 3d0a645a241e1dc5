"""How the processes of a job find one another: the environment variables of a rank, and a port to meet at.

Without torch, so that whoever only starts jobs need not wait for its import.
"""

from __future__ import annotations

import socket

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def free_port() -> int:
    """Return a TCP port that was free a moment ago, so that two jobs on one machine do not meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
