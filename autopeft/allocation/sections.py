"""Groups for masks, read from the dataflow of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import networkx as nx

from autopeft.errors import UsageError

__all__ = ["By", "sections"]

By = Literal["block", "chain"]


def sections(graph: nx.DiGraph, by: By = "block") -> Mapping[str, tuple[str, ...]]:
    """The sites of every section of a model, in the order in which values flow through it; `Mask(groups=...)`.

    Sites outside of every block (stem, last norm) belong to no section.

    Args:
        graph: what `autopeft.models.graph.dataflow` gives.
        by: `block` for one section per residual block (`block0`, `block1`, ...); `chain` for runs of blocks that feed
            one another and nothing else (`chain0`, ...): a transformer is one chain, and a U-Net has a new one wherever
            a skip connection leaves or arrives.

    Raises:
        UsageError: for another way to cut, or a graph without blocks.
    """
    if by not in get_args(By):
        raise UsageError(f"sections are cut by {' or '.join(get_args(By))}, got {by!r}")
    depths = {name: facts["depth"] for name, facts in graph.nodes.items() if facts["kind"] == "block"}
    if not depths:
        raise UsageError("the graph holds no residual blocks; name the groups of the mask by patterns")
    blocks = graph.subgraph(depths)
    ordered = list(nx.lexicographical_topological_sort(blocks, key=lambda name: (depths[name], name)))
    runs: list[list[str]] = []
    for name in ordered:
        before = list(blocks.pred[name])
        follows = len(before) == 1 and len(blocks.succ[before[0]]) == 1 and runs and runs[-1][-1] == before[0]
        if by == "chain" and follows:
            runs[-1].append(name)
        else:
            runs.append([name])
    inside: dict[str, list[str]] = {name: [name] for name in ordered}
    for site, facts in graph.nodes.items():
        if facts["block"] in inside and site not in inside:
            inside[facts["block"]].append(site)
    return {f"{by}{i}": tuple(site for block in run for site in inside[block]) for i, run in enumerate(runs)}
