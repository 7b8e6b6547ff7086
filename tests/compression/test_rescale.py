import pytest
import torch

from autopeft.compression.dare import drop_change
from autopeft.compression.darex import layer_q
from autopeft.compression.loader import patched
from autopeft.compression.rescale import choose_rescaling
from autopeft.compression.settings import CompressionSettings


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


PARTS = {"a.weight.delta": random(20, 30), "b.weight.delta": random(10, 20, seed=1), "b.bias.delta": random(10)}
SHAPES = {"a.weight": (20, 30), "b.weight": (10, 20), "b.bias": (10,)}
NAMES = ("a.weight", "b.weight")


def draws(drop, n):
    return [drop_change(PARTS, SHAPES, NAMES, drop, seed) for seed in range(n)]


def error(parts):
    """Squared distance to the whole change: smallest in expectation at q = 1, since E is sum d^2 (1 - 2k/q + k/q^2)."""
    base = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    whole, found = patched(base, PARTS), patched(base, parts)
    return float(sum(((whole[name] - found[name]) ** 2).sum() for name in SHAPES))


def test_dare_divides_by_the_kept_share_and_asks_nobody():
    def never(parts):
        raise AssertionError

    found = choose_rescaling(draws(0.9, 1), CompressionSettings(drop=0.9), never, {})
    assert found.q == pytest.approx({"a.weight": 0.1, "b.weight": 0.1})
    assert (found.trace, found.chosen, found.plain) == ((), None, None)


def test_one_q_for_all_is_the_best_that_was_tried():
    settings = CompressionSettings(drop=0.9, rescale="darex-q")
    found = choose_rescaling(draws(0.9, 2), settings, error, {})
    assert found.q == {"a.weight": 1.0, "b.weight": 1.0}
    assert found.chosen == min(value for _, value in found.trace) < found.plain
    assert found.plain == sum(error(d.resolved(dict.fromkeys(NAMES, 1 - d.drop))) for d in draws(0.9, 2)) / 2


def test_one_q_per_layer_follows_the_closed_form_and_the_best_eta():
    weighed = {"a.weight": random(20, 30).double() + 0.5}
    settings = CompressionSettings(drop=0.9, rescale="darex-q-layer")

    def objective(parts):
        return abs(float((PARTS["a.weight.delta"].flatten()[parts["a.weight.idx"]] / parts["a.weight.val"])[0]) - 0.4)

    found = choose_rescaling(draws(0.9, 1), settings, objective, weighed)
    assert found.q["a.weight"] == layer_q(weighed["a.weight"], 0.9, found.eta).q
    assert abs(found.q["a.weight"] - 0.4) == pytest.approx(found.chosen, abs=1e-6)
    assert found.q["b.weight"] == pytest.approx(0.1)
    assert found.unseen == ("b.weight",)
    assert len(found.trace) > 7
    fixed = choose_rescaling(
        draws(0.9, 1), CompressionSettings(drop=0.9, rescale="darex-q-layer", eta=0.2), objective, weighed
    )
    assert fixed.eta == 0.2
    assert fixed.q["a.weight"] == layer_q(weighed["a.weight"], 0.9, 0.2).q
