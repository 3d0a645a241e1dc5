"""Findings of facts that are made up: what fails, what warns, and that each of these has a remedy."""

import pytest

from seedling.launch.doctor import Level, Needs, diagnose, fails, format_findings
from seedling.launch.rank_facts import RankFacts

HEALTHY = RankFacts(
    rank=0,
    local_rank=0,
    host="node0",
    versions={"torch": "2.13.0", "deepspeed": "0.19.8"},
    cuda_build=True,
    gpus=["H200"] * 2,
    environment={},
    clock=1000.0,
    shm_free=1e9,
    open_files=65536,
    disk_free=1e12,
    data_seconds=0.1,
    bandwidth=4e10,
)
NEEDS = Needs(workers=2, batch_bytes=10_000_000, shards=100, disk_bytes=1_000_000_000)


def ranks(*changes: dict) -> list[RankFacts]:
    """Return a healthy rank for each of `changes`, with them."""
    return [HEALTHY._replace(**({"rank": rank, "local_rank": rank} | change)) for rank, change in enumerate(changes)]


def troubles(facts: list[RankFacts], needs: Needs = NEEDS) -> list:
    return [finding for finding in diagnose(facts, needs) if finding.level is not Level.FINE]


def test_healthy_ranks_have_no_trouble():
    assert troubles(ranks({}, {})) == []
    assert {finding.check for finding in diagnose(ranks({}, {}), NEEDS)} == {
        *("versions", "GPUs", "environment", "clocks", "shared memory", "open files", "shards", "disk", "data"),
        "bandwidth",
    }


@pytest.mark.parametrize(
    "change, check, level, said",
    [
        ({"versions": {"torch": "2.11.0", "deepspeed": "0.19.8"}}, "versions", Level.FAIL, "2.11.0 on rank 1"),
        ({"local_rank": 2}, "GPUs", Level.FAIL, "process 2 there, of 2 GPUs"),
        ({"gpus": ["H200", "A100"]}, "GPUs", Level.WARN, "A100, H200"),
        ({"environment": {"NCCL_P2P_DISABLE": "1"}}, "environment", Level.WARN, "NCCL_P2P_DISABLE"),
        ({"host": "node1", "environment": {"NCCL_SOCKET_IFNAME": "lo"}}, "environment", Level.FAIL, "lo on several"),
        ({"clock": 1003.0}, "clocks", Level.WARN, "3 s"),
        ({"clock": 1400.0}, "clocks", Level.FAIL, "S3 refuses"),
        ({"shm_free": 6.4e7}, "shared memory", Level.FAIL, "0.06 GB free"),
        ({"open_files": 256}, "open files", Level.WARN, "256"),
        ({"disk_free": 0.9e9}, "disk", Level.FAIL, "0.90 GB free"),
        ({"disk_free": 1.5e9}, "disk", Level.WARN, "1.50 GB free"),
        ({"data_error": "a.tar: no such file"}, "data", Level.FAIL, "rank 1 on node0: a.tar"),
        ({"bandwidth": 1e8}, "bandwidth", Level.WARN, "0.1 GB/s"),
    ],
)
def test_a_trouble_of_one_rank_is_found_named_and_has_a_remedy(change, check, level, said):
    found = [finding for finding in troubles(ranks({}, change)) if finding.level is level]
    assert {finding.check for finding in found} == {check}
    assert any(said in finding.said for finding in found) and all(finding.remedy for finding in found)
    assert fails(troubles(ranks({}, change))) == (level is Level.FAIL)


def test_ranks_of_a_machine_share_its_memory():
    needs = NEEDS._replace(batch_bytes=60_000_000)  # 0.24 GB a rank
    free = {"shm_free": 0.4e9}
    assert not troubles(ranks(free), needs)
    assert [finding.check for finding in troubles(ranks(free, free), needs)] == ["shared memory"]
    assert not troubles(ranks(free, free | {"host": "node1"}), needs)


def test_without_a_gpu_only_a_build_for_one_is_a_trouble():
    assert [f.check for f in troubles(ranks({"gpus": []}))] == ["GPUs"]
    assert troubles(ranks({"gpus": [], "cuda_build": False})) == []


def test_without_a_config_nothing_is_said_of_data_and_shards():
    assert not {f.check for f in diagnose(ranks({}), Needs())} & {"data", "shards"}


def test_fewer_shards_than_readers_is_no_failure():
    found = troubles(ranks({}, {}), NEEDS._replace(shards=2))
    assert [(f.check, f.level) for f in found] == [("shards", Level.WARN)]


def test_remedies_stand_below_what_they_cure():
    lines = format_findings(troubles(ranks({"disk_free": 1.0}))).splitlines()
    assert lines[0].startswith("FAIL  disk") and lines[1].strip().startswith("-> ")
