"""Packing for quality at a price per unit of memorisation."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping

import pytest
import torch

from autopeft.allocation.energies import energies
from autopeft.allocation.gain import GainPolicy, build_menu
from autopeft.allocation.hull import on_hull
from autopeft.allocation.knapsack import Knapsack
from autopeft.core.budget import Budget
from autopeft.core.contracts import Method
from autopeft.core.menu import Menu
from autopeft.core.scores import Evidence, ScoreOrigin, Scores, TensorEvidence
from autopeft.core.site import Catalog, Site
from autopeft.errors import UsageError
from autopeft.methods.bias import Bias
from autopeft.models.scan import scan
from autopeft.scoring.calibrated import Calibrated
from autopeft.scoring.gradient import Gradient
from autopeft.testing.tiny import tiny_vit
from autopeft.testing.toy_task import ToyTask

PRICES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
PLAIN = GainPolicy(exponent=1.0, calibration={})


def _site(name: str) -> Site:
    return Site(name, name, "layer_norm", (2,), True, 0, "norm", ("weight", "bias"))


def _known(signal: tuple[float, float], memory: tuple[float, float]) -> TensorEvidence:
    return TensorEvidence(torch.zeros(2), torch.tensor(signal), torch.ones(2), memory=torch.tensor(memory))


THREE = tuple(_site(name) for name in "abc")
KNOWN = (_known((3.0, 0.0), (1.0, 5.0)), _known((0.0, 2.0), (4.0, -1.0)), _known((1.0, 1.0), (2.0, 2.0)))
SCORES = Scores(
    ScoreOrigin("hand-made", 1, "", memory="noise_difference"),
    {},
    {site.name: Evidence(site, {"bias": known}) for site, known in zip(THREE, KNOWN, strict=True)},
)
BIASES: Mapping[str, Method] = {"bias": Bias()}


def menu_of(policy: GainPolicy, scores: Scores = SCORES) -> Menu:
    return build_menu(Catalog(THREE, (), 100, 0, 1), BIASES, scores, policy, budget=Budget(100))


def test_hand_worked_prices() -> None:
    """Energies 9, 4, 2 of 15; changes -3, 2, -4 of 9 (steps of -s).

    Gains less the price of 0.5: 9/15 + 1/6, 4/15 - 1/9, 2/15 + 2/9. At a price of 2 b is worth 4/15 - 4/9 < 0.
    """
    priced = {o.site: (o.gain, o.memory) for o in menu_of(dataclasses.replace(PLAIN, price=0.5))}
    wanted = {"a": (9 / 15, -3 / 9), "b": (4 / 15, 2 / 9), "c": (2 / 15, -4 / 9)}
    for name, (gain, change) in wanted.items():
        assert priced[name] == pytest.approx((gain - 0.5 * change, change), rel=1e-5)
    assert [o.site for o in menu_of(dataclasses.replace(PLAIN, price=2.0))] == ["a", "c"]
    # What scales a gain scales the change with it: a square root of 9/15 is that much more than 9/15.
    rooted = next(iter(menu_of(dataclasses.replace(PLAIN, price=0.5, exponent=0.5))))
    factor = (9 / 15) ** -0.5
    assert (rooted.gain, rooted.memory) == pytest.approx((factor * (9 / 15 + 0.5 / 3), -factor / 3), rel=1e-5)


def test_no_price_changes_nothing() -> None:
    bare = {
        name: dataclasses.replace(e, slots={s: dataclasses.replace(k, memory=None) for s, k in e.slots.items()})
        for name, e in SCORES.evidence.items()
    }
    plain = Scores(dataclasses.replace(SCORES.origin, memory=""), {}, bare)
    for policy in (PLAIN, GainPolicy(), GainPolicy(hull=True)):
        assert menu_of(policy).options == menu_of(policy, plain).options
        assert all(o.memory is None for o in menu_of(policy))
    with pytest.raises(UsageError, match=r"gain.price is 0.5.*measured nothing.*hand-made.*scorer.memory="):
        menu_of(dataclasses.replace(PLAIN, price=0.5), plain)
    for price in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match=r"gain.price must be finite and at least 0"):
            GainPolicy(price=price)


@pytest.fixture(scope="module")
def measured() -> dict[str, Scores]:
    model = tiny_vit()
    catalog = scan(model)
    scorer = Calibrated(Gradient(batch_size=4, blocks=False))
    return {
        source: dataclasses.replace(scorer, memory=source or None).score(model, catalog, ToyTask())  # type: ignore[arg-type]  # the two and none
        for source in ("", "gap", "noise_difference")
    }


@pytest.mark.parametrize("source", ["gap", "noise_difference"])
@pytest.mark.parametrize(("limit", "exponent"), [(60, 1.0), (60, 0.5), (400, 0.5)])
def test_a_higher_price_never_buys_more_memorisation(
    source: str, limit: int, exponent: float, measured: dict[str, Scores], vit: Catalog, methods: Mapping[str, Method]
) -> None:
    """A law of exact packing: with G and D a plan's gain and change, the best of `G - p D` has less D for a larger p.

    The gain itself never grows with the price either, and the first plan is the one without any price.
    """
    scores, budget = measured[source], Budget(limit)
    known = energies(vit, methods, scores, budget=budget)
    assert known.memories is not None
    assert (known.memories != 0).mean() > 0.9
    best, changes, gains, spent = Knapsack(), [], [], []
    for price in PRICES:
        # Next to nothing for the first: the plan without a price, with its change shown.
        policy = GainPolicy(exponent=exponent, price=price or 1e-12)
        plan = best.allocate(build_menu(vit, methods, scores, policy, budget=budget, energies=known), budget)
        # Nothing is bought where all would cost more than it gains.
        changes.append(plan.memory or 0.0)
        gains.append(plan.gain + (price or 1e-12) * changes[-1])
        spent.append(plan.digest)
    free = best.allocate(build_menu(vit, methods, scores, GainPolicy(exponent=exponent), budget=budget), budget)
    bare = best.allocate(build_menu(vit, methods, measured[""], GainPolicy(exponent=exponent), budget=budget), budget)
    assert spent[0] == free.digest == bare.digest
    assert free.options == bare.options
    assert free.memory is None
    for values in (changes, gains):
        assert all(later <= sooner + 1e-9 * abs(sooner) for sooner, later in itertools.pairwise(values))
    assert changes[-1] < changes[0]
    assert len(set(spent)) > 2


def test_the_hull_is_taken_after_the_price(
    measured: dict[str, Scores], vit: Catalog, methods: Mapping[str, Method]
) -> None:
    scores, budget = measured["noise_difference"], Budget(400)
    whole, hull = (
        build_menu(vit, methods, scores, GainPolicy(price=0.5, hull=hull), budget=budget) for hull in (False, True)
    )
    free = build_menu(vit, methods, scores, GainPolicy(hull=True), budget=budget)
    assert hull.options == on_hull(whole.options, budget)
    assert all(o.gain > 0 for o in whole)
    mine, other = ({(o.site, o.method, o.size) for o in menu} for menu in (hull, free))
    assert mine != other


def test_what_is_valued_on_the_other_half_moves_by_its_step(
    measured: dict[str, Scores], vit: Catalog, methods: Mapping[str, Method], scores_of: Callable[..., Scores]
) -> None:
    """Entries are chosen by the first half and step by the second, scaled to the signal's energy."""
    scores = measured["noise_difference"]
    known = energies(vit, {"sparse": methods["sparse"]}, scores, budget=Budget(64))
    for option in known.options[:: max(1, len(known.options) // 20)]:
        tensor = scores.evidence[option.site]["weight"]
        assert tensor.half_a is not None
        assert tensor.half_c is not None
        assert tensor.memory is not None
        chosen = tensor.half_a.double().square().flatten().argsort(descending=True, stable=True)[: option.size]
        step = tensor.half_c.double() * float(tensor.signal.double().norm() / tensor.half_c.double().norm())
        wanted = -float(step.flatten()[chosen] @ tensor.memory.double().flatten()[chosen])
        assert option.memory == pytest.approx(wanted, rel=1e-4, abs=1e-9)
    assert energies(vit, methods, scores_of(vit), budget=Budget(64)).memories is None
