from __future__ import annotations

import math
from contextlib import AbstractContextManager

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopeft.backends.native import Native
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import Inserted, Method
from autopeft.core.menu import Option
from autopeft.core.places import places_of
from autopeft.core.scores import Evidence, TensorEvidence
from autopeft.core.site import Catalog, Site
from autopeft.errors import ExportError, UsageError
from autopeft.methods._masked import MaskedChange
from autopeft.methods.mask_unet import MaskUNet, MaskUNetShared
from autopeft.models.scan import scan
from autopeft.testing.method_laws import MethodLaws
from autopeft.testing.tiny import tiny_convnet, tiny_vit


class TestLaws(MethodLaws):
    models = ("vit",)

    def make(self) -> Method:
        return MaskUNet(hidden=8)


def block(catalog: Catalog, k: int = 0) -> Site:
    return next(g for g in catalog.groups() if g.name == f"block:{k}")


def inserted(model: nn.Module, method: MaskUNet, size: int) -> AbstractContextManager[Inserted]:
    catalog = scan(model)
    site = block(catalog)
    option = Option(site.name, "m", size, method.cost(site, size), 0.0, places_of(catalog, method, site))
    return Native().insert(model, catalog, Allocation((option,), Budget(10**6)), {"m": method})


def part_of(borrowed: Inserted) -> MaskUNetShared:
    part = borrowed.named_adapters()["block:0/m"]
    assert isinstance(part, MaskUNetShared)
    return part


def spread(part: MaskUNetShared, seed: int = 0) -> None:
    """Move everything to where masks are mixed and follow the input."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in part.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.1 if name.endswith("columns_bias") else 1.0))


def naive(part: MaskUNetShared, index: int, entering: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The masked Linear of one sample after the other, in evaluation."""
    adapter, rows = part.adapters()[index], []
    for tokens, own in zip(entering, x, strict=True):
        hidden = torch.relu(part.inner @ tokens.mean(0) + part.inner_bias)
        small = torch.relu(part.outer @ hidden + part.outer_bias).view(part.size, part.size)
        wide = adapter.rows @ small + adapter.rows_bias[:, None]
        logits = wide @ adapter.columns.T + adapter.columns_bias[None, :]
        mask = (torch.sigmoid(logits) > 0.5).double()
        assert 0 < mask.sum() < mask.numel()
        rows.append(own @ (weight * mask).T + bias)
    return torch.stack(rows)


def test_each_sample_has_masks_of_its_own() -> None:
    model = tiny_vit().double()
    attention = model.blocks[0].attn
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    other = torch.randn(3, 5, 16, dtype=torch.float64)
    with inserted(model, MaskUNet(hidden=8), 2) as borrowed:
        part = part_of(borrowed)
        spread(part)
        with torch.no_grad():
            y, z = attention.qkv(x), attention.proj(other)
            torch.testing.assert_close(y, naive(part, 0, x, x, attention.qkv.weight, attention.qkv.bias))
            torch.testing.assert_close(z, naive(part, 1, x, other, attention.proj.weight, attention.proj.bias))
            alone = model(torch.ones(1, 3, 8, 8, dtype=torch.float64))
            images = torch.cat([torch.randn(2, 3, 8, 8), torch.ones(1, 3, 8, 8)]).double()
            torch.testing.assert_close(model(images)[2:], alone)


def test_masked_change_is_the_masked_product() -> None:
    """Values against the product written out; gradients against the same with a soft mask in the step's place."""
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, dtype=torch.float64)
    seed = torch.randn(2, 3, 4, dtype=torch.float64)
    for temperature, threshold in ((1.0, 0.5), (0.5, 0.3)):
        soft = torch.sigmoid(logits / temperature)
        step = (soft > threshold).double() + soft - soft.detach()
        oracle = torch.einsum("bti,bki->btk", x, (step - 1) * weight)
        found = MaskedChange.apply(x, logits, weight, temperature, threshold)
        torch.testing.assert_close(found, oracle)
        wanted = torch.autograd.grad((oracle * seed).sum(), (x, logits))
        for one, two in zip(torch.autograd.grad((found * seed).sum(), (x, logits)), wanted, strict=True):
            torch.testing.assert_close(one, two)


def test_training_starts_with_few_weights_off() -> None:
    """sigmoid(-5) of them, other ones in every pass; none in evaluation."""
    model = tiny_vit()
    host, x = model.blocks[0].attn.qkv, torch.eye(16).expand(1000, 16, 16)
    plain = F.linear(x, host.weight, host.bias)
    with inserted(model, MaskUNet(), 4) as borrowed, torch.no_grad():
        assert torch.equal(host(x), plain)
        borrowed.train_mode()
        torch.manual_seed(0)
        first, second = host(x), host(x)
        assert not torch.equal(first, second)
        off = ((first - plain).abs() > 1e-7).float().mean()
        assert float(off) == pytest.approx(1 / (1 + math.exp(5)), rel=0.06)


def test_noise_is_logistic() -> None:
    """With logits of -1, sigmoid(-1) of the weights stay on."""
    model = tiny_vit()
    host, x = model.blocks[0].attn.qkv, torch.eye(16).expand(200, 16, 16)
    with inserted(model, MaskUNet(), 1) as borrowed, torch.no_grad():
        borrowed.train_mode()
        part_of(borrowed).adapters()[0].columns_bias.fill_(-1.0)
        torch.manual_seed(0)
        on = ((host(x) - host.bias).abs() > 1e-6).float().mean()
    assert float(on) == pytest.approx(1 / (1 + math.exp(1)), abs=0.005)


def test_the_input_reaches_the_mask_after_two_steps() -> None:
    """From the released start, all zero, no gradient would ever reach the generator; from this one it does."""
    model, x = tiny_vit().double(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    reached = {}
    for start in ("ours", "zero"):
        with inserted(model, MaskUNet(hidden=8), 2) as borrowed:
            part = part_of(borrowed)
            with torch.no_grad():
                for name, p in part.named_parameters():
                    if start == "zero" and name.rpartition(".")[2] in ("outer", "outer_bias", "rows", "columns"):
                        p.zero_()
            borrowed.train_mode()
            parameters = borrowed.groups()["m"]
            torch.manual_seed(1)
            for _ in range(3):
                for p in parameters:
                    p.grad = None
                model(x).square().sum().backward()
                with torch.no_grad():
                    for p in parameters:
                        p.sub_(p.grad, alpha=0.1)
            reached[start] = bool(part.inner.grad.any()) and bool(part.adapters()[0].rows.grad.any())
    assert reached == {"ours": True, "zero": False}


def test_nothing_of_a_pass_is_kept() -> None:
    model = tiny_vit()
    with inserted(model, MaskUNet(), 1) as borrowed:
        model(torch.randn(2, 3, 8, 8))
        assert part_of(borrowed)._map is None
        with pytest.raises(UsageError, match=r"blocks\.0\.attn\.proj was called before"):
            model.blocks[0].attn.proj(torch.randn(1, 2, 16))


def test_it_cannot_be_merged() -> None:
    with inserted(tiny_vit(), MaskUNet(), 1) as borrowed, pytest.raises(ExportError, match="for every input"):
        borrowed.merged_state()


def test_counts() -> None:
    """k (C/f + 1) + d (C/f + 1) per Linear, and the generator C h + h + (h + 1) (C/f)^2, at f = 4 on a ViT-B."""
    with torch.device("meta"):
        catalog = scan(timm.create_model("vit_base_patch16_224", num_classes=10))
    site = block(catalog)
    assert MaskUNet().sizes(site) == (1, 2, 4, 8, 16, 32, 64, 128, 192)
    expanders = (2304 + 768) * 193 + (768 + 768) * 193
    generator = 768 * 64 + 64 + 65 * 192**2
    cost = MaskUNet().cost(site, 192)
    assert cost.trainable == expanders + generator == 3_334_720
    assert (cost.tensors, cost.entries) == (12, 2304 * 768 + 768 * 768)


def test_gains_are_the_share_of_the_directions() -> None:
    site = block(scan(tiny_vit()))
    known = {
        m.name: Evidence(m, {"weight": TensorEvidence(torch.zeros(m.shape), torch.ones(m.shape), torch.ones(m.shape))})
        for m in MaskUNet().members(site)
    }
    # 48 x 16 entries of 1 in qkv, 16 x 16 in proj; 1 + 1 of 48 and of 16 directions per column.
    assert MaskUNet().gains(site, Evidence(site, {}, known), (1, 4)) == pytest.approx((32 + 32, 80 + 80))


def test_where_it_can_be_used() -> None:
    catalog = scan(tiny_vit())
    used = [s.name for s in (*catalog, *catalog.groups()) if MaskUNet().slots(s)]
    assert used == ["block:0", "block:1"]
    conv = scan(tiny_convnet())
    assert not any(MaskUNet().slots(s) for s in (*conv, *conv.groups()))


def test_a_linear_of_another_forward_is_refused() -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = tiny_vit()
    model.blocks[0].attn.proj = Odd(16, 16)
    with pytest.raises(UsageError, match=r"blocks\.0\.attn\.proj is a Odd"), inserted(model, MaskUNet(), 1):
        pass


@pytest.mark.parametrize(
    "settings",
    [
        {"conditioning": "time"},
        {"hidden": 0},
        {"temperature": 0.0},
        {"threshold": 1.0},
        {"start": -1.0},
        {"start": math.nan},
    ],
)
def test_settings_out_of_range(settings: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        MaskUNet(**settings)  # type: ignore[arg-type]
