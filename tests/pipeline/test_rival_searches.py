"""The parts of the contenders that search: gates, the model with every option in it, greedy buying."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.special import expit

from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget, Cost
from autopeft.core.menu import Option
from autopeft.core.site import Place
from autopeft.pipeline.rivals._gates import open_probabilities, sample
from autopeft.pipeline.rivals._supernet import greedy, pool, supernet
from autopeft.pipeline.rivals.prunepeft import PrunePEFT
from autopeft.pipeline.rivals.s3delta import S3Delta


def case(seed, n=9):
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.normal(size=n) * 3), torch.tensor(rng.integers(1, 50, n).astype(float))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.01, 0.3, 0.99])
def test_expected_cost_is_the_budget(seed, share):
    alpha, costs = case(seed)
    limit = share * float(costs.sum())
    p = open_probabilities(alpha, costs, limit, temperature=0.7)
    assert float((p * costs).sum()) == pytest.approx(limit, rel=1e-9)
    a, c = alpha.numpy(), costs.numpy()
    root = brentq(lambda b: (expit((a - b) / 0.7) * c).sum() - limit, -80, 80, xtol=1e-13)
    np.testing.assert_allclose(p.numpy(), expit((a - root) / 0.7), rtol=1e-9)


def test_everything_is_open_where_everything_fits():
    alpha, costs = case(0)
    assert torch.equal(open_probabilities(alpha, costs, float(costs.sum())), torch.ones(9, dtype=torch.float64))


def test_gradient_flows_through_the_shift():
    alpha, costs = case(1)
    weights = torch.linspace(-1, 1, 9, dtype=torch.float64)
    limit = 0.4 * float(costs.sum())
    alpha.requires_grad_(True)
    (gradient,) = torch.autograd.grad((open_probabilities(alpha, costs, limit) * weights).sum(), alpha)
    numeric = torch.zeros(9, dtype=torch.float64)
    for i in range(9):
        step = torch.zeros(9, dtype=torch.float64)
        step[i] = 1e-5
        with torch.no_grad():
            up, down = (open_probabilities(alpha + s, costs, limit) @ weights for s in (step, -step))
        numeric[i] = (up - down) / 2e-5
    torch.testing.assert_close(gradient, numeric, rtol=1e-6, atol=1e-8)
    # Raising all alphas alike changes nothing.
    assert float(gradient.sum()) == pytest.approx(0.0, abs=1e-10)


def test_draws_open_with_their_probability():
    p = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([sample(p, generator, 0.5) for _ in range(4000)])
    torch.testing.assert_close((draws > 0.5).double().mean(0), p, atol=0.025, rtol=0)
    assert ((draws > 0) & (draws < 1)).all()


def option(site, cost, method="m"):
    return Option(site, method, 1, Cost.plain(cost, cost), 0.0, (Place(site, "weight"),))


def test_greedy_buys_in_order_what_fits_and_no_place_twice():
    options = [option("a", 6), option("b", 5), option("c", 3), option("a", 1, "n")]
    plan = greedy(options, [0.9, 0.8, 0.7, 0.6], Budget(10), "test")
    assert isinstance(plan, Allocation)
    assert {(o.site, o.method) for o in plan} == {("a", "m"), ("c", "m")}


def logits(net, batch):
    with torch.no_grad():
        return net.inserted.model(batch[0])


def test_a_gate_alone_is_its_option_alone_and_none_is_the_plain_model(prepared, study):
    options = pool(prepared, study, smallest=True)
    assert len({o.method for o in options}) > 5
    batch = next(iter(prepared.task.batches("inner", 0)))
    with torch.no_grad():
        plain = prepared.model(batch[0])
    states, outputs = {}, {}
    picked = [i for i in range(len(options)) if i % 7 == 0]
    with supernet(prepared, study, options) as net:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for part in net.parts:
                for p in part.parameters():
                    p.add_(0.1 * torch.randn(p.shape, generator=generator))
        net.set_gates(torch.zeros(len(options)))
        torch.testing.assert_close(logits(net, batch), plain)
        for i in picked:
            gates = torch.zeros(len(options))
            gates[i] = 1.0
            net.set_gates(gates)
            outputs[i] = logits(net, batch)
            states[i] = {name: p.detach().clone() for name, p in net.parts[i].named_parameters()}
    for i in picked:
        plan = Allocation((options[i],), Budget(10**6))
        with study.backend.insert(
            prepared.model, prepared.catalog, plan, study.methods, seed=study.seed, head=prepared.head
        ) as inserted:
            (part,) = inserted.named_adapters().values()
            with torch.no_grad():
                for name, p in part.named_parameters():
                    p.copy_(states[i][name])
                torch.testing.assert_close(inserted.model(batch[0]), outputs[i], rtol=1e-4, atol=1e-5)
            assert not torch.allclose(outputs[i], plain)


def test_the_model_is_given_back_as_it_was(prepared, study):
    before = {name: t.clone() for name, t in prepared.model.state_dict().items()}
    state = torch.get_rng_state()
    with supernet(prepared, study, pool(prepared, study, smallest=False)) as net:
        net.set_gates(torch.ones(len(net.options)))
        net.step(next(net.epoch(0)), 1.0)
    after = prepared.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(torch.get_rng_state(), state)


def test_searches_count_every_pass(prepared, study):
    inner, outer = (prepared.task.sizes[split] for split in ("inner", "outer"))
    batches = -(-inner // 12)
    assert outer <= 12, "every look at the outer split is one whole batch of it"
    assert S3Delta(epochs=1).group(prepared, study).sample_epochs == inner + batches * outer
    quarters = 2  # two blocks
    assert PrunePEFT(rounds=1).group(prepared, study).sample_epochs == 2 * inner + 3 * quarters * outer


def test_a_search_is_not_repeated_in_its_run_folder(prepared, study, tmp_path, monkeypatch):
    inside = dataclasses.replace(prepared, folder=tmp_path / "scores")
    inside._scores = prepared.scores
    rival = PrunePEFT(rounds=1)
    first = rival.group(inside, study)
    with monkeypatch.context() as patch:
        patch.setattr(PrunePEFT, "_search", lambda *args: pytest.fail("searched again"))
        again = rival.group(inside, study)
    assert again.candidates[0].allocation == first.candidates[0].allocation
    assert again.sample_epochs == first.sample_epochs
    (tmp_path / "contenders" / "prunepeft" / "cost.json").write_text("{")
    assert rival.group(inside, study).sample_epochs == first.sample_epochs
