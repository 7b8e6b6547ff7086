from __future__ import annotations

import socket

import huggingface_hub.constants as hub
import pytest

from autopeft.models._hub import prompt_hub


class _Connection:
    def __enter__(self) -> _Connection:
        return self

    def __exit__(self, *args: object) -> None: ...


def test_offline_mode_holds_inside_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> _Connection:
        raise TimeoutError

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "create_connection", refuse)
    with prompt_hub() as reachable:
        assert reachable is False
        assert hub.HF_HUB_OFFLINE is True
    assert hub.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(
    ("proxy", "expected"),
    [
        ("", ("huggingface.co", 443)),
        ("http://proxy.example:3128", ("proxy.example", 3128)),
        ("box:8080", ("box", 8080)),
    ],
)
def test_where_it_knocks(monkeypatch: pytest.MonkeyPatch, proxy: str, expected: tuple[str, int]) -> None:
    asked: list[tuple[str, int]] = []

    def connect(address: tuple[str, int], timeout: float) -> _Connection:
        asked.append(address)
        return _Connection()

    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    if proxy:
        monkeypatch.setenv("https_proxy", proxy)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "ENDPOINT", "https://huggingface.co")
    monkeypatch.setattr(socket, "create_connection", connect)
    with prompt_hub() as reachable:
        assert reachable is True
        assert hub.HF_HUB_OFFLINE is False
    assert asked == [expected]


def test_wish_to_stay_offline_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    with prompt_hub() as reachable:
        assert reachable is False
    assert hub.HF_HUB_OFFLINE is True
