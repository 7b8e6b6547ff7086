"""The adapter types of Hugging Face PEFT that work on image models."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from autopeft.errors import UsageError
from autopeft.methods._peft_refusals import LORA_REFUSED, UNUSABLE
from autopeft.methods._peft_sizes import (
    adalora,
    bank,
    bases,
    block_sizes,
    blocks,
    c3a_block,
    doubling,
    entries,
    even_ranks,
    half_ranks,
    initial_ranks,
    named,
    nothing,
    one,
    pairs,
    ranks,
    road,
    sparse_rate,
    sparsity,
    trained_rank,
    wide_ranks,
)
from autopeft.methods._peft_tuner import Host, Tuner

__all__ = ["TUNERS", "tuner_of"]

_MATRIX: frozenset[Host] = frozenset({"linear"})
_CONVS: frozenset[Host] = frozenset({"linear", "pointwise", "conv"})
_GROUPED: frozenset[Host] = _CONVS | {"grouped"}


def tuner_of(name: str) -> Tuner:
    """The adapter type by its name.

    Raises:
        UsageError: with the reason where PEFT has it and it cannot be used, else with a guess at the one meant.
    """
    if name in TUNERS:
        return TUNERS[name]
    if name in UNUSABLE:
        raise UsageError(f"peft: the tuner {name!r} cannot be used: {UNUSABLE[name]}")
    near = difflib.get_close_matches(name, TUNERS, n=1)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"peft: no tuner is called {name!r}.{guess} Known: {', '.join(sorted(TUNERS))}")


_LORA = Tuner(
    "LoraConfig",
    "matrix",
    _CONVS,
    ranks,
    named("r", "lora_alpha"),
    gain="rank",
    dilated=False,
    refused=LORA_REFUSED,
    note="alpha equals the rank, a scale of 1 at every size, so that one learning rate serves a mixed plan",
)

TUNERS: Mapping[str, Tuner] = MappingProxyType(
    {
        "adalora": Tuner(
            "AdaLoraConfig",
            "matrix",
            _CONVS,
            initial_ranks,
            adalora,
            size_fields=("init_r", "r"),
            gain="rank",
            derived=("ranknum",),
            refused=LORA_REFUSED,
            note="pays for init_r; the ranks are cut to an average of target_r while it trains, with backend hf_peft",
        ),
        "adamss": Tuner(
            "AdamssConfig",
            "matrix",
            _MATRIX,
            lambda site: doubling(8, min(site.in_features, site.out_features)),
            named("r"),
            touches="both",
            refused={
                "use_asa": "its subspaces come and go while it trains, and the price of a plan is fixed",
                "use_dynamic_rank": "its price would depend on the weights and not on the site",
            },
        ),
        "beft": Tuner("BeftConfig", "vector", _MATRIX, one, nothing, size_fields=(), touches="bias", gain="all"),
        "boft": Tuner(
            "BOFTConfig",
            "matrix",
            _CONVS,
            block_sizes,
            named("boft_block_size"),
            size_fields=("boft_block_size",),
            note="offered where the block size divides in_features (in * kh * kw for a convolution)",
        ),
        "c3a": Tuner(
            "C3AConfig",
            "matrix",
            _MATRIX,
            blocks,
            c3a_block,
            size_fields=("block_size",),
            fixed={"init_weights": True},
            single=True,
            note="the size is gcd(in, out) / block_size; starts at zero where PEFT's default starts at random",
        ),
        "deft": Tuner("DeftConfig", "matrix", _MATRIX, ranks, named("r"), gain="rank", single=True),
        "delora": Tuner("DeloraConfig", "matrix", _MATRIX, ranks, named("r"), gain="rank", derived=("delora_w_norm",)),
        "dora": replace(_LORA, fixed={"use_dora": True}),
        "eva": replace(
            _LORA,
            hosts=_MATRIX,
            fixed={"init_lora_weights": "eva", "eva_config": {"rho": 1.0}},
            start="data",
            note="A starts from the data's principal directions, with backend hf_peft; ranks are the plan's (rho 1)",
        ),
        "fourierft": Tuner(
            "FourierFTConfig",
            "entries",
            _MATRIX,
            entries,
            named("n_frequency"),
            size_fields=("n_frequency",),
            fixed={"init_weights": True},
            note="starts at zero where PEFT's default starts at random",
        ),
        "frod": Tuner(
            "FrodConfig",
            "vector",
            _MATRIX,
            pairs,
            sparse_rate,
            size_fields=("sparse_rate",),
            fixed={"save_projection": False, "progressbar": False},
            single=True,
            count=lambda site, size: site.in_features + size,
            note="the size is the number of sparse entries beside the singular values",
        ),
        "glora": Tuner("GloraConfig", "matrix", _MATRIX, ranks, named("r"), touches="both"),
        "gralora": Tuner("GraloraConfig", "matrix", _MATRIX, even_ranks, named("r", "alpha")),
        "hira": Tuner("HiraConfig", "matrix", _CONVS, ranks, named("r")),
        "hra": Tuner(
            "HRAConfig", "matrix", _CONVS, even_ranks, named("r"), note="even ranks: odd ones are no identity"
        ),
        "ia3": Tuner(
            "IA3Config",
            "vector",
            _GROUPED,
            one,
            nothing,
            size_fields=(),
            touches="output",
            gain="rows",
            same=True,
            note="scales the output, bias included",
        ),
        "lily": Tuner(
            "LilyConfig",
            "adapter",
            _MATRIX,
            ranks,
            named("r"),
            merges=False,
            note="each site has its own experts; the router looks at the input, so it cannot be merged",
        ),
        "ln_tuning": Tuner(
            "LNTuningConfig",
            "vector",
            _GROUPED | {"norm"},
            one,
            nothing,
            size_fields=(),
            touches="both",
            gain="all",
            same=True,
            note="trains a full copy of the layer; not on BatchNorm, whose copy would keep statistics of its own",
        ),
        "loha": Tuner("LoHaConfig", "matrix", _GROUPED, ranks, named("r", "alpha")),
        "lokr": Tuner("LoKrConfig", "matrix", _GROUPED, ranks, named("r", "alpha")),
        "lora": replace(_LORA, same=True),
        "lora_ga": replace(
            _LORA,
            hosts=_MATRIX,
            sizes=half_ranks,
            fixed={"init_lora_weights": "lora_ga", "lora_ga_config": {}},
            start="data",
            note="both factors start from the gradient, with backend hf_peft; the start is stored",
        ),
        "miss": Tuner("MissConfig", "matrix", _MATRIX, ranks, named("r")),
        "oft": Tuner(
            "OFTConfig",
            "matrix",
            _MATRIX | {"pointwise"},
            block_sizes,
            lambda site, size: {"r": 0, "oft_block_size": size},
            size_fields=("oft_block_size", "r"),
            note="not on convolutions larger than 1x1, where PEFT's output is wrong from the start",
        ),
        "olora": replace(
            _LORA,
            hosts=_MATRIX,
            fixed={"init_lora_weights": "olora"},
            start="host",
            cheaper={"init_lora_weights": True},
        ),
        "orthogonal": replace(
            _LORA, hosts=_MATRIX, sizes=even_ranks, fixed={"init_lora_weights": "orthogonal"}, single=True
        ),
        "osf": Tuner(
            "OSFConfig",
            "matrix",
            _MATRIX,
            half_ranks,
            trained_rank,
            size_fields=("effective_rank",),
            note="the size is the rank that is trained, min(in, out) - effective_rank",
        ),
        "peanut": Tuner("PeanutConfig", "matrix", _MATRIX, ranks, named("r")),
        "pissa": replace(
            _LORA,
            hosts=_MATRIX,
            fixed={"init_lora_weights": "pissa"},
            start="host",
            cheaper={"init_lora_weights": True},
        ),
        "psoft": Tuner("PsoftConfig", "core", _MATRIX, even_ranks, named("r", "psoft_alpha"), single=True),
        "pvera": Tuner("PveraConfig", "vector", _MATRIX, wide_ranks, named("r"), fixed={"save_projection": False}),
        "randlora": Tuner(
            "RandLoraConfig",
            "matrix",
            _MATRIX,
            ranks,
            bases,
            size_fields=("r",),
            fixed={"save_projection": False},
            note="the size is the number of bases, ceil(min(in, out) / r)",
        ),
        "road": Tuner(
            "RoadConfig",
            "vector",
            _MATRIX,
            lambda site: (1, 2, 4) if site.out_features % 2 == 0 else (),
            road,
            size_fields=("variant",),
            touches="output",
            note="sizes 1, 2 and 4 are the variants; rotates and scales pairs of outputs, bias included",
        ),
        "rslora": replace(_LORA, settings=named("r"), fixed={"use_rslora": True}, note="scale alpha / sqrt(r)"),
        "shira": Tuner(
            "ShiraConfig",
            "entries",
            _MATRIX,
            ranks,
            named("r"),
            fixed={"random_seed": 0},
            note="r (in + out) entries at random positions that follow from `random_seed` and are not stored",
        ),
        "supertuning": Tuner(
            "SupertuningConfig",
            "entries",
            _MATRIX,
            entries,
            sparsity,
            size_fields=("sparsity",),
            fixed={"save_precomputed_indices": False},
            gain="largest",
            refused={"r": "it adds a LoRA; use the method `lora` beside it"},
            note="the size is the number of entries, those of largest magnitude",
        ),
        "tinylora": Tuner(
            "TinyLoraConfig",
            "core",
            _MATRIX,
            entries,
            named("u"),
            size_fields=("u",),
            fixed={"save_projection": False, "weight_tying": 0.0},
            derived=("tinylora_A", "tinylora_B"),
            refused={"weight_tying": "each site pays for its own vector"},
        ),
        "unilora": Tuner(
            "UniLoraConfig",
            "core",
            _MATRIX,
            lambda site: doubling(16, sum(4 * (m.in_features + m.out_features) for m in site.members)),
            named("theta_d_length"),
            size_fields=("theta_d_length",),
            identity=False,
            shared=True,
            note="one vector for all sites of a group",
        ),
        "vblora": Tuner(
            "VBLoRAConfig",
            "matrix",
            _MATRIX,
            lambda site: (1, 2, 4, 8),
            bank,
            identity=False,
            shared=True,
            note="one bank of vectors for all sites of a group; vector_length divides all their sides",
        ),
        "vera": Tuner("VeraConfig", "vector", _MATRIX, wide_ranks, named("r"), fixed={"save_projection": False}),
        "waveft": Tuner(
            "WaveFTConfig", "entries", _MATRIX, entries, named("n_frequency"), size_fields=("n_frequency",)
        ),
    }
)
"""Name to what is known."""
