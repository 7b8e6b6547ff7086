from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d, LayerNorm2d, LayerScale
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from autopeft.core.scores import Scores
from autopeft.errors import Diverged, UsageError
from autopeft.models.scan import scan
from autopeft.scoring._per_sample import PerSample
from autopeft.scoring.gradient import Gradient
from autopeft.testing.tiny import tiny_convnet, tiny_vit

SAMPLES = Gradient(mode="per_sample", batch_size=4, order="file", halves=True, squares=True)


def exact(model: nn.Module, task: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean gradient, and sum of the squared gradients of single samples, by torch.func in float64."""
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, {**parameters, **buffers}, image[None]), label[None])

    with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the fused kernels
        found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, task.images, task.labels)
    return {n: g.mean(0) for n, g in found.items()}, {n: g.square().sum(0) for n, g in found.items()}


def check(model: nn.Module, task: Any, scorer: Gradient = SAMPLES) -> Scores:
    """Compare every whole tensor with torch.func."""
    scores = scorer.score(model, scan(model), task)
    mean, squares = exact(model, task)
    seen = 0
    for evidence in scores.evidence.values():
        site = evidence.site
        for slot, tensors in evidence.slots.items():
            if slot == "output" or site.parent:
                continue
            name = "bias" if slot == "bias" else site.parameter
            name = f"{site.module}.{name}" if site.module else name
            torch.testing.assert_close(tensors.score, squares[name], rtol=1e-9, atol=1e-18, msg=lambda m, n=name: n + m)
            torch.testing.assert_close(tensors.signal, mean[name], rtol=1e-9, atol=1e-15)
            torch.testing.assert_close(tensors.square, squares[name] / len(task.images), rtol=1e-9, atol=1e-18)
            seen += 1
    assert seen
    assert scores.origin.n_samples == len(task.images)
    return scores


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[PerSample]:
    """The engines that scorers make, to see which way each tensor went."""
    made: list[PerSample] = []
    original = PerSample.__init__

    def remember(self: PerSample, *args: Any) -> None:
        original(self, *args)
        made.append(self)

    monkeypatch.setattr(PerSample, "__init__", remember)
    return made


def test_vision_transformer_needs_no_fallback(noise_task: Callable[..., Any], ways: list[PerSample]) -> None:
    """The last batch is smaller."""
    check(tiny_vit().double(), noise_task(11))
    assert ways[0]._rest == set()
    assert ways[0]._by_copy == {"cls_token", "pos_embed"}
    assert {"patch_embed.proj.weight", "norm.bias", "blocks.0.norm1.weight", "blocks.1"} <= ways[0]._by_formula


@pytest.mark.parametrize("groups", [4, 16])
def test_convnet_needs_no_fallback(groups: int, noise_task: Callable[..., Any], ways: list[PerSample]) -> None:
    check(tiny_convnet(groups=groups).double(), noise_task(6))
    assert ways[0]._rest == set()


def test_windows_of_one_image_belong_together(noise_task: Callable[..., Any], ways: list[PerSample]) -> None:
    """Swin: several rows per sample, shifted windows, and a table of relative positions that takes the slow way."""
    torch.manual_seed(0)
    model = SwinTransformer(
        img_size=16,
        patch_size=2,
        embed_dim=8,
        depths=(2,),
        num_heads=(2,),
        window_size=4,
        num_classes=4,
        drop_path_rate=0,
    )
    check(model.double().eval(), noise_task(6, shape=(3, 16, 16)))
    assert {k.rpartition(".")[2] for k in ways[0]._rest} == {"relative_position_bias_table"}
    assert "layers.0.blocks.1.attn.qkv.weight" in ways[0]._by_formula


class Zoo(nn.Module):
    """Layers with a formula in odd settings, and layers that no formula describes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2), groups=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.reflected = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.group_norm = nn.GroupNorm(2, 8)
        self.active_norm = BatchNormAct2d(8)
        self.map_norm = LayerNorm2d(8)
        self.rms_norm = nn.RMSNorm(8)
        self.scale = LayerScale(8, 0.5)
        self.inplace_scale = LayerScale(8, 0.5, inplace=True)
        self.twice = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8, bias=False)
        self.sequence_first = nn.Linear(8, 8)
        self.used_directly = nn.Linear(8, 8)
        self.reshaped = nn.Parameter(torch.randn(1, 8, 2))
        self.summed = nn.Parameter(torch.randn(1, 1, 8))
        self.fc = nn.Linear(8, 4)
        for module in self.modules():
            if getattr(module, "bias", None) is not None and module.bias.ndim == 1:
                nn.init.normal_(module.bias, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.conv(x))
        x = self.map_norm(self.active_norm(self.group_norm(self.reflected(x))))
        x = x.flatten(2).mT
        x = self.inplace_scale(self.scale(self.rms_norm(x)) + 0)
        x = self.twice(torch.tanh(self.twice(x)))
        x = x + self.tied(x) @ self.tied.weight
        x = self.sequence_first(x.transpose(0, 1)).transpose(0, 1)
        x = x + F.linear(x, self.used_directly.weight)
        # Copies per sample in the place of these raise, or give something else.
        table = self.reshaped.reshape(8, 2)
        x = x + x @ table @ table.mT + self.summed.sum((0, 1))
        return self.fc(x.mean(1))


def test_odd_layers_are_exact_all_the_same(noise_task: Callable[..., Any], ways: list[PerSample]) -> None:
    check(Zoo().double().eval(), noise_task(6))
    slow = {k.partition(".")[0] for k in ways[0]._rest}
    # What is used without its module being called has no slots, and is not scored.
    odd = {"reflected", "active_norm", "twice", "tied", "sequence_first", "reshaped", "summed"}
    assert slow == odd | ({"inplace_scale"} & slow)  # its own input may be gone
    fast = {k.partition(".")[0] for k in ways[0]._by_formula}
    assert {"conv", "grouped", "group_norm", "map_norm", "rms_norm", "scale"} <= fast


def test_one_vector_per_sample(plain_task: type) -> None:
    """The square of an outer product: no gradient of a sample is formed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)).double()
    task = plain_task(torch.randn(10, 6).double(), torch.arange(10) % 4)
    check(model, task)


@pytest.mark.parametrize("make", [tiny_vit, tiny_convnet])
def test_block_outputs(make: Callable[[], nn.Module], noise_task: Callable[..., Any]) -> None:
    """Batches of one sample are the oracle."""
    model, task = make().double(), noise_task(5)
    catalog = scan(model)
    together = SAMPLES.score(model, catalog, task)
    alone = Gradient(batch_size=1, order="file", squares=True).score(model, catalog, task)
    for site in catalog:
        if site.kind == "block":
            for field in ("signal", "score", "square"):
                mine, theirs = (getattr(s.evidence[site.name]["output"], field) for s in (together, alone))
                torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-18)


class SequenceFirst(nn.Module):
    """A block whose output has the samples on its second axis, as many as tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(6, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).transpose(0, 1)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(0))


def test_samples_on_the_second_axis_are_noticed(plain_task: type, ways: list[PerSample]) -> None:
    task = plain_task(torch.randn(8, 4, 6).double(), torch.arange(8) % 4)
    model = SequenceFirst().double()
    check(model, task)
    assert "blocks.0.0.weight" in ways[0]._rest
    assert "embed.weight" in ways[0]._by_formula


@pytest.mark.parametrize("make", [tiny_vit, tiny_convnet, Zoo])
def test_t5_partition_and_chunks_do_not_matter(make: Callable[[], nn.Module], noise_task: Callable[..., Any]) -> None:
    """Oracle T5, and that `chunk` is a matter of memory alone."""
    model, task = make().double().eval(), noise_task(12)
    catalog = scan(model)
    variants = [
        dataclasses.replace(SAMPLES, batch_size=size, chunk=chunk, halves=False)
        for size, chunk in ((12, 1), (12, 5), (12, 12), (5, 2), (1, 8), (3, 3))
    ]
    first, *others = (v.score(model, catalog, task) for v in variants)
    for other in others:
        for name, evidence in first.evidence.items():
            for slot, tensors in evidence.slots.items():
                scale = float(tensors.score.max())
                error = float((tensors.score - other.evidence[name][slot].score).abs().max())
                assert error <= 1e-12 * scale + 1e-30, (name, slot)
    per_batch = [Gradient(batch_size=size, order="file").score(model, catalog, task) for size in (12, 3)]
    place = next(iter(first.totals))
    assert per_batch[0].totals[place] != pytest.approx(per_batch[1].totals[place], rel=0.1)


def test_batches_of_one_equal_per_batch(noise_task: Callable[..., Any]) -> None:
    """Oracle T2, last part: batch size 1, the two modes are one."""
    model, task = tiny_vit().double(), noise_task(4)
    catalog = scan(model)
    one = dataclasses.replace(SAMPLES, batch_size=1).score(model, catalog, task)
    other = Gradient(batch_size=1, order="file").score(model, catalog, task)
    assert one.totals == other.totals


def test_halves(noise_task: Callable[..., Any], plain_task: type) -> None:
    model, task = tiny_vit().double(), noise_task(12)
    scores = SAMPLES.score(model, scan(model), task)
    for half, rows in (("half_a", slice(0, 8)), ("half_c", slice(8, 12))):
        mean, _ = exact(model, plain_task(task.images[rows], task.labels[rows]))
        for name, slot in (("blocks.0.attn.qkv", "weight"), ("pos_embed", "tokens"), ("norm", "bias")):
            expected = mean[name if slot == "tokens" else f"{name}.{slot}"]
            torch.testing.assert_close(getattr(scores.evidence[name][slot], half), expected, rtol=1e-9, atol=1e-15)
    output = scores.evidence["blocks.0"]["output"]
    assert output.half_a is not None
    assert output.half_c is not None
    torch.testing.assert_close((2 * output.half_a + output.half_c) / 3, output.signal)


def test_float32_is_close(noise_task: Callable[..., Any], plain_task: type) -> None:
    model, task = tiny_vit().double(), noise_task(8)
    _, squares = exact(model, task)
    single = plain_task(task.images.float(), task.labels)
    scores = SAMPLES.score(tiny_vit(), scan(tiny_vit()), single)
    found = scores.evidence["blocks.1.mlp.fc2"]["weight"].score
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), squares["blocks.1.mlp.fc2.weight"], rtol=1e-3, atol=1e-9)


def test_parameters_are_back_in_their_place(noise_task: Callable[..., Any], plain_task: type) -> None:
    model = tiny_vit().double()
    before, keys = dict(model.named_parameters()), list(model.state_dict())
    task = noise_task(8)
    task.images[6] = float("nan")  # fails in the second batch, in the middle of a pass with copies
    with pytest.raises(Diverged):
        SAMPLES.score(model, scan(model), task)
    assert all(p is before[n] for n, p in model.named_parameters())
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_task_without_losses_per_sample(plain_task: type) -> None:
    task = plain_task(torch.randn(8, 3, 8, 8), torch.zeros(8, dtype=torch.long))
    task.criterion = lambda out, y: F.cross_entropy(out, y)[None]
    with pytest.raises(UsageError, match=r"one loss per sample, shape \(4,\), and the task gives \(1,\)"):
        SAMPLES.score(tiny_vit(), scan(tiny_vit()), task)
