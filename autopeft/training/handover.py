"""From one plan's training to another's: what stays is carried over, with its moments; ranks are cut and grown."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from autopeft.core.allocation import Allocation
from autopeft.core.contracts import Inserted
from autopeft.errors import UsageError
from autopeft.methods.core import CoreAdapter
from autopeft.methods.lora import LoRAAdapter

__all__ = ["Begin", "Moments", "best_rank", "hand_over", "named_parameters", "retained"]

Moments = Mapping[str, Mapping[str, Tensor]]
"""Name of a parameter in the saved state to AdamW's `exp_avg`, `exp_avg_sq` and `step`."""


@dataclass(frozen=True, slots=True, eq=False)
class Begin:
    """Where a training begins that goes on from another one.

    Attributes:
        epoch: complete epochs, of the whole schedule.
        state: what `Inserted.load_state` takes.
        moments: of the parameters that go on; the others start without.
        losses: mean training loss of each complete epoch.
        curve: (epoch, value) pairs of the watched metric.
    """

    epoch: int
    state: Mapping[str, Tensor]
    moments: Moments = field(default_factory=dict)
    losses: tuple[float, ...] = ()
    curve: tuple[tuple[int, float], ...] = ()

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of all of it that decides the result."""
        found = hashlib.sha256(str(self.epoch).encode())
        flat = {**self.state, **{f"{n}/{k}": t for n, kept in self.moments.items() for k, t in kept.items()}}
        for name, tensor in sorted(flat.items()):
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            found.update(name.encode() + raw.numpy().tobytes())
        return found.hexdigest()[:16]


def named_parameters(inserted: Inserted) -> dict[str, nn.Parameter]:
    """Every trained parameter, adapters' and head's, by its name in `Inserted.state`."""
    found = {
        f"adapter/{key}/{name}": parameter
        for key, adapter in inserted.named_adapters().items()
        for name, parameter in adapter.named_parameters()
    }
    head = {id(p) for p in inserted.groups()["head"]}
    return found | {f"head/{name}": p for name, p in inserted.model.named_parameters() if id(p) in head}


def retained(adapter: nn.Module, size: int) -> float:
    """Share of the squared Frobenius norm of a trained change that a smaller size keeps; 1 for a change of zero.

    Of LoRA the best approximation of that rank keeps the largest squared singular values (Eckart and Young, 1936). A
    core between nested frozen bases keeps its leading block, which is the nearest matrix that the smaller bases can
    express.

    Raises:
        UsageError: for an adapter that cannot be cut.
    """
    if isinstance(adapter, LoRAAdapter):
        parts = _squared_values(adapter.B, adapter.A)
        kept = parts[:size].sum()
    elif isinstance(adapter, CoreAdapter):
        parts = adapter.M.detach().double().square()
        kept = parts[:size, :size].sum()
    else:
        raise UsageError(f"a {type(adapter).__name__} cannot be cut to a smaller size")
    total = float(parts.sum())
    return float(kept) / total if total else 1.0


def best_rank(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best approximation of `up @ down` at a rank, in balanced factors.

    Args:
        up: (out, r).
        down: (r, in).
        rank: at most r.

    Returns:
        `(up', down', left, right)` with `up' = up @ right` (out, rank) and `down' = left @ down` (rank, in), float64;
        their product is `P_k S_k Q_k^T` of the singular value decomposition of `up @ down`.
    """
    up, down = up.detach().double(), down.detach().double()
    # Through the small sides: the product itself is never decomposed.
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    p, values, qt = torch.linalg.svd(r_up @ r_down.T)
    p, values, q = p[:, :rank], values[:rank], qt[:rank].T
    # A direction of no length has no inverse root; it stays zero.
    root = torch.where(values > 0, values, 1.0).rsqrt() * (values > 0)
    left = root[:, None] * (q_up @ p).T @ up
    right = down @ (q_down @ q) * root
    return up @ right, left @ down, left, right


def hand_over(
    before: Allocation,
    state: Mapping[str, Tensor],
    moments: Moments,
    inserted: Inserted,
    epoch: int,
    *,
    scales: Mapping[str, float] | None = None,
) -> Begin:
    """Where the training of a second plan begins that follows a first one's.

    Equal options keep every tensor and moment. LoRA of a smaller rank becomes its best approximation, of a larger one
    gains fresh rows of A and zeros of B; a core is cut to its leading block or embedded in a larger one: growing
    changes nothing of the function. First moments follow the linear map of the factors exactly, as gradients do;
    second moments follow its squares, as if entries were uncorrelated. New options start as they were inserted, and
    options that are gone are forgotten. The head goes on.

    Args:
        before: the first plan.
        state: `Inserted.state` after its training.
        moments: AdamW's moments after it.
        inserted: the second plan in its model, as it starts.
        epoch: complete epochs.
        scales: option key to LoRA's scale in the first plan; the second plan's own where none is given.

    Raises:
        UsageError: when an option changes its size in a way that no rule covers.
    """
    known = {option.key: option for option in before}
    found = dict(inserted.state())
    kept: dict[str, dict[str, Tensor]] = {}
    for name in [n for n in found if n.startswith("head/") and n in state]:
        found[name] = state[name]
        kept |= {name: dict(moments[name])} if name in moments else {}
    for option in inserted.allocation:
        old, adapter = known.get(option.key), inserted.named_adapters()[option.key]
        if old is None:
            continue
        prefixes = (f"adapter/{option.key}/", f"buffer/{option.key}/")
        if (old.size, old.indices, old.bases) == (option.size, option.indices, option.bases):
            for name in [n for n in found if n.startswith(prefixes)]:
                found[name] = state[name]
                kept |= {name: dict(moments[name])} if name in moments else {}
        elif isinstance(adapter, CoreAdapter) and not (old.bases or option.bases or old.indices or option.indices):
            _resize_core(prefixes[0], state, moments, found, kept)
        elif isinstance(adapter, LoRAAdapter):
            ratio = (scales or {}).get(option.key, adapter.scale) / adapter.scale
            _resize_lora(prefixes[0], ratio, state, moments, found, kept)
        else:
            raise UsageError(f"{option.key} goes from size {old.size} to {option.size}, which only lora and core can")
    return Begin(epoch, found, kept)


def _resize_core(
    prefix: str,
    state: Mapping[str, Tensor],
    moments: Moments,
    found: dict[str, Tensor],
    kept: dict[str, dict[str, Tensor]],
) -> None:
    name = f"{prefix}M"

    def fitted(old: Tensor) -> Tensor:
        new = torch.zeros_like(found[name])
        n = min(len(old), len(new))
        new[:n, :n] = old[:n, :n].to(new)
        return new

    if name in moments:
        kept[name] = {k: t if k == "step" else fitted(t) for k, t in moments[name].items()}
    found[name] = fitted(state[name])


def _resize_lora(
    prefix: str,
    ratio: float,
    state: Mapping[str, Tensor],
    moments: Moments,
    found: dict[str, Tensor],
    kept: dict[str, dict[str, Tensor]],
) -> None:
    """`ratio` is the old scale over the new one: B grows by it, its gradient falls by it."""
    down, up = state[f"{prefix}A"], state[f"{prefix}B"]
    fresh = found[f"{prefix}A"]
    rank, old = len(fresh), len(down)
    if rank >= old:
        more = fresh[old:].to(down)
        found[f"{prefix}A"] = torch.cat([down, more])
        found[f"{prefix}B"] = torch.cat([ratio * up, torch.zeros(len(up), rank - old).to(up)], dim=1)
        left = torch.eye(rank, old, dtype=torch.float64)
        right = left.T
    else:
        new_up, new_down, left, right = best_rank(ratio * up, down, rank)
        found[f"{prefix}A"], found[f"{prefix}B"] = new_down.to(down), new_up.to(up)
    # With A' = left A and B' = ratio B right, gradients are g_A' = right^T g_A and g_B' = g_B left^T / ratio.
    for factor in ("A", "B"):
        name = f"{prefix}{factor}"
        if name in moments:
            moved = {"step": moments[name]["step"]}
            for kind, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
                old_moment = moments[name][kind].double()
                new = right.T.pow(power) @ old_moment if factor == "A" else old_moment @ left.T.pow(power)
                moved[kind] = (new if factor == "A" else new / ratio**power).to(moments[name][kind])
            kept[name] = moved


def _squared_values(up: Tensor, down: Tensor) -> Tensor:
    """Squared singular values of `up @ down`, decreasing, float64."""
    up, down = up.detach().double(), down.detach().double()
    small = torch.linalg.qr(up)[1] @ torch.linalg.qr(down.T)[1].T
    values: Tensor = torch.linalg.svdvals(small)
    return values.square().cpu()
