"""Carrying a training over to another plan: best approximations, unchanged functions, moments that follow."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autopeft.backends.native import Native
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.menu import Option
from autopeft.core.places import places_of
from autopeft.errors import UsageError
from autopeft.methods.bias import Bias
from autopeft.methods.core import Core
from autopeft.methods.lora import LoRA
from autopeft.models.scan import scan
from autopeft.testing.tiny import tiny_vit
from autopeft.testing.toy_task import ToyTask
from autopeft.training.handover import Begin, best_rank, hand_over, named_parameters, retained
from autopeft.training.loop import fit
from autopeft.training.settings import TrainSettings

METHODS = {"lora": LoRA(), "core": Core(), "bias": Bias(), "scaled": LoRA(alpha=4.0)}


@pytest.fixture(scope="module")
def model():
    return tiny_vit()


@pytest.fixture(scope="module")
def catalog(model):
    return scan(model)


def plan(catalog, *picks, limit=10**6):
    options = []
    for site, method, size in picks:
        cost = METHODS[method].cost(catalog[site], size)
        options.append(Option(site, method, size, cost, 0.0, places_of(catalog, METHODS[method], catalog[site])))
    return Allocation(tuple(options), Budget(limit))


def insert(model, catalog, allocation):
    return Native().insert(model, catalog, allocation, METHODS, seed=0)


def roughen(inserted, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in inserted.named_adapters().values():
            for p in adapter.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=generator))


def fake_moments(inserted, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: {
            "step": torch.tensor(7.0),
            "exp_avg": torch.randn(p.shape, generator=generator),
            "exp_avg_sq": torch.rand(p.shape, generator=generator),
        }
        for name, p in named_parameters(inserted).items()
    }


X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
FC, PROJ, QKV = "blocks.0.mlp.fc1", "blocks.1.attn.proj", "blocks.0.attn.qkv"


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 10**6))
def test_a_cut_is_the_best_approximation_of_its_rank(rank, extra, seed):
    generator = torch.Generator().manual_seed(seed)
    full = rank + extra
    up, down = torch.randn(13, full, generator=generator), torch.randn(full, 11, generator=generator)
    new_up, new_down, left, right = best_rank(up, down, rank)
    exact = up.double() @ down.double()
    u, s, vt = torch.linalg.svd(exact)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    torch.testing.assert_close(new_up @ new_down, best)
    # Eckart and Young: the error is what the other singular values hold.
    assert float((exact - new_up @ new_down).square().sum()) == pytest.approx(float(s[rank:].square().sum()), rel=1e-6)
    torch.testing.assert_close(new_up, up.double() @ right)
    torch.testing.assert_close(new_down, left @ down.double())


def test_a_change_of_zero_is_cut_without_nan():
    up, down = torch.zeros(4, 3), torch.randn(3, 5)
    assert all(torch.isfinite(t).all() for t in best_rank(up, down, 2))


def test_retained_shares_by_hand(model, catalog):
    with insert(model, catalog, plan(catalog, (FC, "lora", 2), (PROJ, "core", 2), (QKV, "bias", 1))) as inserted:
        found = inserted.named_adapters()
        lora, core, bias = found[f"{FC}/lora"], found[f"{PROJ}/core"], found[f"{QKV}/bias"]
        assert retained(core, 1) == 1.0
        with torch.no_grad():
            core.M.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
            lora.A.zero_()
            lora.B.zero_()
            lora.A[0, 0] = lora.A[1, 1] = 1.0
            lora.B[0, 0], lora.B[1, 1] = 2.0, 1.0
        assert retained(core, 1) == pytest.approx(0.9)
        assert retained(lora, 1) == pytest.approx(0.8)
        assert retained(lora, 2) == pytest.approx(1.0)
        with pytest.raises(UsageError, match="cannot be cut"):
            retained(bias, 1)


def carried(model, catalog, first, second, x=X):
    """Outputs before and after, and the beginning of the second plan."""
    with insert(model, catalog, first) as inserted:
        roughen(inserted)
        state, moments = inserted.state(), fake_moments(inserted)
        with torch.no_grad():
            before = inserted.model(x)
        scales = {k: a.scale for k, a in inserted.named_adapters().items() if hasattr(a, "scale")}
    with insert(model, catalog, second) as inserted:
        begin = hand_over(first, state, moments, inserted, 1, scales=scales)
        inserted.load_state(begin.state)
        with torch.no_grad():
            after = inserted.model(x)
    return before, after, state, moments, begin


@pytest.mark.parametrize("method", ["lora", "scaled", "core"])
def test_growing_changes_nothing_of_the_function(model, catalog, method):
    first = plan(catalog, (FC, method, 2), (QKV, "bias", 1))
    second = plan(catalog, (FC, method, 4), (QKV, "bias", 1), (PROJ, "lora", 1))
    before, after, *_ = carried(model, catalog, first, second)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_the_same_plan_is_carried_over_bit_for_bit(model, catalog):
    first = plan(catalog, (FC, "lora", 2), (PROJ, "core", 3), (QKV, "bias", 1))
    before, after, state, moments, begin = carried(model, catalog, first, first)
    assert torch.equal(before, after)
    assert all(torch.equal(begin.state[name], state[name]) for name in state)
    for name in moments:
        assert all(torch.equal(begin.moments[name][kind], moments[name][kind]) for kind in moments[name])


@pytest.mark.parametrize("method", ["lora", "scaled"])
def test_moments_follow_the_factors_as_gradients_do(model, catalog, method):
    """A gradient is linear in the change of W: the moved one is the gradient of the moved factors."""
    first, second = plan(catalog, (FC, method, 3)), plan(catalog, (FC, method, 1))
    out, inn = 64, 16
    g = torch.randn(out, inn, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def gradients(adapter):
        change = adapter.delta()["weight"].double()
        found = torch.autograd.grad((change * g).sum(), [adapter.A, adapter.B])
        return dict(zip("AB", found, strict=True))

    with insert(model, catalog, first) as inserted:
        roughen(inserted)
        (adapter,) = inserted.named_adapters().values()
        own = {n: {"step": torch.tensor(1.0), "exp_avg": t, "exp_avg_sq": t**2} for n, t in gradients(adapter).items()}
        moments = {f"adapter/{FC}/{method}/{n}": kept for n, kept in own.items()}
        state, scales = inserted.state(), {f"{FC}/{method}": adapter.scale}
    with insert(model, catalog, second) as inserted:
        begin = hand_over(first, state, moments, inserted, 1, scales=scales)
        inserted.load_state(begin.state)
        (adapter,) = inserted.named_adapters().values()
        for name, gradient in gradients(adapter).items():
            torch.testing.assert_close(
                begin.moments[f"adapter/{FC}/{method}/{name}"]["exp_avg"], gradient, rtol=1e-4, atol=1e-5
            )


def test_a_core_keeps_its_leading_block_with_its_moments(model, catalog):
    first, second = plan(catalog, (PROJ, "core", 4)), plan(catalog, (PROJ, "core", 2))
    _, _, state, moments, begin = carried(model, catalog, first, second)
    name = f"adapter/{PROJ}/core/M"
    assert torch.equal(begin.state[name], state[name][:2, :2])
    assert torch.equal(begin.moments[name]["exp_avg"], moments[name]["exp_avg"][:2, :2])
    assert torch.equal(begin.moments[name]["step"], moments[name]["step"])


def test_other_methods_cannot_change_their_size(model, catalog):
    first, second = plan(catalog, (QKV, "bias", 1)), plan(catalog, (QKV, "bias", 1))
    other = Allocation((dataclasses.replace(first.options[0], size=2),), Budget(10**6))
    with insert(model, catalog, second) as inserted, pytest.raises(UsageError, match="which only lora and core can"):
        hand_over(other, inserted.state(), {}, inserted, 1)


def test_going_on_with_the_same_plan_is_the_uninterrupted_training(model, catalog):
    task, first = ToyTask(), plan(catalog, (FC, "lora", 2), (PROJ, "core", 3), (QKV, "bias", 1))
    settings = TrainSettings(epochs=3, threads=1)

    def train(begin=None, **kwargs):
        with insert(model, catalog, first) as inserted:
            done = fit(
                inserted, task, settings, methods=METHODS, seed=0, device="cpu", watch=None, begin=begin, **kwargs
            )
            return done, inserted.state()

    whole, wanted = train()
    part, state = train(max_epochs=1)
    assert not whole.moments
    with insert(model, catalog, first) as inserted:
        begin = hand_over(first, state, part.moments, inserted, 1)
    rest, found = train(Begin(begin.epoch, begin.state, begin.moments, part.losses))
    assert rest.losses == whole.losses
    assert rest.epochs == whole.epochs
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
