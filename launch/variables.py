"""The environment that launchers give to ranks: each variable with its reason, which `--dry-run` and scripts print.

What a user has exported wins, but where another value would break the run (`fixed`).
"""

import os
import shlex
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Variable(NamedTuple):
    """An environment variable, its value and why it has it; a `fixed` one replaces what the user has set."""

    name: str
    value: str
    why: str
    fixed: bool = False


FOR_CHILDREN = (
    Variable("PYTHONSAFEPATH", "1", "a checkout's kernels/ and data/ would hide packages of these names", True),
    Variable("PYTHONUNBUFFERED", "1", "a line is in the log when it is written, also if the process is killed", True),
)
FOR_RANKS = (
    *FOR_CHILDREN,
    Variable("PYTHONFAULTHANDLER", "1", "a crash in native code leaves the Python stack in the rank's log"),
    Variable("KINETO_LOG_LEVEL", "6", "torch's profiler, which watches one step, would write lines of its own"),
    Variable("TOKENIZERS_PARALLELISM", "false", "tokenizers warns and may deadlock once data workers are forked"),
)


def for_ranks(
    *, threads: int = 0, interface: str = "", gpus: bool = False, given: Mapping[str, str] | None = None
) -> list[Variable]:
    """Return the variables of a rank.

    `threads` a rank (0: decided on the node), the network `interface` to meet over ("": left to NCCL and gloo), and
    what the cluster's config gives, which wins over ours.
    """
    variables = list(FOR_RANKS)
    if threads:
        variables.append(threads_of(threads))
    if interface:
        why = "the network between nodes, as the cluster's config says; the default may be one that peers cannot reach"
        names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if gpus else ("GLOO_SOCKET_IFNAME",)
        variables += [Variable(name, interface, why, True) for name in names]
    if gpus:
        variables.append(Variable("NCCL_DEBUG", "WARN", "NCCL says what failed, not only that something did"))
    given = given or {}
    own = [variable for variable in variables if variable.name not in given]
    return own + [Variable(name, value, "as the cluster's config says", True) for name, value in given.items()]


def threads_of(count: int) -> Variable:
    """Return the variable for threads of one rank."""
    return Variable("OMP_NUM_THREADS", str(count), "ranks share the cores; by default each starts a thread per core")


def environment_with(variables: Iterable[Variable], base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return an environment (this process's own by default) with variables added by their rule."""
    environment = dict(os.environ if base is None else base)
    for variable in variables:
        if variable.fixed or variable.name not in environment:
            environment[variable.name] = variable.value
    return environment


def shell_lines(variables: Iterable[Variable]) -> list[str]:
    """Return variables as lines of a shell script, each under its reason."""
    lines = []
    for variable in variables:
        value = shlex.quote(variable.value)
        text = value if variable.fixed else f"${{{variable.name}:-{value}}}"
        lines += [f"# {variable.why}", f"export {variable.name}={text}"]
    return lines
