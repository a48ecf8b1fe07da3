"""Where the web page listens: the grammar of its address, and the sockets behind it."""

from __future__ import annotations

import ipaddress
import re
import socket
from contextlib import closing, suppress
from dataclasses import dataclass

from edgeseg.errors import RequestError, SinkError

__all__ = ["DEFAULT_PORT", "WebAddress", "is_loopback", "reachable_host"]

DEFAULT_PORT = 8080
_LOOPBACK = "127.0.0.1"
_BACKLOG = 64


@dataclass(frozen=True)
class WebAddress:
    """A host and a port to listen at.

    ``host``: a name or an address, "" for every interface of this machine. ``port``: 0 lets the
    system choose one that is free.
    """

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> WebAddress:
        """The address that ``text`` names; RequestError for what is none.

        ``HOST:PORT``, ``[::1]:8080`` for IPv6, ``:PORT`` for every interface, ``PORT`` for this
        machine alone, ``HOST`` with the usual port, "" for both usual ones.
        """
        given = text.strip()
        if not given:
            return cls(_LOOPBACK, DEFAULT_PORT)
        if re.fullmatch(r"[0-9]+", given):
            return cls(_LOOPBACK, _port(given, text))
        match = re.fullmatch(r"\[([^\[\]]*)\](?::([^:]*))?|([^:\[\]]*)(?::([^:]*))?", given)
        if match is None:
            raise RequestError(_promise(text))
        host = match[1] if match[1] is not None else match[3]
        port = match[2] if match[1] is not None else match[4]
        if match[1] is not None:
            _check_ipv6(match[1], text)
        elif host and not re.fullmatch(r"\w[\w.-]*", host):
            raise RequestError(_promise(text))
        return cls(host, DEFAULT_PORT if port is None else _port(port, text))

    def listen(self) -> list[socket.socket]:
        """Bound and listening sockets, one per address of the host; the caller closes them.

        SinkError, with the way out, when the port is taken or the host is not of this machine.
        """
        sockets: list[socket.socket] = []
        port = self.port
        try:
            for family, address in self._resolved():
                listening = socket.socket(family, socket.SOCK_STREAM)
                sockets.append(listening)
                if hasattr(socket, "SO_REUSEADDR"):
                    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    # Each family has a socket of its own: one for both is not to be had anywhere.
                    listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                listening.bind((address, port))
                listening.listen(_BACKLOG)
                listening.setblocking(False)
                # What the system chose for the first is asked of the others.
                port = port or int(listening.getsockname()[1])
        except OSError as error:
            for opened in sockets:
                opened.close()
            raise SinkError(self._reason(error)) from error
        return sockets

    def _resolved(self) -> list[tuple[socket.AddressFamily, str]]:
        if not self.host:
            found = [(socket.AF_INET, "0.0.0.0")]
            if _has_ipv6():
                found.append((socket.AF_INET6, "::"))
            return found
        entries = socket.getaddrinfo(self.host, None, type=socket.SOCK_STREAM)
        resolved = [
            (family, str(where[0]))
            for family, _, _, _, where in entries
            if family == socket.AF_INET or (family == socket.AF_INET6 and _has_ipv6())
        ]
        if not resolved:
            raise OSError("it has no address")
        return list(dict.fromkeys(resolved))

    def _reason(self, error: OSError) -> str:
        where = f"{self.host or 'any address'}, port {self.port}"
        if isinstance(error, socket.gaierror):
            return (
                f"the web page cannot listen at {where}: the host is not known "
                f"({(error.strerror or str(error)).lower()}); give an address of this machine"
            )
        if isinstance(error, PermissionError):
            return (
                f"the web page may not listen at {where}; ports below 1024 are the "
                f"administrator's, {DEFAULT_PORT} is not"
            )
        why = (error.strerror or str(error)).lower()
        return (
            f"the web page cannot listen at {where} ({why}); choose another port, or 0 for one "
            "that is free"
        )


def is_loopback(host: str) -> bool:
    """Whether an IP address can be reached from this machine alone; False for what is none."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def reachable_host() -> str:
    """An address of this machine that others on its network can use, as far as can be told."""
    with suppress(OSError), closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        # Nothing is sent: connecting a datagram socket only has the system choose the interface.
        # The address is one of RFC 5737, which nobody has.
        probe.connect(("192.0.2.1", 9))
        found = str(probe.getsockname()[0])
        if not is_loopback(found) and found != "0.0.0.0":
            return found
    return socket.gethostname()


def _check_ipv6(host: str, text: str) -> None:
    try:
        ipaddress.IPv6Address(host)
    except ValueError as error:
        raise RequestError(_promise(text)) from error


def _port(digits: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", digits) or int(digits) > 65535:
        raise RequestError(_promise(text))
    return int(digits)


def _promise(text: str) -> str:
    return (
        "the address of the web page is HOST:PORT, :PORT for every interface, PORT, or "
        f"[::1]:{DEFAULT_PORT}, with a port up to 65535, and {text!r} came"
    )


def _has_ipv6() -> bool:
    if not socket.has_ipv6:
        return False
    # Compiled in does not mean there: containers often have none.
    try:
        with closing(socket.socket(socket.AF_INET6, socket.SOCK_STREAM)) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True
