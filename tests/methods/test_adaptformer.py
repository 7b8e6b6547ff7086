from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopeft.backends.native import Native
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import Method
from autopeft.core.menu import Option
from autopeft.core.scores import Evidence, TensorEvidence
from autopeft.core.site import Site
from autopeft.errors import UsageError
from autopeft.methods.adaptformer import AdaptFormer
from autopeft.models.scan import scan
from autopeft.testing.method_laws import MethodLaws
from autopeft.testing.tiny import tiny_vit

MLP = Site("b.mlp", "b.mlp", "residual", (2,), False, 0, "mlp", ("output",), entry="b.norm2")


class TestLaws(MethodLaws):
    models = ("vit",)

    def make(self) -> Method:
        return AdaptFormer(scale="learned", reads="norm", layer_norm="in")


@pytest.mark.parametrize("reads", ["stream", "norm"])
@pytest.mark.parametrize("layer_norm", ["none", "in"])
def test_a_block_with_it(reads: str, layer_norm: str) -> None:
    """The whole block, written out."""
    method = AdaptFormer(scale=0.3, reads=reads, layer_norm=layer_norm, dropout=0.0)
    model = tiny_vit().double()
    catalog = scan(model)
    site = catalog["blocks.1.mlp"]
    option = Option(site.name, "m", 4, method.cost(site, 4), 0.0, catalog.places(site, ("output",)))
    block, x = model.blocks[1], torch.randn(2, 5, 16, dtype=torch.float64)
    with Native().insert(model, catalog, Allocation((option,), Budget(10**6)), {"m": method}) as inserted:
        adapter = inserted.named_adapters()["blocks.1.mlp/m"]
        for p in adapter.parameters():
            nn.init.normal_(p)
        y = block(x).detach()
    middle = x + block.attn(block.norm1(x))
    given = middle if reads == "stream" else block.norm2(middle)
    if layer_norm == "in":
        given = F.layer_norm(given, (16,), adapter.norm_weight, adapter.norm_bias)
    hidden = torch.relu(given @ adapter.down_weight.T + adapter.down_bias)
    beside = 0.3 * (hidden @ adapter.up_weight.T + adapter.up_bias)
    torch.testing.assert_close(y, middle + block.mlp(block.norm2(middle)) + beside)


def test_hand_worked(build) -> None:
    adapter = build(AdaptFormer(scale=0.5, dropout=0.0), MLP, nn.Linear(2, 2), 1)
    assert adapter.reads_entry
    with torch.no_grad():
        adapter.down_weight.copy_(torch.tensor([[1.0, -2.0]]))
        adapter.up_weight.copy_(torch.tensor([[2.0], [3.0]]))
        adapter.up_bias.copy_(torch.tensor([4.0, 0.0]))
    assert adapter.branch(torch.tensor([[5.0, 1.0], [0.0, 1.0]])).tolist() == [[5.0, 4.5], [2.0, 0.0]]


def test_where_no_norm_is_known_the_branch_reads_the_stream_anyway(build) -> None:
    site = Site("b.mlp", "b.mlp", "residual", (2,), False, 0, "mlp", ("output",))
    assert not build(AdaptFormer(), site, nn.Linear(2, 2), 1).reads_entry
    assert not build(AdaptFormer(reads="norm"), MLP, nn.Linear(2, 2), 1).reads_entry


def test_learned_scale_starts_at_one(build) -> None:
    adapter = build(AdaptFormer(scale="learned"), MLP, nn.Linear(2, 2), 1)
    assert adapter.scale.shape == ()
    assert float(adapter.scale.detach()) == 1.0
    assert adapter.scale.requires_grad


def test_dropout_acts_in_training_alone(build) -> None:
    site = Site("b.mlp", "b.mlp", "residual", (64,), False, 0, "mlp", ("output",))
    adapter = build(AdaptFormer(dropout=0.5), site, nn.Linear(64, 64), 32)
    nn.init.normal_(adapter.up_weight)
    x = torch.randn(3, 64)

    def twice() -> tuple[Tensor, Tensor]:
        return adapter.branch(x), adapter.branch(x)

    assert not torch.equal(*twice())
    adapter.eval()
    assert torch.equal(*twice())


def test_gains_and_sites() -> None:
    matrix = torch.diag(torch.tensor([2.0, 4.0]))
    known = Evidence(MLP, {"output": TensorEvidence(torch.empty(0), matrix, matrix.square())})
    assert AdaptFormer().gains(MLP, known, (1, 2)) == (4.0, 5.0)
    assert AdaptFormer().gains(MLP, Evidence(MLP, {}), (1,)) == (0.0,)
    attention = Site("b.attn", "b.attn", "residual", (8,), False, 0, "attn", ("output",))
    assert not AdaptFormer().slots(attention)
    assert not AdaptFormer().mergeable(MLP)


@pytest.mark.parametrize(
    ("fields", "name"),
    [({"scale": 0.0}, "scale"), ({"scale": float("nan")}, "scale"), ({"dropout": 1.0}, "dropout")],
)
def test_bad_fields(fields: dict, name: str) -> None:
    with pytest.raises(UsageError, match=f"adaptformer: {name}"):
        AdaptFormer(**fields)


def test_count_on_a_vit_b() -> None:
    with torch.device("meta"):
        catalog = scan(timm.create_model("vit_base_patch16_224", num_classes=10))
    plain, full = AdaptFormer(), AdaptFormer(scale="learned", layer_norm="in")
    assert sum(plain.cost(s, 64).trainable for s in catalog if plain.slots(s)) == 1_189_632
    assert sum(full.cost(s, 64).trainable for s in catalog if full.slots(s)) == 1_189_632 + 12 * (1 + 2 * 768)
