"""Where ranks run: what does not make sense is refused, and DeepSpeed is told the same world on every machine."""

import argparse
import base64
import json

import pytest
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

from seedling.launch.placement import JOB_MODULE, Placement, add_placement, deepspeed_command, hosts_of, placement_of

TWO = {"nproc": 2, "nnodes": 2, "master_addr": "10.0.0.1", "master_port": 29500}


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"nproc": 0}, "--nproc is 0"),
        ({"nnodes": 0}, "--nnodes is 0"),
        ({**TWO, "node_rank": 2}, "--node_rank is 2; with --nnodes 2 it is 0 to 1"),
        ({"nnodes": 2}, "--master_addr ADDRESS --master_port PORT"),
        ({**TWO, "hostfile": "hosts"}, "leave --nnodes out"),
    ],
)
def test_a_placement_that_makes_no_sense_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        Placement(**wrong)


@pytest.mark.parametrize(
    "placement",
    [Placement(), Placement(nproc=3), Placement(master_addr="127.0.0.1"), Placement(**TWO, node_rank=1)],
)
def test_a_placement_survives_the_way_through_a_command_line(placement):
    parser = argparse.ArgumentParser()
    add_placement(parser)
    assert placement_of(parser.parse_args(placement.options())) == placement


def test_only_a_rank_alone_without_an_address_is_this_process():
    assert Placement().in_this_process
    assert not Placement(nproc=2).in_this_process and not Placement(master_addr="127.0.0.1").in_this_process


def world_of(command: list[str]) -> dict[str, list]:
    encoded = next(part for part in command if part.startswith("--world_info="))
    return json.loads(base64.urlsafe_b64decode(encoded.partition("=")[2]))


def shown(placement: Placement) -> str:
    """Return the CUDA_VISIBLE_DEVICES that DeepSpeed's launcher gives to a machine's ranks."""
    environment: dict[str, str] = {}
    devices = world_of(deepspeed_command(placement, []))[f"node{placement.node_rank}"]
    CUDA_Accelerator.set_visible_devices_envs(CUDA_Accelerator.__new__(CUDA_Accelerator), environment, devices)
    return environment["CUDA_VISIBLE_DEVICES"]


@pytest.mark.parametrize(
    "said, given",
    [
        (None, "0,1"),
        ("4,5", "4,5"),
        ("7, 3,1", "7,3"),
        ("GPU-8932f937-d72c,MIG-1/2/0", "GPU-8932f937-d72c,MIG-1/2/0"),
        ("", "-1,-1"),
        ("-1", "-1,-1"),
        ("NoDevFiles", "-1,-1"),
    ],
)
def test_ranks_see_the_gpus_that_this_process_was_given_and_no_other(monkeypatch, said, given):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if said is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
    for placement in (Placement(nproc=2), Placement(**TWO, node_rank=1)):
        assert shown(placement) == given


@pytest.mark.parametrize("said", ["4", "4,-1,5"])
def test_more_processes_than_visible_gpus_are_refused(monkeypatch, said):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
    with pytest.raises(ValueError, match=f"CUDA_VISIBLE_DEVICES={said} shows 1 GPUs, and --nproc is 2"):
        deepspeed_command(Placement(nproc=2), [])


def test_a_choice_of_gpus_that_would_not_reach_other_machines_is_refused(monkeypatch, tmp_path):
    (tmp_path / "hosts").write_text("a slots=2\n")
    placement = Placement(hostfile=str(tmp_path / "hosts"))
    for harmless in ("0,1,2,3", ""):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", harmless)
        deepspeed_command(placement, [])
    for chosen in ("4,5", "0,2"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        with pytest.raises(ValueError, match=f"CUDA_VISIBLE_DEVICES={chosen} does not reach"):
            deepspeed_command(placement, [])


def test_every_machine_is_told_the_same_world_and_its_own_number(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def told(node_rank: int) -> tuple[dict, list[str]]:
        command = deepspeed_command(Placement(**TWO, node_rank=node_rank), ["sft", "a=b c"])
        return world_of(command), command

    (first, command), (second, other) = told(0), told(1)
    assert first == second and [len(ranks) for ranks in first.values()] == [2, 2]
    assert [part for part in other if part not in command] == ["--node_rank=1"]
    assert command[-3:] == [JOB_MODULE, "sft", "a=b c"] and "--master_port=29500" in command


def test_two_jobs_on_one_machine_do_not_meet_at_a_port():
    ports = {deepspeed_command(Placement(nproc=2), [])[8] for _ in range(5)}
    assert all(port.startswith("--master_port=") for port in ports) and len(ports) > 1


def test_a_host_file_is_read_with_its_order_and_its_mistakes_are_named(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("# ours\nb slots=4\n\na slots=4  # the new one\n")
    assert list(hosts_of(file).items()) == [("b", 4), ("a", 4)]
    assert Placement(hostfile=str(file)).size == 8
    for text, said in [
        ("a\n", "line 1: a: expected HOST"),
        ("a slots=1\na slots=2\n", "twice"),
        ("", "no host"),
    ]:
        file.write_text(text)
        with pytest.raises(ValueError, match=said):
            hosts_of(file)
