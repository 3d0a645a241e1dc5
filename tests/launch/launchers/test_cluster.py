"""What is said about a cluster: packaged ones load, and mistakes name the key."""

from pathlib import Path

import pytest

from seedling.launch.launchers.cluster import load_cluster
from seedling.launch.stage_lookup import PACKAGED

CLUSTERS = sorted((PACKAGED / "clusters").glob("*.yaml"))


def test_there_are_packaged_clusters():
    assert len(CLUSTERS) >= 3


@pytest.mark.parametrize("file", CLUSTERS, ids=lambda file: file.stem)
def test_a_packaged_cluster_loads_by_its_name(file: Path):
    assert load_cluster(file.stem)[0] == load_cluster(str(file))[0]


def test_overrides_of_the_cluster_are_told_from_those_of_the_job():
    overrides = ["train.max_steps=5", "cluster.nodes=3", "++cluster.slurm.account=abc", "cluster.slurm.time='10:00'"]
    cluster, rest = load_cluster("slurm_h100", overrides=overrides)
    assert rest == ["train.max_steps=5"]
    assert (cluster.nodes, cluster.slurm.account, cluster.slurm.time, cluster.nproc) == (3, "abc", "10:00", 8)


@pytest.mark.parametrize(
    "override, said",
    [
        ("cluster.nods=3", "nearest valid key: nodes"),
        ("cluster.nodes=0", r"nodes \(0\) must be 1 or more"),
        ("cluster.slurm.time=soon", r"slurm.time \(soon\)"),
        ("cluster.kubernetes.kind=pod", "must be jobset or pytorchjob"),
    ],
)
def test_mistakes_name_the_key(override, said):
    with pytest.raises(ValueError, match=said):
        load_cluster(None, overrides=[override])
