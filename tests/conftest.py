"""What all tests share: where human speech lies, one torch thread per test process, no rank left behind, same draws."""

import os
import zlib
from pathlib import Path

import pytest
import torch

from seedling.stages.runtime.rendezvous import RANK_VARIABLES

# Two test processes on two cores: more threads each would only make them wait for one another.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Read when triton is imported, so before any test file: without a GPU kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Noted before any test: a fixture that outlives a file may train, and would be noted as if the shell had set it.
RANK_AT_START = {name: os.environ[name] for name in RANK_VARIABLES if name in os.environ}


@pytest.fixture(scope="module", autouse=True)
def rank_variables_restored():
    """Training in this process makes it rank 0 of 1; the next file's tests must not inherit that."""
    yield
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(RANK_AT_START)


def seed_by_name(node: pytest.Item | pytest.Collector) -> None:
    """Seed torch by a test's or a file's name: what it draws must not hang on what ran before it in this process."""
    torch.manual_seed(zlib.crc32(node.nodeid.encode()))


@pytest.fixture(scope="module", autouse=True)
def seeded_file(request):
    seed_by_name(request.node)


@pytest.fixture(autouse=True)
def seeded_test(request):
    seed_by_name(request.node)


@pytest.fixture(scope="session")
def speech_dir() -> Path:
    """The folder of human speech that SEEDLING_SPEECH names; tests that need it are skipped without it."""
    folder = os.environ.get("SEEDLING_SPEECH")
    if not folder or not Path(folder).is_dir():
        pytest.skip("no human speech: set SEEDLING_SPEECH to a folder with librispeech_250/, fsdd/, ...")
    return Path(folder)
