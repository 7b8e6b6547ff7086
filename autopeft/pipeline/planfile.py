"""`plan.json`: a plan that `autopeft train` takes back and retrains to the same metric."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from autopeft.core.allocation import Allocation, Provenance
from autopeft.core.bases import Bases
from autopeft.core.budget import Budget, Cost
from autopeft.core.menu import Indices, Option
from autopeft.core.site import Place
from autopeft.errors import CorruptFile, UsageError
from autopeft.pipeline.phases import FirstPhase
from autopeft.store.atomic import read_json, write_bytes, write_json

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PLAN_SCHEMA", "Plan", "plan_to_json", "read_plan", "write_plan"]

PLAN_SCHEMA = "autopeft.plan/1"

_FIRST = "first/"


@dataclass(frozen=True, eq=False)
class Plan:
    """An allocation with everything that is needed to train it again.

    Attributes:
        allocation: the options, with the entries of sparse ones and the bases of those whose bases come from data.
        model: name of the model.
        fingerprint: fingerprint of the catalogue it was made for.
        study: the resolved study as plain data: methods with their settings, train settings, data.
        seed: seed of the training that this plan describes.
        threads: CPU threads of that training; float results depend on them.
        weights_hash: hash of the base weights.
        data_hash: hash of the data and its splits.
        head: state dict entries the head starts from.
        packing: what is known of how well it is packed; see `autopeft.pipeline.packing`.
        first: the plan that is trained before this one, in the first epochs of the schedule.
    """

    allocation: Allocation
    model: str
    fingerprint: str
    study: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    threads: int = 1
    weights_hash: str = ""
    data_hash: str = ""
    head: Mapping[str, Tensor] = field(default_factory=dict)
    packing: Mapping[str, Any] = field(default_factory=dict)
    first: FirstPhase | None = None


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The JSON object that `plan --json` prints and `plan.json` holds, without the tensors' file."""
    allocation = plan.allocation
    provenance = allocation.provenance
    first: dict[str, Any] = {}
    if plan.first is not None:
        options = [_option_to_json(option) for option in plan.first.allocation.options]
        digest = plan.first.allocation.digest
        first = {"first": {"epochs": plan.first.epochs, "options": options, "digest": digest}}
    return {
        "schema": PLAN_SCHEMA,
        "model": plan.model,
        "fingerprint": plan.fingerprint,
        "budget": {
            "unit": allocation.budget.unit,
            "limit": allocation.budget.limit,
            "spent": allocation.spent,
            "share_of": allocation.budget.share_of,
            "text": allocation.budget.text,
        },
        "trainable": allocation.trainable,
        "options": [_option_to_json(option) for option in allocation.options],
        "provenance": {
            "allocator": provenance.allocator,
            "scorer": provenance.scorer,
            "bound": provenance.bound,
            "price": provenance.price,
            "value": provenance.value,
        },
        "packing": dict(plan.packing),
        "digest": allocation.digest,
        **first,
        "seed": plan.seed,
        "threads": plan.threads,
        "weights_hash": plan.weights_hash,
        "data_hash": plan.data_hash,
        "study": dict(plan.study),
    }


def write_plan(plan: Plan, path: Path) -> None:
    """Write `plan.json` and, beside it, `plan.safetensors` with chosen entries, bases from data and the head."""
    tensors = _entries(plan.allocation)
    if plan.first is not None:
        tensors |= {f"{_FIRST}{name}": tensor for name, tensor in _entries(plan.first.allocation).items()}
    tensors |= {f"head/{name}": tensor.contiguous() for name, tensor in plan.head.items()}
    data = plan_to_json(plan)
    if tensors:
        payload = save_safetensors(tensors, metadata={"format": PLAN_SCHEMA})
        target = path.with_suffix(".safetensors")
        write_bytes(target, payload)
        data["tensors"] = {"file": target.name, "sha256": hashlib.sha256(payload).hexdigest()}
    write_json(path, data)


def read_plan(path: Path) -> Plan:
    """Read what `write_plan` wrote.

    Raises:
        UsageError: when there is no such file.
        CorruptFile: when it is no plan, or its tensors are missing or changed.
        InfeasibleBudget: when the options cost more than the budget they claim.
    """
    if not path.is_file():
        raise UsageError(f"there is no plan at {path}; `autopeft plan` writes one")
    data = read_json(path)
    if not isinstance(data, dict) or data.get("schema") != PLAN_SCHEMA:
        raise CorruptFile(f"{path} is not a plan of format {PLAN_SCHEMA!r}")
    tensors = _read_tensors(path, data)
    try:
        budget = Budget(
            data["budget"]["limit"], data["budget"]["unit"], data["budget"].get("share_of"), data["budget"]["text"]
        )
        options = tuple(_option_from_json(row, tensors) for row in data["options"])
        provenance = Provenance(**data.get("provenance", {}))
        allocation = Allocation(options, budget, provenance)
        first = _first_from_json(data["first"], tensors, budget) if "first" in data else None
        plan = Plan(
            allocation,
            data["model"],
            data["fingerprint"],
            data["study"],
            data["seed"],
            data["threads"],
            data["weights_hash"],
            data["data_hash"],
            {name.removeprefix("head/"): t for name, t in tensors.items() if name.startswith("head/")},
            data.get("packing", {}),
            first,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"{path} is not a whole plan: {type(error).__name__}: {error}") from error
    if data.get("digest") != allocation.digest:
        raise CorruptFile(f"{path} was edited: its options do not match their digest {data.get('digest')!r}")
    if first is not None and data["first"].get("digest") != first.allocation.digest:
        raise CorruptFile(f"{path} was edited: the options of its first phase do not match their digest")
    return plan


def _entries(allocation: Allocation) -> dict[str, Tensor]:
    """The entries of sparse options and what was chosen with them, and the bases that options carry."""
    chosen = [(option.key, option.indices) for option in allocation.options if option.indices is not None]
    found = {f"indices/{key}": torch.from_numpy(indices.values.copy()) for key, indices in chosen}
    for key, indices in chosen:
        found |= {f"extra/{name}/{key}": torch.from_numpy(array.copy()) for name, array in indices.extra.items()}
    return found | {
        f"bases/{side}/{option.key}": torch.from_numpy(getattr(option.bases, side).copy())
        for option in allocation.options
        if option.bases is not None
        for side in ("left", "right")
    }


def _first_from_json(data: Mapping[str, Any], tensors: Mapping[str, Tensor], budget: Budget) -> FirstPhase:
    own = {name.removeprefix(_FIRST): tensor for name, tensor in tensors.items() if name.startswith(_FIRST)}
    options = tuple(_option_from_json(row, own) for row in data["options"])
    return FirstPhase(Allocation(options, budget), data["epochs"])


def _option_to_json(option: Option) -> dict[str, Any]:
    cost = option.cost
    row: dict[str, Any] = {
        "site": option.site,
        "slot": "+".join(dict.fromkeys(place.slot for place in option.places)),
        "method": option.method,
        "size": option.size,
        "cost": cost.trainable,
        "gain": option.gain,
        "stored": cost.stored,
        "bits": cost.bits,
        "entries": cost.entries,
        "tensors": cost.tensors,
        "places": [[place.site, place.slot] for place in option.places],
    }
    if option.memory is not None:
        row["memory"] = option.memory
    if option.indices is not None:
        row["indices_sha256"] = option.indices.sha256
    if option.bases is not None:
        row["bases_sha256"] = option.bases.sha256
    return row


def _option_from_json(row: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Option:
    cost = Cost(row["cost"], row["stored"], row["bits"], row["entries"], row["tensors"])
    places = tuple(Place(site, slot) for site, slot in row["places"])
    indices = None
    if "indices_sha256" in row:
        key = f"{row['site']}/{row['method']}"
        extra = {
            name.split("/", 2)[1]: tensor.numpy().copy()
            for name, tensor in tensors.items()
            if name.startswith("extra/") and name.split("/", 2)[2] == key
        }
        indices = Indices(tensors[f"indices/{key}"].numpy().copy(), extra)
        if indices.sha256 != row["indices_sha256"]:
            raise ValueError(f"the entries of {key} do not match their digest")
    bases = None
    if "bases_sha256" in row:
        key = f"{row['site']}/{row['method']}"
        bases = Bases(*(tensors[f"bases/{side}/{key}"].numpy().copy() for side in ("left", "right")))
        if bases.sha256 != row["bases_sha256"]:
            raise ValueError(f"the bases of {key} do not match their digest")
    memory = float(row["memory"]) if "memory" in row else None
    return Option(row["site"], row["method"], row["size"], cost, float(row["gain"]), places, indices, bases, memory)


def _read_tensors(path: Path, data: Mapping[str, Any]) -> dict[str, Tensor]:
    if "tensors" not in data:
        return {}
    target = path.parent / str(data["tensors"]["file"])
    if not target.is_file():
        raise CorruptFile(f"{path} refers to {target.name}, which is missing beside it")
    payload = target.read_bytes()
    if hashlib.sha256(payload).hexdigest() != data["tensors"]["sha256"]:
        raise CorruptFile(f"{target} does not match the digest in {path.name}; it was changed or truncated")
    tensors: dict[str, Tensor] = load_safetensors(payload)
    return tensors
