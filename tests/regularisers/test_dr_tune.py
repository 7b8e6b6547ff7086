from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopeft.errors import UsageError
from autopeft.methods.lora import LoRA
from autopeft.regularisers._calibration import calibrated, rotation
from autopeft.regularisers.dr_tune import DRTune
from autopeft.testing.tiny import tiny_convnet, tiny_vit
from autopeft.testing.toy_task import ToyTask
from autopeft.training._terms import Terms

FC1 = "blocks.0.mlp.fc1"


def _turn(degrees: float) -> Tensor:
    angle = math.radians(degrees)
    return torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)


# Rotation


def test_a_rotation_is_found_again() -> None:
    torch.manual_seed(0)
    source = torch.randn(20, 5, dtype=torch.float64)
    true = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    true[:, 0] *= torch.linalg.det(true).sign()
    found = rotation(source, source @ true.T + torch.randn(5, dtype=torch.float64))
    torch.testing.assert_close(found, true)


def test_no_angle_is_better_and_reflections_are_not_taken() -> None:
    torch.manual_seed(1)
    source = torch.randn(9, 2, dtype=torch.float64)
    for target in (torch.randn(9, 2, dtype=torch.float64), source * torch.tensor([1.0, -1.0])):
        found = rotation(source, target)
        assert torch.linalg.det(found).item() == pytest.approx(1)

        def misfit(turn: Tensor, target: Tensor = target) -> float:
            moved = (source - source.mean(0)) @ turn.T + target.mean(0)
            return (moved - target).square().sum().item()

        assert misfit(found) <= min(misfit(_turn(degrees)) for degrees in range(360)) + 1e-9


# Calibration


def test_hand_worked_shift() -> None:
    # Class 0: frozen (1, 0), trained (0, 1): it moves there. Class 1: two samples, seen with cosines 1 and 0.
    trained = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    frozen = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    prototypes = torch.tensor([[5.0, 5.0], [3.0, 0.0]], dtype=torch.float64)
    sure = math.e / (math.e + 1)
    place = torch.tensor([sure, 1 - sure], dtype=torch.float64)
    found = calibrated(trained, frozen, torch.tensor([0, 1, 1]), prototypes)
    torch.testing.assert_close(found[0], torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(found[1:], (place / place.norm()).expand(2, 2))


def _written_out(trained: Tensor, frozen: Tensor, labels: Tensor, head: Tensor, turned: bool) -> Tensor:
    """Calibration class by class, as the paper's figure says it."""
    moved = frozen.clone()
    if turned:
        moved = (frozen - frozen.mean(0)) @ rotation(frozen, trained).T + trained.mean(0)
    for c in labels.unique().tolist():
        mine = labels == c
        cosine = torch.stack([torch.dot(row, head[c]) / head[c].norm() for row in trained[mine]])
        centre = (torch.softmax(cosine, 0)[:, None] * trained[mine]).sum(0)
        moved[mine] = moved[mine] - moved[mine].mean(0) + centre
    return moved / moved.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("turned", [False, True])
def test_against_the_algorithm_written_out(turned: bool) -> None:
    torch.manual_seed(2)
    trained, frozen = (F.normalize(torch.randn(30, 6, dtype=torch.float64)) for _ in range(2))
    labels, head = torch.randint(0, 4, (30,)), torch.randn(6, 6, dtype=torch.float64)
    turn = rotation(frozen, trained) if turned else None
    torch.testing.assert_close(
        calibrated(trained, frozen, labels, head, turn), _written_out(trained, frozen, labels, head, turned)
    )


# The bank


def _features(inserted, images: Tensor) -> Tensor:
    return inserted.model.forward_head(inserted.model.forward_features(images), pre_logits=True)


@pytest.fixture
def inserted(insert):
    return insert(tiny_vit(), (FC1, "lora", LoRA(), 2))


def test_first_step_with_frozen_features_everywhere(inserted, step_of) -> None:
    task = ToyTask(n_inner=32)
    term = DRTune(0.5, bank=2048).begin(inserted, task, 0)
    state = step_of(inserted, task=task)
    with torch.no_grad():
        everything = {
            tuple(label.tolist()): label
            for batch in task.batches("inner", None)
            for label in _features(inserted, batch[0])
        }
    found = term.add(state)
    bank = term.state()
    assert bank["trained"].shape == (32, 16)
    # Full of training samples: each is there, and the batch of the step once more in the place of the oldest.
    known = torch.stack(list(everything.values()))
    nearest = torch.cdist(bank["frozen"], known, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    assert nearest.values.max().item() < 1e-4
    assert len(nearest.indices.unique()) > 20
    assert torch.equal(bank["next"], torch.tensor(8))
    torch.testing.assert_close(bank["trained"], bank["frozen"])
    assert torch.isfinite(found)


def test_the_term_is_the_heads_loss_on_the_calibrated_bank(inserted, step_of) -> None:
    torch.manual_seed(3)
    task = ToyTask()
    (adapter,) = inserted.named_adapters().values()
    term = DRTune(0.5, bank=12, rotate_every=2, between="none").begin(inserted, task, 0)
    term.add(step_of(inserted, 0, task))
    nn.init.normal_(adapter.B)
    nn.init.normal_(inserted.model.head.weight)
    term.add(step_of(inserted, 1, task))  # now trained and frozen features differ
    for step in (2, 3):
        bank = {name: tensor.clone() for name, tensor in term.state().items()}
        state = step_of(inserted, step, task)
        head = inserted.model.head
        rows = _written_out(
            F.normalize(bank["trained"]), F.normalize(bank["frozen"]), bank["labels"], head.weight.detach(), step == 2
        )
        rows = rows * state.features.detach().norm(dim=1).mean()
        found = term.add(state)
        torch.testing.assert_close(found, 0.5 * F.cross_entropy(head(rows), bank["labels"]), rtol=1e-3, atol=1e-4)
    gradients = torch.autograd.grad(found, [head.weight, adapter.B], allow_unused=True)
    assert gradients[0].abs().max().item() > 0
    assert gradients[1] is None


def test_the_last_rotation_is_kept_in_between(inserted, step_of) -> None:
    task = ToyTask()
    (adapter,) = inserted.named_adapters().values()
    values = {}
    for between in ("keep", "none"):
        term = DRTune(1.0, bank=12, rotate_every=3, between=between).begin(inserted, task, 0)
        nn.init.zeros_(adapter.B)
        term.add(step_of(inserted, 1, task))
        assert term.state()["turn"].numel() == 0  # there is none before the first
        nn.init.constant_(adapter.B, 0.5)
        for step in (2, 3, 4):
            values[between, step] = term.add(step_of(inserted, step, task)).item()
        assert term.state()["turn"].shape == (16, 16)
    assert values["keep", 3] == values["none", 3]
    assert values["keep", 4] != values["none", 4]


def test_pooled_it_is_one_mean_over_batch_and_bank(inserted, step_of) -> None:
    task = ToyTask()
    state = step_of(inserted, 0, task)
    alone = DRTune(1.0, bank=12).begin(inserted, task, 0).add(state)
    pooled = DRTune(1.0, bank=12, combine="pool").begin(inserted, task, 0).add(state)
    torch.testing.assert_close(state.loss + pooled, (8 * state.loss + 12 * alone) / 20)


def test_the_oldest_samples_go_first(inserted, step_of) -> None:
    task = ToyTask()
    term = DRTune(bank=12).begin(inserted, task, 0)
    state = step_of(inserted, 0, task)
    term.add(state)
    state.seen["features"] = torch.arange(8.0)[:, None].expand(8, 16)
    term.add(state)
    # 12 places: filled up to the end, then the batch at 0 to 7, then at 8 to 11 and 0 to 3.
    assert term.state()["trained"][:, 0].tolist()[8:] == [0, 1, 2, 3]
    assert term.state()["trained"][:4, 0].tolist() == [4, 5, 6, 7]
    assert torch.equal(term.state()["labels"][8:], state.batch[1][:4])
    assert torch.equal(term.state()["labels"][:4], state.batch[1][4:])
    assert term.state()["next"].item() == 4


def test_a_batch_larger_than_the_bank_leaves_its_last_samples(inserted, step_of) -> None:
    term = DRTune(bank=3).begin(inserted, ToyTask(), 0)
    state = step_of(inserted)
    state.seen["features"] = torch.arange(8.0)[:, None].expand(8, 16)
    term.add(state)
    assert sorted(term.state()["trained"][:, 0].tolist()) == [5, 6, 7]


def test_a_state_of_another_bank_is_refused(inserted, step_of) -> None:
    term = DRTune(bank=12).begin(inserted, ToyTask(), 0)
    assert term.state() == {}
    term.load_state({})
    term.add(step_of(inserted))
    other = DRTune(bank=8).begin(inserted, ToyTask(), 0)
    with pytest.raises(UsageError, match="of 8 samples with 16 features"):
        other.load_state(term.state())
    with pytest.raises(UsageError, match="the checkpoint has frozen"):
        term.load_state({name: t for name, t in term.state().items() if name != "turn"})


# What it needs


def test_a_head_that_is_no_linear_classifier_is_refused(insert) -> None:
    net = tiny_vit()
    with pytest.raises(UsageError, match="a head of one Linear layer with 9 outputs"):
        DRTune().begin(insert(net, (FC1, "lora", LoRA(), 1)), ToyTask(classes=9), 0)


def test_convolutional_networks_have_features_too(insert) -> None:
    inserted = insert(tiny_convnet(), ("blocks.0.conv1", "lora", LoRA(), 1))
    task = ToyTask()
    batch = next(iter(task.batches("inner", 1)))
    terms = Terms(inserted, task, {"d": DRTune(bank=12)}, 0)
    with terms.watching(batch, 0, 1):
        loss = task.loss(inserted.model, batch)
    assert terms.added_to(loss).item() > loss.item()
    assert terms.state()["d/frozen"].shape == (12, 16)


def test_batches_and_features_that_do_not_fit(inserted, step_of) -> None:
    term = DRTune(bank=12).begin(inserted, ToyTask(), 0)
    state = step_of(inserted)
    images, labels = state.batch
    for batch in (images, (images, labels.float()), (images, labels[:3])):
        state.batch = batch
        with pytest.raises(UsageError, match="needs batches"):
            term.add(state)
    state.batch = (images, labels)
    state.seen["features"] = torch.zeros(8, 16, 1, 1)
    with pytest.raises(UsageError, match=r"one row of 16 features per sample.*got \(8, 16, 1, 1\)"):
        term.add(state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, "weight must be"),
        ({"bank": 0}, "bank must be at least 1, got 0"),
        ({"rotate_every": 0}, "rotate_every must be at least 1"),
        ({"between": "half"}, "between must be one of keep, none"),
        ({"combine": "multiply"}, "combine must be one of add, pool"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DRTune(**settings)
