"""The network that process groups use, and whether it can be reached from outside."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from collections.abc import MutableMapping

LOOPBACK = "127.0.0.1"

INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Which network the two libraries use; left to themselves they go by the machine's name, or by chance."""

_GET_ADDRESS = 0x8915  # SIOCGIFADDR of Linux


def is_loopback(host: str) -> bool:
    """Whether a numeric address reaches this machine only."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def own_address(host: str) -> str:
    """The address of this machine from which it reaches another one; nothing is sent.

    Args:
        host: numeric address of the other one, or of this one.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as found:
        # Any port: no packet leaves before the first message, and there is none.
        found.connect((host, 9))
        address: str = found.getsockname()[0]
    return address


def name_interface(environment: MutableMapping[str, str], address: str) -> None:
    """Keep gloo and NCCL to the network of an address.

    Args:
        environment: variables; changed. On a cluster, what its operator set there stays.
        address: numeric, of this machine.
    """
    name = _interface_of(address)
    if not name:
        return
    # NCCL takes a bare name for the beginning of one.
    for variable, value in zip(INTERFACES, (name, f"={name}"), strict=True):
        if is_loopback(address):
            environment[variable] = value
        else:
            environment.setdefault(variable, value)


def _interface_of(address: str) -> str:
    """Name of the network interface with an IPv4 address; empty where it cannot be told."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asked, _GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # it has none
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""
