"""A request to stop is heard, whichever signal brings it; what is ignored stays so."""

import os
import signal
import time

import pytest

from seedling.stages.runtime.signals import StopRequest


@pytest.fixture(autouse=True)
def restored():
    """The handlers of before, whatever pytest was started under."""
    before = {number: signal.getsignal(number) for number in StopRequest.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", StopRequest.SIGNALS)
def test_the_first_signal_asks_and_one_that_comes_later_means_it(number, monkeypatch):
    """A terminal that closes sends two at once."""
    heard, clock = [], [100.0]
    signal.signal(number, lambda *_: heard.append(number))
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with StopRequest() as stop:
        assert not stop.requested
        for _ in range(2):
            os.kill(os.getpid(), number)
            assert stop.requested and not heard
        clock[0] += 10
        os.kill(os.getpid(), number)
        assert heard == [number]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_what_a_parent_has_ignored_asks_nothing(number):
    """nohup does so with SIGHUP, the launcher of ranks with SIGUSR1."""
    signal.signal(number, signal.SIG_IGN)
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        assert not stop.requested and signal.getsignal(number) == signal.SIG_IGN
    assert signal.getsignal(number) == signal.SIG_IGN
