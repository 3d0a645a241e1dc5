"""One seed for each forward pass, so that random state never has to be saved.

Dropout and masks of a micro-batch depend on (run seed, the micro-batch's running number) alone: the same on any number
of ranks, after a resume, and whether or not anything else has drawn random numbers in between.
"""

from __future__ import annotations

import hashlib

import torch


def seed_forward(seed: int, index: int) -> None:
    """Seed torch on all devices for micro-batch `index` of a run with `seed`."""
    # Hashed, not added: runs with seeds 1 and 2 must not share the masks of neighbouring micro-batches.
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=7).digest()
    torch.manual_seed(int.from_bytes(digest, "big"))
