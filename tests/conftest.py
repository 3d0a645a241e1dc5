"""Shared fixtures: where human speech lies, and one torch thread per test process."""

import os
from pathlib import Path

import pytest
import torch

# Two test processes on two cores: more threads each would only make them wait for one another.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def speech_dir() -> Path:
    """The folder of human speech that SEEDLING_SPEECH names; tests that need it are skipped without it."""
    folder = os.environ.get("SEEDLING_SPEECH")
    if not folder or not Path(folder).is_dir():
        pytest.skip("no human speech: set SEEDLING_SPEECH to a folder with librispeech_250/, fsdd/, ...")
    return Path(folder)
