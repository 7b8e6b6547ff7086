from __future__ import annotations

import pytest
import timm
import torch

from autopeft.backends.native import Native
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import Method
from autopeft.core.menu import Option
from autopeft.errors import ExportError, UsageError
from autopeft.methods.bit_adaptformer import BitAdaptFormer
from autopeft.methods.codes import kept_energy
from autopeft.models.scan import scan
from autopeft.testing._method_cases import ground_of
from autopeft.testing.method_laws import MethodLaws
from autopeft.testing.tiny import tiny_vit


class TestOneBit(MethodLaws):
    identity = False

    def make(self) -> Method:
        return BitAdaptFormer()


class TestFiveBits(MethodLaws):
    identity = False
    models = ("vit",)
    dtypes = (torch.float32,)

    def make(self) -> Method:
        return BitAdaptFormer(bits=5, scale=0.5)


def test_it_reads_the_residual_stream() -> None:
    model = tiny_vit()
    catalog = scan(model)
    method = BitAdaptFormer(scale=3.0)
    site = catalog["blocks.0.mlp"]
    option = Option(site.name, "bits", 4, method.cost(site, 4), 0.0, catalog.places(site, method.slots(site)))
    images = torch.randn(2, 3, 8, 8)
    block = model.blocks[0]
    with torch.no_grad():
        x = model._pos_embed(model.patch_embed(images))
        x = x + block.attn(block.norm1(x))
        plain = x + block.mlp(block.norm2(x))
        with Native().insert(model, catalog, Allocation((option,), Budget(10**6)), {"bits": method}) as inserted:
            module = inserted.named_adapters()[option.key]
            c = 0.6744898
            down = torch.where(module.down >= module.down.mean(), c, -c)
            down = down * module.down.std(correction=0) + module.down.mean()
            up = torch.where(module.up >= module.up.mean(), c, -c) * module.up.std(correction=0) + module.up.mean()
            found = block(model._pos_embed(model.patch_embed(images)))
            torch.testing.assert_close(found, plain + 3 * (x @ down.T).relu() @ up.T)
            assert (found - plain).abs().max() > 1e-4
            with pytest.raises(ExportError, match="not linear"):
                inserted.merged_state()


def test_counts_on_a_vit_base() -> None:
    with torch.device("meta"):
        catalog = scan(timm.create_model("vit_base_patch16_224", num_classes=10))
    method = BitAdaptFormer()
    costs = [method.cost(site, 32) for site in catalog if method.slots(site)]
    assert len(costs) == 12
    # 589,824 bits of codes are 72 KiB; a mean and a deviation per matrix come on top.
    assert sum(c.trainable for c in costs) == 589_824
    assert sum(c.bits for c in costs) == 589_824 + 12 * 2 * 64
    four = [BitAdaptFormer(bits=4).cost(site, 8) for site in catalog if method.slots(site)]
    assert sum(c.bits for c in four) == sum(c.bits for c in costs)


def test_only_beside_an_mlp_with_a_norm_in_front() -> None:
    catalog = scan(tiny_vit())
    assert [s.name for s in catalog if BitAdaptFormer().slots(s)] == ["blocks.0.mlp", "blocks.1.mlp"]
    assert BitAdaptFormer().sizes(catalog["blocks.0.mlp"]) == (1, 2, 4, 8, 16)


def test_gains() -> None:
    ground = ground_of("vit", torch.float32)
    site = ground.catalog["blocks.0.mlp"]
    evidence = ground.about(site)
    spectrum = torch.linalg.svdvals(evidence["output"].signal.double()).square().cumsum(0)
    found = BitAdaptFormer(bits=2).gains(site, evidence, (1, 4))
    kept = kept_energy(2) ** 2 / 4
    assert found == pytest.approx((kept * float(spectrum[0]), kept * float(spectrum[3])))
    assert found > BitAdaptFormer(bits=1).gains(site, evidence, (1, 4))


def test_dropout_in_training_alone() -> None:
    site = ground_of("vit", torch.float32).catalog["blocks.0.mlp"]
    method = BitAdaptFormer(dropout=0.5)
    option = Option(
        site.name, "m", 8, method.cost(site, 8), 0.0, ground_of("vit", torch.float32).catalog.places(site, ("output",))
    )
    module = method.build(site, option, torch.nn.Linear(16, 16), torch.Generator().manual_seed(0))
    x = torch.randn(2, 5, 16)
    assert torch.equal(module.eval().branch(x), module.branch(x))
    assert not torch.equal(module.train().branch(x), module.branch(x))


@pytest.mark.parametrize(
    ("name", "value"), [("bits", 0), ("bits", True), ("scale", -1.0), ("scale", float("inf")), ("dropout", 1.0)]
)
def test_bad_settings(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"bit_adaptformer: {name}"):
        BitAdaptFormer(**{name: value})
