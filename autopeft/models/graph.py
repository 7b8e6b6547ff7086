"""The dataflow of a model between its sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import networkx as nx
from torch import Tensor, nn

from autopeft.core.site import Catalog
from autopeft.errors import CorruptFile, StoreError, UsageError
from autopeft.models._capture import Operation, capture_by_export, capture_by_hooks
from autopeft.models._trace import example_of
from autopeft.store.atomic import read_json, write_json

__all__ = ["INPUT", "OUTPUT", "dataflow"]

INPUT, OUTPUT = "<input>", "<output>"
"""Nodes of the model's input and output."""

_SCHEMA = "autopeft.dataflow/1"


def dataflow(
    model: nn.Module, catalog: Catalog, example: Tensor | None = None, cache: Path | None = None
) -> nx.DiGraph:
    """Which sites feed which.

    An edge leads from a site to another when some value of the first reaches the second with no other site between;
    through a residual stream a block's last projection feeds every norm after it. The slices of a fused projection
    have the edges of the whole. Blocks form a graph of their own within the same one: an edge leads from a block to
    the next that takes its output. Nodes are site names, the classifier's paths, `INPUT` and `OUTPUT`.

    Node attributes: `kind` (of the site, `head`, `input` or `output`), `role`, `depth`, `block` (the block it lies in,
    or empty), `parent` (of a slice), `used` (whether a value flows through it). Graph attributes: `fingerprint`,
    `captured` (`export` or `hooks`), `tied` (lists of names of one parameter), `fused` (whole to slices), `unused`
    (parameters that the forward pass never reads) and `bypassed` (sites whose parameter is read while their module is
    not called).

    The pass is captured with torch.export, which takes some seconds, or with hooks where torch.export fails.

    Args:
        model: the plain model; left as it was found.
        catalog: its catalogue.
        example: images (B, C, H, W); None takes the size that the model declares.
        cache: folder for the result, which is put there under a name that holds the catalogue's fingerprint, or the
            `.json` file itself. Read back when present; made again when unreadable or of another fingerprint. None
            keeps nothing.

    Returns:
        The graph.

    Raises:
        UsageError: when no example can be made, or the model runs on none.
    """
    path = cache
    if cache is not None and cache.suffix != ".json":
        path = cache / f"dataflow-{catalog.fingerprint}.json"
    if path is not None and path.exists():
        graph = _read(path, catalog)
        if graph is not None:
            return graph
    example = example if example is not None else example_of(model)
    if example is None:
        raise UsageError(f"{catalog.architecture} does not say which images it takes; give an example batch")
    operations, captured = _capture(model, example, catalog)
    graph = _assemble(model, catalog, operations)
    graph.graph["captured"] = captured
    if path is not None:
        nodes = [[name, dict(attributes)] for name, attributes in graph.nodes.items()]
        write_json(
            path, {"schema": _SCHEMA, "graph": graph.graph, "nodes": nodes, "edges": [list(e) for e in graph.edges]}
        )
    return graph


def _capture(model: nn.Module, example: Tensor, catalog: Catalog) -> tuple[list[Operation], str]:
    try:
        return capture_by_export(model, example), "export"
    except Exception:  # noqa: BLE001  # torch.export raises anything on code it cannot follow; hooks take over
        pass
    try:
        return capture_by_hooks(model, example), "hooks"
    except Exception as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise UsageError(f"{catalog.architecture} does not run on images {tuple(example.shape)}: {reason}") from error


def _read(path: Path, catalog: Catalog) -> nx.DiGraph | None:
    try:
        data = read_json(path)
        if data["schema"] != _SCHEMA or data["graph"]["fingerprint"] != catalog.fingerprint:
            return None
        graph = nx.DiGraph(**data["graph"])
        graph.add_nodes_from((name, attributes) for name, attributes in data["nodes"])
        graph.add_edges_from((a, b) for a, b in data["edges"])
    except (StoreError, CorruptFile, KeyError, TypeError, ValueError):
        return None
    return graph


def _assemble(model: nn.Module, catalog: Catalog, operations: Sequence[Operation]) -> nx.DiGraph:
    graph = nx.DiGraph(
        fingerprint=catalog.fingerprint,
        tied=_tied(model),
        fused={site.name: list(site.parts) for site in catalog if site.parts},
        unused=_unused(model, operations),
    )
    blocks = [site.name for site in catalog if site.kind == "block"]
    for site in catalog:
        if site.kind == "residual":
            continue
        block = next((b for b in blocks if site.kind != "block" and _within(site.module, b)), "")
        graph.add_node(
            site.name, kind=site.kind, role=site.role, depth=site.depth, block=block, parent=site.parent, used=False
        )
    for head in catalog.head:
        graph.add_node(head, kind="head", role="head", depth=catalog.n_depth - 1, block="", parent="", used=False)
    for name, kind, depth in ((INPUT, "input", 0), (OUTPUT, "output", catalog.n_depth - 1)):
        graph.add_node(name, kind=kind, role=kind, depth=depth, block="", parent="", used=True)

    hosts = _hosts(catalog)
    graph.add_edges_from(_edges(operations, _innermost(hosts), _parameters(model, catalog)))
    graph.add_edges_from(
        (a, b) for a, b in _edges(operations, _innermost({b: b for b in blocks}), {}) if a in blocks and b in blocks
    )
    ran = {path for operation in operations for path in operation.modules}
    graph.graph["bypassed"] = [
        site.name
        for site in catalog
        if not site.parent and site.module in hosts and site.module not in ran and graph.degree(site.name)
    ]
    for site in catalog:
        if site.parent:
            graph.add_edges_from([(a, site.name) for a in list(graph.pred[site.parent])])
            graph.add_edges_from([(site.name, b) for b in list(graph.succ[site.parent])])
    for name in graph:
        graph.nodes[name]["used"] = graph.nodes[name]["used"] or graph.degree(name) > 0 or name in ran
    return graph


def _hosts(catalog: Catalog) -> dict[str, str]:
    """Module path to site, for sites that are a module's own computation; and the classifier's modules."""
    modules = {
        site.module: site.name
        for site in catalog
        if not site.parent
        and site.kind not in ("block", "residual")
        and (site.name == site.module or _is_embedding(site.name, site.module))
    }
    return modules | {head: head for head in catalog.head}


def _is_embedding(name: str, module: str) -> bool:
    return bool(module) and name == f"{module}.weight"


def _parameters(model: nn.Module, catalog: Catalog) -> dict[str, str]:
    """Parameter name to site, for the parameters that sites are made of; tied names lead to the one site."""
    by_tensor: dict[int, str] = {}
    for site in catalog:
        if site.kind not in ("block", "residual") and not site.parent:
            by_tensor[id(getattr(model.get_submodule(site.module), site.parameter))] = site.name
    return {
        name: by_tensor[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in by_tensor
    }


def _innermost(hosts: Mapping[str, str]) -> Callable[[Operation], str]:
    def owner(operation: Operation) -> str:
        return next((hosts[path] for path in reversed(operation.modules) if path in hosts), "")

    return owner


def _edges(
    operations: Sequence[Operation], owner: Callable[[Operation], str], parameters: Mapping[str, str]
) -> list[tuple[str, str]]:
    """Edges between owners: what reaches an owner's operation from outside of it.

    A parameter that no module of its own applies (tokens, a held layer scale, a weight used behind its module's back)
    is a source by itself; a layer scale stands in the flow at the product that applies it.
    """
    edges: dict[tuple[str, str], None] = {}
    reach: list[frozenset[str]] = []
    bare: list[bool] = []
    for operation in operations:
        name = owner(operation)
        sources = frozenset().union(*(reach[i] for i in operation.inputs)) if operation.inputs else frozenset()
        if operation.is_input:
            sources = frozenset({INPUT})
        elif operation.parameter:
            sources = frozenset({parameters[operation.parameter]} if operation.parameter in parameters else ())
        scale = [reach[i] for i in operation.inputs if bare[i] and len(reach[i]) == 1]
        is_bare = bool(operation.parameter) or (bool(operation.inputs) and all(bare[i] for i in operation.inputs))
        if not name and operation.is_product and len(scale) == 1 and len(sources) > 1:
            name = next(iter(scale[0]))
        if name:
            edges.update(dict.fromkeys((source, name) for source in sorted(sources - {name})))
            sources, is_bare = frozenset({name}), False
        reach.append(sources)
        bare.append(is_bare)
    if operations:
        edges.update(dict.fromkeys((source, OUTPUT) for source in sorted(reach[-1])))
    return list(edges)


def _tied(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _unused(model: nn.Module, operations: Sequence[Operation]) -> list[str]:
    """Parameters that no operation takes, tied ones under every name."""
    taken = {i for operation in operations for i in operation.inputs}
    read = {operation.parameter for i, operation in enumerate(operations) if i in taken and operation.parameter}
    tensors = dict(model.named_parameters(remove_duplicate=False))
    identities = {id(tensors[name]) for name in read if name in tensors}
    return [name for name, parameter in tensors.items() if id(parameter) not in identities]


def _within(path: str, block: str) -> bool:
    return path == block or path.startswith(block + ".")
