"""The exported adapter file: it comes back, and it takes what the plan costs in bytes."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from autopeft.backends.native import Native
from autopeft.config.registries import METHODS
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import BasedMethod, Inserted, Method
from autopeft.core.menu import Option
from autopeft.core.places import places_of
from autopeft.core.scores import Evidence, TensorEvidence
from autopeft.core.site import Catalog, Site
from autopeft.errors import CorruptFile, StoreError, UsageError
from autopeft.export.native_file import full_names, is_native, load_native, write_native
from autopeft.methods.bit_adaptformer import BitAdaptFormer
from autopeft.methods.bit_lora import BitLoRA
from autopeft.methods.core import Core
from autopeft.models.scan import scan
from autopeft.testing._method_cases import cases_of, ground_of, images
from autopeft.training.checkpoint import save_adapter

ANY = Budget(10**9)
CODED: Mapping[str, Method] = {
    "bit_lora_2": BitLoRA(bits=2),
    "bit_lora_5": BitLoRA(bits=5),
    "bit_adaptformer_4": BitAdaptFormer(bits=4),
    "core_gradient": Core("gradient"),
    "core_rectangle": Core(shape="rectangle"),
}


def built_in() -> dict[str, Method]:
    return {name: METHODS[name]() for name in METHODS if METHODS[name].__module__.startswith("autopeft.")}


def disturb(inserted: Inserted) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for part in inserted.named_adapters().values():
            for p in part.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p) + 0.05)


def header_of(path: Path) -> dict[str, dict[str, list[int]]]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, dict[str, list[int]]] = json.loads(file.read(length))
    header.pop("__metadata__")
    return header


def added_bytes(inserted: Inserted, empty: int, path: Path) -> int:
    """What the plan adds to the file that holds the classifier alone."""
    return write_native(inserted, path).stat().st_size - empty


def empty_size(model: torch.nn.Module, catalog: Catalog, path: Path) -> int:
    with Native().insert(model, catalog, Allocation((), ANY), {}) as inserted:
        return write_native(inserted, path).stat().st_size


@pytest.mark.parametrize("key", sorted({*built_in(), *CODED}))
def test_every_method_is_priced_as_it_is_written(key: str, tmp_path: Path) -> None:
    method = {**built_in(), **CODED}[key]
    found = 0
    for case in cases_of(method, ("vit", "convnet"), (torch.float32,)):
        found += 1
        model, catalog, x = case.ground.model(), case.ground.catalog, images(torch.float32)
        empty = empty_size(model, catalog, tmp_path / "empty.safetensors")
        file = tmp_path / "adapter.safetensors"
        with Native().insert(model, catalog, case.allocation, {"tested": method}, seed=1) as inserted:
            disturb(inserted)
            expected = inserted.model(x)
            added = added_bytes(inserted, empty, file)
        entries = {name: entry for name, entry in header_of(file).items() if name.startswith("o0.")}
        sizes = [entry["data_offsets"][1] - entry["data_offsets"][0] for entry in entries.values()]
        numbers = sum(load_file(file)[name].numel() for name in entries)
        cost = method.cost(case.site, case.option.size)
        written = (numbers, 8 * sum(sizes), len(entries))
        assert written == (cost.stored, cost.bits, cost.tensors), f"{case}: wrote {written}, the cost says {cost}"
        assert added <= cost.of("bytes"), f"{case}: {added} bytes in the file, {cost.of('bytes')} paid"
        with Native().insert(case.ground.model(twin=1), catalog, case.allocation, {"tested": method}, seed=2) as other:
            load_native(other, file)
            torch.testing.assert_close(other.model(x), expected, rtol=1e-5, atol=1e-5)
    assert found, f"{key} can be used on no site of the small models"


def mixed_plan(
    catalog: Catalog,
    methods: Mapping[str, Method],
    about: Callable[[Site], Evidence],
    rng: random.Random,
    share: float,
    first: str = "",
) -> Allocation:
    """Options of any methods and sizes wherever no other has taken the place, one of `first` among them."""
    options: list[Option] = []
    taken: set[object] = set()
    sites = list(catalog.offered("both"))
    rng.shuffle(sites)
    sites.sort(key=lambda site: not (first and methods[first].slots(site)))
    for site in sites:
        for key in sorted(rng.sample(sorted(methods), len(methods)), key=lambda key: key != first):
            method, wanted = methods[key], key == first and not options
            if not method.slots(site) or (rng.random() > share and not wanted):
                continue
            places = places_of(catalog, method, site)
            if taken & set(places):
                continue
            size = rng.choice(method.sizes(site))
            indices = method.select(site, about(site), size)
            bases = method.bases(site, about(site), size, indices) if isinstance(method, BasedMethod) else None
            options.append(Option(site.name, key, size, method.cost(site, size), 0.0, places, indices, bases))
            taken |= set(places)
    return Allocation(tuple(options), Budget(10**9, "bytes"))


def test_fifty_mixed_plans_take_no_more_than_they_cost(tmp_path: Path) -> None:
    methods = {**built_in(), **CODED}
    ground = ground_of("vit", torch.float32)
    model = ground.model()
    empty = empty_size(model, ground.catalog, tmp_path / "empty.safetensors")
    rng = random.Random(0)
    used: set[str] = set()
    keys = sorted(methods)
    for number in range(max(50, len(keys))):
        share = rng.choice((0.02, 0.1, 0.5))
        plan = mixed_plan(ground.catalog, methods, ground.about, rng, share, first=keys[number % len(keys)])
        used |= {o.method for o in plan}
        with Native().insert(model, ground.catalog, plan, methods) as inserted:
            file = tmp_path / f"{number}.safetensors"
            added = added_bytes(inserted, empty, file)
            tensors = plan.cost.tensors
            assert added <= plan.spent, f"plan {number}: {added:,} bytes written, {plan.spent:,} paid"
            assert plan.spent - added <= 40 * tensors, f"plan {number}: {plan.spent - added} bytes too dear"
            assert all(len(name) <= 7 for name in header_of(file) if name.startswith("o"))
    usable = {key for key in keys if any(methods[key].slots(site) for site in ground.catalog.offered("both"))}
    assert used == usable, f"never drawn: {sorted(usable - used)}"


def random_evidence(site: Site) -> Evidence:
    generator = torch.Generator().manual_seed(0)
    slots = {}
    for slot, shape in (("weight", site.shape), ("bias", site.shape[:1])):
        value = torch.randn(shape, generator=generator)
        slots[slot] = TensorEvidence(value, value, value.square())
    return Evidence(site, slots)


@pytest.mark.parametrize("bits", [1, 4])
def test_on_a_model_of_real_width_the_price_is_close(bits: int, tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    catalog = scan(model)
    names = ("bias", "lora", "norm", "ssf", "sparse", "vector", "adapter")
    methods: dict[str, Method] = {
        **{n: METHODS[n]() for n in names},
        "bit_lora": BitLoRA(bits),
        "bit_mlp": BitAdaptFormer(bits),
    }
    empty = empty_size(model, catalog, tmp_path / "empty.safetensors")
    plan = mixed_plan(catalog, methods, random_evidence, random.Random(bits), share=0.5)
    with Native().insert(model, catalog, plan, methods) as inserted:
        added = added_bytes(inserted, empty, tmp_path / "adapter.safetensors")
    assert 0.9 * plan.spent <= added <= plan.spent
    # Nothing but codes of rank 1: as small as a tensor gets, and header and slack weigh most.
    small = tuple(
        Option(s.name, "bit_lora", 1, methods["bit_lora"].cost(s, 1), 0.0, places_of(catalog, methods["bit_lora"], s))
        for s in catalog.candidates("whole")
        if s.role == "attn.qkv"
    )
    plan = Allocation(small, Budget(10**9, "bytes"))
    with Native().insert(model, catalog, plan, methods) as inserted:
        added = added_bytes(inserted, empty, tmp_path / "adapter.safetensors")
    assert 0.8 * plan.spent <= added <= plan.spent


def coded(catalog: Catalog, size: int) -> Allocation:
    method, site = BitLoRA(), catalog["blocks.0.attn.qkv"]
    options: Sequence[Option] = (
        Option(site.name, "bits", size, method.cost(site, size), 0.0, places_of(catalog, method, site)),
    )
    return Allocation(tuple(options), ANY)


def test_codes_are_written_in_place_of_the_state_of_training(tmp_path: Path) -> None:
    ground = ground_of("vit", torch.float32)
    model, x = ground.model(), images(torch.float32)
    with Native().insert(model, ground.catalog, coded(ground.catalog, 2), {"bits": BitLoRA()}) as inserted:
        disturb(inserted)
        expected = inserted.model(x)
        exported = write_native(inserted, tmp_path / "native.safetensors")
        trial = save_adapter(inserted, tmp_path / "trial.safetensors")
        names = list(full_names(inserted).items())
        assert names[0] == ("o0.0", "packed/blocks.0.attn.qkv/bits/packed")
        assert names[1:] == [("head/head.weight", "head/head.weight"), ("head/head.bias", "head/head.bias")]
    assert is_native(exported)
    assert not is_native(trial)
    tensors = load_file(exported)
    assert tensors["o0.0"].dtype == torch.uint8
    # 2 x 16 and 48 x 2 entries of one bit, each with two floats in front.
    assert tensors["o0.0"].shape == (8 + 4 + 8 + 12,)
    with Native().insert(model, ground.catalog, coded(ground.catalog, 2), {"bits": BitLoRA()}, seed=4) as inserted:
        load_native(inserted, exported)
        assert torch.equal(inserted.model(x), expected)
        again = write_native(inserted, tmp_path / "again.safetensors")
        assert again.read_bytes() == exported.read_bytes()


def test_what_does_not_belong_is_refused(tmp_path: Path) -> None:
    ground = ground_of("vit", torch.float32)
    model = ground.model()
    path = tmp_path / "native.safetensors"
    with Native().insert(model, ground.catalog, coded(ground.catalog, 2), {"bits": BitLoRA()}) as inserted:
        write_native(inserted, path)
        trial = save_adapter(inserted, tmp_path / "trial.safetensors")
        with pytest.raises(CorruptFile, match=r"not an exported adapter of format 'autopeft\.native/2'"):
            load_native(inserted, trial)
        with pytest.raises(CorruptFile, match="not a readable"):
            load_native(inserted, tmp_path / "absent.safetensors")
        metadata = {"format": "autopeft.native/2", "plan": inserted.allocation.digest}
        tensors = load_file(path)
        del tensors["o0.0"]
        save_file(tensors, tmp_path / "part.safetensors", metadata)
        with pytest.raises(UsageError, match="1 tensors missing"):
            load_native(inserted, tmp_path / "part.safetensors")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CorruptFile, match="not a readable"):
        is_native(path)
    with Native().insert(model, ground.catalog, coded(ground.catalog, 1), {"bits": BitLoRA()}) as inserted:
        write_native(inserted, path)
    with (
        Native().insert(model, ground.catalog, coded(ground.catalog, 2), {"bits": BitLoRA()}) as inserted,
        pytest.raises(StoreError, match="exported from the plan"),
    ):
        load_native(inserted, path)
