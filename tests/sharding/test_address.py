"""The address that a process tells others, whatever this machine's name stands for."""

from __future__ import annotations

import socket

import pytest

from serving.engine.api.config import EngineConfig
from serving.server.ports import kv_address
from serving.transfer.config import TransferConfig
from serving.transfer.device_link import listening
from sharding import processes
from sharding.address import address_towards, own_address


class Probe:
    """A socket that knows from where it would send, or that nothing leads outside."""

    outward: str | None = "10.1.2.3"

    def __init__(self, *kind):
        assert kind == (socket.AF_INET, socket.SOCK_DGRAM), "nothing is sent"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def connect(self, address):
        self.own = address[0] if address[0].startswith("127.") else self.outward
        if self.own is None:
            raise OSError(101, "Network is unreachable")

    def getsockname(self):
        return self.own, 40000


@pytest.fixture
def machine(monkeypatch):
    """Has this machine's name stand for an address, or be unknown (None), and an address lead outside, or none."""

    def machine(named, outward):
        def look(name):
            if named is None:
                raise socket.gaierror(-2, "Name or service not known")
            return named

        def names(host, port, type):
            known = {"localhost": "127.0.0.1", "box": named, "node": "10.7.7.7"}
            address = known.get(host) or (host if host[0].isdigit() else None)
            if address is None:
                raise socket.gaierror(-2, "Name or service not known")
            return [(socket.AF_INET, type, 17, "", (address, port))]

        monkeypatch.setattr(socket, "getaddrinfo", names)
        monkeypatch.setattr(socket, "gethostname", lambda: "box")
        monkeypatch.setattr(socket, "gethostbyname", look)
        monkeypatch.setattr(socket, "socket", type("Here", (Probe,), {"outward": outward}))

    return machine


@pytest.mark.parametrize(
    ("named", "outward", "found"),
    [
        ("10.9.9.9", "10.1.2.3", "10.9.9.9"),
        ("127.0.1.1", "10.1.2.3", "10.1.2.3"),
        (None, "10.1.2.3", "10.1.2.3"),
        ("10.9.9.9", None, "10.9.9.9"),
    ],
)
def test_it_is_one_that_others_reach(machine, named, outward, found):
    machine(named, outward)
    assert own_address() == found
    assert listening(TransferConfig("both", peers=("10.0.0.0/8",))) == found
    told = EngineConfig(role="both", kv_transfer_config='{"peers": "*"}')
    assert kv_address(told, "0.0.0.0", 7) == (found, 7)
    assert kv_address(told, "10.4.4.4", 7) == ("10.4.4.4", 7) and kv_address(EngineConfig(), "0.0.0.0", 7) is None


@pytest.mark.parametrize("named", ["127.0.1.1", None])
def test_a_machine_without_any_is_told_by_its_name(machine, named):
    machine(named, None)
    with pytest.raises(OSError):
        own_address()
    assert kv_address(EngineConfig(role="both"), "::", 7) == ("box", 7)


@pytest.mark.parametrize(
    ("coordinator", "named", "found"),
    [
        ("127.0.0.1", "127.0.1.1", "127.0.0.1"),
        ("localhost", None, "127.0.0.1"),
        ("node", None, "10.1.2.3"),
        ("node", "127.0.1.1", "10.1.2.3"),
        ("box", "127.0.1.1", "10.1.2.3"),  # process 0 itself, whose name is a loopback address at home
    ],
)
def test_processes_meet_where_they_reach_each_other(machine, coordinator, named, found):
    machine(named, "10.1.2.3")
    assert address_towards(coordinator) == found


def test_gloo_is_told_the_address(machine, monkeypatch):
    from jax._src import xla_bridge

    machine("127.0.1.1", "10.1.2.3")
    with monkeypatch.context() as patch:
        patch.setattr(xla_bridge._jax, "make_gloo_tcp_collectives", lambda **given: given)
        processes._name_for_gloo("nobody")
        assert xla_bridge._jax.make_gloo_tcp_collectives() == {}, "as jax has it, which will say that there is nobody"
        processes._name_for_gloo("node")
        assert xla_bridge._jax.make_gloo_tcp_collectives(distributed_client=1) == {
            "distributed_client": 1, "hostname": "10.1.2.3",
        }  # fmt: skip
