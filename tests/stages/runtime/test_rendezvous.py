"""A port to meet at is one that nobody has."""

import socket

import pytest

from seedling.stages.runtime import rendezvous
from seedling.stages.runtime.rendezvous import free_port


def test_a_port_that_somebody_has_is_passed_over(monkeypatch):
    port = free_port()
    monkeypatch.setattr(rendezvous, "PORTS", range(port, port + 1))
    monkeypatch.setattr(rendezvous, "TRIES", 1)
    assert free_port() == port
    with socket.create_server(("127.0.0.1", port)), pytest.raises(OSError, match="none is free"):
        free_port()
