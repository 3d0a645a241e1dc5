"""The environment of ranks: every variable says why, a user's own value wins but where it would break the run."""

import subprocess

from seedling.launch.variables import FOR_CHILDREN, Variable, environment_with, for_ranks, shell_lines


def named(variables) -> dict[str, str]:
    return {variable.name: variable.value for variable in variables}


def test_every_variable_has_a_reason():
    variables = for_ranks(threads=4, interface="ib0", gpus=True, given={"HF_HOME": "/cache"})
    assert len(variables) > 7 and all(len(variable.why) > 10 for variable in variables)
    assert len(named(variables)) == len(variables)


def test_an_interface_and_threads_are_set_only_where_they_are_given():
    assert not {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS"} & set(named(for_ranks(gpus=True)))
    with_gpus = named(for_ranks(interface="ib0", threads=3, gpus=True))
    assert with_gpus["NCCL_SOCKET_IFNAME"] == with_gpus["GLOO_SOCKET_IFNAME"] == "ib0"
    assert with_gpus["OMP_NUM_THREADS"] == "3"
    assert "NCCL_SOCKET_IFNAME" not in named(for_ranks(interface="eth0"))


def test_what_the_cluster_gives_replaces_what_we_would_set():
    assert named(for_ranks(threads=3, given={"OMP_NUM_THREADS": "7"}))["OMP_NUM_THREADS"] == "7"


def test_a_users_value_wins_but_for_fixed_ones_and_the_shell_agrees_with_python():
    variables = [*FOR_CHILDREN, Variable("OURS", "a 'b' $c", "for this test"), Variable("SET", "no", "for this test")]
    before = {"PATH": "/usr/bin:/bin", "PYTHONSAFEPATH": "0", "SET": "by the user"}
    in_python = environment_with(variables, before)
    assert (in_python["PYTHONSAFEPATH"], in_python["SET"], in_python["OURS"]) == ("1", "by the user", "a 'b' $c")
    script = "\n".join(["set -u", *shell_lines(variables), "env -0"])
    ended = subprocess.run(["bash", "-c", script], env=before, capture_output=True, text=True, check=True)
    in_shell = dict(line.split("=", 1) for line in ended.stdout.split("\0") if line)
    assert {name: in_shell[name] for name in in_python} == in_python
