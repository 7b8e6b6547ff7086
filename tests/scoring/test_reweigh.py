from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from autopeft.errors import UsageError
from autopeft.models.scan import scan
from autopeft.scoring.fisher import Fisher
from autopeft.scoring.gradient import Gradient
from autopeft.scoring.reweigh import reweighed
from autopeft.testing.tiny import tiny_vit


@pytest.mark.parametrize("mode", ["per_batch", "per_sample"])
@pytest.mark.parametrize("power", [0.0, 0.25, 1.0])
def test_it_is_what_another_pass_would_have_measured(noise_task: Callable[..., Any], mode: Any, power: float) -> None:
    """Entry by entry, up to one factor for the whole model, which is 1 where samples are taken one by one."""
    model, task = tiny_vit().double(), noise_task(8)
    catalog = scan(model)
    gradient = Gradient(mode=mode, batch_size=2, order="file", halves=True)
    before, after = Fisher(gradient, 0.5, 0.01), Fisher(gradient, power, 0.01)
    measured = after.score(model, catalog, task)
    found = reweighed(before.score(model, catalog, task), catalog, before, after)
    factor = 1.0 if mode == "per_sample" else 2.0 ** ((power - 0.5) / 2)
    assert found.origin.scorer == repr(after)
    assert set(found.evidence) == set(measured.evidence)
    for name, evidence in measured.evidence.items():
        for slot, tensors in evidence.slots.items():
            mine = found.evidence[name][slot]
            torch.testing.assert_close(mine.signal, tensors.signal * factor, rtol=1e-6, atol=1e-12)
            torch.testing.assert_close(mine.score, tensors.score * factor**2, rtol=1e-6, atol=1e-12)
            assert mine.half_a is not None
            assert tensors.half_a is not None
            torch.testing.assert_close(mine.half_a, tensors.half_a * factor, rtol=1e-6, atol=1e-12)
    for place, total in measured.totals.items():
        assert found.totals[place] == pytest.approx(total * factor**2, rel=1e-5, abs=1e-12)


def test_only_the_power_may_differ(noise_task: Callable[..., Any]) -> None:
    model, task = tiny_vit().double(), noise_task(4)
    catalog = scan(model)
    scores = Fisher().score(model, catalog, task)
    with pytest.raises(UsageError, match="only the power may differ"):
        reweighed(scores, catalog, Fisher(), Fisher(damping=0.5))
    plain = Gradient().score(model, catalog, task)
    with pytest.raises(UsageError, match="keep no second moment"):
        reweighed(plain, catalog, Fisher(), Fisher(power=0.25))
