"""Process groups keep to the network they are told, and a process alone to its own machine."""

import os
import socket
import subprocess
import sys

import psutil
import pytest

from bdtrain.parallel import network
from bdtrain.parallel.network import is_loopback, name_interface, own_address


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *(("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("::ffff:127.0.0.1", True)),
        *(("0.0.0.0", False), ("::", False), ("192.0.2.2", False), ("::ffff:192.0.2.2", False)),
        *(("fe80::1", False), ("localhost", False)),
    ],
)
def test_only_loopback_counts_as_loopback(host, expected):
    assert is_loopback(host) is expected


def test_a_process_takes_the_address_by_which_it_reaches_the_head():
    assert own_address("127.0.0.1") == "127.0.0.1"
    environment = {"GLOO_SOCKET_IFNAME": "eth7"}
    name_interface(environment, "127.0.0.1")
    loopback = environment["GLOO_SOCKET_IFNAME"]
    assert loopback in {name for _, name in socket.if_nameindex()} and loopback != "eth7"
    assert environment["NCCL_SOCKET_IFNAME"] == f"={loopback}"


def test_on_a_cluster_what_its_operator_set_stays(monkeypatch):
    monkeypatch.setattr(network, "_interface_of", {"10.0.0.1": "eth0"}.get)
    environment = {"GLOO_SOCKET_IFNAME": "eth7"}
    name_interface(environment, "10.0.0.1")
    assert environment == {"GLOO_SOCKET_IFNAME": "eth7", "NCCL_SOCKET_IFNAME": "=eth0"}
    unknown = {}
    name_interface(unknown, "10.0.0.2")
    assert unknown == {}


ALONE = """
import os, sys, psutil
from bdtrain.parallel.groups import init_groups
init_groups()
found = {one.laddr.ip for one in psutil.Process().net_connections(kind="inet") if one.status == "LISTEN"}
print(os.environ.get("GLOO_SOCKET_IFNAME"), *sorted(found))
"""


def test_training_alone_listens_to_nobody_outside():
    """gloo opens a port for every group; by default on the address of the machine's name."""
    environment = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True, check=True
    )
    name, *addresses = done.stdout.split()
    assert addresses and all(is_loopback(address) for address in addresses)
    loopback = {one.address for one in psutil.net_if_addrs()[name]}
    assert "127.0.0.1" in loopback
