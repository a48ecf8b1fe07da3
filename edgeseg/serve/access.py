"""Who may use the web page: a token, the host that was asked, and where the request comes from."""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from edgeseg.errors import RequestError
from edgeseg.serve.address import is_loopback

__all__ = ["Access", "Refusal", "new_token"]

_SHORTEST_TOKEN, _LONGEST_TOKEN = 8, 200


@dataclass(frozen=True)
class Refusal:
    """Why a request is not answered: an HTTP status, and a sentence for who asked."""

    status: int
    reason: str


@dataclass(frozen=True)
class Access:
    """The rules, which every request has to pass.

    ``token``: what each request must bring, None on a loopback address, where only programs of
    this machine ask. There the ``Host`` must be this machine's name, for a page of another site
    can have its own name lead to 127.0.0.1 (DNS rebinding); ``names`` are those that are right
    beside localhost. ``cookie``: the name of the cookie that holds the token. RequestError for a
    token that is too short to keep anybody out, or cannot stand in an address.
    """

    token: str | None
    cookie: str
    names: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        token = self.token
        if token is None:
            return
        if not re.fullmatch(
            rf"[A-Za-z0-9._~-]{{{_SHORTEST_TOKEN},{_LONGEST_TOKEN}}}", token, re.ASCII
        ):
            raise RequestError(
                f"a token has {_SHORTEST_TOKEN} to {_LONGEST_TOKEN} letters, digits or . _ ~ - , "
                f"and one of {len(token)} signs came; leave it out, and a good one is made"
            )

    def refusal(
        self,
        method: str,
        headers: Mapping[str, str],
        *,
        given: str | None,
        changing: bool,
    ) -> Refusal | None:
        """Why this request is refused; None when it may pass.

        ``headers``: by name, whatever the case. ``given``: the token that came, in the query, the
        cookie or as a bearer. ``changing``: whether it changes something here, or opens a channel
        that a page of another site could read from, such as a WebSocket.
        """
        if self.token is None:
            refused = self._of_host(headers.get("Host", ""))
        else:
            refused = self._of_token(given)
        return refused or _of_origin(method, headers, changing)

    def token_in(
        self, headers: Mapping[str, str], query: Mapping[str, str], cookies: Mapping[str, str]
    ) -> str | None:
        """The token that a request brings: as a bearer, in the query, or in the cookie."""
        kind, _, value = headers.get("Authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return value.strip()
        return query.get("token") or cookies.get(self.cookie)

    def _of_host(self, asked: str) -> Refusal | None:
        host = _host_in(asked)
        if host is not None and (
            host == "localhost" or host in self.names or is_loopback(host.strip("[]"))
        ):
            return None
        return Refusal(
            403,
            "This page answers to localhost and 127.0.0.1 only, and the request was for another "
            "host; serve at that host's address to open it to others.",
        )

    def _of_token(self, given: str | None) -> Refusal | None:
        right = (self.token or "").encode()
        # Compared in constant time, also when nothing came.
        if hmac.compare_digest((given or "").encode("utf-8", "replace"), right):
            return None
        return Refusal(
            401,
            "This page needs its token: open the whole address that the program printed, or send "
            "the header Authorization: Bearer TOKEN.",
        )


def new_token() -> str:
    """A token that nobody guesses: 144 random bits, in 24 signs."""
    return secrets.token_urlsafe(18)


def _of_origin(method: str, headers: Mapping[str, str], changing: bool) -> Refusal | None:
    """Refuses what a page of another site asks for in its visitor's name.

    Browsers state where a request comes from, in ``Origin`` or, the newer ones, always in
    ``Sec-Fetch-Site`` (https://www.w3.org/TR/fetch-metadata/); programs that are none state
    neither, and nobody can make them send a visitor's cookie.
    """
    refused = Refusal(403, "Only this page itself may ask for that, and another site did.")
    site = headers.get("Sec-Fetch-Site", "")
    # To follow a link to the page is not to read it.
    followed = method == "GET" and headers.get("Sec-Fetch-Mode", "") == "navigate" and not changing
    if site in ("cross-site", "same-site") and not followed:
        return refused
    origin = headers.get("Origin")
    if origin is None or not (changing or method not in ("GET", "HEAD")):
        return None
    try:
        came_from = urlsplit(origin).netloc
    except ValueError:
        return refused
    if came_from and came_from.lower() == headers.get("Host", "").strip().lower():
        return None
    return refused


def _host_in(asked: str) -> str | None:
    """The host of a ``Host`` header, without its port; None when it is none."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?", asked.strip())
    return match[1].lower().rstrip(".") if match else None
