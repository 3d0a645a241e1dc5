"""Where ranks run: what does not make sense is refused, and DeepSpeed is told the same world on every machine."""

import argparse
import base64
import json

import pytest

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


def test_every_machine_is_told_the_same_world_and_its_own_number():
    def told(node_rank: int) -> tuple[dict, list[str]]:
        command = deepspeed_command(Placement(**TWO, node_rank=node_rank), ["sft", "a=b c"])
        world = next(part for part in command if part.startswith("--world_info="))
        return json.loads(base64.urlsafe_b64decode(world.partition("=")[2])), command

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
