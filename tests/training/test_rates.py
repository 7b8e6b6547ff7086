from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autopeft.backends.native import Native
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import Method
from autopeft.core.menu import Indices, Option
from autopeft.core.site import Catalog, Place, Site
from autopeft.methods.base import Part, Role
from autopeft.methods.bias import Bias
from autopeft.methods.block_adapter import BlockAdapter
from autopeft.methods.core import Core
from autopeft.methods.lora import LoRA
from autopeft.methods.norm import Norm
from autopeft.methods.sparse import Sparse
from autopeft.methods.ssf import SSF
from autopeft.methods.tokens import Tokens
from autopeft.models.load import load_model
from autopeft.models.scan import scan
from autopeft.models.spec import ModelSpec
from autopeft.testing.tiny import tiny_convnet, tiny_vit
from autopeft.training.optim import make_optimizer
from autopeft.training.rates import REFERENCE_COUNT, Sizes, decay_factor, head_factor, rate_factor, sizes_of
from autopeft.training.settings import LearningRates, TrainSettings

ETA = 1e-3
"""Every family's rate in the oracles."""

WIDTHS = (128, 512)


class Held:
    """What the optimiser needs of an insertion: one adapter on a lone float64 Linear (width, width)."""

    def __init__(self, method: Method, width: int, size: int, chosen: list[int] | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        host = nn.Linear(width, width).double()
        host.weight.data = torch.randn(width, width, generator=generator, dtype=torch.float64) * width**-0.5
        self.site = Site("host", "", "linear", (width, width), True, 0, "other", ("weight", "bias", "output"))
        indices = None if chosen is None else Indices(np.array(chosen, dtype=np.int64))
        places = tuple(Place("host", slot) for slot in method.slots(self.site))
        self.methods = {"m": method}
        option = Option("host", "m", size, method.cost(self.site, size), 0.0, places, indices)
        self.allocation = Allocation((option,), Budget(10**9))
        self.part: Any = method.build(self.site, option, host, generator)

    def groups(self) -> Mapping[str, list[nn.Parameter]]:
        return {"m": list(self.part.parameters()), "head": []}

    def named_adapters(self) -> Mapping[str, nn.Module]:
        return {"host/m": self.part}

    def step(self, loss: Tensor, **rules: Any) -> None:
        """One step of Adam at `ETA` times the rule's factors, from nothing but this gradient."""
        settings = TrainSettings(
            lr=LearningRates(**dict.fromkeys(("head", *LearningRates.FAMILIES), ETA)),
            weight_decay=0.0,
            eps=1e-30,
            **rules,
        )
        optimizer = make_optimizer(self, settings, self.methods)  # type: ignore[arg-type]
        loss.backward()
        optimizer.step()


def signs(n: int, seed: int) -> Tensor:
    return torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1


def coherent(held: Held) -> Tensor:
    """A loss whose gradient with respect to the weight's change is `u v^T`, as one batch's would be."""
    width = held.site.in_features
    return (signs(width, 1) @ held.part.delta()["weight"]) @ signs(width, 2)


def spectral(held: Held) -> float:
    return float(torch.linalg.matrix_norm(held.part.delta()["weight"].detach(), 2))


def orthonormal_rows(held: Held) -> None:
    held.part.A.data = torch.linalg.qr(held.part.A.data.T).Q.T.contiguous()


def core_step(width: int, rank: int, rule: str) -> float:
    held = Held(Core(), width, rank)
    held.step(coherent(held), rate_rule=rule)
    return spectral(held)


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_step_of_core_moves_the_spectral_norm_by_rate_times_rank(width: int, rank: int) -> None:
    assert core_step(width, rank, "none") == pytest.approx(ETA * rank, rel=1e-5)
    assert core_step(width, rank, "width") == pytest.approx(ETA * rank, rel=1e-5)
    # The reference is rank 8; below rank 4 the rate rises no further.
    assert core_step(width, rank, "spectral") == pytest.approx(ETA * (8 if rank >= 4 else 2), rel=1e-5)


def up_step(width: int, rank: int, rule: str, scaling: Any = "rank") -> float:
    held = Held(LoRA(scaling=scaling), width, rank)
    orthonormal_rows(held)
    held.step(coherent(held), rate_rule=rule)
    return spectral(held)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_a_step_of_up_moves_the_spectral_norm_by_rate_times_root_of_width_and_rank(rank: int) -> None:
    for width in WIDTHS:
        assert up_step(width, rank, "none") == pytest.approx(ETA * math.sqrt(width * rank), rel=1e-9)
        assert up_step(width, rank, "spectral") == pytest.approx(ETA * math.sqrt(128), rel=1e-9)
        assert up_step(width, rank, "none", "sqrt") == pytest.approx(ETA * math.sqrt(width), rel=1e-9)
        # rsLoRA has done the rank's part already.
        assert up_step(width, rank, "spectral", "sqrt") == pytest.approx(ETA * math.sqrt(128), rel=1e-9)


def test_under_width_a_step_of_up_moves_outputs_alike() -> None:
    moved = []
    for width in WIDTHS:
        held = Held(LoRA(), width, 4)
        orthonormal_rows(held)
        features = torch.tensor([1.0, -2.0, 0.5, 1.5], dtype=torch.float64)
        held.step(signs(width, 1) @ held.part.B @ features, rate_rule="width")
        moved.append(float((held.part.B.detach() @ features).abs().max()))
    assert moved == pytest.approx([ETA * 5.0, ETA * 5.0], rel=1e-9)  # |1| + |-2| + |0.5| + |1.5|


@pytest.mark.parametrize(("rule", "ratio"), [("none", 4.0), ("width", 1.0), ("spectral", 2.0)])
def test_a_step_of_down_moves_its_features_by_rate_times_width(rule: str, ratio: float) -> None:
    moved = []
    for width in WIDTHS:
        held = Held(LoRA(), width, 1)
        start = held.part.A.detach().clone()
        held.part.B.data = torch.outer(signs(width, 3), torch.ones(1, dtype=torch.float64))
        held.step(coherent(held), rate_rule=rule)
        held.part.B.requires_grad_(False)
        moved.append(float(((held.part.A.detach() - start) @ signs(width, 2)).abs().max()))
    assert moved[0] == pytest.approx(ETA * 128, rel=1e-9)
    assert moved[1] / moved[0] == pytest.approx(ratio, rel=1e-9)


@pytest.mark.parametrize(
    ("rule", "first", "second"), [("none", 16.0, 64.0), ("width", 16.0, 16.0), ("spectral", 1.0, 1.0)]
)
def test_a_step_of_sparse_entries_moves_the_spectral_norm_by_rate_times_entries_per_row(
    rule: str, first: float, second: float
) -> None:
    moved = []
    for width in WIDTHS:
        per_row = width // 8  # One share of the weight at both widths.
        chosen = sorted(i * width + (i + j) % width for i in range(width) for j in range(per_row))
        held = Held(Sparse(), width, len(chosen), chosen)
        # All signs equal: the change is a circulant matrix, whose largest eigenvalue is its row sum.
        held.step(held.part.delta()["weight"].sum(), rate_rule=rule)
        moved.append(spectral(held))
    assert moved == pytest.approx([ETA * first, ETA * second], rel=1e-9)


def test_sparse_entries_below_one_per_row_keep_their_rate() -> None:
    held = Held(Sparse(), 128, 4, [0, 200, 5000, 16000])
    held.step(held.part.delta()["weight"].sum(), rate_rule="spectral")
    assert held.part.values.abs().tolist() == pytest.approx([ETA] * 4)


@pytest.mark.parametrize("rule", ["none", "width", "spectral"])
def test_a_step_of_a_vector_moves_outputs_alike(rule: str) -> None:
    for width in WIDTHS:
        held = Held(Bias(), width, 1)
        held.step(signs(width, 1) @ held.part.delta()["bias"], rate_rule=rule)
        assert held.part.bias.abs().tolist() == pytest.approx([ETA] * width)


@pytest.mark.parametrize("n", [REFERENCE_COUNT, 5000, 10**6])
def test_count_keeps_the_first_order_decrease_where_energy_grows_as_the_root_of_the_count(n: int) -> None:
    # n equal entries of total energy sqrt(n): each n^(-1/4); a step along the signs decreases the loss by their sum.
    decrease = rate_factor("count", Sizes("core", total=n)) * n * n**-0.25
    assert decrease == pytest.approx(REFERENCE_COUNT**0.75, rel=1e-12)


def test_count_looks_at_the_plan_alone_and_never_raises() -> None:
    assert rate_factor("count", Sizes("vector", 1024, total=12)) == 1.0
    roles: tuple[Role, ...] = ("down", "up", "core", "dense", "entries", "vector")
    assert {rate_factor("count", Sizes(role, 384, 20, 7.0, 16 * REFERENCE_COUNT)) for role in roles} == {0.125}


def test_stationary_spectral_norm_does_not_depend_on_the_width() -> None:
    # sqrt(eta / lambda) d^(3/4), with eta of the rule `width` for a whole matrix.
    sizes = [Sizes("dense", width) for width in (128, 512, 2048)]
    norms = [math.sqrt(rate_factor("width", s) / decay_factor("width", s)) * s.width**0.75 for s in sizes]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-12)
    assert [decay_factor("width", s) for s in sizes] == [1.0, 2.0, 4.0]
    assert decay_factor("none", sizes[2]) == 1.0


def planned(catalog: Catalog, methods: Mapping[str, Method], size: int = 2) -> Allocation:
    """Every method on every site where nothing else is."""
    taken: set[Place] = set()
    options = []
    for key, method in methods.items():
        for site in catalog.candidates("whole"):
            places = tuple(sorted(catalog.places(site, method.slots(site))))
            if not places or taken & set(places) or (isinstance(method, Sparse) and site.n_weight < size):
                continue
            taken |= set(places)
            n = min(size, method.sizes(site)[-1])
            chosen = Indices(np.arange(n, dtype=np.int64)) if isinstance(method, Sparse) else None
            options.append(Option(site.name, key, n, method.cost(site, n), 0.0, places, chosen))
    return Allocation(tuple(options), Budget(10**9))


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        (LoRA(), {"A": ("down", 16, 2), "B": ("up", 16, 2)}),
        (Core(), {"M": ("core", 16, 2)}),
        (Norm(), {"weight": ("vector", 16, 1), "bias": ("vector", 16, 1)}),
        (
            BlockAdapter(),
            {"down_weight": ("down", 16, 2), "up_weight": ("up", 16, 2), "down_bias": ("vector", 16, 1)}
            | {"up_bias": ("vector", 16, 1)},
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_roles_on_a_transformer(method: Method, wanted: dict[str, tuple[str, float, int]]) -> None:
    model = tiny_vit()
    catalog = scan(model)
    with Native().insert(model, catalog, planned(catalog, {"m": method}), {"m": method}) as inserted:
        sizes = sizes_of(inserted, {"m": method})
        assert {known.total for known in sizes.values()} == {inserted.allocation.trainable}
        for key, part in inserted.named_adapters().items():
            found = {name: sizes[id(p)] for name, p in part.named_parameters()}
            on_stem = catalog[key.removesuffix("/m")].role == "stem"
            for name, (role, width, rank) in wanted.items():
                # The patch embedding reads the image: its width does not grow.
                assert (found[name].role, found[name].rank) == (role, rank)
                assert found[name].width == (128 if on_stem and role != "vector" else found[name].width)
                assert on_stem or found[name].width == width
            assert set(found) == set(wanted)


def test_entries_are_counted_by_row_on_weights_alone() -> None:
    model = tiny_vit()
    catalog = scan(model)
    for method in (Sparse(), Sparse(slot="bias")):
        with Native().insert(model, catalog, planned(catalog, {"m": method}, 32), {"m": method}) as inserted:
            sizes = sizes_of(inserted, {"m": method})
            found = {key: sizes[id(part.values)] for key, part in inserted.named_adapters().items()}  # type: ignore[arg-type]
        for key, known in found.items():
            site = catalog[key.removesuffix("/m")]
            on_weight = method.slot == "weight" and site.is_matrix
            assert (known.role, known.per_row) == (
                ("entries", 32 / site.out_features) if on_weight else ("vector", 1.0)
            )


def test_what_is_not_known_keeps_its_rate() -> None:
    held = Held(LoRA(), 32, 2)
    held.part.ring = nn.Parameter(torch.zeros(2, 3, 4))
    held.part.square = nn.Parameter(torch.zeros(2, 2))
    sizes = sizes_of(held, held.methods)  # type: ignore[arg-type]
    for tensor in (held.part.ring, held.part.square):
        assert rate_factor("spectral", sizes[id(tensor)]) == rate_factor("width", sizes[id(tensor)]) == 1.0


def test_tokens_are_vectors_whatever_their_shape() -> None:
    model = tiny_vit()
    catalog, methods = scan(model), {"m": Tokens()}
    with Native().insert(model, catalog, planned(catalog, methods), methods) as inserted:
        found = {(known.role, known.width) for known in sizes_of(inserted, methods).values()}
    assert found == {("vector", 16.0)}


def test_width_of_convolutions() -> None:
    model = tiny_convnet(width=16, groups=4)
    catalog = scan(model)
    methods: Mapping[str, Method] = {"m": Core()}
    with Native().insert(model, catalog, planned(catalog, methods, 1), methods) as inserted:
        sizes = sizes_of(inserted, methods)
        widths = {
            key.removesuffix("/m"): sizes[id(part.M)].width  # type: ignore[arg-type]
            for key, part in inserted.named_adapters().items()
        }
    found = set()
    for name, width in widths.items():
        site = catalog[name]
        fixed = site.role == "stem" or (site.groups > 1 and site.shape[1] == 1)
        assert width == (128 if fixed else min(site.shape[:2]))
        found.add(width)
    assert found == {128.0, 16.0, 4.0}  # stem; 1x1; 3x3 of 4 groups


@pytest.mark.parametrize("rule", ["width", "spectral", "count"])
def test_rules_change_nothing_on_the_bundled_model_at_its_budget(rule: Any) -> None:
    loaded = load_model(ModelSpec())
    catalog = loaded.reset_head(10, 0)
    assert Budget.share("0.001", catalog.n_base).limit == REFERENCE_COUNT
    # One method at a time on every site, of the reference's rank; the count is the budget's.
    tried: list[tuple[Method, int]] = [(LoRA(), 1), (Core(), 8), (Sparse(), 64), (BlockAdapter(), 1)]
    for method, size in (*tried, (Bias(), 1), (SSF(), 1), (Tokens(), 1)):
        with Native().insert(loaded.model, catalog, planned(catalog, {"m": method}, size), {"m": method}) as inserted:
            for known in sizes_of(inserted, {"m": method}).values():
                assert rate_factor(rule, dataclasses.replace(known, total=REFERENCE_COUNT)) == 1.0


class Turned(Part):
    """Stores its factors the other way round, and says so."""

    rate_roles: ClassVar[Mapping[str, Role]] = {"first": "down"}

    def __init__(self) -> None:
        super().__init__()
        self.site = Site("host", "", "linear", (32, 32), False, 0, "other", ("weight",))
        self.first, self.second = nn.Parameter(torch.zeros(32, 2)), nn.Parameter(torch.zeros(32, 2))


def test_a_part_may_name_its_roles() -> None:
    held = Held(LoRA(), 32, 2)
    held.part = Turned()
    sizes = sizes_of(held, held.methods)  # type: ignore[arg-type]
    assert (sizes[id(held.part.first)].role, sizes[id(held.part.second)].role) == ("down", "up")


def test_groups_by_role(insert: Callable[..., Any], methods: dict[str, Any]) -> None:
    settings = TrainSettings(
        lr=LearningRates(head=0.1, matrix=0.2), rate_rule="width", head_rule="width", lora_plus=8.0, weight_decay=0.5
    )
    optimizer = make_optimizer(insert(), settings, methods)
    rows = {(g["key"], tuple(g["params"][0].shape)): (g["peak"], g["weight_decay"]) for g in optimizer.param_groups}
    # A hand-made adapter without a site: the width is the longer side.
    assert rows == {
        ("lora", (2, 192)): (pytest.approx(0.2 * 128 / 192), 0.5),
        ("lora", (12, 2)): (pytest.approx(0.2 * 8), 0.5),
        ("lora", (12,)): (0.2, 0.0),
        ("head", (4, 12)): (pytest.approx(0.1 * 128 / 12), 0.5),
        ("head", (4,)): (0.1, 0.0),
    }


def test_decay_by_role() -> None:
    rates = {}
    for name, method, width, chosen in (
        ("lora", LoRA(), 512, None),
        ("sparse", Sparse(), 512, [0, 1]),
        ("bias", Bias(), 512, None),
    ):
        held = Held(method, width, 1 if chosen is None else len(chosen), chosen)
        for rule in ("none", "width"):
            settings = TrainSettings(weight_decay=0.5, decay_rule=rule)  # type: ignore[arg-type]
            optimizer = make_optimizer(held, settings, held.methods)  # type: ignore[arg-type]
            rates[name, rule] = {g["weight_decay"] for g in optimizer.param_groups}
    assert rates == {
        ("lora", "none"): {0.5},
        ("lora", "width"): {1.0},
        ("sparse", "none"): {0.0},
        ("sparse", "width"): {1.0},
        ("bias", "none"): {0.0},
        ("bias", "width"): {0.0},
    }


def test_head_factor() -> None:
    weight, bias = nn.Parameter(torch.zeros(10, 384)), nn.Parameter(torch.zeros(10))
    assert head_factor("width", weight) == pytest.approx(1 / 3)
    assert (head_factor("width", bias), head_factor("none", weight)) == (1.0, 1.0)
