"""Access to the model hub that fails at once when there is no network."""

from __future__ import annotations

import logging
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import huggingface_hub.constants as hub

__all__ = ["prompt_hub"]

_PATIENCE_S = 3.0
"""How long to wait for a connection before the hub counts as out of reach."""


@contextmanager
def prompt_hub() -> Iterator[bool]:
    """Use the hub if it can be reached, the local cache alone if not; yields whether it can.

    The hub's client retries an unreachable host for most of a minute per file. In its offline mode it finds what is
    in the cache and fails at once otherwise.
    """
    reachable = not hub.HF_HUB_OFFLINE and _reachable()
    before = hub.HF_HUB_OFFLINE
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    hub.HF_HUB_OFFLINE = not reachable
    # Every failure ends in one sentence of ours; the client's log would print it several times before.
    logger.setLevel(logging.ERROR)
    try:
        yield reachable
    finally:
        hub.HF_HUB_OFFLINE = before
        logger.setLevel(level)


def _reachable() -> bool:
    """Whether a connection to the hub, or to the proxy on the way to it, can be opened."""
    endpoint = urlsplit(hub.ENDPOINT)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(endpoint.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(endpoint.hostname or ""):
        endpoint = urlsplit(proxy if "//" in proxy else "//" + proxy)
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        with socket.create_connection((endpoint.hostname or "", port), timeout=_PATIENCE_S):
            return True
    except OSError:
        return False
