"""AdaLoRA through PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from autopeft.allocation.uniform import Target, Uniform
from autopeft.backends.hf_peft import HfPeftBackend
from autopeft.core.allocation import Allocation, Provenance
from autopeft.core.budget import Budget, Cost
from autopeft.core.menu import Menu, Option
from autopeft.core.places import places_of
from autopeft.errors import InfeasibleBudget
from autopeft.methods.hf_peft import HfPeft
from autopeft.pipeline.contenders import Candidate, Group
from autopeft.pipeline.rivals._plans import first_feasible

if TYPE_CHECKING:
    from autopeft.config.study import Study
    from autopeft.pipeline.prepare import Prepared

__all__ = ["AdaLoRA"]

_TARGETS: tuple[Target, ...] = ("qkv", "attn", "mlp", "all")


@dataclass(frozen=True, slots=True)
class AdaLoRA:
    """AdaLoRA (Zhang et al., 2023, arXiv 2303.10512): within the budget when its ranks are cut, above it before.

    It starts with half as many ranks again as it ends with (twice as many at an end of rank 1), so it is shown as a
    reference and takes no part in verdicts. Ranks cost alike on sites of one shape only; the end is counted as if
    every site kept its average, which is where the cut starts from.
    """

    title: ClassVar[str] = "adalora"
    needs: ClassVar[tuple[str, ...]] = ()

    def group(self, prepared: Prepared, study: Study) -> Group:
        """One variant per target set, with the most ranks whose end fits.

        Raises:
            InfeasibleBudget: when the budget counts something else than trained parameters, or nothing fits.
        """
        if prepared.budget.unit != "trainable":
            raise InfeasibleBudget(f"adalora counts ranks, which cannot be held against {prepared.budget.unit}")
        method = HfPeft("adalora")
        menu = self._menu(prepared, method)
        found: list[Candidate] = []
        reason = InfeasibleBudget("adalora can be put nowhere on this model")
        for target in _TARGETS:
            spend = partial(self._spend, prepared, method, target)
            try:
                name, plan = first_feasible(prepared, f"{self.title} ({target})", menu, spend)
            except InfeasibleBudget as error:
                reason = error
                continue
            found.append(Candidate(name, plan, {"adalora": method}, HfPeftBackend()))
        if not found:
            raise reason
        note = "exceeds the budget while training; within it when its ranks are cut"
        return Group(self.title, "reference", tuple(found), note=note)

    def _menu(self, prepared: Prepared, method: HfPeft) -> Menu:
        """Options priced at what they end with."""
        sites = {site.name: site for site in prepared.catalog.candidates("whole")}
        options = []
        for site in sites.values():
            places = places_of(prepared.catalog, method, site)
            for size in method.sizes(site) if places else ():
                end = _end(size) * (site.in_features + site.out_features + 1)
                if end <= prepared.budget.limit:
                    cost = Cost.plain(end, entries=site.n_weight, tensors=3)
                    options.append(Option(site.name, "adalora", size, cost, 0.0, places))
        return Menu(tuple(options), sites)

    def _spend(self, prepared: Prepared, method: HfPeft, target: Target, menu: Menu) -> Allocation:
        ended = Uniform("adalora", target).allocate(menu, prepared.budget)
        options = tuple(
            Option(o.site, o.method, o.size, method.cost(prepared.catalog[o.site], o.size), 0.0, o.places)
            for o in ended.options
        )
        count = sum(option.cost.trainable for option in options)
        text = f"{ended.spent:,} when the ranks are cut"
        return Allocation(options, Budget(count, text=text), Provenance(f"adalora(target={target!r})"))


def _end(initial: int) -> int:
    """PEFT's average rank at the end for one at the start, as `HfPeft` sets it."""
    return max(1, 2 * initial // 3)
