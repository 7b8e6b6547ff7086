from __future__ import annotations

import timm
import torch
from torch import nn

from autopeft.core.contracts import Method
from autopeft.core.site import Catalog, Site
from autopeft.methods.snella import SNELLA, SNELLAShared
from autopeft.models.scan import scan
from autopeft.testing._method_cases import ground_of
from autopeft.testing.method_laws import MethodLaws


class TestLaws(MethodLaws):
    def make(self) -> Method:
        return SNELLA(sparsifier="hard")


class TestLawsOfTheReleasedSparsifier(MethodLaws):
    """In float64: its changes start at some 1e-6."""

    models = ("vit",)
    dtypes = (torch.float64,)

    def make(self) -> Method:
        return SNELLA(start_sparsity=0.5)


class TestLawsOfTheReleasedStart(MethodLaws):
    models = ("vit",)
    dtypes = (torch.float64,)
    identity = False

    def make(self) -> Method:
        return SNELLA(sparsifier="soft", start_sparsity=0.3, start="released")


class _Two(nn.Module):
    """An 8x8 Linear, and one of 8x32."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8)
        self.two = nn.Linear(8, 32)


def _site() -> Site:
    members = tuple(
        Site(name, name, "linear", shape, True, 0, "fc", ("weight", "bias"))
        for name, shape in (("one", (8, 8)), ("two", (32, 8)))
    )
    return Site("*", "", "group", (2,), False, 0, "group", (), members=members)


def _built(method: SNELLA) -> SNELLAShared:
    generator = torch.Generator().manual_seed(0)
    shared = SNELLAShared(_site(), method.members(_site()), _Two(), 2, method, generator)
    with torch.no_grad():
        for p in shared.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return shared


def _give_scores(shared: SNELLAShared, scores: dict[str, float]) -> None:
    """Scores halved between the factors, entries alike."""
    for name, score in scores.items():
        for watch in shared.watch[name]:
            watch.mean.fill_(score / 2)
            watch.spread.fill_(1.0)


def test_hand_worked_competition() -> None:
    # 320 entries at the start; of 0.75 zeros 80 are left.
    shared = _built(SNELLA(sparsity=0.75, floor=0.0, cooldown=0.5, every=1))
    assert (shared.start, shared.end, shared.unit) == (320, 80, "entries")
    _give_scores(shared, {"one": 3.0, "two": 1.0})
    # last = 4: 80 + 240 (1 - t / 4)^3 is 320, 181.25, 110, 83.75, 80. Shares of 3 to 1, `one` holds 64 at most.
    expected = [(64, 256), (64, 117), (64, 46), (62, 21), (60, 20), (60, 20)]
    for step, (one, two) in enumerate(expected):
        assert not shared.advance(step, 8)
        assert shared.shares() == {"one": one, "two": two}


def test_a_floor_is_shared_out_by_size() -> None:
    shared = _built(SNELLA(sparsity=0.75, floor=0.5, cooldown=0.5))
    _give_scores(shared, {"one": 0.0, "two": 1.0})
    shared.advance(4, 8)
    # 40 by size are 8 and 32, the other 40 go to `two`.
    assert shared.shares() == {"one": 8, "two": 72}


def test_without_scores_the_sizes_decide() -> None:
    shared = _built(SNELLA(sparsity=0.75))
    shared.advance(0, 1)
    assert shared.shares() == {"one": 16, "two": 64}


def test_scores_are_means_of_both_factors() -> None:
    shared = _built(SNELLA())
    a, b = shared.watch["one"]
    a.mean[0, 0], a.spread[0, 0] = 2.0, 8.0  # 16 / 16 entries
    b.mean[1, 1], b.spread[1, 1] = 4.0, 8.0  # 32 / 16 entries
    assert shared.scores() == [3.0, 0.0]


def test_the_change_has_as_many_entries_as_were_shared_out() -> None:
    """Oracle T24, to the entry."""
    for method in (SNELLA(floor=0.0), SNELLA(sparsifier="soft", start="released"), SNELLA(sparsifier="hard")):
        shared = _built(method)
        _give_scores(shared, {"one": 0.0, "two": 5.0})
        for step in (0, 6):
            shared.advance(step, 8)
            changed = {a.site.name: int(a.delta()["weight"].count_nonzero()) for a in shared.adapters()}
            assert changed == shared.shares()
        assert sum(changed.values()) == shared.end == 320 - 288
        x = torch.randn(4, 8)
        for adapter in shared.adapters():
            torch.testing.assert_close(adapter.branch(x), x @ adapter.delta()["weight"].T)


def _vit_b() -> Catalog:
    with torch.device("meta"):
        return scan(timm.create_model("vit_base_patch16_224", num_classes=10))


def test_counts_on_a_vit_b16() -> None:
    """Oracle T25."""
    catalog = _vit_b()
    by_role = {"*:attn.qkv": 3072, "*:attn.proj": 1536, "*:mlp.fc1": 3840, "*:mlp.fc2": 3840}
    assert sum(by_role.values()) * 12 == 147_456
    for group, sides in by_role.items():
        assert SNELLA().cost(catalog[group], 8).trainable == 12 * (8 * sides + 3)
    # Those of the six matrices per block, 165,888 r and 3 for each of the 72, on the slices of the fused projections.
    each = SNELLA().each()
    slices = [s for s in catalog.candidates("slices") if s.kind == "linear"]
    assert len(slices) == 72
    assert sum(each.cost(s, 8).trainable for s in slices) == 165_888 * 8 + 216


def test_entries_of_a_vit_b16_are_those_of_the_end() -> None:
    catalog = _vit_b()
    cost = SNELLA(sparsity=0.9).cost(catalog["*"], 8)
    # The 48 Linears and the projection of the patches, 768 x 768 too.
    total = 84_934_656 + 589_824
    assert cost.trainable == (147_456 + 1536) * 8 + 3 * 49
    assert cost.entries == total - -(-9 * total // 10)


def test_gains_never_exceed_the_share_of_the_entries() -> None:
    ground = ground_of("vit", torch.float32)
    site = ground.catalog["*"]
    sparse, dense = SNELLA(sparsity=0.999), SNELLA(sparsity=0.5)
    sizes = dense.sizes(site)
    few, many = (m.gains(site, ground.about(site), sizes) for m in (sparse, dense))
    total = sum(float(ground.evidence[m.name]["weight"].signal.square().sum()) for m in dense.members(site))
    entries = dense.entries(dense.members(site))[0]
    assert few[-1] <= total * sparse.entries(sparse.members(site))[1] / entries * (1 + 1e-6)
    assert few[-1] < many[-1]
