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


def test_a_new_checkpoint_ends_a_row_of_crashes(tmp_path):
    """Each start goes on from the last checkpoint and crashes at some step, having written one every tenth."""
    crashes, pauses = iter([15, 17, 19, 25, 24, 21, 29, 24]), []
    folders = [tmp_path / "done/checkpoints", tmp_path / "running/checkpoints"]
    (folders[0] / "step_001000").mkdir(parents=True)

    def run(_: list[str], *, environment: dict[str, str]) -> Ended:
        for step in range(10, next(crashes), 10):
            (folders[1] / f"step_{step:06d}").mkdir(parents=True, exist_ok=True)
        (folders[1] / ".step_000030.partial").mkdir(exist_ok=True)  # what a crash leaves of the next one
        return Ended(1, False)

    code = run_restarting(["x"], environment={}, max_restarts=3, checkpoints=folders, run=run, sleep=pauses.append)
    assert (code, pauses) == (1, [15, 30, 60, 15, 30, 60]) and len(list(crashes)) == 1


def test_pauses_grow_to_a_limit_and_the_first_one_lets_other_machines_notice():
    pauses = [pause_before(restart) for restart in range(1, 20)]
    assert pauses == sorted(pauses) and pauses[-1] == LONGEST_PAUSE_SECONDS
    assert pauses[0] > GRACE_SECONDS + POLL_SECONDS
