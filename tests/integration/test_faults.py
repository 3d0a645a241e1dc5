"""Seeded faults in tiny runs, each started again until it has ended as the run that nothing happened to.

`python benchmarks/faults.py --count 1000` does the same for longer.
"""

import pytest
from fault_drill import drill


@pytest.mark.slow
def test_runs_under_faults_end_as_the_one_that_nothing_happened_to(tmp_path):
    report = drill(tmp_path, seed=8, count=40)
    assert report.total >= 40 and len(report.faults) >= 8
