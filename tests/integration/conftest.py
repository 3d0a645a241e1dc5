"""The toy language of the stages' tests (tests/stages/tiny_runs.py) under the name `tiny_runs`."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

if "tiny_runs" not in sys.modules:
    file = Path(__file__).parents[1] / "stages" / "tiny_runs.py"
    spec = importlib.util.spec_from_file_location("tiny_runs", file)
    sys.modules["tiny_runs"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["tiny_runs"])

import tiny_runs


@pytest.fixture(scope="package", autouse=True)
def rank_variables_restored():
    """Training in this process makes it rank 0 of 1; later tests must not inherit that."""
    before = {name: os.environ.get(name) for name in tiny_runs.RANK_VARIABLES}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
