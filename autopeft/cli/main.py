"""The command line."""

from __future__ import annotations


def main() -> None:
    """Entry point of the `autopeft` command."""
    raise SystemExit(2)
