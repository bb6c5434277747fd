"""Addresses: what counts as this machine, and what as the public internet. Pure; the one home of both rules."""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Iterable
from typing import TypeAlias

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

# What the IANA registries of special-purpose addresses reserve, written out: `is_global` differs between the releases
# of Python (it took 192.0.0.0/24, and what carries an IPv4 address, for public). Last, what a cloud's machines reach
# their provider by although the address is a public one.
_NOT_PUBLIC_V4 = tuple(
    ipaddress.IPv4Network(text)
    for text in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
        "224.0.0.0/4", "240.0.0.0/4", "168.63.129.16/32",
    )
)  # fmt: skip
# Everything public lies in here …
_UNICAST_V6 = ipaddress.IPv6Network("2000::/3")
# … but for protocol assignments (Teredo among them), documentation, and 6to4, which carries an IPv4 address.
_NOT_PUBLIC_V6 = tuple(ipaddress.IPv6Network(text) for text in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"))
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


@functools.lru_cache(maxsize=256)
def is_loopback(host: str) -> bool:
    """Whether a host, or a Host header, names this machine: `localhost`, 127.0.0.0/8, `::1`; with or without a port."""
    name = host.lower()
    if name.count(":") == 1 or "]" in name:  # else the colons are those of an IPv6 address
        name = re.sub(r":\d*$", "", name)
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def meant(address: str) -> Address:
    """The address that a connection to `address` reaches: the IPv4 one where an IPv6 address stands for it (mapped, or
    NAT64's well-known prefix). `ValueError` for what is none."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return ip.ipv4_mapped
        if ip in _NAT64:
            return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip


def address_of(host: str) -> str:
    """What counts as one address: an IPv4 address, or the /64 that an IPv6 host usually has to itself."""
    try:
        ip = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is None:
        return str(ipaddress.IPv6Network((ip, 64), strict=False))
    return host


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet; IPv6 that stands for an IPv4 address is judged by that."""
    ip = meant(address)
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in network for network in _NOT_PUBLIC_V4)
    return ip in _UNICAST_V6 and not any(ip in network for network in _NOT_PUBLIC_V6)


def is_in(address: str, networks: Iterable[Network]) -> bool:
    """Whether the address, or the one that it stands for, lies in one of the networks."""
    given = ipaddress.ip_address(address.partition("%")[0])
    reached = meant(address)
    return any(ip in network for network in networks for ip in (given, reached) if ip.version == network.version)
