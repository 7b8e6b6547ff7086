from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autopeft.backends._forward import HostForward
from autopeft.backends.native import Native
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.menu import Indices, Option
from autopeft.core.places import places_of
from autopeft.core.site import Place
from autopeft.errors import UsageError
from autopeft.methods import _sparse
from autopeft.methods._chosen import best_entries
from autopeft.methods.lora import LoRA
from autopeft.methods.sparse import Sparse
from autopeft.models.scan import scan
from autopeft.testing.memory import LiveBytes
from autopeft.testing.tiny import tiny_vit
from autopeft.testing.toy_task import ToyTask

ENTRIES = [0, 3, 7, 8, 13, 21, 22, 29]


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (2, 2, 3, 5)])
def test_linear_gradients_equal_the_gathered_dense_ones(site_of, build, monkeypatch, shape: tuple[int, ...]) -> None:
    """Oracle T11."""
    monkeypatch.setattr(_sparse, "_CHUNK", 16)
    host = nn.Linear(5, 6).double()
    adapter = build(Sparse(), site_of(host), host, len(ENTRIES), ENTRIES)
    nn.init.normal_(adapter.values)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    dense = adapter.delta()["weight"].detach().requires_grad_()
    y, oracle = adapter.branch(x), F.linear(x2, dense)
    torch.testing.assert_close(y, oracle)
    up = torch.randn_like(y)
    y.backward(up)
    oracle.backward(up)
    torch.testing.assert_close(adapter.values.grad, dense.grad.flatten()[ENTRIES])
    torch.testing.assert_close(x.grad, x2.grad)


@pytest.mark.parametrize(
    "conv",
    [
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "groups": 2, "dilation": 2, "padding": (2, 0)},
        {"kernel_size": 3, "padding": "same"},
    ],
)
def test_convolution_gradients(site_of, build, conv: dict) -> None:
    host = nn.Conv2d(4, 6, **conv).double()
    site = site_of(host)
    entries = [0, 2, 5, 9, site.n_weight - 1]
    adapter = build(Sparse(), site, host, 5, entries)
    nn.init.normal_(adapter.values)
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64, requires_grad=True)
    if adapter.form == "swap":
        assert conv.get("padding") == "same"
        merged = adapter.merge({"weight": host.weight, "bias": host.bias})["weight"]
        assert torch.nonzero((merged != host.weight).flatten()).flatten().tolist() == entries
        return
    dense = adapter.delta()["weight"].detach()
    torch.testing.assert_close(
        adapter.branch(x), F.conv2d(x, dense, None, host.stride, host.padding, host.dilation, host.groups)
    )

    def run(x: Tensor, values: Tensor) -> Tensor:
        return torch.func.functional_call(_Branch(adapter), {"adapter.values": values}, (x,))

    assert torch.autograd.gradcheck(run, (x, adapter.values))


class _Branch(nn.Module):
    def __init__(self, adapter: nn.Module) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter.branch(x)


def test_linear_gradcheck_first_and_second_order(site_of, build) -> None:
    host = nn.Linear(5, 6).double()
    adapter = build(Sparse(), site_of(host), host, len(ENTRIES), ENTRIES)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    values = torch.randn(len(ENTRIES), dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, values: Tensor) -> Tensor:
        return torch.func.functional_call(_Branch(adapter), {"adapter.values": values}, (x,))

    assert torch.autograd.gradcheck(run, (x, values))
    assert torch.autograd.gradgradcheck(run, (x, values))


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (2, 2, 3, 5)])
@pytest.mark.parametrize("compressed", [True, False])
def test_gradcheck_at_every_rank(site_of, build, monkeypatch, shape: tuple[int, ...], compressed: bool) -> None:
    """Oracle T11."""
    monkeypatch.setattr(_sparse, "_CSR_DENSITY", 1.0 if compressed else 0.0)
    if not compressed:
        monkeypatch.setattr(_sparse, "compressible", lambda x, values: False)
    host = nn.Linear(5, 6).double()
    adapter = build(Sparse(), site_of(host), host, len(ENTRIES), ENTRIES)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    values = torch.randn(len(ENTRIES), dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, values: Tensor) -> Tensor:
        return torch.func.functional_call(_Branch(adapter), {"adapter.values": values}, (x,))

    assert torch.autograd.gradcheck(run, (x, values))
    dense = torch.zeros(30, dtype=torch.float64).index_put((torch.tensor(ENTRIES),), values).view(6, 5)
    torch.testing.assert_close(run(x, values), F.linear(x, dense), rtol=1e-12, atol=1e-12)


def _gradients(adapter: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    adapter.values.grad = None
    adapter.branch(x).sin().sum().backward()
    return x.grad, adapter.values.grad


@pytest.mark.parametrize("way", ["sampled", "gathered", "convolution"])
def test_chunks_and_runs_change_nothing(site_of, build, monkeypatch, way: str) -> None:
    """One entry, a few, all of them at a time: within 1e-12; the same twice: to the bit."""
    monkeypatch.setattr(_sparse, "_CONV_DENSITY", 1.0)
    if way != "sampled":
        monkeypatch.setattr(_sparse, "compressible", lambda x, values: False)
    host = (nn.Conv2d(6, 8, 3, stride=2, padding=1) if way == "convolution" else nn.Linear(30, 40)).double()
    x = torch.randn(3, 6, 9, 8) if way == "convolution" else torch.randn(3, 7, 30)
    adapter = build(Sparse(), site_of(host), host, 32, list(range(5, 421, 13)))
    nn.init.normal_(adapter.values)
    found = {}
    for chunk in (1, 100, 1 << 20):
        monkeypatch.setattr(_sparse, "_CHUNK", chunk)
        found[chunk] = _gradients(adapter, x.double())
        for one, two in zip(found[chunk], _gradients(adapter, x.double()), strict=True):
            assert torch.equal(one, two)
    for chunk in (1, 100):
        for one, two in zip(found[chunk], found[1 << 20], strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "conv",
    [
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": (2, 3), "groups": 2, "dilation": (1, 2), "padding": (2, 0), "stride": (1, 2)},
        {"kernel_size": 2, "stride": 2},
    ],
)
def test_few_kernel_entries_are_gathered(site_of, build, monkeypatch, conv: dict) -> None:
    monkeypatch.setattr(_sparse, "_CONV_DENSITY", 1.0)
    monkeypatch.setattr(_sparse, "_CHUNK", 64)
    host = nn.Conv2d(4, 6, **conv).double()
    site = site_of(host)
    adapter = build(Sparse(), site, host, 5 if site.n_weight > 5 else 1, [0, 7, 11, 30, site.n_weight - 1])
    nn.init.normal_(adapter.values)
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, values: Tensor) -> Tensor:
        return torch.func.functional_call(_Branch(adapter), {"adapter.values": values}, (x,))

    assert torch.autograd.gradcheck(run, (x, adapter.values))
    assert torch.autograd.gradgradcheck(run, (x, adapter.values))


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t._nnz() if t.layout == torch.sparse_csr else t.numel())
        return out


@pytest.mark.parametrize("host", [nn.Linear(200, 300), nn.Conv2d(64, 96, 3, padding=1)])
def test_no_dense_gradient_of_a_weight(site_of, build, host: nn.Module) -> None:
    """The backward makes nothing of the weight's size, but for a convolution's transient kernel for its input."""
    site = site_of(host)
    adapter = build(Sparse(), site, host, 64, list(range(0, 64 * 700, 700)))
    x = torch.randn(2, 4, 200) if site.kind == "linear" else torch.randn(1, 64, 3, 3)
    y = adapter.branch(x)
    with _Largest() as seen:
        y.sum().backward()
    assert seen.numel < site.n_weight / 5


def test_unchosen_weights_stay_to_the_bit() -> None:
    """Oracle T12: with decay and momentum, under both optimisers, the merged weight differs at chosen entries alone."""
    model = tiny_vit()
    catalog = scan(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    method = Sparse()
    chosen: dict[str, Tensor] = {}
    options = []
    for site in catalog:
        if site.kind != "linear" or site.parent or not method.slots(site):
            continue
        chosen[f"{site.module}.weight"] = index = torch.randperm(site.n_weight)[:4].sort().values
        places = places_of(catalog, method, site)
        options.append(Option(site.name, "sparse", 4, method.cost(site, 4), 0.0, places, Indices(index.numpy())))
    assert len(options) > 3
    task = ToyTask()
    with Native().insert(model, catalog, Allocation(tuple(options), Budget(10**9)), {"sparse": method}) as inserted:
        for make in (
            functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
            functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
        ):
            adapters = [p for adapter in inserted.named_adapters().values() for p in adapter.parameters()]
            optimizer = make(adapters)
            for batch in task.batches("inner", seed=0):
                optimizer.zero_grad()
                task.loss(model, batch).backward()
                optimizer.step()
            sizes = [t.numel() for state in optimizer.state.values() for t in state.values() if t.ndim]
            assert sum(sizes) % (4 * len(options)) == 0
            assert max(sizes) == 4, "the state of an optimiser is of the chosen entries alone"
        merged = inserted.merged_state()
    for name, tensor in before.items():
        changed = torch.nonzero((merged[name] != tensor).flatten()).flatten()
        if name.startswith("head"):
            continue
        assert torch.equal(changed, chosen.get(name, changed[:0])), name


def test_nothing_below_the_first_adapter_is_differentiated() -> None:
    """No graph is built there: the input of the block that holds it requires no gradient, its output does."""
    model = tiny_vit()
    catalog = scan(model)
    site = next(s for s in catalog if s.module == "blocks.1.mlp.fc1")
    option = Option(
        site.name,
        "sparse",
        2,
        Sparse().cost(site, 2),
        0.0,
        (Place(site.name, "weight"),),
        Indices(np.array([1, 9])),
    )
    flags: dict[str, tuple[bool, bool]] = {}
    with Native().insert(model, catalog, Allocation((option,), Budget(10**9)), {"sparse": Sparse()}):
        for name, module in model.named_modules():
            module.register_forward_hook(
                lambda m, given, out, name=name: flags.update({name: (given[0].requires_grad, out.requires_grad)})
            )
        model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert flags["blocks.0"] == (False, False)
    assert flags["blocks.1"] == (False, True)
    assert flags["blocks.1.mlp.fc1"] == (False, True)


class _Products(TorchDispatchMode):
    """Counts the operations that read one of some weights."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self._known = {w.untyped_storage()._cdata for w in weights}
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default):
            given = (a for a in args if isinstance(a, Tensor))
            self.count += any(a.untyped_storage()._cdata in self._known for a in given)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("where", "products"), [("blocks.1.mlp.fc1", 0), ("blocks.0.attn.qkv", 3)])
def test_frozen_layers_below_skip_their_input_gradient(where: str, products: int) -> None:
    """Products of the backward with weights of the first block: none below an adapter in the second, and with one on
    its own qkv those of proj, fc1 and fc2."""
    model = tiny_vit()
    catalog = scan(model)
    site = next(s for s in catalog if s.module == where)
    places = places_of(catalog, Sparse(), site)
    option = Option(site.name, "sparse", 2, Sparse().cost(site, 2), 0.0, places, Indices(np.array([1, 9])))
    weights = [m.weight for n, m in model.named_modules() if n.startswith("blocks.0.") and isinstance(m, nn.Linear)]
    assert len(weights) == 4
    with Native().insert(model, catalog, Allocation((option,), Budget(10**9)), {"sparse": Sparse()}):
        y = model(torch.randn(2, 3, 8, 8)).sum()
        with _Products(weights) as seen:
            y.backward()
    assert seen.count == products


def _peak(make: Callable[[nn.Module], nn.Module | None]) -> int:
    """Most bytes alive in a step of one ViT-B block on two images, one kind of adapter on its four linear layers."""
    torch.manual_seed(0)
    block = Block(768, 12, qkv_bias=True, init_values=None).requires_grad_(False)
    for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
        adapter = make(layer)
        if adapter is not None:
            layer.adapter = adapter
            layer.forward = HostForward(layer, layer.forward, [adapter])
    # As inside of a model: something below is trained.
    x = torch.randn(2, 197, 768, requires_grad=True)
    with LiveBytes([*block.parameters(), *block.buffers(), x]) as bytes_:
        block(x).sum().backward()
    return bytes_.peak


def test_memory_of_a_step_is_at_most_that_of_lora(site_of, build) -> None:
    """Sparse entries at 0.1 % against LoRA of rank 8; the floor has no adapter at all."""

    def sparse(layer: nn.Module) -> nn.Module:
        site = site_of(layer)
        n = 1 << round(math.log2(0.001 * site.n_weight))
        entries = torch.randperm(site.n_weight)[:n].sort().values.tolist()
        return build(Sparse(), site, layer, n, entries)

    floor, entries, lora = (_peak(make) for make in (lambda _: None, sparse, lambda m: build(LoRA(), site_of(m), m, 8)))
    print(f"floor {floor / 2**20:.1f} MiB, sparse {entries / floor:.4f}, LoRA-8 {lora / floor:.4f}")
    assert floor < entries <= lora


def test_backward_makes_nothing_quadratic_in_the_entries(site_of, build, monkeypatch) -> None:
    """Oracle T12."""
    monkeypatch.setattr(_sparse, "_CHUNK", 1024)
    host = nn.Linear(48, 64)
    site, n = site_of(host), 3000
    adapter = build(Sparse(), site, host, n, list(range(n)))
    x = torch.randn(10, 48, requires_grad=True)
    with _Largest() as seen:
        adapter.branch(x).sum().backward()
    assert seen.numel <= site.n_weight < n * n


def test_forward_keeps_no_dense_copy(site_of, build) -> None:
    host = nn.Linear(48, 64)
    adapter = build(Sparse(), site_of(host), host, 2000, list(range(2000)))
    x = torch.randn(10, 48, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        adapter.branch(x)
    assert max(kept) <= 2000 < host.weight.numel()


@pytest.mark.parametrize("host", [nn.Linear(5, 6), nn.Conv2d(3, 6, 2), nn.LayerNorm(6), nn.BatchNorm2d(6)])
def test_bias_entries(site_of, build, host: nn.Module) -> None:
    """Oracle T11."""
    site = site_of(host)
    adapter = build(Sparse(slot="bias"), site, host, 2, [1, 4])
    with torch.no_grad():
        adapter.values.copy_(torch.tensor([2.0, 3.0]))
    assert adapter.delta()["bias"].tolist() == [0, 2, 0, 0, 3, 0]
    if adapter.form == "branch":
        x = torch.zeros(1, 5) if site.kind == "linear" else torch.zeros(1, 3, 4, 4)
        change = adapter.branch(x)
        assert (host(x) + change).shape == host(x).shape
        assert change.flatten().tolist() == [0, 2, 0, 0, 3, 0]


def test_ties_are_broken_by_position() -> None:
    score = torch.tensor([1.0, 5, 5, 2, 5, 0])
    assert [best_entries(score, n).tolist() for n in (1, 2, 3, 4, 5, 6)] == [
        [1],
        [1, 2],
        [1, 2, 4],
        [1, 2, 3, 4],
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4, 5],
    ]
    assert best_entries(torch.zeros(3, 4), 5).tolist() == [0, 1, 2, 3, 4]


def test_selection_equals_a_stable_sort(site_of, evidence_of) -> None:
    host = nn.Linear(9, 11)
    site = site_of(host)
    signal, score = torch.randn(11, 9), torch.randint(0, 6, (11, 9)).float()
    known = evidence_of(site, {"weight": host.weight.detach()}, {"weight": signal}, score)
    order = np.lexsort((np.arange(99), -score.flatten().numpy()))
    sizes = Sparse().sizes(site)
    assert sizes == (1, 2, 4, 8, 16, 32, 64, 99)
    gains = Sparse().gains(site, known, sizes)
    for n, gain in zip(sizes, gains, strict=True):
        assert Sparse().select(site, known, n).values.tolist() == sorted(order[:n].tolist())
        assert gain == pytest.approx(float(signal.flatten()[order[:n].copy()].square().sum()), rel=1e-5)


def test_entries_must_be_chosen(site_of, build) -> None:
    host = nn.Linear(5, 6)
    with pytest.raises(UsageError, match="which 2 entries"):
        build(Sparse(), site_of(host), host, 2)


def test_entries_of_another_tensor(site_of, build) -> None:
    host = nn.Linear(5, 6)
    with pytest.raises(UsageError, match=r"30 entries.*go up to 30"):
        build(Sparse(), site_of(host), host, 2, [3, 30])


def test_unknown_slot() -> None:
    with pytest.raises(UsageError, match="slot"):
        Sparse(slot="output")
