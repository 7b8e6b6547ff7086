from __future__ import annotations

from typing import Any

import torch

from autopeft.core.site import Catalog, Place, Site
from autopeft.models.scan import scan
from autopeft.scoring.gradient import Gradient
from autopeft.scoring.snip import SNIP
from autopeft.testing.tiny import tiny_vit
from autopeft.testing.toy_task import ToyTask


def test_hand_worked(line: Any) -> None:
    """Weights (2, -3) and a mean gradient of (1, 1): scores 2 and 3."""
    model, catalog, task = line
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0, -3.0]]))
    scores = SNIP(Gradient(batch_size=2, order="file")).score(model, catalog, task)
    found = scores.evidence["0"]["weight"]
    torch.testing.assert_close(found.score, torch.tensor([[2.0, 3.0]], dtype=torch.float64))
    torch.testing.assert_close(found.signal, torch.tensor([[2.0, 3.0]], dtype=torch.float64).sqrt())
    assert scores.totals == {Place("0", "weight"): 5.0}


def test_the_score_is_the_change_of_a_linear_loss(line: Any) -> None:
    """Under a loss that is linear in the weights, taking an entry away changes it by exactly `w g`."""
    model, catalog, task = line
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.7, -1.3]]))
    score = SNIP(Gradient(order="file")).score(model, catalog, task).evidence["0"]["weight"].score
    batch = next(iter(task.batches("inner")))
    before = task.loss(model, batch).item()
    for i in range(2):
        kept = model[0].weight.detach().clone()
        with torch.no_grad():
            model[0].weight[0, i] = 0
        change = abs(task.loss(model, batch).item() - before)
        with torch.no_grad():
            model[0].weight.copy_(kept)
        torch.testing.assert_close(score[0, i].item(), change)


def test_the_sign_is_the_gradient_s_and_outputs_are_left_out() -> None:
    model = tiny_vit()
    catalog = scan(model)
    scores, plain = SNIP().score(model, catalog, ToyTask()), Gradient().score(model, catalog, ToyTask())
    found, true = (s.evidence["blocks.0.mlp.fc1"]["weight"].signal for s in (scores, plain))
    assert torch.equal(found.sign(), true.sign())
    assert "blocks.0" not in scores.evidence


def test_a_dead_entry_scores_nothing(plain_task: type) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 1.0]]))
    task = plain_task(torch.ones(4, 2, dtype=torch.float64), torch.zeros(4), lambda out, y: out[:, 0])
    site = Site("0", "0", "linear", (1, 2), False, 0, "other", ("weight",))
    scores = SNIP().score(model, Catalog((site,), (), 2, 0, 1), task)
    assert scores.evidence["0"]["weight"].score.tolist() == [[0.0, 1.0]]
