"""sft on two machines loses one that dies and one whose cable is pulled, and ends as if nothing had happened.

`python benchmarks/lost_nodes.py --losses 10` does the same for longer.
"""

import lost_nodes
import pytest
import two_nodes

LOSSES = 2


@pytest.mark.slow
@pytest.mark.cluster
def test_sft_that_loses_machines_ends_as_the_run_that_lost_none(tmp_path):
    if reason := two_nodes.missing():
        pytest.skip(reason)
    config = lost_nodes.tiny_sft(tmp_path, steps=12 * LOSSES)
    with two_nodes.two_nodes() as nodes:
        told = lost_nodes.lose_nodes(tmp_path, config, nodes, losses=LOSSES, seed=0)
    assert [way for _, way, _ in told.lost] == ["died", "lost its cable"] and told.restarts >= 3
    assert max(told.steps_again) <= lost_nodes.SAVE_EVERY
