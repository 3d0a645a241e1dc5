"""The toy stage and its jobs as `toy_stage` and `toy_jobs`: pytest's importlib mode puts no folder on the path."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

for name in ("toy_stage", "toy_jobs"):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])

from toy_jobs import RANK_VARIABLES, Job  # noqa: E402


@pytest.fixture
def job():
    """Start a Job; what is still alive at the end of the test is killed."""
    started = []

    def start(*args, **kwargs) -> Job:
        started.append(Job(*args, **kwargs))
        return started[-1]

    yield start
    for each in started:
        each.kill()


@pytest.fixture(scope="package", autouse=True)
def rank_variables_restored():
    """Training in this process makes it rank 0 of 1; later tests must not inherit that."""
    before = {name: os.environ.get(name) for name in RANK_VARIABLES}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
