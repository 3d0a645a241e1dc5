"""A process that ends when its parent does, so that `kill -9` of a job leaves no ranks that hold GPUs."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1  # prctl(2), Linux


def end_with_parent() -> None:
    """Ask the kernel to kill this process when the thread that started it ends. It holds across exec, not fork."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we asked
        os._exit(128 + signal.SIGKILL)
