"""Classifies network addresses."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """Whether this host or address is this machine itself."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def network_of(address: str) -> str:
    """An IPv4 address, or the /64 prefix of an IPv6 address, since one subscriber owns all of that."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    if ip.version == 6 and ip.ipv4_mapped:
        return str(ip.ipv4_mapped)
    return str(ip if ip.version == 4 else ipaddress.ip_network((ip, 64), strict=False))


def pinned(url: str, resolve: Callable[..., Any] = socket.getaddrinfo) -> tuple[str, dict[str, Any]]:
    """The URL with its host's address in place of its name, and what httpx needs of the name: a header, and the name for TLS. So the
    connection goes to the address that was checked. Raises OSError for a host without an address that may be called."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    found = [entry[4][0] for entry in resolve(parts.hostname, port, type=socket.SOCK_STREAM)]
    good = [one for one in found if may_be_called(one)]
    if not good:
        raise OSError(f"{parts.hostname} has no address that may be called")
    at = f"[{good[0]}]" if ":" in good[0] else good[0]
    more = {"headers": {"host": parts.netloc}, "extensions": {"sni_hostname": parts.hostname}}
    return parts._replace(netloc=f"{at}:{port}").geturl(), more


def may_be_called(address: str) -> bool:
    """Loopback and private addresses are where servers of one's own are; link-local ones (metadata services of clouds) are never called."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return not (ip.is_link_local or ip.is_multicast or ip.is_unspecified)
