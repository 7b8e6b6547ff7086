"""A budget as a person writes it, resolved against a model."""

from __future__ import annotations

import re
from collections.abc import Mapping

from autopeft.core.budget import Budget
from autopeft.core.contracts import Method
from autopeft.core.site import Catalog, Site
from autopeft.errors import UsageError

__all__ = ["resolve_budget"]

_LIKE = re.compile(r"^like:(?P<method>[a-z_]+?)(?:-[rhn]?(?P<size>\d+))?(?:@(?P<target>[a-z_.]+))?$")


def resolve_budget(text: str, catalog: Catalog, methods: Mapping[str, Method]) -> Budget:
    """Read a budget, including `like:lora-r8` and `like:lora-r8@qkv`: what that uniform plan would cost.

    Raises:
        UsageError: when the text is no budget, or names a method or target that does not exist.
    """
    if not text.startswith("like:"):
        return Budget.parse(text, catalog.n_base)
    match = _LIKE.match(text)
    if match is None:
        raise UsageError(
            f"cannot read the budget {text!r}; write it as like:METHOD-rSIZE, for example like:lora-r8@qkv"
        )
    key, size, target = match["method"], int(match["size"] or 1), match["target"] or ""
    if key not in methods:
        raise UsageError(f"the budget {text!r} names the method {key!r}; this study has {', '.join(sorted(methods))}")
    method = methods[key]
    sites = [s for s in catalog.candidates("whole") if method.slots(s) and _matches(s, target)]
    if not sites:
        raise UsageError(f"the budget {text!r} matches no site of the model")
    limit = sum(method.cost(site, size).trainable for site in sites)
    return Budget(limit, "trainable", None, text)


def _matches(site: Site, target: str) -> bool:
    return not target or target in site.role.split(".") or site.role == target
