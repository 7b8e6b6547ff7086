from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest

from autopeft.allocation.uniform import Uniform
from autopeft.core.budget import Budget
from autopeft.core.contracts import Allocator, Method
from autopeft.core.menu import Menu, Option
from autopeft.core.site import Catalog, Fused
from autopeft.errors import InfeasibleBudget, UsageError
from autopeft.testing.allocator_laws import AllocatorLaws

TENTH_OF_A_PERCENT = Budget(85_798)


def priced(catalog: Catalog, methods: Mapping[str, Method], fused: Fused, limit: int) -> Menu:
    sites = {s.name: s for s in catalog.candidates(fused)}
    options = [
        Option(s.name, key, size, cost, 0.0, tuple(sorted(catalog.places(s, method.slots(s)))))
        for s in sites.values()
        for key, method in methods.items()
        if method.slots(s)
        for size in method.sizes(s)
        if (cost := method.cost(s, size)).trainable <= limit
    ]
    return Menu(tuple(options), sites)


class TestLaws(AllocatorLaws):
    @pytest.fixture(autouse=True)
    def _menus(self, small_menus: list[tuple[Menu, Budget]]) -> None:
        self.small = small_menus

    def make(self) -> Allocator:
        return Uniform("lora", "all")

    def menus(self) -> Iterator[tuple[Menu, Budget]]:
        yield from self.small


@pytest.mark.parametrize(
    ("target", "fused", "sites", "rank", "spent"),
    [
        # Per rank: a slice 1,536; qkv 3,072; proj 1,536; fc1 and fc2 3,840 each; times 12 blocks.
        ("qv", "slices", 24, 2, 73_728),
        ("qkv", "whole", 12, 2, 73_728),
        ("qkv", "both", 12, 2, 73_728),
        ("qkv", "slices", 36, 1, 55_296),
        ("attn", "whole", 24, 1, 55_296),
    ],
)
def test_vit_b_at_a_tenth_of_a_percent(
    vit_b: Catalog, methods: Mapping[str, Method], target: str, fused: Fused, sites: int, rank: int, spent: int
) -> None:
    menu = priced(vit_b, {"lora": methods["lora"]}, fused, TENTH_OF_A_PERCENT.limit)
    plan = Uniform("lora", target).allocate(menu, TENTH_OF_A_PERCENT)  # type: ignore[arg-type]
    assert (len(plan), {o.size for o in plan}, plan.spent) == (sites, {rank}, spent)


@pytest.mark.parametrize(("target", "cheapest"), [("mlp", 92_160), ("all", 147_456)])
def test_rank_one_on_everything_does_not_fit(
    vit_b: Catalog, methods: Mapping[str, Method], target: str, cheapest: int
) -> None:
    menu = priced(vit_b, {"lora": methods["lora"]}, "whole", TENTH_OF_A_PERCENT.limit)
    with pytest.raises(InfeasibleBudget, match=f"costs {cheapest:,}") as caught:
        Uniform("lora", target).allocate(menu, TENTH_OF_A_PERCENT)  # type: ignore[arg-type]
    assert caught.value.cheapest == cheapest
    exact = Uniform("lora", target).allocate(menu, Budget(cheapest))  # type: ignore[arg-type]
    assert (exact.spent, {o.size for o in exact}) == (cheapest, {1})


def test_vectors_go_everywhere(vit_b: Catalog, methods: Mapping[str, Method]) -> None:
    menu = priced(vit_b, methods, "whole", 10**6)
    biases = Uniform("bias", "all").allocate(menu, Budget(10**6))
    # 12 x (2304 + 768 + 3072 + 768) in blocks, 25 norms, and the stem, which BitFit trains too.
    assert biases.spent == 82_944 + 25 * 768 + 768
    assert "patch_embed.proj" in {o.site for o in biases}
    assert Uniform("vector", "all").allocate(menu, Budget(10**6)).spent == 25 * 768
    assert Uniform("bias", "mlp").allocate(menu, Budget(10**6)).spent == 12 * (3072 + 768)


def test_the_stem_gets_no_matrix(vit: Catalog, convnet: Catalog, methods: Mapping[str, Method]) -> None:
    for catalog in (vit, convnet):
        menu = priced(catalog, methods, "whole", 10**6)
        plan = Uniform("lora", "all").allocate(menu, Budget(10**6))
        offered = {o.site for o in menu if o.method == "lora"}
        assert {o.site for o in plan} == {name for name in offered if catalog[name].role != "stem"}
        assert len(plan) >= 2


def test_a_site_that_cannot_pay_makes_the_plan_infeasible(vit_b: Catalog, methods: Mapping[str, Method]) -> None:
    # 2,000 pay for rank 1 on one output projection (1,536) and not for rank 1 on any qkv (3,072).
    menu = priced(vit_b, {"lora": methods["lora"]}, "whole", 2_000)
    one_block = Menu(
        tuple(o for o in menu if o.site.startswith("blocks.3.")),
        {n: s for n, s in menu.sites.items() if n.startswith("blocks.3.")},
    )
    with pytest.raises(InfeasibleBudget, match=r"1 of 2 sites, such as blocks\.3\.attn\.qkv"):
        Uniform("lora", "attn").allocate(one_block, Budget(2_000))


def test_nothing_to_buy(vit: Catalog, convnet: Catalog, methods: Mapping[str, Method]) -> None:
    whole = priced(vit, methods, "whole", 1000)
    with pytest.raises(InfeasibleBudget, match="need a menu of slices"):
        Uniform("lora", "qv").allocate(whole, Budget(1000))
    with pytest.raises(InfeasibleBudget, match="no 'lora' on attn"):
        Uniform("lora", "attn").allocate(priced(convnet, methods, "whole", 1000), Budget(1000))
    with pytest.raises(UsageError, match="'heads'"):
        Uniform("lora", "heads")  # type: ignore[arg-type]
