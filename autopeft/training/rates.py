"""How learning rates and weight decay follow the size of what is trained, as named rules."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor, nn

from autopeft.core.contracts import Inserted, Method
from autopeft.core.site import Site
from autopeft.methods.base import Part, Role
from autopeft.training.settings import DecayRule, HeadRule, RateRule

__all__ = [
    "REFERENCE_COUNT",
    "REFERENCE_RANKS",
    "REFERENCE_WIDTH",
    "Sizes",
    "decay_factor",
    "head_factor",
    "is_decayed",
    "rate_factor",
    "sizes_of",
]

REFERENCE_WIDTH = 128
"""Width of the model that the default learning rates were chosen on, the bundled vision transformer."""

REFERENCE_RANKS: Mapping[Role, int] = MappingProxyType({"core": 8, "down": 1, "up": 1})
"""Ranks that the default learning rates were chosen with: what 0.1 % buys of each on the bundled model."""

REFERENCE_COUNT = 1211
"""Trainable scalars of the plans that the default learning rates were chosen on: 0.1 % of the bundled model."""

_LEAST_CORE = 4
"""Rank below which the rate of a core stops rising under `spectral`; measured in studies/lr_rules."""

_MIDDLE = 0.75
"""Exponent of the rule `count`."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the rules need to know about one trained tensor.

    Attributes:
        role: what it does in the change of its host.
        width: width of its host, see `sizes_of`.
        rank: the smaller side of a matrix; 1 for everything else, and where the adapter's own factor allows for it.
        per_row: entries trained per row of the host's weight, of role `entries`; 1 for everything else.
        total: scalars that the whole plan trains, the head not counted.
    """

    role: Role
    width: float = REFERENCE_WIDTH
    rank: int = 1
    per_row: float = 1.0
    total: int = REFERENCE_COUNT


def rate_factor(rule: RateRule, sizes: Sizes) -> float:
    """What a tensor's learning rate is multiplied by; 1 at the reference.

    One step of Adam changes every entry by about the learning rate `eta`, with signs that a batch makes coherent. A
    host `W` (k, d) of a network in which features of order 1 go in and out has a spectral norm of order `sqrt(k / d)`.

    - `none`: 1.
    - `width`: muP (Yang et al., 2022, arXiv 2203.03466, table 3, Adam) carried over to adapters: a tensor that sums
      over all d inputs takes `eta ~ 1 / d`, every other `eta ~ 1`. The first are `down` and `dense`, and `entries` at
      a fixed share of the weight. `up` (fed by r features of order 1), `core` and `vector` keep their rate.
    - `spectral`: a step changes the spectral norm of W by the same multiple of `sqrt(k / d)` at every width and rank.
      `core` between orthonormal bases: `||U dM V^T||_2 = eta r`, so `eta ~ 1 / r`, but no more than at rank 4. `down`
      and `up`: for A of orthonormal rows `||dB A||_2 = eta sqrt(k r)`, so `eta ~ 1 / sqrt(d r)`, and the same for A
      when B has grown at that rate. `entries`, n on k rows: the norm is `eta n / sqrt(k d)`, so
      `eta ~ 1 / (n / k)`, but no more than at one entry per row. `dense`: `1 / d`. Vectors keep theirs.
    - `count`: all rates of a plan of n scalars fall as `(REFERENCE_COUNT / n)^(3/4)`, and are never raised. A step
      along the signs lowers the loss by `eta ||g||_1`. When scalars are added, the gradient's energy `||g||_2^2`
      stays as it is at the least, and grows in proportion to n where all directions are alike: `||g||_1` goes as
      `n^(1/2)` to `n`, and the rule takes the middle. It is blind to roles, so that the plans of one budget keep
      their relations, and covers width, rank, density and depth alike.

    Args:
        rule: the rule.
        sizes: the tensor.
    """
    if rule == "none":
        return 1.0
    if rule == "count":
        return math.pow(min(1.0, REFERENCE_COUNT / sizes.total), _MIDDLE)
    width = REFERENCE_WIDTH / sizes.width
    if rule == "width":
        return width if sizes.role in ("down", "dense", "entries") else 1.0
    low = max(sizes.rank, _LEAST_CORE) if sizes.role == "core" else sizes.rank
    rank = REFERENCE_RANKS.get(sizes.role, low) / low
    by_role: Mapping[Role, float] = {
        "core": rank,
        "down": math.sqrt(width * rank),
        "up": math.sqrt(width * rank),
        "entries": 1.0 / max(1.0, sizes.per_row),
        "dense": width,
        "vector": 1.0,
    }
    return by_role[sizes.role]


def decay_factor(rule: DecayRule, sizes: Sizes) -> float:
    """What a decayed tensor's weight decay is multiplied by.

    `width`: `lambda ~ sqrt(d)` for tensors of a matrix's kind (arXiv 2510.15262, section 3): with `eta ~ 1 / d` the
    stationary spectral norm `sqrt(eta / lambda) d^(3/4)` does not depend on the width.
    """
    return math.sqrt(sizes.width / REFERENCE_WIDTH) if rule == "width" else 1.0


def is_decayed(rule: DecayRule, sizes: Sizes, parameter: nn.Parameter) -> bool:
    """Whether a tensor is decayed at all.

    Decay pulls towards the pre-trained model, since adapters train changes. Without a rule, tensors with two or more
    dimensions are decayed. With one, the role decides: vectors are not, whatever their shape (prompts, tokens), and
    chosen entries of a weight are, although they are stored as a vector.
    """
    return parameter.ndim >= 2 if rule == "none" else sizes.role != "vector"


def head_factor(rule: HeadRule, parameter: Tensor) -> float:
    """What the learning rate of a classifier's tensor is multiplied by; `width`: `REFERENCE_WIDTH / d` for its weight.

    The classifier sums over d features, which makes it `dense` in the sense of `rate_factor`.
    """
    return REFERENCE_WIDTH / parameter[0].numel() if rule == "width" and parameter.ndim >= 2 else 1.0


def sizes_of(inserted: Inserted, methods: Mapping[str, Method]) -> dict[int, Sizes]:
    """Sizes of every trainable tensor of a plan, by the tensor's `id`.

    A part's `rate_roles` name the roles. Where they do not, the method's family and the shape tell, and what they do
    not tell keeps its rate as a `vector`: a matrix of the families `matrix` and `adapter` is `down` or `up` by the side
    of the host that is its longer one, or, on a square host, by being wide or tall; one of the family `core` is `core`.

    The width of a host is the smaller side of its weight, which in a transformer is the width of the residual stream
    on every matrix. Of a depthwise convolution, and of one that reads the image, it is `REFERENCE_WIDTH`: they sum
    over a number of inputs that does not grow. Of a group it is the median over its matrices.

    Args:
        inserted: the model with adapters.
        methods: method key to method.
    """
    total = inserted.allocation.trainable
    parts = inserted.named_adapters()
    found: dict[int, Sizes] = {}
    for option in inserted.allocation:
        part = parts[option.key]
        site = part.site if isinstance(part, Part) else None
        named: Mapping[str, Role] = part.rate_roles if isinstance(part, Part) else {}
        for name, parameter in part.named_parameters():
            role = named.get(name) or _infer(methods[option.method].family, parameter, site)
            if role == "entries" and (site is None or not site.is_matrix or part.slots != ("weight",)):
                role = "vector"  # Entries of a bias or of a norm.
            rows = site.out_features if site is not None and site.kind != "group" else 1
            ranked = parameter.ndim >= 2 and not (isinstance(part, Part) and part.rank_in_scale)
            found[id(parameter)] = Sizes(
                role=role,
                width=_width(site, parameter),
                rank=min(parameter.shape[0], parameter[0].numel()) if ranked else 1,
                per_row=parameter.numel() / rows if role == "entries" else 1.0,
                total=max(1, total),
            )
    return found


def _infer(family: str, parameter: nn.Parameter, site: Site | None) -> Role:
    if parameter.ndim != 2 or family not in ("matrix", "adapter", "core"):
        return "vector"
    if family == "core":
        return "core"
    rows, columns = parameter.shape
    if rows == columns:
        return "vector"
    if family == "matrix" and site is not None and site.is_matrix and site.in_features != site.out_features:
        long = max(rows, columns)
        if long in (site.in_features, site.out_features):
            return "down" if long == site.in_features else "up"
    return "down" if rows < columns else "up"


def _width(site: Site | None, parameter: nn.Parameter) -> float:
    if site is None:
        return float(max(parameter.shape[0], parameter[0].numel())) if parameter.ndim >= 2 else REFERENCE_WIDTH
    if site.kind == "group":
        widths = [_side(member) for member in site.members if member.is_matrix]
        return float(statistics.median(widths)) if widths else REFERENCE_WIDTH
    return float(_side(site))


def _side(site: Site) -> int:
    """The smaller side of a matrix, the channels of anything else, and the reference where nothing grows."""
    if site.kind == "linear":
        return min(site.out_features, site.in_features)
    if site.kind == "conv2d":
        depthwise = site.shape[1] == 1 and site.groups > 1
        return REFERENCE_WIDTH if depthwise or site.role == "stem" else min(site.out_features, site.shape[1])
    if site.kind == "tokens":
        return site.shape[-1]
    return site.out_features
