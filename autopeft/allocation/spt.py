"""SPT: threshold the sensitivities, train a module where many entries pass, single entries elsewhere.

He, Cai, Zhang, Tao, Zhuang, "Sensitivity-aware visual parameter-efficient fine-tuning", ICCV 2023 (arXiv 2303.08566),
with the rules of the released code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from autopeft.allocation._spt_parts import ENTRIES, TOKENS, VECTORS, class_token, default_methods, key_for, make_option
from autopeft.core.allocation import Allocation, Provenance
from autopeft.core.budget import Budget, Unit
from autopeft.core.menu import Menu, Option
from autopeft.core.site import Site, Slot
from autopeft.errors import InfeasibleBudget, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.core.contracts import Method
    from autopeft.scoring.select import Ranking

__all__ = ["SPT", "Rule"]

Rule = Literal["largest", "released_nearest"]
"""The largest total within the budget; or the released sweep, which takes the total nearest to it, above or below."""

_SWEEP = range(1, 80)
_SWEEP_STEP = 20_000
_SWEEP_ENTRIES = 85_056_000
"""The released sweep looks at 0.02, 0.04, ... 1.58 million entries of the 85,056,000 eligible ones of a ViT-B/16."""


@dataclass(frozen=True, slots=True)
class SPT:
    """Modules where many sensitive entries lie, whole vectors where a fair share does, single entries elsewhere.

    The entries of all eligible tensors are ranked together and the `tau` largest selected. Then, tensor by tensor:

    - a matrix with n selected entries gets a structured module when `n >= P / alpha`, P being the module's trainable
      parameters; else its n entries are trained;
    - a vector (norm weight or bias, bias of a matrix) is trained whole when `n >= len / beta`; else its n entries are.

    Eligible are the matrices except the stem, the norms and the biases; tokens and position embeddings are not. The
    total never falls as `tau` grows when `alpha >= 1`, so bisection finds the largest total within the budget. (A
    budget in bytes prices an entry above a parameter of a module: there the plan fits, and a larger one may fit too.)

    Attributes:
        structured: key of the method that serves as structured module, `lora` or `adapter`; None trains entries alone.
        rank: its size, or the largest that a small matrix allows.
        alpha: how many parameters of a module one selected entry justifies; at least 1. The larger, the sooner a
            matrix gets a module.
        beta: the same for whole vectors; at least 1. None never trains vectors whole.
        structured_only: leave the single entries out.
        rule: how the total meets the budget.
        tokens: train the class token where the model has one and it fits, and count it, as the released code does.
        methods: the study's methods by key, for prices; left empty, the built-in ones under their usual keys. Whole
            vectors are bought from `vector` and `bias`, entries from `sparse` and `sparse_bias`, the class token from
            `tokens`; what is missing is not bought.

    Raises:
        UsageError: for a value outside of its range.
    """

    structured: str | None = "lora"
    rank: int = 8
    alpha: float = 10.0
    beta: float | None = 5.0
    structured_only: bool = False
    rule: Rule = "largest"
    tokens: bool = True
    methods: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"spt: rank must be at least 1, got {self.rank}")
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if value is not None and not 1 <= value < math.inf:
                raise UsageError(
                    f"spt: {name} must be at least 1, got {value}: below 1 more entries would cost less than few, and "
                    "no threshold would belong to a budget"
                )
        if self.rule not in get_args(Rule):
            raise UsageError(f"spt: the rule is one of {', '.join(get_args(Rule))}, got {self.rule!r}")
        if self.methods and self.structured is not None and self.structured not in self.methods:
            raise UsageError(
                f"spt: the structured method {self.structured!r} is not in the study; it has {', '.join(self.methods)}"
            )

    def allocate(self, menu: Menu, budget: Budget, seed: int = 0) -> Allocation:
        """The plan of the largest (or nearest) total, with the entries of its sparse options.

        Args:
            menu: its sites and scores are used, its options are not looked at.
            budget: the limit.
            seed: not used.

        Raises:
            InfeasibleBudget: when the menu has options and nothing can be bought, or when the released rule ends above
                the budget, or finds nothing within a factor of two of it.
            UsageError: when the menu carries no scores.
        """
        from autopeft.scoring.select import Ranking

        methods: Mapping[str, Method] = self.methods or default_methods()
        parts = self._parts(menu, methods)
        ranking = Ranking([part.score for part in parts])
        options = self._token_options(menu, methods, budget)
        fixed = sum(o.cost.of(budget.unit) for o in options)

        def total(tau: int) -> int:
            counts = ranking.counts(tau)
            return fixed + sum(part.price(n, budget.unit) for part, n in zip(parts, counts, strict=True))

        find = _largest if self.rule == "largest" else _nearest
        tau = find(total, len(ranking), budget)
        counts = ranking.counts(tau)
        options += [
            option
            for i, (part, n) in enumerate(zip(parts, counts, strict=True))
            if (option := part.option(n, ranking, i, tau)) is not None
        ]
        if not options and len(menu):
            raise InfeasibleBudget(f"a budget of {budget} buys nothing by the rules of {self._name(tau)}")
        scorer = menu.scores.origin.scorer if menu.scores is not None else ""
        return Allocation(tuple(options), budget, Provenance(self._name(tau), scorer))

    def _name(self, tau: int) -> str:
        only = ", structured_only" if self.structured_only else ""
        return (
            f"spt(structured={self.structured!r}, rank={self.rank}, alpha={self.alpha:g}, beta={self.beta}, "
            f"rule={self.rule!r}{only}, tau={tau})"
        )

    def _token_options(self, menu: Menu, methods: Mapping[str, Method], budget: Budget) -> list[Option]:
        site = class_token(menu.sites.values()) if self.tokens else None
        if site is None or key_for(methods, (TOKENS,), site, "tokens") is None:
            return []
        option = make_option(methods, TOKENS, site, methods[TOKENS].sizes(site)[-1])
        return [option] if option.cost.of(budget.unit) <= budget.limit else []

    def _parts(self, menu: Menu, methods: Mapping[str, Method]) -> list[_Part]:
        """Eligible tensors with evidence, in an order that depends on nothing but the model: it breaks ties."""
        if menu.scores is None or not menu.scores.evidence:
            raise UsageError("SPT thresholds the scores of single entries, and this menu carries none; score the model")
        parts: list[_Part] = []
        for site in sorted(menu.sites.values(), key=lambda s: (s.depth, s.name)):
            evidence = menu.scores.evidence.get(site.name)
            if evidence is None or not _eligible(site) or (site.parts and all(p in menu.sites for p in site.parts)):
                continue
            for slot in _SLOTS:
                known = evidence.get(slot) if slot in site.slots else None
                if known is not None:
                    parts.append(self._part(methods, site, slot, known.score))
        return parts

    def _part(self, methods: Mapping[str, Method], site: Site, slot: Slot, score: Tensor) -> _Part:
        entries = None if self.structured_only else key_for(methods, ENTRIES, site, slot)
        whole: str | None = None
        size, worth = 1, 1.0
        if site.is_matrix and slot == "weight":
            if self.structured is not None and methods[self.structured].slots(site):
                whole, worth = self.structured, self.alpha
                size = min(self.rank, methods[whole].sizes(site)[-1])
        elif self.beta is not None:
            whole, worth = key_for(methods, VECTORS, site, slot), self.beta
        cut = None if whole is None else math.ceil(methods[whole].cost(site, size).trainable / worth)
        return _Part(site, score, methods, whole, size, cut, entries)


_SLOTS: tuple[Slot, ...] = ("weight", "bias")


def _eligible(site: Site) -> bool:
    return site.kind in ("linear", "conv2d", "layer_norm", "batch_norm", "layer_scale") and site.role != "stem"


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """One eligible tensor.

    Attributes:
        site: its site.
        score: its scores, of the tensor's shape.
        methods: method key to method.
        whole: key of the method that takes the whole tensor, None when none does.
        size: size of that method.
        cut: selected entries from which on it does.
        entries: key of the method that takes single entries, None when they are left out.
    """

    site: Site
    score: Tensor
    methods: Mapping[str, Method]
    whole: str | None
    size: int
    cut: int | None
    entries: str | None

    def price(self, n: int, unit: Unit) -> int:
        """What `n` selected entries lead to, in the budget's unit."""
        if n == 0:
            return 0
        if self.whole is not None and self.cut is not None and n >= self.cut:
            return self.methods[self.whole].cost(self.site, self.size).of(unit)
        return 0 if self.entries is None else self.methods[self.entries].cost(self.site, n).of(unit)

    def option(self, n: int, ranking: Ranking, position: int, tau: int) -> Option | None:
        """The option that `n` selected entries lead to; its gain is the sum of the scores that it can act on."""
        if n == 0:
            return None
        if self.whole is not None and self.cut is not None and n >= self.cut:
            gain = float(self.score.double().sum())
            return make_option(self.methods, self.whole, self.site, self.size, gain)
        if self.entries is None:
            return None
        chosen = ranking.indices_of(position, tau)
        gain = float(self.score.reshape(-1)[chosen].double().sum())
        return make_option(self.methods, self.entries, self.site, n, gain, chosen.numpy())


def _largest(total: Callable[[int], int], n: int, budget: Budget) -> int:
    """The largest tau whose total is within the budget, for a total that never falls."""
    if total(n) <= budget.limit:
        return n
    low, high = 0, n
    while high - low > 1:
        middle = (low + high) // 2
        if total(middle) <= budget.limit:
            low = middle
        else:
            high = middle
    return low


def _nearest(total: Callable[[int], int], n: int, budget: Budget) -> int:
    """The sweep of the released code, scaled to the model: the nearest total, the last of equally near ones.

    Raises:
        InfeasibleBudget: where the released code writes no file, or one above its target.
    """
    best: tuple[int, int] | None = None
    for i in _SWEEP:
        tau = min(n, -(-i * _SWEEP_STEP * n // _SWEEP_ENTRIES))
        spent = total(tau)
        if abs(spent - budget.limit) <= abs((0 if best is None else best[1]) - budget.limit):
            best = (tau, spent)
    if best is None:
        raise InfeasibleBudget(
            f"the released rule of SPT finds no total within a factor of two of {budget}; use rule 'largest'"
        )
    if best[1] > budget.limit:
        raise InfeasibleBudget(
            f"the released rule of SPT overshoots {budget} by {best[1] - budget.limit:,}: the nearest total of its "
            f"sweep is {best[1]:,}; use rule 'largest', or a budget of {best[1]:,}",
            best[1],
        )
    return best[0]
