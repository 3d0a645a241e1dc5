"""What GPUs offer, by their data sheets: memory, dense bf16 operations a second, bytes a second between them.

Links are bytes a second that one GPU sends: NVLink within a node, and its share of the node's network beyond it.
"""

from __future__ import annotations

from typing import NamedTuple

GB, TERA = 1e9, 1e12
# What training cannot use: the CUDA context and NCCL's buffers, and what the caching allocator cannot fill.
CONTEXT_BYTES = 2 * GB
UNFILLED = 0.05


class GPU(NamedTuple):
    name: str
    memory: float
    flops: float
    node_link: float
    network: float
    per_node: int = 8

    @property
    def usable(self) -> float:
        """Bytes that the tensors of a run may take."""
        return (self.memory - CONTEXT_BYTES) / (1 + UNFILLED)

    def link(self, ranks: int) -> float:
        """Bytes a second of one rank in a ring over `ranks`: as fast as its slowest link."""
        return self.node_link if ranks <= self.per_node else min(self.node_link, self.network)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.memory / GB:g} GB, {self.flops / TERA:g} TFLOP/s, {self.node_link / GB:g} GB/s in a "
            f"node of {self.per_node}, {self.network / GB:g} GB/s between nodes"
        )


# NVIDIA's data sheets, bf16 without sparsity, NVLink in one direction; 400 and 200 Gb/s of network for each GPU, as in
# DGX H100 and DGX A100.
GPUS = {
    "h200": GPU("h200", 141 * GB, 989 * TERA, 450 * GB, 50 * GB),
    "h100": GPU("h100", 80 * GB, 989 * TERA, 450 * GB, 50 * GB),
    "a100": GPU("a100", 80 * GB, 312 * TERA, 300 * GB, 25 * GB),
}


def known_gpu(device_name: str) -> GPU | None:
    """Return the GPU that a driver calls so, as `NVIDIA H100 80GB HBM3`."""
    return next((gpu for name, gpu in GPUS.items() if name in device_name.lower()), None)


def parse_gpu(text: str) -> GPU:
    """Return the GPU of a name, or of `MEMORY_GB,TFLOPS,NODE_GB_S,NETWORK_GB_S`."""
    if text in GPUS:
        return GPUS[text]
    try:
        memory, tera, node, network = map(float, text.split(","))
    except ValueError:
        raise ValueError(
            f"--gpu is {text!r}; choose one of {', '.join(GPUS)}, or give four numbers, as 141,989,450,50 for GB, "
            "TFLOP/s, and GB/s within a node and between nodes"
        ) from None
    if min(memory - CONTEXT_BYTES / GB, tera, node, network) <= 0:
        raise ValueError(f"--gpu is {text!r}; memory must be above {CONTEXT_BYTES / GB:g} GB, and each number above 0")
    return GPU("gpu", memory * GB, tera * TERA, node * GB, network * GB)
