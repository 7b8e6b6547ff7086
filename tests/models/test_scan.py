from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, LayerNorm2d, LayerScale2d
from torch import Tensor, nn

from autopeft.core.budget import Budget
from autopeft.core.site import Catalog, Site
from autopeft.errors import UsageError
from autopeft.models.scan import scan
from autopeft.testing.tiny import tiny_convnet, tiny_vit

Family = Callable[[str], tuple[nn.Module, Catalog]]
NAMES = ("vit", "swin", "convnext", "resnet", "efficientnet")
BLOCKS = {"vit": 3, "swin": 5, "convnext": 5, "resnet": 8, "efficientnet": 16}
KINDS = {
    "vit": {"linear", "conv2d", "layer_norm", "tokens", "block", "residual"},
    "swin": {"linear", "conv2d", "layer_norm", "tokens", "block", "residual"},
    "convnext": {"conv2d", "layer_norm", "layer_scale", "block"},
    "resnet": {"conv2d", "batch_norm", "block"},
    "efficientnet": {"conv2d", "batch_norm", "block"},
}


def _owned(catalog: Catalog) -> list[Site]:
    return [site for site in catalog if not site.parent and site.kind not in ("block", "residual")]


@pytest.mark.parametrize("name", NAMES)
def test_sites_hold_every_base_parameter_once(family: Family, name: str) -> None:
    model, catalog = family(name)
    covered: list[int] = []
    for site in _owned(catalog):
        host = model.get_submodule(site.module)
        weight = getattr(host, site.parameter)
        assert tuple(weight.shape) == site.shape
        covered.append(id(weight))
        if site.has_bias:
            assert host.bias.shape == (site.shape[0],)
            covered.append(id(host.bias))
    classifier = model.get_classifier()
    in_head = {id(p) for p in classifier.parameters()}
    assert sorted(covered) == sorted(id(p) for p in model.parameters() if id(p) not in in_head)
    assert catalog.n_base == sum(p.numel() for p in model.parameters() if id(p) not in in_head)
    assert catalog.n_head == sum(p.numel() for p in classifier.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_kinds_blocks_and_depths(family: Family, name: str) -> None:
    catalog = family(name)[1]
    assert {site.kind for site in catalog} == KINDS[name]
    assert catalog.n_depth == BLOCKS[name]
    blocks = [site for site in catalog if site.kind == "block"]
    assert [block.depth for block in blocks] == list(range(BLOCKS[name]))
    for site in catalog:
        inside = [b.depth for b in blocks if site.module.startswith(b.name + ".") or site.module == b.name]
        if inside:
            assert site.depth == inside[0]
    depths = [site.depth for site in catalog if site.role != "tokens"]
    assert depths == sorted(depths), "depth never falls in model order"
    assert all(site.slots for site in catalog)
    stems = [site for site in catalog if site.role == "stem"]
    assert stems
    assert {site.depth for site in stems} == {0}


def test_residual_branches_of_a_transformer() -> None:
    """Attention and MLP of every block, with the norm whose input is the residual stream."""
    catalog = scan(tiny_vit())
    found = [(s.name, s.role, s.entry, s.shape, s.slots) for s in catalog if s.kind == "residual"]
    assert found == [
        (f"blocks.{i}.{name}", name, f"blocks.{i}.{norm}", (16,), ("output",))
        for i in range(2)
        for name, norm in (("attn", "norm1"), ("mlp", "norm2"))
    ]
    assert [s.slots for s in catalog if s.kind == "block"] == [("output", "tokens")] * 2


def test_groups_of_a_transformer() -> None:
    """All matrices, those of one role, the sites of a block, the blocks, the first and last block."""
    catalog = scan(tiny_vit())
    groups = {g.name: [m.name for m in g.members] for g in catalog.groups()}
    assert list(groups) == [
        "*", "*:attn.qkv", "*:attn.proj", "*:mlp.fc1", "*:mlp.fc2", "block:0", "block:1", "blocks", "stream",
    ]  # fmt: skip
    assert groups["*:mlp.fc1"] == ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]
    assert groups["*"][0] == "patch_embed.proj"
    assert len(groups["*"]) == 9
    assert set(groups["block:1"]) == {
        f"blocks.1.{n}" for n in ("norm1", "attn", "attn.qkv", "attn.proj", "norm2", "mlp", "mlp.fc1", "mlp.fc2")
    }
    assert catalog["*:attn.qkv"].members[1] is catalog["blocks.1.attn.qkv"]


@pytest.mark.parametrize("name", NAMES)
def test_channel_axis_is_the_one_the_output_has(family: Family, name: str) -> None:
    model, catalog = family(name)
    shapes: dict[str, torch.Size] = {}
    handles = [
        model.get_submodule(site.module).register_forward_hook(
            lambda m, a, out, key=site.name: shapes.__setitem__(key, out.shape)
        )
        for site in catalog
        if "output" in site.slots and not site.parent
    ]
    # Height, width and channels all differ, so that a wrong axis shows.
    size = (56, 56) if name == "swin" else (32, 32) if name == "vit" else (64, 96)
    with torch.no_grad():
        model(torch.zeros(1, 3, *size))
    for handle in handles:
        handle.remove()
    assert len(shapes) == len(handles)
    for key, shape in shapes.items():
        site = catalog[key]
        assert shape[site.channel_axis] == site.shape[0], key


@pytest.mark.parametrize("build", [tiny_vit, tiny_convnet])
def test_row_of_the_weight_is_channel_of_the_output(build: Callable[[], nn.Module]) -> None:
    model = build()
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for site in scan(model):
        if "output" not in site.slots or site.kind in ("block", "residual"):
            continue
        seen: list[Tensor] = []
        host = model.get_submodule(site.module)
        handle = host.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
        row = (site.rows[0] if site.rows else 0) + site.shape[0] - 1
        with torch.no_grad():
            model(images)
            host.weight[row] += 1.0
            model(images)
            host.weight[row] -= 1.0
        handle.remove()
        other = tuple(i for i in range(seen[0].ndim) if i != site.channel_axis % seen[0].ndim)
        changed = (seen[1] - seen[0]).abs().sum(other).nonzero().flatten().tolist()
        assert changed == [row], site.name


@pytest.mark.parametrize(
    ("name", "n_base", "limit"),
    [
        ("vit_base_patch16_224", 85_798_656, 85_798),
        ("vit_small_patch14_dinov2", 22_056_192, 22_056),
        ("tf_efficientnet_lite0", 3_371_008, 3_371),
    ],
)
def test_budget_base_of_known_models_on_meta(name: str, n_base: int, limit: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    catalog = scan(model)
    assert catalog.n_base == n_base
    assert Budget.parse("0.1%", n_base).limit == limit
    assert catalog.n_depth in (12, 16)
    assert all(site.slots for site in catalog)


def test_meta_and_real_give_one_fingerprint() -> None:
    args = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_classes": 3}
    with torch.device("meta"):
        meta = timm.create_model("vit_tiny_patch16_224", pretrained=False, **args)
    real = timm.create_model("vit_tiny_patch16_224", pretrained=False, **args)
    assert scan(meta).fingerprint == scan(real).fingerprint
    assert scan(real).fingerprint != scan(tiny_vit()).fingerprint


def test_slices_partition_the_rows_of_the_whole() -> None:
    catalog = scan(tiny_vit())
    whole = catalog["blocks.1.attn.qkv"]
    assert whole.parts == ("blocks.1.attn.qkv[q]", "blocks.1.attn.qkv[k]", "blocks.1.attn.qkv[v]")
    assert whole.rows is None
    slices = [catalog[name] for name in whole.parts]
    assert [s.rows for s in slices] == [(0, 16), (16, 32), (32, 48)]
    assert [s.role for s in slices] == ["attn.q", "attn.k", "attn.v"]
    assert {(s.module, s.parent, s.shape, s.has_bias) for s in slices} == {
        ("blocks.1.attn.qkv", "blocks.1.attn.qkv", (16, 16), True)
    }
    names = [s.name for s in catalog]
    at = names.index(whole.name)
    assert tuple(names[at + 1 : at + 4]) == whole.parts


class _Attention(nn.Module):
    def __init__(self, out: int = 24, **marks: object) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, out)
        self.proj = nn.Linear(out // 3, 8)
        for name, value in marks.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.qkv(x)[..., : self.proj.in_features])


class _Vectors(nn.Module):
    """A head on whatever body maps (B, 3, 4, 4) to (B, 8)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4)
        self.body = body
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x).flatten(1)))


EXAMPLE = torch.zeros(1, 3, 4, 4)


@pytest.mark.parametrize(
    ("attention", "sliced"),
    [
        (_Attention(), True),
        (_Attention(48, num_heads=2, head_dim=8), True),
        (_Attention(48), False),  # neither three times the input nor three times the heads
        (_Attention(head_first=True), False),  # q, k and v interleaved by head
        (_Attention(val_dim=4), False),
    ],
)
def test_only_known_layouts_are_sliced(attention: nn.Module, sliced: bool) -> None:
    catalog = scan(_Vectors(attention), EXAMPLE)
    assert bool(catalog["body.qkv"].parts) is sliced
    assert ("body.qkv[q]" in catalog) is sliced
    assert catalog["body.qkv"].role == "attn.qkv"


def test_tied_weight_is_listed_once_and_counted_once() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    catalog = scan(_Vectors(nn.Sequential(first, second)), EXAMPLE)
    assert "body.0" in catalog
    assert "body.1" not in catalog
    assert catalog.n_base == (3 * 8 * 16 + 8) + 64 + 8 + 8


def test_shared_module_is_one_usable_site() -> None:
    shared = nn.Linear(8, 8)
    catalog = scan(_Vectors(nn.Sequential(shared, nn.GELU(), shared)), EXAMPLE)
    assert [s.name for s in catalog if s.kind == "linear"] == ["body.0"]
    assert catalog["body.0"].slots == ("weight", "bias", "output")


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("beit_base_patch16_224", {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 3}),
        ("eva02_tiny_patch14_224", {"img_size": 28, "depth": 1, "embed_dim": 48, "num_heads": 3}),
        ("swinv2_tiny_window8_256", {"img_size": 64, "depths": (1, 1), "embed_dim": 24, "num_heads": (1, 2)}),
    ],
)
def test_fused_weight_bypass_has_no_slots(name: str, args: dict[str, object]) -> None:
    model = timm.create_model(name, pretrained=False, num_classes=2, **args).eval()
    fired: set[str] = set()
    handles = [
        module.register_forward_hook(lambda m, a, o, key=key: fired.add(key)) for key, module in model.named_modules()
    ]
    catalog = scan(model)
    for handle in handles:
        handle.remove()
    dead = {s.name for s in catalog if not s.slots}
    assert dead
    assert all("qkv" in n for n in dead)
    assert {s.name for s in catalog if s.module and s.module not in fired} == dead
    assert all(len(s.parts) in (0, 3) for s in catalog)


def test_output_projection_of_torch_attention_has_no_slots() -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out, _ = self.attn(x[:, None], x[:, None], x[:, None], need_weights=False)
            return out[:, 0]

    catalog = scan(_Vectors(Body()), EXAMPLE)
    assert catalog["body.attn.out_proj"].slots == ()


def test_tokens_that_no_operation_takes_have_no_slots() -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mask_token = nn.Parameter(torch.zeros(1, 1, 8))
            self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))

        def forward(self, x: Tensor) -> Tensor:
            assert self.mask_token.shape[-1] == x.shape[-1], "reading a shape is no use of the values"
            return torch.cat([self.cls_token.expand(len(x), -1, -1), x[:, None]], 1).mean(1)

    catalog = scan(_Vectors(Body()), EXAMPLE)
    assert catalog["body.mask_token"].slots == ()
    assert catalog["body.cls_token"].slots == ("tokens",)
    assert catalog["body.cls_token"].role == "tokens"


def test_norms_with_an_activation_take_no_output_adapter() -> None:
    body = nn.Sequential(
        nn.Unflatten(1, (8, 1, 1)), BatchNormAct2d(8), BatchNormAct2d(8, apply_act=False), LayerNorm2d(8),
        nn.GroupNorm(2, 8), LayerScale2d(8), nn.Flatten(),
    )  # fmt: skip
    catalog = scan(_Vectors(body), EXAMPLE)
    assert catalog["body.1"].slots == ("weight", "bias")
    assert catalog["body.2"].slots == ("weight", "bias", "output")
    assert [(catalog[f"body.{i}"].kind, catalog[f"body.{i}"].channel_axis) for i in range(1, 6)] == [
        ("batch_norm", 1), ("batch_norm", 1), ("layer_norm", 1), ("layer_norm", 1), ("layer_scale", 1),
    ]  # fmt: skip
    assert (catalog["body.5"].parameter, catalog["body.5"].slots) == ("gamma", ("weight",))


def test_layer_scale_held_by_a_block(family: Family) -> None:
    catalog = family("convnext")[1]
    site = catalog["stages.2.blocks.1.gamma"]
    assert (site.module, site.parameter, site.shape) == ("stages.2.blocks.1", "gamma", (24,))
    assert (site.slots, site.role, site.channel_axis) == (("weight",), "layer_scale", 1)
    assert catalog["stages.1.downsample.1"].depth == catalog["stages.1.blocks.0"].depth
    assert catalog["stages.0.blocks.0.conv_dw"].groups == 8


def test_roles() -> None:
    roles = {site.name: site.role for site in scan(tiny_vit())}
    assert roles["patch_embed.proj"] == "stem"
    assert roles["blocks.0.attn.proj"] == "attn.proj"
    assert roles["blocks.0.mlp.fc1"] == "mlp.fc1"
    assert roles["blocks.0.mlp.fc2"] == "mlp.fc2"
    assert roles["pos_embed"] == "tokens"
    assert roles["norm"] == "norm"
    roles = {site.name: site.role for site in scan(tiny_convnet())}
    assert (roles["stem"], roles["blocks.0.conv1"], roles["blocks.1"]) == ("stem", "conv", "block")


def test_blocks_that_are_numbered_children() -> None:
    with torch.device("meta"):
        model = timm.create_model("regnetx_002", pretrained=False)
    names = [s.name for s in scan(model) if s.kind == "block"]
    assert names[:3] == ["s1.b1", "s2.b1", "s3.b1"]
    assert len(names) == 1 + 1 + 4 + 7


def test_two_classifiers_are_both_head() -> None:
    model = timm.create_model("deit_tiny_distilled_patch16_224", pretrained=False, img_size=32, depth=1, num_classes=3)
    catalog = scan(model)
    assert catalog.head == ("head", "head_dist")
    assert catalog.n_head == 2 * (192 * 3 + 3)
    assert "dist_token" in catalog
    assert "head" not in catalog


def test_model_without_classifier_has_an_empty_head() -> None:
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=1, num_classes=0)
    catalog = scan(model)
    assert (catalog.head, catalog.n_head) == ((), 0)
    assert catalog.n_base == sum(p.numel() for p in model.parameters())


def test_model_is_left_as_found() -> None:
    model = tiny_convnet().train()
    model.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    hooks = [len(m._forward_hooks) for m in model.modules()]
    state = torch.random.get_rng_state()
    scan(model)
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_forward_that_depends_on_values_is_run_for_real() -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) if x.sum().item() < 1e9 else self.idle(x)

    catalog = scan(_Vectors(Body()), EXAMPLE)
    assert catalog["body.used"].slots == ("weight", "bias", "output")
    assert catalog["body.idle"].slots == ()


def test_model_that_runs_on_no_example_lists_everything() -> None:
    catalog = scan(_Vectors(_Attention()), torch.zeros(1, 1, 1, 1))
    assert all(site.slots for site in catalog)


def test_nothing_but_a_classifier() -> None:
    with pytest.raises(UsageError, match="Linear has no parameters besides its classifier"):
        scan(nn.Linear(3, 2))


SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 3}


@pytest.mark.parametrize(
    ("name", "sizes", "takes"),
    [
        ("deit3_small_patch16_224", {"img_size": 32, **SMALL}, [True, True]),
        ("beit_base_patch16_224", {"img_size": 32, **SMALL}, [False, False]),
        ("eva02_tiny_patch14_224", {"img_size": 28, **SMALL}, [False, False]),
        ("resmlp_12_224", {"img_size": 32, "num_classes": 3}, [False] * 12),
        ("cait_xxs24_224", {"img_size": 32, **SMALL}, [True, True, False, False]),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_blocks_with_a_fixed_number_of_tokens(
    name: str, sizes: dict, takes: list[bool], device: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with torch.device(device):
        model = timm.create_model(name, pretrained=False, **sizes)
    catalog = scan(model)
    assert ["tokens" in s.slots for s in catalog if s.kind == "block"] == takes
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precision_changes_nothing(dtype: torch.dtype) -> None:
    assert scan(tiny_vit().to(dtype)) == scan(tiny_vit())
