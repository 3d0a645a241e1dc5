"""What every rank imports sooner or later: forked_jobs forks its ranks from a process that has done it once.

torch's optimizers import its compiler, DeepSpeed's engine compiles its Muon: seven seconds of CPU.
"""

import importlib

import torch
import torch._dynamo
import toy_stage  # noqa: F401

from seedling.stages.runtime.world import import_deepspeed

torch.set_num_threads(1)
import_deepspeed()
importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
