"""Every adapter type of PEFT: laws, prices, refusals."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import timm
import timm.layers
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from torch import nn
from torch.func import functional_call

from autopeft.backends.native import Native
from autopeft.config.decode import study_from_dict, study_to_dict
from autopeft.config.study import Study
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.menu import Option
from autopeft.core.places import places_of
from autopeft.core.scores import Evidence, TensorEvidence
from autopeft.core.site import Catalog, Site
from autopeft.errors import UsageError
from autopeft.methods._peft_layer import ADAPTER
from autopeft.methods._peft_tuners import TUNERS
from autopeft.methods.base import Adapter
from autopeft.methods.hf_peft import HfPeft
from autopeft.methods.peft_adapter import PeftAdapter, PeftShared
from autopeft.models.scan import scan
from autopeft.testing.method_laws import MethodLaws
from autopeft.testing.tiny import tiny_vit

# torch warns once when a sparse tensor is made without saying whether to check it, as SHiRA and FRoD do.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")

LAWS = sorted(name for name in dir(MethodLaws) if name.startswith("test_"))
SMALL_BANK: dict[str, dict[str, Any]] = {"vblora": {"num_vectors": 8}}
"""VB-LoRA's own bank of 256 vectors is larger than all weights of the tiny models."""

REPRESENTATIVE = frozenset(
    {"dora", "hra", "ia3", "lily", "ln_tuning", "lokr", "oft", "osf", "pissa", "shira", "vblora"}
)
"""One type of each way to be built, run and merged; plain LoRA is among the built-in methods' laws."""


def method_of(tuner: str) -> HfPeft:
    return HfPeft(tuner, SMALL_BANK.get(tuner, {}))


def laws_of(tuner: str) -> MethodLaws:
    known = TUNERS[tuner]

    class Laws(MethodLaws):
        identity = known.identity
        dtypes = (torch.float32,) if known.single else (torch.float32, torch.float64)

        def make(self) -> HfPeft:
            return method_of(tuner)

    return Laws()


@pytest.mark.parametrize("tuner", sorted(REPRESENTATIVE))
def test_representative_types_keep_the_laws(tuner: str) -> None:
    laws = laws_of(tuner)
    for law in LAWS:
        getattr(laws, law)()


@pytest.mark.slow
@pytest.mark.parametrize("tuner", sorted(set(TUNERS) - REPRESENTATIVE))
def test_all_other_types_keep_the_laws(tuner: str) -> None:
    laws = laws_of(tuner)
    for law in LAWS:
        getattr(laws, law)()


# Prices

ONE_LINEAR = Site("fc", "fc", "linear", (48, 32), True, 0, "mlp.fc1", ("weight", "bias", "output"))

BY_HAND = {
    # With d = 32 inputs and k = 48 outputs: size, scalars.
    "lora": (4, 4 * (32 + 48)),
    "rslora": (4, 4 * (32 + 48)),
    "pissa": (4, 4 * (32 + 48)),
    "olora": (4, 4 * (32 + 48)),
    "orthogonal": (4, 4 * (32 + 48)),
    "eva": (4, 4 * (32 + 48)),
    "lora_ga": (4, 4 * (32 + 48)),
    "dora": (4, 4 * (32 + 48) + 48),
    "adalora": (4, 4 * (32 + 48 + 1)),
    "loha": (4, 2 * 4 * (32 + 48)),
    "lokr": (1, 6 * 4 + 1 * (8 + 8)),  # 48 = 6 * 8, 32 = 4 * 8
    "oft": (8, 32 * 7 // 2),
    "boft": (4, 32 * 4 + 48),
    "ia3": (1, 48),
    "hra": (4, 4 * 32),
    "hira": (4, 4 * (32 + 48)),
    "ln_tuning": (1, 48 * 32 + 48),
    "vera": (4, 48 + 4),
    "pvera": (4, 48 + 2 * 4),
    "randlora": (4, 8 * 4 + 4 * 32),  # 4 bases of rank 8 cover 32
    "frod": (16, 32 + 16),
    "tinylora": (8, 8),
    "fourierft": (64, 64),
    "waveft": (64, 64),
    "shira": (2, 2 * (32 + 48)),
    "supertuning": (64, 64),
    "c3a": (4, 32 * 48 // 4),  # gcd 16, blocks of 4
    "delora": (4, 4 * (32 + 48) + 1),
    "osf": (4, 4 * (32 + 48 + 1)),
    "miss": (4, 4 * 48),
    "road": (2, 2 * 48),
    "gralora": (4, 4 * (32 + 48)),
    "psoft": (4, 4 * 3 // 2 + 2 * 4),
    "peanut": (4, 2 * 4 * 48),
    "deft": (8, 8 * (32 + 48)),
    "glora": (2, 2 * 2 * (32 + 48) + 2 * 32 + 2 + 2),
    "beft": (1, 48),
    "adamss": (8, 5 * 8 + 48),
    "lily": (4, 4 * 32 + 2 * 4 * 48 + 2 * 4),
}


@pytest.mark.parametrize("tuner", sorted(BY_HAND))
def test_the_price_of_one_linear_is_the_formulas(tuner: str) -> None:
    size, count = BY_HAND[tuner]
    assert HfPeft(tuner).cost(ONE_LINEAR, size).trainable == count


@pytest.mark.parametrize("tuner", ["frod", "pissa", "olora"])
def test_a_price_that_is_figured_more_cheaply_is_that_of_the_layer(tuner: str) -> None:
    method = HfPeft(tuner)
    for size in method.sizes(ONE_LINEAR)[:6]:
        adapter, cost = built(method, size), method.cost(ONE_LINEAR, size)
        stored = adapter.stored()
        found = (sum(p.numel() for p in adapter.parameters()), sum(t.numel() for t in stored.values()), len(stored))
        assert found == (cost.trainable, cost.stored, cost.tensors)
    with pytest.raises(UsageError, match="at most"):
        method.cost(ONE_LINEAR, 10**6)


def test_every_type_has_a_number_by_hand() -> None:
    assert set(TUNERS) - set(BY_HAND) == {"unilora", "vblora"}, "those two are offered on groups and counted below"


def test_what_sites_share_is_paid_for_once() -> None:
    catalog = scan(tiny_vit())
    group = next(g for g in catalog.groups() if g.name == "*:mlp.fc1")
    assert HfPeft("unilora").cost(group, 64).trainable == 64
    # r (d + k) / b vectors chosen among h by h logits each, and h b scalars of the bank, b = gcd(16, 64).
    bank = HfPeft("vblora", {"num_vectors": 8})
    assert bank.cost(group, 2).trainable == 2 * (2 * (16 + 64) // 16 * 8) + 8 * 16
    assert bank.slots(catalog["blocks.0.mlp.fc1"]) == ()
    assert HfPeft("lora").slots(group) == ()


def test_what_follows_from_the_weight_or_a_key_is_not_stored() -> None:
    doubled = {"lora_ga"}  # its start depends on the data
    extra = {"adamss"}  # PEFT keeps its clusters' basis, which depends on the library's clustering
    for tuner, (size, count) in BY_HAND.items():
        cost = HfPeft(tuner).cost(ONE_LINEAR, size)
        if tuner in extra:
            assert cost.stored > count
        else:
            assert cost.stored == count * (2 if tuner in doubled else 1), tuner
        assert cost.bits == 32 * cost.stored


@pytest.fixture(scope="module")
def vit_b() -> Catalog:
    with torch.device("meta"):
        return scan(timm.create_model("vit_base_patch16_224"))


@pytest.mark.parametrize(
    ("tuner", "kinds", "total"),
    [("lora", ("linear",), 147_456), ("ln_tuning", ("layer_norm",), 38_400), ("beft", ("linear",), 82_944)],
)
def test_counts_on_vit_b_16(vit_b: Catalog, tuner: str, kinds: tuple[str, ...], total: int) -> None:
    method = HfPeft(tuner)
    sites = [s for s in vit_b.candidates() if s.kind in kinds and method.slots(s)]
    assert sum(method.cost(site, 1).trainable for site in sites) == total


def test_fields_of_the_study_change_price_and_scale() -> None:
    assert HfPeft("lokr", {"decompose_both": True, "decompose_factor": 4}).cost(ONE_LINEAR, 1).trainable != 40
    assert HfPeft("lokr", size="decompose_factor").cost(ONE_LINEAR, 4).trainable > 0
    adapters = [built(method, 4) for method in (HfPeft("lora"), HfPeft("lora", {"lora_alpha": 16}), HfPeft("rslora"))]
    assert [adapter.rank_in_scale for adapter in adapters] == [False, False, True]
    assert [a.layer.scaling[ADAPTER] for a in adapters] == [1.0, 4.0, 8 / 2]


def test_ia3_scales_the_input_where_it_is_told_to() -> None:
    method = HfPeft("ia3", {"feedforward_modules": ["fc"]})
    assert method.slots(ONE_LINEAR) == ("weight",)
    assert method.cost(ONE_LINEAR, 1).trainable == 32
    other = dataclasses.replace(ONE_LINEAR, name="proj", module="proj")
    assert (method.slots(other), method.cost(other, 1).trainable) == (("output",), 48)


def built(method: HfPeft, size: int, host: nn.Module | None = None, site: Site = ONE_LINEAR) -> PeftAdapter:
    option = Option(site.name, "it", size, method.cost(site, size), 0.0, tuple(places_on(site, method)))
    host = nn.Linear(32, 48) if host is None else host
    adapter = method.build(site, option, host, torch.Generator().manual_seed(0))
    assert isinstance(adapter, PeftAdapter)
    return adapter


def places_on(site: Site, method: HfPeft) -> tuple[Any, ...]:
    return Catalog((site,), (), 1, 0, 1).places(site, method.slots(site))


# Gains


def evidence(seed: int = 0) -> Evidence:
    g = torch.Generator().manual_seed(seed)
    weight, bias = (torch.randn(2, *shape, generator=g) for shape in ((48, 32), (48,)))
    slots = {
        "weight": TensorEvidence(weight[0], weight[1], weight[1].square()),
        "bias": TensorEvidence(bias[0], bias[1], bias[1].square()),
    }
    return Evidence(ONE_LINEAR, slots)


def test_gains_are_captured_energies() -> None:
    seen = evidence()
    (w, s), (b, t) = ((e.value.double(), e.signal.double()) for e in (seen["weight"], seen["bias"]))
    total = float(s.square().sum())
    singular = torch.linalg.svdvals(s).square()
    assert HfPeft("lora").gains(ONE_LINEAR, seen, (1, 4)) == pytest.approx(
        (float(singular[0]), float(singular[:4].sum()))
    )
    # A vector per row: the projection on the directions (w_i, b_i), one per row, by least squares.
    rows = torch.zeros(48 * 33, 48, dtype=torch.float64)
    for i in range(48):
        rows[i * 33 : i * 33 + 32, i] = w[i]
        rows[i * 33 + 32, i] = b[i]
    target = torch.cat([s, t[:, None]], 1).flatten()
    fitted = rows @ torch.linalg.lstsq(rows, target[:, None]).solution
    assert HfPeft("ia3").gains(ONE_LINEAR, seen, (1,)) == pytest.approx((float(fitted.square().sum()),))
    assert HfPeft("beft").gains(ONE_LINEAR, seen, (1,)) == pytest.approx((float(t.square().sum()),))
    whole = total + float(t.square().sum())
    assert HfPeft("ln_tuning").gains(ONE_LINEAR, seen, (1,)) == pytest.approx((whole,))
    largest = w.abs().flatten().topk(64).indices
    assert HfPeft("supertuning").gains(ONE_LINEAR, seen, (64,)) == pytest.approx(
        (float(s.flatten()[largest].square().sum()),)
    )
    assert HfPeft("fourierft").gains(ONE_LINEAR, seen, (64,)) == pytest.approx((total * 64 / (48 * 32),))


# What works where, and what is refused


def test_the_hosts_are_those_that_peft_is_right_on() -> None:
    """Convolutions: ten types and the variants of LoRA that only change scales; in groups four; norms one."""
    on = {kind: {t for t, known in TUNERS.items() if kind in known.hosts} for kind in ("conv", "grouped", "norm")}
    assert on["conv"] == {
        "adalora", "boft", "dora", "hira", "hra", "ia3", "ln_tuning", "loha", "lokr", "lora", "rslora",
    }  # fmt: skip
    assert on["grouped"] == {"ia3", "ln_tuning", "loha", "lokr"}
    assert on["norm"] == {"ln_tuning"}
    assert {t for t, known in TUNERS.items() if "pointwise" in known.hosts} - on["conv"] == {"oft"}


def conv_site(conv: nn.Conv2d) -> Site:
    slots = ("weight", "bias", "output")
    return Site(
        "c", "c", "conv2d", tuple(conv.weight.shape), True, 0, "conv", slots, groups=conv.groups, channel_axis=1
    )


@pytest.mark.parametrize(
    ("tuner", "host", "reason"),
    [
        ("lora", nn.Conv2d(4, 8, 3, dilation=2), "ignores the dilation"),
        ("dora", nn.Conv2d(4, 8, 3, dilation=2), "ignores the dilation"),
        ("lora", timm.layers.StdConv2d(4, 8, 3, bias=True), "standardise"),
        ("loha", timm.layers.StdConv2d(4, 8, 3, bias=True), "standardise"),
        ("ia3", timm.layers.StdConv2d(4, 8, 3, bias=True), "standardise"),
        ("loha", timm.layers.Conv2dSame(4, 8, 3, bias=True), "pads by a rule of its own"),
        ("lokr", timm.layers.Conv2dSame(4, 8, 3, bias=True), "pads by a rule of its own"),
        ("dora", timm.layers.Conv2dSame(4, 8, 3, bias=True), "pads by a rule of its own"),
    ],
)
def test_known_defects_are_named(tuner: str, host: nn.Conv2d, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        built(HfPeft(tuner), 2 if tuner != "ia3" else 1, host, conv_site(host))


@pytest.mark.parametrize("tuner", ["lora", "ia3"])
def test_convolutions_that_pad_by_themselves_work_where_peft_calls_them(tuner: str) -> None:
    host = timm.layers.Conv2dSame(4, 8, 3, stride=2, bias=True)
    adapter = built(HfPeft(tuner), 1, host, conv_site(host))
    x = torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(0))
    run = adapter.around if adapter.form == "stand_in" else lambda forward, x: adapter.transform(forward(x))
    assert torch.equal(run(host.forward, x), host(x))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3)
    merged = adapter.merge({"weight": host.weight, "bias": host.bias})
    wanted = run(host.forward, x)
    assert float((functional_call(host, merged, (x,)) - wanted).detach().abs().max()) <= 1e-5
    assert float((wanted - host(x)).detach().abs().max()) > 1e-2


def test_sites_that_no_size_fits_are_not_offered() -> None:
    stem = conv_site(nn.Conv2d(3, 64, 7))
    assert HfPeft("boft").slots(stem) == (), "147 inputs are divided by no even block"
    assert HfPeft("oft").slots(stem) == (), "PEFT's OFT is wrong on kernels larger than 1x1"
    depthwise = conv_site(nn.Conv2d(8, 8, 3, groups=8))
    assert HfPeft("lora").slots(depthwise) == ()
    assert HfPeft("loha").slots(depthwise) == ("weight",)
    slice_of = dataclasses.replace(ONE_LINEAR, name="fc[q]", rows=(0, 48), parent="fc")
    assert HfPeft("lora").slots(slice_of) == (), "PEFT adapts a fused projection whole"
    with pytest.raises(UsageError, match="is refused by PEFT"):
        HfPeft("gralora").cost(dataclasses.replace(ONE_LINEAR, shape=(48, 33)), 2)


@pytest.mark.parametrize(
    "model",
    [
        Beit(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=3, use_rel_pos_bias=True),
        Eva(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=3, qkv_fused=True),
    ],
    ids=["beit", "eva02"],
)
def test_a_fused_weight_that_is_read_past_its_module_is_not_offered(model: nn.Module) -> None:
    """timm's BEiT and EVA use `qkv.weight` without calling `qkv`: PEFT's layer would never run."""
    model = model.eval()
    catalog = scan(model)
    site = catalog["blocks.0.attn.qkv"]
    method = HfPeft("lora")
    assert method.slots(site) == ()
    forced = dataclasses.replace(site, slots=("weight", "bias", "output"))
    places = tuple(sorted(catalog.places(forced, ("weight",))))
    option = Option(site.name, "it", 1, method.cost(forced, 1), 0.0, places)
    with (
        pytest.raises(UsageError, match="its forward is never called"),
        Native().insert(model, catalog, Allocation((option,), Budget(10**6)), {"it": method}),
    ):
        pass
    live = catalog["blocks.0.attn.proj"]
    assert method.slots(live) == ("weight",)


def test_what_cannot_be_used_says_why() -> None:
    for tuner, words in {
        "lorra": "Did you mean 'lora'",
        "prompt_tuning": "language model",
        "poly": "number of the task",
        "corda": "covariances",
    }.items():
        with pytest.raises(UsageError, match=words):
            HfPeft(tuner)
    for tuner, fields, words in [
        ("lokr", {"decompose_bth": True}, "Did you mean 'decompose_both'"),
        ("lora", {"target_modules": ["fc"]}, "the plan decides that"),
        ("lora", {"r": 8}, "is the size"),
        ("oft", {"r": 8}, "is the size"),
        ("lora", {"init_lora_weights": "mica"}, "pissa_niter_N"),
        ("lora", {"lora_bias": True}, "the method `bias`"),
        ("eva", {"eva_config": {"rho": 2.0}}, "rho must be 1"),
        ("adamss", {"use_asa": True}, "the price of a plan is fixed"),
        ("tinylora", {"weight_tying": 0.5}, "its own vector"),
    ]:
        with pytest.raises(UsageError, match=words):
            HfPeft(tuner, fields)
    with pytest.raises(UsageError, match="whole number from 1"):
        HfPeft("lora").cost(ONE_LINEAR, 0)
    with pytest.raises(UsageError, match="cannot be used on"):
        HfPeft("shira").cost(conv_site(nn.Conv2d(3, 4, 3)), 1)


def test_a_study_names_a_type_with_its_fields_and_gives_it_back() -> None:
    data = {"methods": {"lokr": {"type": "peft", "tuner": "lokr", "fields": {"decompose_both": True}}, "peft": None}}
    study = study_from_dict(data)
    assert isinstance(study, Study)
    assert study.methods == {"lokr": HfPeft("lokr", {"decompose_both": True}), "peft": HfPeft()}
    assert study_from_dict(study_to_dict(study)).methods == study.methods
    with pytest.raises(UsageError, match="decompose_bth"):
        study_from_dict({"methods": {"it": {"type": "peft", "tuner": "lokr", "fields": {"decompose_bth": True}}}})


# The adapter


def test_parameters_are_float32_on_a_bfloat16_host() -> None:
    for tuner in ("lora", "dora", "pissa", "lokr", "ia3"):
        host = nn.Linear(32, 48).bfloat16()
        adapter = built(HfPeft(tuner), 1, host)
        x = torch.randn(3, 32).bfloat16()
        y = adapter.transform(host(x)) if adapter.form == "output" else adapter.around(host.forward, x)
        assert {p.dtype for p in adapter.parameters()} == {torch.float32}
        assert y.dtype == torch.bfloat16
        assert float((y - host(x)).detach().abs().max()) <= 0.05, tuner


def test_the_layer_follows_the_hosts_present_tensors() -> None:
    """A swapped bias is seen; what PiSSA took stays taken."""
    host = nn.Linear(32, 48)
    adapter = built(HfPeft("pissa"), 4, host)
    x = torch.randn(3, 32)
    before = adapter.around(host.forward, x)
    bias = host.bias
    host._parameters["bias"] = nn.Parameter(bias.detach() + 1)
    assert torch.allclose(adapter.around(host.forward, x), before + 1, atol=1e-5)


def test_low_rank_factors_are_the_change_of_the_weight() -> None:
    """Also where the start was taken from the weight: the difference has twice the rank."""
    for tuner, rank in {"lora": 4, "pissa": 8, "rslora": 4}.items():
        host = nn.Linear(32, 48)
        adapter = built(HfPeft(tuner), 4, host)
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(0.1 * torch.randn_like(p))
        pair = adapter.low_rank()
        assert pair is not None
        assert pair[0].shape[0] == rank
        change = adapter.merge({"weight": host.weight, "bias": host.bias})["weight"] - host.weight
        assert torch.allclose(pair[1] @ pair[0], change.detach(), atol=1e-5)
    assert built(HfPeft("dora"), 4).low_rank() is None
    assert built(HfPeft("loha"), 4).low_rank() is None


def test_a_start_that_changes_the_base_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora.layer import Linear

    def spoil(self: Any, adapter_name: str, init: Any) -> None:
        self.get_base_layer().weight.data = self.get_base_layer().weight.data * 2

    monkeypatch.setattr(Linear, "reset_lora_parameters", spoil)
    with pytest.raises(UsageError, match="the model is only borrowed"):
        built(HfPeft("lora"), 4)


def test_a_group_holds_its_shared_vector_once() -> None:
    model = tiny_vit()
    catalog = scan(model)
    method = HfPeft("unilora")
    group = next(g for g in catalog.groups() if g.name == "*:mlp.fc1")
    option = Option(group.name, "it", 64, method.cost(group, 64), 0.0, places_of(catalog, method, group))
    with Native().insert(model, catalog, Allocation((option,), Budget(10**6)), {"it": method}) as inserted:
        shared = inserted.named_adapters()["*:mlp.fc1/it"]
        assert isinstance(shared, PeftShared)
        assert [tuple(p.shape) for p in shared.parameters()] == [(64,)]
        assert sum(t.numel() for n, t in inserted.state().items() if n.startswith("adapter/")) == 64
        x = torch.randn(2, 3, 8, 8)
        before = inserted.model(x)
        with torch.no_grad():
            next(shared.parameters()).add_(0.5)
        assert all(isinstance(a, Adapter) for a in shared.adapters())
        assert not torch.equal(inserted.model(x), before)
