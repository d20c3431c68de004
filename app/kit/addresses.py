"""Classifies network addresses, and reads those of servers that whoever runs the studio lists in a setting."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from app.errors import BadField


class Address(NamedTuple):
    """One entry of such a list: its address without name and key, the key, and the name before it."""

    url: str
    key: str | None
    user: str = ""

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc


def listed(text: str, setting: str) -> dict[str, Address]:
    """The servers in a setting, by address. Raises BadField for an entry that is no server address."""
    found = [_listed(part, setting) for part in text.replace(",", " ").split()]
    return {address.url: address for address in found}


def _listed(text: str, setting: str) -> Address:
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise BadField(
            f"LUTHIER_{setting.upper()} names something that is no address of a server.",
            hint="Write addresses as http://127.0.0.1:8001/v1, with commas between them.",
            param=setting,
        )
    named = f"[{host}]" if ":" in host else host
    url = f"{parts.scheme}://{named}{f':{port}' if port else ''}{parts.path.rstrip('/')}"
    return Address(url, unquote(parts.password) if parts.password else None, unquote(parts.username or ""))


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
