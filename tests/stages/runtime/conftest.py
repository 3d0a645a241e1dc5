"""Jobs of toy stages, none of which outlives its test."""

import pytest
from toy_jobs import Job


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
