"""After a crash a command is started again, later each time; after its end, a mistake, a request to stop it is not."""

import pytest

from seedling.launch.launchers.restarts import LONGEST_PAUSE_SECONDS, pause_before, run_restarting
from seedling.launch.process import POLL_SECONDS, Ended
from seedling.launch.watch import GRACE_SECONDS


def restarted(ends: list[Ended], *, max_restarts: int) -> tuple[int, list[float], int]:
    """Return (exit code, pauses, starts) of a command that ends so."""
    pauses: list[float] = []
    left = iter(ends)
    code = run_restarting(
        ["x"], environment={}, max_restarts=max_restarts, run=lambda *_, environment: next(left), sleep=pauses.append
    )
    return code, pauses, len(ends) - len(list(left))


def test_a_crash_is_followed_by_another_start_until_none_is_left():
    assert restarted([Ended(1, False), Ended(137, False), Ended(0, False)], max_restarts=2) == (0, [15, 30], 3)
    assert restarted([Ended(1, False), Ended(9, False), Ended(0, False)], max_restarts=1) == (9, [15], 2)
    assert restarted([Ended(1, False)], max_restarts=0) == (1, [], 1)


@pytest.mark.parametrize("end", [Ended(0, False), Ended(2, False), Ended(75, False), Ended(75, True), Ended(143, True)])
def test_what_a_restart_would_not_help_is_the_end(end):
    assert restarted([end, Ended(0, False)], max_restarts=5) == (end.code, [], 1)


def test_pauses_grow_to_a_limit_and_the_first_one_lets_other_machines_notice():
    pauses = [pause_before(restart) for restart in range(1, 20)]
    assert pauses == sorted(pauses) and pauses[-1] == LONGEST_PAUSE_SECONDS
    assert pauses[0] > GRACE_SECONDS + POLL_SECONDS
