"""What would go wrong with a run, found before its first step: checks are functions from facts to findings.

Facts come from every rank (rank_facts.py) and from the config; a finding says what is so and what to do about it. A
run fails where its ranks disagree about versions, where something it needs is missing or too small; it is slower, or
harder to look into, where a check warns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import NamedTuple

from .rank_facts import RankFacts

GB = 1e9
# Beyond a second lines of logs no longer sort; beyond five minutes S3 refuses what such a clock has signed.
SKEW_SECONDS, REFUSED_SKEW_SECONDS = 1.0, 300.0
FEWEST_FILES = 1024
# Far below any working link: 10 Gb/s of network, and a CPU's gloo over one machine.
SLOW_GPU_BYTES, SLOW_CPU_BYTES = 1.25e9, 2e7
# What makes NCCL leave its fast ways; set while looking for a fault, and forgotten.
SLOWING = {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}


class Level(Enum):
    FINE = "fine"
    WARN = "warn"
    FAIL = "FAIL"


class Finding(NamedTuple):
    level: Level
    check: str
    said: str
    remedy: str = ""


class Needs(NamedTuple):
    """What the config asks of a rank; zeros where there is no config."""

    workers: int = 0
    batch_bytes: int = 0  # of a micro-batch, as workers hand it over in shared memory
    prefetched: int = 2  # micro-batches of each worker
    shards: int = 0
    disk_bytes: int = 0  # checkpoints that are kept, the one that is written, and the artifact


def diagnose(ranks: Sequence[RankFacts], needs: Needs) -> list[Finding]:
    """Return the findings of all checks, in their order."""
    return [finding for check in CHECKS for finding in check(ranks, needs)]


def fails(findings: Sequence[Finding]) -> bool:
    return any(finding.level is Level.FAIL for finding in findings)


def format_findings(findings: Sequence[Finding]) -> str:
    """Return a line for each finding, and the remedies below them."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.level.value:<5} {finding.check:<14} {finding.said}")
        if finding.remedy:
            lines.append(f"{'':<21}-> {finding.remedy}")
    return "\n".join(lines)


def by_value(ranks: Sequence[RankFacts], value: Callable[[RankFacts], object]) -> str:
    """Say who has what, for values that differ: `2.11 on rank 0; 2.13 on rank 1, 2`."""
    groups: dict[object, list[int]] = {}
    for facts in ranks:
        groups.setdefault(value(facts), []).append(facts.rank)
    return "; ".join(f"{found} on rank {', '.join(map(str, who))}" for found, who in groups.items())


def versions(ranks: Sequence[RankFacts], needs: Needs) -> Iterator[Finding]:
    packages = sorted({name for facts in ranks for name in facts.versions})
    differ = [name for name in packages if len({facts.versions.get(name) for facts in ranks}) > 1]
    for name in differ:
        said = f"{name}: {by_value(ranks, lambda facts, name=name: facts.versions.get(name, 'none'))}"
        yield Finding(Level.FAIL, "versions", said, f"install the same {name} on every machine, or use one image")
    if not differ:
        yield Finding(Level.FINE, "versions", ", ".join(f"{name} {ranks[0].versions[name]}" for name in packages))


def gpus(ranks: Sequence[RankFacts], needs: Needs) -> Iterator[Finding]:
    if not any(facts.gpus for facts in ranks):
        if any(facts.cuda_build for facts in ranks):
            remedy = "load the driver (`nvidia-smi`), or start the container with its GPUs; else the run is on CPUs"
            yield Finding(Level.WARN, "GPUs", "torch is built for CUDA and sees no GPU", remedy)
        else:
            yield Finding(Level.FINE, "GPUs", "none: the run is on CPUs")
        return
    for facts in ranks:
        if facts.local_rank >= len(facts.gpus):
            said = f"rank {facts.rank} on {facts.host} is process {facts.local_rank} there, of {len(facts.gpus)} GPUs"
            yield Finding(Level.FAIL, "GPUs", said, "start one process a GPU, and look at CUDA_VISIBLE_DEVICES")
    kinds = {gpu for facts in ranks for gpu in facts.gpus}
    if len(kinds) > 1:
        remedy = "every step waits for the slowest and fits the smallest: use one kind"
        yield Finding(Level.WARN, "GPUs", f"several kinds: {', '.join(sorted(kinds))}", remedy)
    else:
        yield Finding(Level.FINE, "GPUs", f"{len(ranks)} ranks, {next(iter(kinds))}")


def nccl(ranks: Sequence[RankFacts], needs: Needs) -> Iterator[Finding]:
    names = sorted({name for facts in ranks for name in facts.environment})
    differ = [name for name in names if len({facts.environment.get(name) for facts in ranks}) > 1]
    for name in differ:
        said = f"{name}: {by_value(ranks, lambda facts, name=name: facts.environment.get(name, 'unset'))}"
        yield Finding(Level.WARN, "environment", said, "ranks that talk in different ways may hang: set it alike")
    for name, value in SLOWING.items():
        if any(facts.environment.get(name) == value for facts in ranks):
            remedy = f"unset {name}: it takes NCCL off its fast ways"
            yield Finding(Level.WARN, "environment", f"{name}={value}", remedy)
    several = len({facts.host for facts in ranks}) > 1
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        if several and any(facts.environment.get(name) == "lo" for facts in ranks):
            remedy = f"set {name} to the interface that reaches the other machines (`ip -br address`)"
            yield Finding(Level.FAIL, "environment", f"{name}=lo on several machines", remedy)
    if not names:
        yield Finding(Level.FINE, "environment", "no NCCL_* or GLOO_* is set")
    elif not differ:
        yield Finding(Level.FINE, "environment", ", ".join(f"{k}={v}" for k, v in ranks[0].environment.items()))


def clocks(ranks: Sequence[RankFacts], needs: Needs) -> Iterator[Finding]:
    skew = max(facts.clock for facts in ranks) - min(facts.clock for facts in ranks)
    said = f"{skew:.3g} s between the first and the last"
    remedy = "let chrony or ntpd set the clock (`timedatectl`)"
    if skew > REFUSED_SKEW_SECONDS:
        yield Finding(Level.FAIL, "clocks", f"{said}: S3 refuses such requests", remedy)
    elif skew > SKEW_SECONDS:
        yield Finding(Level.WARN, "clocks", f"{said}: lines of logs do not sort", remedy)
    else:
        yield Finding(Level.FINE, "clocks", said)


def shared_memory(ranks: Sequence[RankFacts], needs: Needs) -> Iterator[Finding]:
    # Ranks of a machine share it.
    for host, free in sorted({facts.host: facts.shm_free for facts in ranks}.items()):
        there = sum(facts.host == host for facts in ranks)
        wanted = there * needs.workers * needs.prefetched * needs.batch_bytes
        said = f"{host}: {free / GB:.2f} GB free in /dev/shm, {wanted / GB:.2f} GB wanted by {there} ranks' workers"
        if wanted > free:
            remedy = "docker run --shm-size, an emptyDir of medium Memory in Kubernetes, or train.num_workers=0"
            yield Finding(Level.FAIL, "shared memory", said, remedy)
        else:
            yield Finding(Level.FINE, "shared memory", said)


def open_files(ranks: Sequence[RankFacts], needs: Needs) -> Iterator[Finding]:
    limit = min(facts.open_files for facts in ranks)
    if limit < FEWEST_FILES:
        remedy = f"`ulimit -n {2**16}` before the start, or LimitNOFILE / nofile in limits.conf"
        yield Finding(Level.WARN, "open files", f"at most {limit} in a process; {FEWEST_FILES} are usual", remedy)
    else:
        yield Finding(Level.FINE, "open files", f"at most {limit} in a process")


def shards(ranks: Sequence[RankFacts], needs: Needs) -> Iterator[Finding]:
    if not needs.shards:
        return
    readers = len(ranks) * max(1, needs.workers)
    said = f"{needs.shards} shards, {readers} readers"
    if len(ranks) > 1 and needs.shards < readers:
        # Any rank reads any shard: this is about disks alone, not about who gets what.
        remedy = (
            "right as it is; where they lie on one disk, more and smaller ones read faster (prepare --shard-seconds)"
        )
        yield Finding(Level.WARN, "shards", said, remedy)
    else:
        yield Finding(Level.FINE, "shards", said)


def disk(ranks: Sequence[RankFacts], needs: Needs) -> Iterator[Finding]:
    free = min(facts.disk_free for facts in ranks)
    said = f"{free / GB:.2f} GB free for run_dir, {needs.disk_bytes / GB:.2f} GB for checkpoints and the artifact"
    if needs.disk_bytes > free:
        yield Finding(Level.FAIL, "disk", said, "free some, set run_dir to another disk, or lower train.keep_last")
    elif 2 * needs.disk_bytes > free:
        yield Finding(Level.WARN, "disk", f"{said}: little is left for logs and other runs", "free some")
    else:
        yield Finding(Level.FINE, "disk", said)


def data(ranks: Sequence[RankFacts], needs: Needs) -> Iterator[Finding]:
    if not needs.shards:
        return
    bad = [facts for facts in ranks if facts.data_error]
    for facts in bad:
        remedy = "mount the data there, or look at its rights; `seedling check-data` says what is wrong with a shard"
        yield Finding(Level.FAIL, "data", f"rank {facts.rank} on {facts.host}: {facts.data_error}", remedy)
    if not bad:
        slowest = max(facts.data_seconds for facts in ranks)
        yield Finding(Level.FINE, "data", f"every rank reads its first micro-batch, the slowest in {slowest:.2f} s")


def bandwidth(ranks: Sequence[RankFacts], needs: Needs) -> Iterator[Finding]:
    if len(ranks) == 1:
        return
    speed, on_gpu = min(facts.bandwidth for facts in ranks), any(facts.gpus for facts in ranks)
    said = f"all-reduce at {speed / GB:.3g} GB/s a rank"
    if speed < (SLOW_GPU_BYTES if on_gpu else SLOW_CPU_BYTES):
        remedy = (
            "NCCL_DEBUG=INFO says over what it goes; NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose"
            if on_gpu
            else ("GLOO_SOCKET_IFNAME chooses the interface; look for other work on these machines")
        )
        yield Finding(Level.WARN, "bandwidth", said, remedy)
    else:
        yield Finding(Level.FINE, "bandwidth", said)


CHECKS = (versions, gpus, nccl, clocks, shared_memory, open_files, shards, disk, data, bandwidth)
