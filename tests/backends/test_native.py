from __future__ import annotations

import dataclasses

import pytest
import timm.layers
import torch
from torch import Tensor, nn
from torch.func import functional_call

from autopeft.backends.native import Native
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.site import Catalog, Site
from autopeft.errors import BudgetMismatch, ExportError, UsageError
from autopeft.models.scan import scan
from autopeft.testing.tiny import tiny_convnet, tiny_vit

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def vit() -> nn.Module:
    return tiny_vit()


@pytest.fixture
def convnet() -> nn.Module:
    return tiny_convnet()


def disturb(inserted, scale: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for adapter in inserted.named_adapters().values():
            for p in adapter.parameters():
                p.add_(scale * torch.randn(p.shape, generator=generator).to(p))


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max())


def test_many_options_on_one_host_compose_and_merge(vit, plan, methods) -> None:
    catalog = scan(vit)
    qkv = "blocks.0.attn.qkv"
    allocation = plan(
        catalog,
        (f"{qkv}[q]", "lora", 2),
        (f"{qkv}[k]", "sparse", 9),
        (f"{qkv}[v]", "core", 3),
        (f"{qkv}[q]", "sparse_bias", 4),
        (f"{qkv}[v]", "bias", 1),
        (f"{qkv}[v]", "ssf", 1),
        (f"{qkv}[k]", "ssf", 1),
        ("blocks.0.norm1", "norm", 1),
        ("blocks.0.norm1", "ssf", 1),
        ("blocks.1.norm2", "vector", 1),
        ("blocks.1.norm2", "sparse_bias", 3),
        ("blocks.1.mlp.fc2", "sparse", 700),
        ("patch_embed.proj", "lora", 1),
        ("cls_token", "tokens", 1),
        ("pos_embed", "tokens", 1),
    )
    base = vit(X)
    with Native().insert(vit, catalog, allocation, methods) as inserted:
        assert torch.equal(inserted.model(X), base)
        disturb(inserted)
        adapted = inserted.model(X)
        merged = inserted.merged_state()
    assert gap(adapted, base) > 0.05
    assert gap(functional_call(vit, merged, (X,)), adapted) < 1e-5


def test_layers_below_the_first_adapter_keep_no_graph(vit, plan, methods) -> None:
    catalog = scan(vit)
    seen: dict[str, bool] = {}
    saved: list[str] = []
    where = ["start"]

    def hook(name: str):
        def keep(module: nn.Module, args: object, output: Tensor) -> None:
            seen[name] = output.requires_grad
            where[0] = name

        return keep

    with Native().insert(vit, catalog, plan(catalog, ("blocks.1.mlp.fc2", "lora", 2)), methods) as inserted:
        inserted.train_mode()
        handles = [
            vit.get_submodule(name).register_forward_hook(hook(name))
            for name in ("patch_embed", "blocks.0", "blocks.1.attn", "blocks.1.mlp.act", "blocks.1.mlp.fc2")
        ]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(where[0]) or t, lambda t: t):
            inserted.model(X).sum().backward()
        for handle in handles:
            handle.remove()
    below = ("patch_embed", "blocks.0", "blocks.1.attn", "blocks.1.mlp.act")
    assert seen == {**dict.fromkeys(below, False), "blocks.1.mlp.fc2": True}
    assert saved
    assert set(saved) <= {"blocks.1.mlp.act", "blocks.1.mlp.fc2"}


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_base_dtype_and_float32_gradients(vit, plan, methods, low: torch.dtype) -> None:
    catalog = scan(vit)
    choices = [
        ("blocks.0.attn.qkv", "lora", 2),
        ("blocks.0.mlp.fc1", "sparse", 5),
        ("blocks.0.mlp.fc2", "core", 3),
        ("blocks.0.norm1", "norm", 1),
        ("blocks.1.attn.proj", "adapter", 2),
        ("blocks.1.mlp.fc1", "ssf", 1),
        ("blocks.1.mlp.fc2", "bias", 1),
        ("blocks.1", "block_adapter", 2),
        ("cls_token", "tokens", 1),
    ]
    dtypes: dict[str, torch.dtype] = {}
    with torch.autocast("cpu", low):
        before = vit(X)
        handles = [
            m.register_forward_hook(lambda _, __, y, n=n: dtypes.__setitem__(n, y.dtype))
            for n, m in vit.named_modules()
            if isinstance(m, nn.Linear)
        ]
        vit(X)
        plain = dict(dtypes)
        with Native().insert(vit, catalog, plan(catalog, *choices), methods) as inserted:
            y = inserted.model(X)
            assert y.dtype == before.dtype == low
            assert gap(y.float(), before.float()) < 0.02
            disturb(inserted)
            loss = inserted.model(X).float().square().mean()
        for handle in handles:
            handle.remove()
    assert all(dtypes[n] == dtype for n, dtype in plain.items())
    loss.backward()
    for key, adapter in inserted.named_adapters().items():
        for name, p in adapter.named_parameters():
            assert p.dtype == torch.float32
            assert p.grad is not None, f"{key} {name}"
            assert torch.isfinite(p.grad).all()
            assert p.grad.any(), f"{key} {name}"


def test_half_precision_base(vit, plan, methods) -> None:
    catalog = scan(vit)
    vit.bfloat16()
    allocation = plan(
        catalog,
        ("blocks.0.attn.qkv", "lora", 2),
        ("blocks.0.mlp.fc1", "sparse", 5),
        ("blocks.0.norm1", "norm", 1),
        ("blocks.1", "block_adapter", 2),
    )
    with Native().insert(vit, catalog, allocation, methods) as inserted:
        y = inserted.model(X.bfloat16())
        assert y.dtype == torch.bfloat16
        y.float().square().mean().backward()
        for adapter in inserted.named_adapters().values():
            assert all(p.dtype == torch.float32 and p.grad is not None for p in adapter.parameters())
        state = inserted.state()
    assert all(t.dtype == torch.bfloat16 for n, t in state.items() if n.startswith("head/"))


@pytest.mark.parametrize("cls", [timm.layers.StdConv2d, timm.layers.Conv2dSame])
@pytest.mark.parametrize(("method", "size"), [("lora", 2), ("core", 3), ("sparse", 11), ("bias", 1)])
def test_convolutions_with_a_forward_of_their_own(convnet, plan, methods, cls, method: str, size: int) -> None:
    convnet.blocks[0].conv2 = cls(16, 16, 3, padding=1 if cls is timm.layers.StdConv2d else "", bias=True)
    catalog = scan(convnet)
    allocation = plan(catalog, ("blocks.0.conv2", method, size))
    base = convnet(X)
    with Native().insert(convnet, catalog, allocation, methods) as inserted:
        assert gap(inserted.model(X), base) < 1e-6
        disturb(inserted, 0.5)
        adapted = inserted.model(X)
        merged = inserted.merged_state()
    assert gap(adapted, base) > 1e-3
    assert gap(functional_call(convnet, merged, (X,)), adapted) < 1e-5


def test_batch_norm_follows_the_data_only_when_asked(convnet, plan, methods) -> None:
    catalog = scan(convnet)
    before = convnet.norm.running_mean.clone()
    allocation = plan(catalog, ("norm", "norm", 1))
    with Native(train_batch_norm=True).insert(convnet, catalog, allocation, methods) as inserted:
        inserted.train_mode()
        assert convnet.norm.training
        assert not convnet.blocks[0].training
        inserted.model(X + 1)
        inserted.train_mode(False)
        assert not convnet.norm.training
        moved = convnet.norm.running_mean.clone()
        assert not torch.equal(moved, before)
        state, y = inserted.state(), inserted.model(X)
        assert torch.equal(inserted.merged_state()["norm.running_mean"], moved)
    assert torch.equal(convnet.norm.running_mean, before)
    assert torch.equal(state["buffer/norm/batch_norm/running_mean"], moved)
    with Native(train_batch_norm=True).insert(convnet, catalog, allocation, methods) as inserted:
        inserted.load_state(state)
        assert gap(inserted.model(X), y) < 1e-6


def test_base_dropout_only_when_asked(vit, plan, methods) -> None:
    catalog = scan(vit)
    for asked in (False, True):
        backend = Native(base_dropout=asked)
        with backend.insert(vit, catalog, plan(catalog, ("blocks.0.attn.qkv", "lora", 1)), methods) as inserted:
            inserted.train_mode()
            assert vit.blocks[0].mlp.drop1.training == asked
            assert all(a.training for a in inserted.named_adapters().values())
            assert vit.head.training
            inserted.train_mode(False)
            assert not any(m.training for m in vit.modules())


def test_block_that_is_a_sequential(plan, methods) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
            self.fc = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.block(x))

    site = Site("block", "block", "block", (6,), False, 0, "block", ("output",))
    catalog = Catalog((site,), ("fc",), 84, 14, 1)
    model, x = Net(), torch.randn(2, 6)
    base = model(x)
    with Native().insert(model, catalog, plan(catalog, ("block", "block_adapter", 2)), methods) as inserted:
        assert len(model.block) == 3
        assert torch.equal(inserted.model(x), base)
        disturb(inserted)
        assert gap(inserted.model(x), base) > 1e-4
        assert inserted.trainable_count() == 2 * 6 * 2 + 2 + 6
    assert torch.equal(model(x), base)
    lone = nn.Sequential(nn.Sequential(nn.Linear(6, 6)), nn.Linear(6, 2))
    catalog = Catalog((dataclasses.replace(site, module="0", name="0"),), ("1",), 42, 14, 1)
    with (
        pytest.raises(UsageError, match="plain container"),
        Native().insert(lone, catalog, plan(catalog, ("0", "block_adapter", 2)), methods),
    ):
        pass
    assert "forward" not in vars(lone[0])


def test_block_that_returns_a_tuple(plan, methods) -> None:
    class Block(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return x, None

    model = nn.Module()
    model.block, model.fc = Block(), nn.Linear(6, 2)
    site = Site("block", "block", "block", (6,), False, 0, "block", ("output",))
    catalog = Catalog((site,), ("fc",), 0, 14, 1)
    with (
        Native().insert(model, catalog, plan(catalog, ("block", "block_adapter", 2)), methods),
        pytest.raises(UsageError, match=r"Block returns a tuple.*block"),
    ):
        model.block(torch.randn(2, 6))


def test_a_forward_that_was_overridden_before(vit, plan, methods) -> None:
    catalog = scan(vit)
    host = vit.blocks[0].mlp.fc1
    own = host.forward
    calls = []
    host.forward = lambda x: calls.append(1) or own(x)
    host.later = "attribute"
    before = list(vars(host).items())
    base = vit(X)
    with Native().insert(vit, catalog, plan(catalog, ("blocks.0.mlp.fc1", "lora", 2)), methods) as inserted:
        assert inserted.named_adapters()["blocks.0.mlp.fc1/lora"].form == "swap"
        assert torch.equal(inserted.model(X), base)
        disturb(inserted)
        assert gap(inserted.model(X), base) > 1e-4
    assert len(calls) == 3
    assert list(vars(host).items()) == before


def test_host_called_by_keyword(vit, plan, methods) -> None:
    catalog = scan(vit)
    with Native().insert(vit, catalog, plan(catalog, ("blocks.0.mlp.fc1", "lora", 2)), methods) as inserted:
        disturb(inserted)
        x = torch.randn(2, 16)
        host = vit.blocks[0].mlp.fc1
        assert torch.equal(host(input=x), host(x))


def test_error_inside_of_a_forward_gives_the_tensors_back(vit, plan, methods) -> None:
    catalog = scan(vit)
    norm = vit.blocks[0].norm1
    weight = norm.weight
    with Native().insert(vit, catalog, plan(catalog, ("blocks.0.norm1", "norm", 1)), methods):
        with pytest.raises(RuntimeError):
            norm(torch.randn(2, 5))
        assert norm._parameters["weight"] is weight


def test_tied_weight_cannot_be_merged(plan, methods) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.b(self.a(x).relu()))

    model = Tied()
    site = Site("a", "a", "linear", (6, 6), True, 0, "other", ("weight", "bias", "output"))
    catalog = Catalog((site,), ("fc",), 48, 14, 1)
    with (
        Native().insert(model, catalog, plan(catalog, ("a", "lora", 1)), methods) as inserted,
        pytest.raises(ExportError, match=r"a/lora: a\.weight is tied to b\.weight"),
    ):
        inserted.merged_state()
    with Native().insert(model, catalog, plan(catalog, ("a", "bias", 1)), methods) as inserted:
        assert "a.bias" in inserted.merged_state()


def test_merging_names_every_obstacle(convnet, plan, methods) -> None:
    catalog = scan(convnet)
    allocation = plan(catalog, ("blocks.0.conv1", "ssf", 1), ("blocks.1", "block_adapter", 1), ("norm", "norm", 1))
    with (
        Native().insert(convnet, catalog, allocation, methods) as inserted,
        pytest.raises(ExportError, match=r"2 of the plan's.*conv1/ssf: the host has no bias.*blocks\.1/block"),
    ):
        inserted.merged_state()


def test_other_entries_are_not_loaded(vit, plan, methods) -> None:
    catalog = scan(vit)
    allocation = plan(catalog, ("blocks.0.mlp.fc1", "sparse", 5))
    with Native().insert(vit, catalog, allocation, methods) as inserted:
        state = inserted.state()
        key = "buffer/blocks.0.mlp.fc1/sparse/index"
        assert state[key].dtype == torch.int32
        with pytest.raises(UsageError, match=f"{key} of the saved state differs"):
            inserted.load_state({**state, key: state[key] + 1})


def test_after_the_model_was_given_back(vit, plan, methods) -> None:
    catalog = scan(vit)
    with Native().insert(vit, catalog, plan(catalog, ("blocks.0.mlp.fc1", "lora", 2)), methods) as inserted:
        count = inserted.trainable_count()
        disturb(inserted)
        inside = inserted.state()
    assert inserted.trainable_count() == count
    assert all(torch.equal(t, inside[n]) for n, t in inserted.state().items())
    with pytest.raises(UsageError, match="given back"):
        inserted.merged_state()
    with pytest.raises(UsageError, match="given back"):
        inserted.train_mode()


def test_state_names(vit, plan, methods) -> None:
    catalog = scan(vit)
    allocation = plan(catalog, ("blocks.0.attn.qkv[q]", "lora", 1), ("blocks.0.norm1", "norm", 1))
    with Native().insert(vit, catalog, allocation, methods) as inserted:
        assert sorted(inserted.state()) == [
            "adapter/blocks.0.attn.qkv[q]/lora/A",
            "adapter/blocks.0.attn.qkv[q]/lora/B",
            "adapter/blocks.0.norm1/norm/bias",
            "adapter/blocks.0.norm1/norm/weight",
            "head/head.bias",
            "head/head.weight",
        ]
        assert {key: len(group) for key, group in inserted.groups().items()} == {"lora": 2, "norm": 2, "head": 2}


def test_adapters_are_seen_by_the_model(vit, plan, methods) -> None:
    catalog = scan(vit)
    with Native().insert(vit, catalog, plan(catalog, ("blocks.0.attn.qkv", "core", 2)), methods) as inserted:
        names = [name for name, p in vit.named_parameters() if p.requires_grad]
        assert names == ["blocks.0.attn.qkv.autopeft_adapters.blocks:0:attn:qkv/core.M", "head.weight", "head.bias"]
        vit.double()
        assert inserted.model(X.double()).dtype == torch.float64
        vit.float()


def test_wrong_plans(vit, plan, methods) -> None:
    catalog = scan(vit)
    good = plan(catalog, ("blocks.0.attn.qkv", "lora", 2))

    def refused(error: type[Exception], match: str, allocation: Allocation = good, **others) -> None:
        arguments = {"catalog": catalog, "methods": methods, "head": None, **others}
        with (
            pytest.raises(error, match=match),
            Native().insert(vit, arguments["catalog"], allocation, arguments["methods"], head=arguments["head"]),
        ):
            pass
        assert not any("autopeft" in name for name, _ in vit.named_modules())
        assert all(p.requires_grad for p in vit.parameters())

    def changed(**changes) -> Allocation:
        return Allocation((dataclasses.replace(good.options[0], **changes),), Budget(10**9))

    cheap = dataclasses.replace(good.options[0].cost, trainable=7)
    refused(UsageError, "needs method 'lora', which was not given", methods={})
    refused(UsageError, "no site called 'nowhere'", changed(site="nowhere"))
    refused(UsageError, "lora cannot be used on blocks.0.norm1", changed(site="blocks.0.norm1"))
    refused(
        UsageError,
        r"claims blocks\.0\.norm1:bias, but lora occupies",
        changed(places=catalog.places(catalog["blocks.0.norm1"], ["bias"])),
    )
    refused(
        BudgetMismatch, r"blocks\.0\.attn\.qkv/lora of size 2 has 128 parameters, its cost says 7", changed(cost=cheap)
    )
    refused(UsageError, "lies in the head", catalog=dataclasses.replace(catalog, head=("blocks.0",)))
    dead = tuple(dataclasses.replace(s, slots=()) if s.name == "blocks.0.attn.qkv" else s for s in catalog)
    refused(UsageError, "its forward is never called", catalog=dataclasses.replace(catalog, sites=dead))
    refused(UsageError, "the given head does not fit 'head'", head={"head.weight": torch.zeros(4, 16)})
    gone = tuple(dataclasses.replace(s, module="x.y") if s.name == "blocks.0.attn.qkv" else s for s in catalog)
    refused(UsageError, "does not have", catalog=dataclasses.replace(catalog, sites=gone))
    head = dict(methods, head=methods["lora"])
    refused(UsageError, "cannot be called 'head'", changed(method="head"), methods=head)


def test_a_part_of_a_borrowed_model_stays_borrowed(vit, plan, methods) -> None:
    wrapper = nn.Module()
    wrapper.inner, wrapper.fc = vit, nn.Linear(4, 2)
    catalog = scan(vit)
    outer = Catalog((Site("fc", "fc", "linear", (2, 4), True, 0, "other", ("weight",)),), (), 10, 0, 1)
    with (
        Native().insert(vit, catalog, plan(catalog, ("blocks.0.attn.qkv", "lora", 2)), methods),
        pytest.raises(UsageError, match=r"\(inner\) has adapters in it already"),
        Native().insert(wrapper, outer, Allocation((), Budget(1)), methods),
    ):
        pass


@pytest.mark.gpu
def test_on_cuda(vit, plan, methods) -> None:
    catalog = scan(vit)
    vit.cuda()
    allocation = plan(
        catalog,
        ("blocks.0.attn.qkv", "lora", 2),
        ("blocks.0.mlp.fc1", "sparse", 50),
        ("blocks.0.mlp.fc2", "core", 3),
        ("blocks.1", "block_adapter", 2),
        ("cls_token", "tokens", 1),
    )
    with Native().insert(vit, catalog, allocation, methods) as inserted:
        assert all(p.is_cuda for p in vit.parameters())
        disturb(inserted)
        with torch.autocast("cuda", torch.bfloat16):
            inserted.model(X.cuda()).float().square().mean().backward()
        assert all(p.grad is not None for a in inserted.named_adapters().values() for p in a.parameters())
        assert all(t.device.type == "cpu" for t in inserted.state().values())
