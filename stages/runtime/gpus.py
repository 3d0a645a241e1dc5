"""What GPUs offer, by their data sheets: memory, dense operations a second, bytes a second between them.

Links are bytes a second that one GPU sends: NVLink within a node, and its share of the node's network beyond it. A node
of 8 GPUs has 8 network cards. NCCL lays a ring for each of them, which leaves the node through that card and stays on
NVLink for the other 7 of 8 hops; so a rank sends to all of its rings together as fast as the 8 cards, or NVLink, allow.
"""

from __future__ import annotations

from typing import NamedTuple

GB, TERA = 1e9, 1e12
# What training cannot use: the CUDA context and NCCL's buffers, and what the caching allocator cannot fill.
CONTEXT_BYTES = 2 * GB
UNFILLED = 0.05


class GPU(NamedTuple):
    """Bytes, operations a second in bf16 and in fp32, bytes a second. `fp32_flops` 0: not known."""

    name: str
    memory: float
    flops: float
    node_link: float
    network: float
    fp32_flops: float = 0.0
    per_node: int = 8

    @property
    def usable(self) -> float:
        """Bytes that the tensors of a run may take."""
        return (self.memory - CONTEXT_BYTES) / (1 + UNFILLED)

    def peak(self, precision: str) -> float:
        """Operations a second of training's matrix products; ValueError where that is not known.

        In fp32 they run without TF32, as torch has it by default.
        """
        if precision != "fp32":
            return self.flops
        if not self.fp32_flops:
            raise ValueError(
                f"train.precision is fp32, and of GPU {self.name} only the peak in bf16 is known; give --gpu a fifth "
                "number, its TFLOP/s in fp32 without TF32"
            )
        return self.fp32_flops

    def link(self, ranks: int) -> float:
        """Bytes a second that one rank sends in collectives over `ranks`, which fill their nodes."""
        return self.node_link if ranks <= self.per_node else min(self.node_link, self.network * self.per_node)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.memory / GB:g} GB, {self.flops / TERA:g} TFLOP/s in bf16"
            + (f" and {self.fp32_flops / TERA:g} in fp32" if self.fp32_flops else "")
            + f", {self.node_link / GB:g} GB/s in a node of {self.per_node}, {self.network / GB:g} GB/s of network each"
        )


# NVIDIA's data sheets, bf16 without sparsity, fp32 without TF32, NVLink in one direction; 400 and 200 Gb/s of network
# for each GPU, as in DGX H100 and DGX A100.
GPUS = {
    "h200": GPU("h200", 141 * GB, 989 * TERA, 450 * GB, 50 * GB, 67 * TERA),
    "h100": GPU("h100", 80 * GB, 989 * TERA, 450 * GB, 50 * GB, 67 * TERA),
    "a100": GPU("a100", 80 * GB, 312 * TERA, 300 * GB, 25 * GB, 19.5 * TERA),
}


def known_gpu(device_name: str) -> GPU | None:
    """Return the GPU that a driver calls so, as `NVIDIA H100 80GB HBM3`."""
    return next((gpu for name, gpu in GPUS.items() if name in device_name.lower()), None)


def parse_gpu(text: str) -> GPU:
    """Return the GPU of a name, or of `MEMORY_GB,TFLOPS,NODE_GB_S,NETWORK_GB_S` and perhaps `,FP32_TFLOPS`."""
    if text in GPUS:
        return GPUS[text]
    try:
        memory, tera, node, network, *fp32 = numbers = [float(part) for part in text.split(",")]
        (fp32_tera,) = fp32 or [0.0]
    except ValueError:
        raise ValueError(
            f"--gpu is {text!r}; choose one of {', '.join(GPUS)}, or give four numbers, as 141,989,450,50 for GB, "
            "TFLOP/s in bf16, GB/s of a GPU within its node, GB/s of network for each GPU; a fifth is TFLOP/s in fp32"
        ) from None
    if min(memory - CONTEXT_BYTES / GB, *numbers) <= 0:
        raise ValueError(f"--gpu is {text!r}; memory must be above {CONTEXT_BYTES / GB:g} GB, and each number above 0")
    return GPU("gpu", memory * GB, tera * TERA, node * GB, network * GB, fp32_tera * TERA)
