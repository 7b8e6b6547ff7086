"""autopeft: where trainable parameters should go, and of which kind, under an exact budget."""

from __future__ import annotations

__version__ = "0.1.0.dev0"

__all__ = ["__version__"]
