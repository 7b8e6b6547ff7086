from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import networkx as nx
import pytest
import timm
import torch
from torch import Tensor, nn

from autopeft.core.site import Catalog
from autopeft.errors import UsageError
from autopeft.models import graph as module
from autopeft.models.graph import INPUT, OUTPUT, dataflow
from autopeft.models.scan import scan
from autopeft.testing.tiny import tiny_convnet, tiny_vit

Family = Callable[[str], tuple[nn.Module, Catalog]]


def _refuse(*args: object) -> None:
    raise RuntimeError("torch.export cannot follow this")


@pytest.fixture(scope="module")
def vit() -> tuple[nn.Module, Catalog, nx.DiGraph]:
    model = tiny_vit()
    catalog = scan(model)
    return model, catalog, dataflow(model, catalog)


def test_edges_of_a_transformer(vit: tuple[nn.Module, Catalog, nx.DiGraph]) -> None:
    graph = vit[2]
    assert graph.graph["captured"] == "export"
    assert set(graph.successors("blocks.0.mlp.fc1")) == {"blocks.0.mlp.fc2"}
    assert set(graph.predecessors("blocks.0.attn.proj")) == {
        "blocks.0.attn.qkv", "blocks.0.attn.qkv[q]", "blocks.0.attn.qkv[k]", "blocks.0.attn.qkv[v]",
    }  # fmt: skip
    for part in "qkv":
        assert set(graph.predecessors(f"blocks.1.attn.qkv[{part}]")) == {"blocks.1.norm1"}
        assert graph.nodes[f"blocks.1.attn.qkv[{part}]"]["parent"] == "blocks.1.attn.qkv"
    # The residual stream carries everything before it into each later norm, and nothing from behind.
    assert set(graph.predecessors("blocks.0.norm2")) == {
        "patch_embed.proj",
        "cls_token",
        "pos_embed",
        "blocks.0.attn.proj",
    }
    assert set(graph.predecessors("norm")) == {
        "patch_embed.proj", "cls_token", "pos_embed",
        "blocks.0.attn.proj", "blocks.0.mlp.fc2", "blocks.1.attn.proj", "blocks.1.mlp.fc2",
    }  # fmt: skip
    assert set(graph.successors("norm")) == {"head"}
    assert list(graph.successors("head")) == [OUTPUT]
    assert list(graph.successors(INPUT)) == ["patch_embed.proj"]
    assert list(graph.successors("blocks.0")) == ["blocks.1"]
    assert nx.is_directed_acyclic_graph(graph)


def test_attributes(vit: tuple[nn.Module, Catalog, nx.DiGraph]) -> None:
    _, catalog, graph = vit
    assert graph.graph["fingerprint"] == catalog.fingerprint
    assert graph.nodes["blocks.1.mlp.fc1"] == {
        "kind": "linear", "role": "mlp.fc1", "depth": 1, "block": "blocks.1", "parent": "", "used": True,
    }  # fmt: skip
    assert graph.nodes["head"]["kind"] == "head"
    assert graph.graph["unused"] == []
    assert graph.graph["fused"]["blocks.0.attn.qkv"] == [f"blocks.0.attn.qkv[{p}]" for p in "qkv"]
    assert set(graph) == {s.name for s in catalog if s.kind != "residual"} | {"head", INPUT, OUTPUT}


@pytest.mark.parametrize("name", ["vit", "convnext", "swin"])
def test_hooks_find_the_same_edges(family: Family, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model, catalog = family(name)
    size = 56 if name == "swin" else 32
    exported = dataflow(model, catalog, torch.zeros(1, 3, size, size))
    monkeypatch.setattr(module, "capture_by_export", _refuse)
    watched = dataflow(model, catalog, torch.zeros(1, 3, size, size))
    assert (exported.graph["captured"], watched.graph["captured"]) == ("export", "hooks")
    assert set(exported.edges) == set(watched.edges)
    assert dict(exported.nodes) == dict(watched.nodes)


def test_chain_reaches_what_lies_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 6), nn.Linear(6, 2)
    )
    catalog = scan(model, torch.zeros(1, 3, 2, 2))
    order = ["0", "2", "4", "5"]
    for refuse in (False, True):
        if refuse:
            monkeypatch.setattr(module, "capture_by_export", _refuse)
        graph = dataflow(model, catalog, torch.zeros(1, 3, 2, 2))
        assert set(graph.edges) == set(zip([INPUT, *order], [*order, OUTPUT], strict=True))
        for i, name in enumerate(order):
            assert nx.descendants(graph, name) == {*order[i + 1 :], OUTPUT}


def test_layer_scale_stands_in_the_flow(family: Family) -> None:
    model, catalog = family("convnext")
    graph = dataflow(model, catalog, torch.zeros(1, 3, 32, 32))
    block = "stages.2.blocks.0"
    assert list(graph.successors(f"{block}.mlp.fc2")) == [f"{block}.gamma"]
    assert "stages.2.blocks.1.conv_dw" in graph.successors(f"{block}.gamma")


def test_bypassed_and_unused_weights() -> None:
    model = timm.create_model(
        "beit_base_patch16_224", pretrained=False, img_size=32, depth=1, embed_dim=48, num_heads=3, num_classes=2
    ).eval()
    model.spare = nn.Parameter(torch.zeros(3))
    graph = dataflow(model, scan(model))
    assert graph.graph["bypassed"] == ["blocks.0.attn.qkv"]
    assert graph.graph["unused"] == ["spare"]
    assert list(graph.successors("blocks.0.attn.qkv")) == ["blocks.0.attn.proj"]


def test_tied_weights_are_named() -> None:
    model = tiny_convnet()
    model.blocks[1].conv2.weight = model.blocks[0].conv2.weight
    catalog = scan(model)
    graph = dataflow(model, catalog)
    assert graph.graph["tied"] == [["blocks.0.conv2.weight", "blocks.1.conv2.weight"]]
    assert graph.graph["unused"] == []
    assert "blocks.1.conv2" not in graph


def test_cache_is_read_back_and_not_captured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_convnet()
    catalog = scan(model)
    first = dataflow(model, catalog, cache=tmp_path)
    path = tmp_path / f"dataflow-{catalog.fingerprint}.json"
    assert path.is_file()
    monkeypatch.setattr(module, "_capture", _refuse)
    second = dataflow(model, catalog, cache=tmp_path)
    assert nx.utils.graphs_equal(first, second)
    assert second.graph == first.graph


def test_cache_may_be_one_file_and_is_made_again_for_another_model(tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    for model in (tiny_convnet(), tiny_vit()):
        catalog = scan(model)
        first = dataflow(model, catalog, cache=path)
        assert first.graph["fingerprint"] == catalog.fingerprint
        assert path.is_file()
        assert nx.utils.graphs_equal(first, dataflow(model, catalog, cache=path))


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"schema": "other/1"}', '{"schema": "autopeft.dataflow/1", "graph": {}}']
)
def test_unreadable_cache_is_made_again(tmp_path: Path, content: str) -> None:
    model = tiny_convnet()
    catalog = scan(model)
    path = tmp_path / f"dataflow-{catalog.fingerprint}.json"
    path.write_text(content)
    graph = dataflow(model, catalog, cache=tmp_path)
    assert graph.has_edge("stem", "norm")
    assert "autopeft.dataflow/1" in path.read_text()
    assert path.read_text() != content


def test_in_place_writes_and_value_dependent_code_are_followed_by_hooks() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 4, 2), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            held = torch.zeros(len(x), 4)
            held[:] = self.a(x).flatten(1)
            return self.head(self.b(held) if held.sum().item() < 1e9 else held)

    model = Net().eval()
    example = torch.ones(1, 3, 2, 2)
    graph = dataflow(model, scan(model, example), example)
    assert graph.graph["captured"] == "hooks"
    assert nx.has_path(graph, INPUT, OUTPUT)
    assert list(graph.successors("a")) == ["b"]


def test_wrong_example_is_refused() -> None:
    model = tiny_vit()
    with pytest.raises(UsageError, match=r"VisionTransformer does not run on images \(1, 3, 5, 5\)"):
        dataflow(model, scan(model), torch.zeros(1, 3, 5, 5))


def test_model_is_left_as_found() -> None:
    model = tiny_convnet().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    catalog = scan(model)
    dataflow(model, catalog)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
