from __future__ import annotations

import networkx as nx
import pytest

from autopeft.allocation.mask import Mask
from autopeft.allocation.sections import sections
from autopeft.core.budget import Budget
from autopeft.core.menu import Menu, Option
from autopeft.core.places import places_of
from autopeft.errors import UsageError
from autopeft.methods.lora import LoRA
from autopeft.models.graph import dataflow
from autopeft.models.scan import scan
from autopeft.testing.tiny import tiny_vit


def graph_of(edges: str, depths: dict[str, int] | None = None) -> nx.DiGraph:
    """Blocks called by letters, each with one site, and a norm behind them."""
    graph = nx.DiGraph()
    names = sorted({n for edge in edges.split() for n in edge})
    for i, name in enumerate(names):
        graph.add_node(name, kind="block", depth=(depths or {}).get(name, i), block="")
        graph.add_node(f"{name}.w", kind="linear", depth=i, block=name)
    graph.add_node("norm", kind="layer_norm", depth=0, block="")
    graph.add_edges_from(tuple(edge) for edge in edges.split())
    graph.add_edges_from([("a.w", "b.w"), ("b.w", "norm")])
    return graph


def test_a_section_per_block_in_the_order_of_the_flow() -> None:
    # The middle block was made last, as diffusers' U-Nets do.
    graph = graph_of("ac cb", {"a": 0, "b": 1, "c": 2})
    assert sections(graph) == {"block0": ("a", "a.w"), "block1": ("c", "c.w"), "block2": ("b", "b.w")}


def test_chains_end_where_values_part_or_meet() -> None:
    # a and b down, c in the middle, d and e up; b skips to d.
    found = sections(graph_of("ab bc cd bd de"), "chain")
    assert found == {"chain0": ("a", "a.w", "b", "b.w"), "chain1": ("c", "c.w"), "chain2": ("d", "d.w", "e", "e.w")}
    assert list(sections(graph_of("ab bc cd"), "chain")) == ["chain0"]


def test_a_mask_by_the_graph_is_the_mask_by_the_catalogue() -> None:
    model = tiny_vit()
    catalog = scan(model)
    options = [
        Option(s.name, "lora", 1, LoRA().cost(s, 1), 0.0, places_of(catalog, LoRA(), s))
        for s in catalog.candidates()
        if LoRA().slots(s)
    ]
    menu = Menu(tuple(options), {s.name: s for s in catalog.offered()})
    graph = dataflow(model, catalog)
    budget = Budget(10**6)
    for bit in range(catalog.n_depth):
        bits = {f"block{bit}": 0}
        plan = Mask(groups=sections(graph), bits=bits).allocate(menu, budget)
        assert plan == Mask("blocks", bits=bits).allocate(menu, budget)
        assert len(plan)
    assert list(sections(graph, "chain")) == ["chain0"]


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(UsageError, match="'floor'"):
        sections(graph_of("ab"), "floor")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no residual blocks"):
        sections(nx.DiGraph())
