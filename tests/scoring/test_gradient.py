from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from autopeft.core.scores import Scores
from autopeft.core.site import Catalog, Place, Site
from autopeft.errors import DataError, Diverged, UsageError
from autopeft.models.scan import scan
from autopeft.scoring.gradient import Gradient
from autopeft.testing.tiny import tiny_convnet, tiny_vit
from autopeft.testing.toy_task import ToyTask

FILE = Gradient(batch_size=4, order="file")


def by_parameter(scores: Scores, field: str = "score") -> dict[str, Tensor]:
    """Evidence of whole tensors, by parameter name."""
    found = {}
    for evidence in scores.evidence.values():
        site = evidence.site
        for slot, tensors in evidence.slots.items():
            if slot != "output" and not site.parent:
                name = "bias" if slot == "bias" else site.parameter
                found[f"{site.module}.{name}" if site.module else name] = getattr(tensors, field)
    return found


def total(scores: Scores) -> float:
    return sum(float(t.sum()) for t in by_parameter(scores).values())


def layer(shape: tuple[int, ...] = (4, 3), name: str = "0", has_bias: bool = True) -> Catalog:
    slots = ("weight", "bias") if has_bias else ("weight",)
    site = Site(name, name, "linear", shape, has_bias, 0, "other", slots)
    return Catalog((site,), (), 15, 0, 1)


@pytest.mark.parametrize("make", [tiny_vit, tiny_convnet])
def test_equals_autograd(
    make: Callable[[], nn.Module], noise_task: Callable[..., Any], gradients_of: Callable[..., dict[str, Tensor]]
) -> None:
    """Every moment of every tensor, against one autograd call per batch; the last batch is smaller."""
    model, task = make().double(), noise_task(10)
    catalog = scan(model)
    scores = dataclasses.replace(FILE, halves=True, squares=True).score(model, catalog, task)
    batches = [(b, len(b[0])) for b in task.batches("inner", None, 4)]
    gradients = [gradients_of(model, task, b) for b, _ in batches]
    sizes = [n for _, n in batches]
    assert sizes == [4, 4, 2]
    assert scores.origin.n_samples == 10
    found = by_parameter(scores)
    assert set(found) == {n for n, _ in model.named_parameters() if n.split(".")[0] not in ("head", "fc")}
    for name in found:
        g = [g[name] for g in gradients]
        squares = g[0] ** 2 + g[1] ** 2 + g[2] ** 2
        for field, expected in {
            "score": squares,
            "square": squares / 3,
            "signal": (4 * g[0] + 4 * g[1] + 2 * g[2]) / 10,
            "half_a": (g[0] + g[1]) / 2,
            "half_c": g[2],
        }.items():
            torch.testing.assert_close(by_parameter(scores, field)[name], expected, rtol=1e-9, atol=1e-15)
    assert torch.equal(by_parameter(scores, "value")[name], dict(model.named_parameters())[name])


@pytest.mark.parametrize("make", [tiny_vit, tiny_convnet])
def test_block_outputs(make: Callable[[], nn.Module], noise_task: Callable[..., Any]) -> None:
    """The matrix is the gradient of a linear map put behind the block, at the identity."""
    model, task = make().double(), noise_task(8)
    catalog = scan(model)
    scores = FILE.score(model, catalog, task)
    blocks = [s for s in catalog if s.kind == "block"]
    assert len(blocks) == 2
    for site in blocks:
        expected = []
        for batch in task.batches("inner", None, 4):
            behind = torch.eye(site.shape[0], dtype=torch.float64, requires_grad=True)

            def mapped(m: Any, i: Any, y: Tensor, p: Tensor = behind, axis: int = site.channel_axis) -> Tensor:
                return (y.movedim(axis, -1) @ p.T).movedim(-1, axis)

            handle = model.get_submodule(site.module).register_forward_hook(mapped)
            expected.append(torch.autograd.grad(task.loss(model, batch), behind)[0])
            handle.remove()
        evidence = scores.evidence[site.name]["output"]
        torch.testing.assert_close(evidence.signal, (expected[0] + expected[1]) / 2, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(evidence.score, expected[0] ** 2 + expected[1] ** 2, rtol=1e-9, atol=1e-15)
        assert evidence.value.numel() == 0
        assert scores.totals[Place(site.name, "output")] == pytest.approx(float(evidence.score.sum()))


def test_block_that_runs_twice(plain_task: type) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x))

    model = Twice().double()
    task = plain_task(torch.randn(4, 3).double(), torch.zeros(4, dtype=torch.long))
    site = Site("block", "block", "block", (3,), False, 0, "block", ("output",))
    weights = layer((3, 3), "block").sites[0]
    catalog = Catalog((site, dataclasses.replace(weights, name="lin")), (), 12, 0, 1)
    behind = torch.eye(3, dtype=torch.float64, requires_grad=True)
    handle = model.block.register_forward_hook(lambda m, i, y: y @ behind.T)
    (expected,) = torch.autograd.grad(task.loss(model, (task.images, task.labels)), behind)
    handle.remove()
    scores = FILE.score(model, catalog, task)
    torch.testing.assert_close(scores.evidence["block"]["output"].signal, expected)
    torch.testing.assert_close(scores.evidence["block"]["output"].score, expected**2)


def test_blocks_can_be_left_out() -> None:
    model = tiny_vit()
    scores = Gradient(blocks=False).score(model, scan(model), ToyTask())
    assert not [p for p in scores.totals if p.slot == "output"]
    assert "blocks.0" not in scores.evidence


def test_t1_step_lowers_the_loss_by_the_score(noise_task: Callable[..., Any]) -> None:
    """Oracle T1: what is left after the first-order term falls to a quarter when the step is halved."""
    model, task = tiny_vit().double(), noise_task(4)
    batch = next(iter(task.batches("inner", None, 4)))
    scores = FILE.score(model, scan(model), task)
    steps = by_parameter(scores, "signal")
    first_order = total(scores)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}

    def left_over(eps: float, only: tuple[str, int] | None = None) -> float:
        start = task.loss(model, batch).item()
        expected = first_order
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name not in steps:
                    continue
                step = steps[name].clone()
                if only is not None:
                    mask = torch.zeros_like(step)
                    if name == only[0]:
                        mask.flatten()[only[1]] = 1
                        expected = float(by_parameter(scores)[name].flatten()[only[1]])
                    step *= mask
                p -= eps * step
        lowered = start - task.loss(model, batch).item()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(before[name])
        return lowered - eps * expected

    assert left_over(2e-4) / left_over(1e-4) == pytest.approx(4, rel=0.02)
    for only in (("blocks.0.mlp.fc1.weight", 5), ("blocks.1.attn.qkv.bias", 40), ("pos_embed", 3)):
        assert left_over(0.2, only) / left_over(0.1, only) == pytest.approx(4, rel=0.02), only


def test_t2_sums_of_squares(noise_task: Callable[..., Any], plain_task: type) -> None:
    """Oracle T2: disjoint batches add; copies of samples change nothing; copies of batches double."""
    model = tiny_vit().double()
    catalog, task = scan(model), noise_task(8)

    def score(rows: list[int], size: int = 4) -> dict[str, Tensor]:
        part = plain_task(task.images[rows], task.labels[rows])
        return by_parameter(Gradient(batch_size=size, order="file").score(model, catalog, part))

    first, second, both = score([0, 1, 2, 3]), score([4, 5, 6, 7]), score(list(range(8)))
    copied_samples = score([0, 0, 1, 1, 2, 2, 3, 3], size=8)
    copied_batches = score([0, 1, 2, 3] * 2)
    for name in both:
        assert (both[name] >= 0).all()
        torch.testing.assert_close(both[name], first[name] + second[name])
        torch.testing.assert_close(copied_samples[name], first[name])
        torch.testing.assert_close(copied_batches[name], 2 * first[name])


def test_t3_closed_form(plain_task: type) -> None:
    """Oracle T3: a Linear under squared loss; a loss scaled by c scales the score by c squared."""
    model = nn.Sequential(nn.Linear(3, 4)).double()
    x, y = torch.randn(1, 3).double(), torch.randn(1, 4).double()
    task = plain_task(x, y, lambda out, target: (out - target).square().sum(1))
    scores = FILE.score(model, layer(), task)
    delta = 2 * (model(x) - y).detach()[0]
    torch.testing.assert_close(scores.evidence["0"]["weight"].score, torch.outer(delta**2, x[0] ** 2))
    torch.testing.assert_close(scores.evidence["0"]["bias"].score, delta**2)
    scaled = plain_task(x, y, lambda out, target: 3 * (out - target).square().sum(1))
    torch.testing.assert_close(
        FILE.score(model, layer(), scaled).evidence["0"]["weight"].score, 9 * scores.evidence["0"]["weight"].score
    )
    assert scores.totals[Place("0", "bias")] == pytest.approx(float((delta**2).sum()))


class SplitAttention(nn.Module):
    """timm's attention with three Linears instead of one."""

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        width = fused.qkv.in_features
        self.heads, self.proj = fused.num_heads, fused.proj
        for i, name in enumerate("qkv"):
            part = nn.Linear(width, width).double()
            part.weight.data.copy_(fused.qkv.weight[i * width : (i + 1) * width])
            part.bias.data.copy_(fused.qkv.bias[i * width : (i + 1) * width])
            self.add_module(name, part)

    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        b, n, c = x.shape
        q, k, v = (m(x).reshape(b, n, self.heads, -1).transpose(1, 2) for m in (self.q, self.k, self.v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


def test_t4_fused_equals_split(noise_task: Callable[..., Any]) -> None:
    """Oracle T4: slices are those of separate projections, and views; a key bias is not sensitive."""
    fused, split, task = tiny_vit().double(), tiny_vit().double(), noise_task(8)
    for block in split.blocks:
        block.attn = SplitAttention(block.attn)
    one = FILE.score(fused, scan(fused), task)
    three = FILE.score(split, scan(split), task)
    for i in range(2):
        name = f"blocks.{i}.attn"
        for slot in ("weight", "bias"):
            whole = one.evidence[f"{name}.qkv"][slot].score
            parts = [three.evidence[f"{name}.{part}"][slot].score for part in "qkv"]
            torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-8, atol=1e-20)
            for j, part in enumerate("qkv"):
                view = one.evidence[f"{name}.qkv[{part}]"][slot]
                torch.testing.assert_close(view.score, parts[j], rtol=1e-8, atol=1e-20)
                for field in ("score", "signal", "value"):
                    whole_field = getattr(one.evidence[f"{name}.qkv"][slot], field)
                    same = getattr(view, field).untyped_storage().data_ptr()
                    assert same == whole_field.untyped_storage().data_ptr()
        keys = one.totals[Place(f"{name}.qkv[k]", "bias")]
        assert keys < 1e-20 * one.totals[Place(f"{name}.qkv[q]", "bias")]
        whole_total = one.totals[Place(f"{name}.qkv", "weight")]
        assert whole_total == pytest.approx(sum(one.totals[Place(f"{name}.qkv[{p}]", "weight")] for p in "qkv"))


def test_tied_weights_are_one_tensor(plain_task: type) -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False)).double()
    model[2].weight = model[0].weight
    site = Site("0", "0", "linear", (3, 3), False, 0, "other", ("weight",))
    both = Catalog((site, dataclasses.replace(site, name="2", module="2")), (), 9, 0, 1)
    task = plain_task(torch.randn(4, 3).double(), torch.tensor([0, 1, 2, 0]))
    scores = FILE.score(model, both, task)
    (expected,) = torch.autograd.grad(task.loss(model, (task.images, task.labels)), model[0].weight)
    torch.testing.assert_close(scores.evidence["0"]["weight"].score, expected**2)
    assert scores.evidence["2"]["weight"].score is scores.evidence["0"]["weight"].score


def test_slices_of_the_data(noise_task: Callable[..., Any], plain_task: type) -> None:
    model, task = tiny_vit().double(), noise_task(12)
    catalog = scan(model)
    few = plain_task(task.images[:6], task.labels[:6])
    expected = by_parameter(FILE.score(model, catalog, few))
    found = dataclasses.replace(FILE, max_samples=6).score(model, catalog, task)
    assert found.origin.n_samples == 6
    assert all(torch.equal(t, expected[n]) for n, t in by_parameter(found).items())
    assert dataclasses.replace(FILE, max_batches=2).score(model, catalog, task).origin.n_samples == 8
    shuffled = dataclasses.replace(FILE, order="shuffled")
    one, again, other = (shuffled.score(model, catalog, task, seed=s) for s in (1, 1, 2))
    assert total(one) == total(again) != total(other)


def test_unused_tensors_score_zero(plain_task: type) -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 4), "idle": nn.Linear(3, 4)})
    model.forward = model["used"].forward  # type: ignore[method-assign]
    catalog = Catalog((layer(name="used").sites[0], layer(name="idle").sites[0]), (), 32, 0, 1)
    task = plain_task(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    scores = FILE.score(model, catalog, task)
    assert scores.totals[Place("used", "weight")] > 0
    assert scores.totals[Place("idle", "weight")] == 0
    assert scores.evidence["idle"]["weight"].signal.shape == (4, 3)


def test_half_precision_is_summed_in_float32(plain_task: type) -> None:
    """One gradient of 1 and 2047 of about 2^-9: in bfloat16 the small ones would be lost."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).to(torch.bfloat16)
    images = torch.full((600, 1), 2.0**-4, dtype=torch.bfloat16)
    images[0] = 4.0
    task = plain_task(images, torch.zeros(600), lambda out, y: out[:, 0])
    scores = Gradient(batch_size=1, max_samples=None, order="file").score(model, layer((1, 1), has_bias=False), task)
    found = scores.evidence["0"]["weight"]
    assert found.score.dtype == torch.float32
    assert float(found.score) == 16 + 599 * 2.0**-8
    assert float(found.signal) == pytest.approx((4 + 599 / 16) / 600)


# -- memory: gradients are consumed one tensor at a time -----------------------------------------------------------


class NaiveScorer:
    """The broken one: all gradients are alive together after the backward pass."""

    def score(self, model: nn.Module, catalog: Catalog, task: Any, seed: int = 0) -> None:
        model.requires_grad_()
        for batch in task.batches("inner", seed, 1):
            model.zero_grad()
            task.loss(model, batch).backward()
            for p in model.parameters():
                assert p.grad is not None
                p.grad.square()


def most_live_bytes(scorer: Any) -> tuple[int, int]:
    """Largest total of live `.grad` bytes at batch size 1, and the bytes of the largest tensor."""
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=24, depth=4, num_heads=2, num_classes=4).eval()
    parameters = list(model.parameters())
    most = 0

    def count(_: Tensor) -> None:
        nonlocal most
        most = max(most, sum(p.grad.nbytes for p in parameters if p.grad is not None))

    # Registered first, so that every gradient is counted before the scorer consumes it.
    handles = [p.register_post_accumulate_grad_hook(count) for p in parameters]
    scorer.score(model, scan(model), ToyTask(n_inner=4))
    for handle in handles:
        handle.remove()
    assert most > 0
    return most, max(p.nbytes for p in parameters)


def test_gradients_are_consumed_layer_by_layer() -> None:
    most, largest = most_live_bytes(Gradient(batch_size=1))
    assert most <= 2 * largest


def test_naive_scorer_fails_the_memory_test() -> None:
    most, largest = most_live_bytes(NaiveScorer())
    assert most > 8 * largest


def test_per_sample_mode_streams_too() -> None:
    most, largest = most_live_bytes(Gradient(mode="per_sample", batch_size=2))
    assert most <= 2 * largest


# -- checkpointing and broken inputs -------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = checkpoint(self.second, x, use_reentrant=self.reentrant)
        return checkpoint(self.second, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("mode", ["per_batch", "per_sample"])
def test_reentrant_checkpointing_is_refused(plain_task: type, mode: Any) -> None:
    catalog = Catalog((layer(name="first").sites[0], layer((4, 4), "second").sites[0]), (), 36, 0, 1)
    task = plain_task(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    scorer = dataclasses.replace(FILE, mode=mode)
    with pytest.raises(UsageError, match="reentrant"):
        scorer.score(Checkpointed(True), catalog, task)
    kept = scorer.score(Checkpointed(False), catalog, task)
    plain = scorer.score(Plain(Checkpointed(False)), catalog, task)
    for name, tensor in by_parameter(kept).items():
        torch.testing.assert_close(tensor, by_parameter(plain)[name])


class Plain(nn.Module):
    """The same without checkpointing."""

    def __init__(self, other: Checkpointed) -> None:
        super().__init__()
        self.first, self.second = other.first, other.second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.second(self.first(x)))


def test_hook_that_fires_twice_is_refused(plain_task: type) -> None:
    """What the graph does not show: a backward pass inside the backward pass."""

    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
            ctx.save_for_backward(x)
            ctx.module = module
            return module(x).detach()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
            x = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                ctx.module(x).backward(dy)
            assert x.grad is not None
            return x.grad, None

    model = Plain(Checkpointed(False))
    model.forward = lambda x: Hidden.apply(model.second(model.first(x)), model.second)  # type: ignore[method-assign]
    catalog = Catalog((layer(name="first").sites[0], layer((4, 4), "second").sites[0]), (), 36, 0, 1)
    with pytest.raises(UsageError, match=r"second\.(weight|bias) arrived twice"):
        FILE.score(model, catalog, plain_task(torch.randn(4, 3), torch.tensor([0, 1, 2, 0])))
    assert all(p.grad is None for p in model.parameters())


def test_loss_that_is_not_finite(noise_task: Callable[..., Any]) -> None:
    model, task = tiny_vit().double(), noise_task(4)
    task.images[2, 0, 0, 0] = float("nan")
    with pytest.raises(Diverged, match="the loss is nan"):
        FILE.score(model, scan(model), task)


def test_too_little_data(noise_task: Callable[..., Any]) -> None:
    model = tiny_vit().double()
    with pytest.raises(DataError, match="at least 2 batches"):
        dataclasses.replace(FILE, halves=True).score(model, scan(model), noise_task(4))


def test_catalogue_of_another_model() -> None:
    model, task = tiny_vit(), ToyTask()
    with pytest.raises(UsageError, match="another model"):
        FILE.score(model, scan(tiny_convnet()), task)
    site = Site("patch_embed.proj", "patch_embed.proj", "conv2d", (16, 3, 2, 2), True, 0, "stem", ("weight",))
    with pytest.raises(UsageError, match=r"has shape \(16, 3, 4, 4\) here"):
        FILE.score(model, Catalog((site,), (), 9, 0, 1), task)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "per_epoch"}, r"gradient\.mode must be one of per_batch, per_sample"),
        ({"order": "sorted"}, r"gradient\.order"),
        ({"batch_size": 0}, r"gradient\.batch_size must be an integer of at least 1, got 0"),
        ({"max_batches": -1}, r"gradient\.max_batches"),
        ({"chunk": True}, r"gradient\.chunk"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Gradient(**settings)
