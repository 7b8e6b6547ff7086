from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from autopeft.core.contracts import Method
from autopeft.core.scores import Evidence, TensorEvidence
from autopeft.core.site import Site
from autopeft.errors import UsageError
from autopeft.methods.mosa import MoSA
from autopeft.models.scan import scan
from autopeft.testing.method_laws import MethodLaws

MLP = Site("b.mlp", "b.mlp", "residual", (12,), False, 0, "mlp", ("output",), entry="b.norm2")


class TestLaws(MethodLaws):
    models = ("vit",)

    def make(self) -> Method:
        return MoSA(experts=3, split="both", layer_norm="none")


def built(build, **fields) -> nn.Module:
    return build(MoSA(dropout=0.0, **fields), MLP, nn.Linear(12, 12).double(), 4)


@pytest.mark.parametrize("experts", [1, 4, 7])
def test_every_entry_has_one_owner_and_owners_have_equal_shares(build, experts: int) -> None:
    adapter = built(build, experts=experts, split="both")
    for owner, weight in ((adapter.up_owner, adapter.up_weight), (adapter.down_owner, adapter.down_weight)):
        assert owner.shape == weight.shape
        counts = torch.bincount(owner.flatten().long(), minlength=experts)
        assert len(counts) == experts
        assert counts.max() - counts.min() <= 1
    assert not torch.equal(adapter.up_owner, adapter.down_owner.T) or experts == 1


def test_evaluation_is_the_mean_of_the_experts(build) -> None:
    """With U alone split the output is linear in the experts, so that the mean over the draws is exact."""
    adapter = built(build, experts=4)
    for p in adapter.parameters():
        nn.init.normal_(p)
    x = torch.randn(3, 12, dtype=torch.float64)
    torch.manual_seed(0)
    seen = {}
    for _ in range(60):
        y = adapter.branch(x)
        seen[tuple(y.flatten().tolist())] = y
    assert len(seen) == 4
    adapter.eval()
    torch.testing.assert_close(torch.stack(list(seen.values())).mean(0), adapter.branch(x))


def test_experts_by_definition(build) -> None:
    """start + mask_e * delta in training, start + delta / E in evaluation, for both matrices."""
    adapter = built(build, experts=4, split="both", seed=3)
    for p in (adapter.up_weight, adapter.down_weight):
        nn.init.normal_(p)
    torch.manual_seed(5)
    down, up = adapter.matrices()
    torch.manual_seed(5)
    a, b = (int(torch.randint(4, (1,))) for _ in range(2))
    assert torch.equal(down, adapter.down_start + (adapter.down_owner == a) * adapter.down_weight)
    assert torch.equal(up, (adapter.up_owner == b) * adapter.up_weight)
    adapter.eval()
    down, up = adapter.matrices()
    torch.testing.assert_close(down, adapter.down_start + adapter.down_weight / 4)
    torch.testing.assert_close(up, adapter.up_weight / 4)


def test_a_step_trains_one_expert(build) -> None:
    adapter = built(build)
    x = torch.randn(6, 12, dtype=torch.float64)
    torch.manual_seed(7)
    adapter.branch(x).square().sum().backward()
    assert not adapter.up_weight.grad.any()  # the branch is zero, and the loss has no slope there
    torch.manual_seed(7)
    adapter.branch(x).sum().backward()
    torch.manual_seed(7)
    expert = int(torch.randint(4, (1,)))
    assert torch.equal(adapter.up_weight.grad != 0, adapter.up_owner == expert)
    assert adapter.up_bias.grad.all()


def test_only_the_dense_adapter_is_stored(build) -> None:
    adapter = built(build, split="both")
    names = {"down_weight", "down_bias", "up_weight", "up_bias", "norm_weight", "norm_bias"}
    assert set(adapter.state_dict()) == names
    assert adapter.reads_entry


def test_start_of_a_split_matrix_follows_the_methods_seed(build) -> None:
    starts = [built(build, split="down", seed=seed).down_start for seed in (0, 0, 1)]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_gains() -> None:
    matrix = torch.zeros(12, 12)
    matrix[0, 0], matrix[1, 1] = 2.0, 4.0
    known = Evidence(MLP, {"output": TensorEvidence(torch.empty(0), matrix, matrix.square())})
    assert MoSA().gains(MLP, known, (1, 2)) == (4.0, 5.0)


@pytest.mark.parametrize(
    ("fields", "name"),
    [({"experts": 0}, "experts"), ({"experts": 256}, "experts"), ({"scale": 0.0}, "scale"), ({"dropout": 1.5}, "drop")],
)
def test_bad_fields(fields: dict, name: str) -> None:
    with pytest.raises(UsageError, match=f"mosa: {name}"):
        MoSA(**fields)


def test_count_on_a_vit_b() -> None:
    with torch.device("meta"):
        catalog = scan(timm.create_model("vit_base_patch16_224", num_classes=10))
    for method, extra in ((MoSA(), 2 * 768), (MoSA(layer_norm="none", experts=9), 0)):
        assert sum(method.cost(s, 64).trainable for s in catalog if method.slots(s)) == 1_189_632 + 12 * extra
