"""One seed for each forward pass, so that random state never has to be saved.

Dropout, noise and masks of a micro-batch depend on (run seed, the micro-batch's running number) alone: the same on any
number of ranks, after a resume, and whether or not anything else has drawn random numbers in between.
"""

from __future__ import annotations

import hashlib

import torch


def seed_forward(seed: int, index: int) -> None:
    """Seed torch on all devices for micro-batch `index` of a run with `seed`."""
    torch.manual_seed(micro_batch_seed(seed, index))


def micro_batch_seed(seed: int, index: int, *, purpose: str = "") -> int:
    """Return the seed of a generator for micro-batch `index`; every purpose has draws of its own."""
    # Hashed, not added: runs with seeds 1 and 2 must not share the masks of neighbouring micro-batches.
    digest = hashlib.blake2b(f"{seed}/{index}{purpose and '/' + purpose}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")
