from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from autopeft.backends.native import Native
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import Method
from autopeft.core.menu import Option
from autopeft.errors import UsageError
from autopeft.methods._chosen import smallest_entries
from autopeft.methods.sara import SaRA
from autopeft.models.scan import scan
from autopeft.testing.method_laws import MethodLaws
from autopeft.testing.tiny import tiny_vit
from autopeft.testing.toy_task import ToyTask
from autopeft.training.checkpoint import Checkpoint
from autopeft.training.loop import fit
from autopeft.training.settings import LearningRates, TrainSettings


class TestWeights(MethodLaws):
    def make(self) -> Method:
        return SaRA()


class TestBiases(MethodLaws):
    def make(self) -> Method:
        return SaRA(slot="bias")


def _host(rows: list[list[float]]) -> nn.Linear:
    host = nn.Linear(len(rows[0]), len(rows))
    with torch.no_grad():
        host.weight.copy_(torch.tensor(rows))
    return host


# Which entries


def test_ties_are_broken_by_position() -> None:
    value = torch.tensor([[0.5, -0.1, 3.0], [0.1, 0.0, -0.1]])
    assert [smallest_entries(value, n).tolist() for n in (1, 2, 3, 4, 5, 6)] == [
        [4],
        [1, 4],
        [1, 3, 4],
        [1, 3, 4, 5],
        [0, 1, 3, 4, 5],
        [0, 1, 2, 3, 4, 5],
    ]


def test_selection_and_gains_equal_a_stable_sort(site_of, evidence_of) -> None:
    host = nn.Linear(9, 11)
    with torch.no_grad():
        host.weight.copy_(torch.randint(-5, 6, (11, 9)).float())
    site, signal = site_of(host), torch.randn(11, 9)
    known = evidence_of(site, {"weight": host.weight.detach()}, {"weight": signal})
    order = np.lexsort((np.arange(99), host.weight.detach().abs().flatten().numpy()))
    sizes = SaRA().sizes(site)
    assert sizes == (1, 2, 4, 8, 16, 32, 64, 99)
    for n, gain in zip(sizes, SaRA().gains(site, known, sizes), strict=True):
        assert SaRA().select(site, known, n).values.tolist() == sorted(order[:n].tolist())
        assert gain == pytest.approx(float(signal.flatten()[order[:n].copy()].square().sum()), rel=1e-5)


def test_only_values_are_stored(site_of, build) -> None:
    host = nn.Linear(40, 30)
    site = site_of(host)
    cost = SaRA().cost(site, 100)
    assert (cost.trainable, cost.stored, cost.bits, cost.entries, cost.tensors) == (100, 100, 3_200, 100, 1)
    adapter = build(SaRA(), site, host, 100)
    assert set(adapter.stored()) == {"values"}
    assert set(adapter.state_dict()) == {"values", "active"}
    with pytest.raises(UsageError, match=r"holds 100 values; the file has values \(99,\)"):
        adapter.load_stored({"values": torch.zeros(99)})


def test_all_entries_of_the_48_linears_of_a_vit_b16() -> None:
    with torch.device("meta"):
        catalog = scan(timm.create_model("vit_base_patch16_224", num_classes=10))
    sites = [site for site in catalog.candidates("whole") if site.kind == "linear"]
    assert sum(SaRA().cost(site, site.n_weight).trainable for site in sites) == 84_934_656


def test_a_plan_for_other_weights_is_refused(site_of, build) -> None:
    host = _host([[0.5, -0.1], [0.2, 0.0]])
    assert build(SaRA(), site_of(host), host, 2, [1, 3]).index.tolist() == [1, 3]
    with pytest.raises(UsageError, match="they are not those that the plan names"):
        build(SaRA(), site_of(host), host, 2, [0, 3])


# The switch


def test_hand_worked_switch(site_of, build) -> None:
    # The three smallest are 0.1, -0.2 and 0; the next magnitude, 0.5, is the threshold.
    host = _host([[0.5, -0.2, 2.0], [0.1, 0.0, -0.7]])
    adapter = build(SaRA(), site_of(host), host, 3)
    assert adapter.index.tolist() == [1, 3, 4]
    assert adapter.threshold.item() == 0.5
    with torch.no_grad():
        # To -0.6 (over it), to 0.3 (below), and to -0.5 (at it).
        adapter.values.copy_(torch.tensor([-0.4, 0.2, -0.5]))
    assert [adapter.advance(step, 9) for step in range(4)] == [False] * 4
    assert adapter.active.all()
    assert adapter.advance(4, 9)
    assert adapter.active.tolist() == [False, True, False]
    assert [adapter.advance(step, 9) for step in range(5, 9)] == [False] * 4
    torch.testing.assert_close(adapter.delta()["weight"], torch.tensor([[0.0, -0.4, 0.0], [0.2, -0.5, 0.0]]))
    x = torch.tensor([[1.0, 2.0, 3.0]])
    torch.testing.assert_close(adapter.branch(x), torch.tensor([[-0.8, -0.8]]))
    adapter.branch(x).sum().backward()
    assert adapter.values.grad.tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("switch", [0.0, 1.0])
def test_no_switch(site_of, build, switch: float) -> None:
    host = _host([[0.5, -0.2, 2.0], [0.1, 0.0, -0.7]])
    adapter = build(SaRA(switch=switch), site_of(host), host, 3)
    assert not any(adapter.advance(step, 9) for step in range(9))


def test_thresholds_among_equals(site_of, build) -> None:
    pruned = _host([[0.0, 0.0, 0.3], [0.0, 0.0, -0.7]])
    assert build(SaRA(), site_of(pruned), pruned, 2).threshold.item() == pytest.approx(0.3)
    assert build(SaRA(), site_of(pruned), pruned, 6).threshold.item() == float("inf")


@contextmanager
def _inserted(method: SaRA) -> Iterator[Any]:
    model = tiny_vit()
    catalog = scan(model)
    options = []
    for name in ("blocks.0.mlp.fc1", "blocks.1.attn.qkv"):
        site = catalog[name]
        places = tuple(sorted(catalog.places(site, method.slots(site))))
        options.append(Option(name, "sara", 200, method.cost(site, 200), 0.0, places))
    with Native().insert(model, catalog, Allocation(tuple(options), Budget(10**6)), {"sara": method}) as inserted:
        yield inserted


def _fit(inserted: Any, method: SaRA, **kw: Any) -> None:
    settings = TrainSettings(epochs=4, lr=LearningRates(entries=6e-4))
    fit(inserted, ToyTask(), settings, methods={"sara": method}, seed=1, device="cpu", watch=None, **kw)


def test_frozen_entries_stay_and_the_others_move(tmp_path: Path) -> None:
    at_switch: dict[str, Tensor] = {}
    with _inserted(SaRA()) as inserted:
        _fit(inserted, SaRA(), max_epochs=2, checkpoint=Checkpoint(tmp_path))
        at_switch = inserted.state()
    with _inserted(SaRA()) as inserted:
        _fit(inserted, SaRA(), checkpoint=Checkpoint(tmp_path))
        end = inserted.state()
        merged = inserted.merged_state()
        plain = inserted.model.get_submodule("blocks.0.mlp.fc1").weight
        changed = (merged["blocks.0.mlp.fc1.weight"] != plain).sum().item()
    for site in ("blocks.0.mlp.fc1", "blocks.1.attn.qkv"):
        active = end[f"buffer/{site}/sara/active"]
        before, after = at_switch[f"adapter/{site}/sara/values"], end[f"adapter/{site}/sara/values"]
        assert 10 < active.sum().item() < 190
        assert torch.equal(before[~active], after[~active])
        assert (before != after)[active].all()
    assert 190 <= changed <= 200


def test_stopped_around_the_switch_and_continued_equals_uninterrupted(tmp_path: Path) -> None:
    with _inserted(SaRA(switch=0.4)) as inserted:
        _fit(inserted, SaRA(switch=0.4))
        whole = inserted.state()
    for stop in (1, 2):
        for last in (stop, None):
            with _inserted(SaRA(switch=0.4)) as inserted:
                _fit(inserted, SaRA(switch=0.4), max_epochs=last, checkpoint=Checkpoint(tmp_path / str(stop)))
                state = inserted.state()
        assert all(torch.equal(whole[name], state[name]) for name in whole)


def test_the_optimizer_starts_afresh() -> None:
    method, ages = SaRA(), []
    with _inserted(method) as inserted, pytest.MonkeyPatch.context() as patch:
        mine = inserted.groups()["sara"][0]
        step = torch.optim.AdamW.step

        def spy(self: torch.optim.AdamW, *args: Any) -> Any:
            done = step(self, *args)
            ages.append(int(self.state[mine]["step"]))
            return done

        patch.setattr(torch.optim.AdamW, "step", spy)
        _fit(inserted, method)
    assert ages == [*range(1, 9), *range(1, 9)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"slot": "output"}, "slot must be one of weight, bias"), ({"switch": 1.5}, "switch must be a fraction")],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SaRA(**settings)
