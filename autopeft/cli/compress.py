"""`autopeft compress`: a trained plan made smaller after training."""

from __future__ import annotations

import json as json_module
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autopeft.cli import options as o
from autopeft.cli.progress import Talk
from autopeft.errors import UsageError

if TYPE_CHECKING:
    from autopeft.compression.record import CompressionRecord

__all__ = ["By", "Codes", "Of", "On", "Rescale", "compress"]


class Of(StrEnum):
    """What is compressed."""

    change = "change"
    adapters = "adapters"


class Rescale(StrEnum):
    """What kept entries are divided by."""

    dare = "dare"
    darex_q = "darex-q"
    darex_q_layer = "darex-q-layer"


class By(StrEnum):
    """What the divisor is chosen by."""

    loss = "loss"
    output = "output"


class On(StrEnum):
    """The split it is chosen on."""

    inner = "inner"
    outer = "outer"


class Codes(StrEnum):
    """What the bits stand for."""

    lloyd = "lloyd"
    uniform = "uniform"


def compress(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_PLAN",
            help="run folder, RUN#TRIAL, a folder written by autopeft train or its plan.json; "
            "a compress.json is done again and compared",
        ),
    ],
    of: Annotated[
        Of,
        typer.Option(
            help="change of the model's own tensors, which timm alone can apply, or the adapters' own tensors, which "
            "need autopeft"
        ),
    ] = Of.change,
    drop: Annotated[
        float | None, typer.Option(help="share of each changed weight's entries to drop at random, such as 0.9")
    ] = None,
    rescale: Annotated[
        Rescale,
        typer.Option(
            help="what kept entries are divided by: dare 1 - drop; darex-q one number that is tried out; darex-q-layer "
            "one per layer in closed form"
        ),
    ] = Rescale.dare,
    bits: Annotated[int | None, typer.Option(help="bits per stored value, 1 to 8", show_default="32")] = None,
    codes: Annotated[
        Codes, typer.Option(help="what the bits stand for: lloyd fits bell-shaped values, uniform spaces evenly")
    ] = Codes.lloyd,
    head: Annotated[bool, typer.Option("--head/--no-head", help="give the classifier codes too")] = False,
    choose: Annotated[By, typer.Option(help="choose the divisor by the loss, or without labels by the output")] = (
        By.loss
    ),
    choose_on: Annotated[On, typer.Option(help="split that the divisor is chosen on; inner was trained on")] = On.outer,
    samples: Annotated[int, typer.Option(help="samples that the divisor is chosen on")] = 256,
    draws: Annotated[int, typer.Option(help="random draws that the divisor is chosen over")] = 2,
    eta: Annotated[
        float | None, typer.Option(help="parameter of darex-q-layer", show_default="tried from 0.1 to 0.7")
    ] = None,
    max_loss_increase: Annotated[
        float, typer.Option(help="refuse a result whose loss on the outer split is higher by more; inf refuses none")
    ] = 0.1,
    even_larger: Annotated[
        bool, typer.Option("--even-larger", help="drop and write also where that takes more room than before")
    ] = False,
    seed: Annotated[int, typer.Option(help="seed of the draw")] = 0,
    device: o.Device = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="folder to write to", show_default="SOURCE/compressed/...")
    ] = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Drop entries of a trained change and keep the others in a few bits; each step's loss is measured."""
    from autopeft.compression.settings import CompressionSettings
    from autopeft.core.codec import encode
    from autopeft.pipeline.compress import RECORD_NAME, compress_again
    from autopeft.pipeline.compress import compress as run

    name, _, number = source.partition("#")
    if number and not number.isdigit():
        raise UsageError(f"a trial is named RUN#NUMBER, got {source!r}")
    path = Path(name)
    if path.name == RECORD_NAME:
        if drop is not None or bits is not None:
            raise UsageError(f"{source} says what is done; leave --drop and --bits out, or name the run to do it anew")
        with Talk(quiet=quiet or json) as talk:
            record, where = compress_again(path, device=device, emit=talk), path.parent
    else:
        settings = CompressionSettings(
            of=of.value,
            drop=drop,
            rescale=rescale.value,
            choose=choose.value,
            choose_on=choose_on.value,
            samples=samples,
            draws=draws,
            eta=eta,
            even_larger=even_larger,
            bits=bits,
            codes=codes.value,
            head=head,
            seed=seed,
            max_loss_increase=max_loss_increase,
        )
        trial = int(number) if number else None
        with Talk(quiet=quiet or json) as talk:
            record, where = run(path, settings, output, trial=trial, device=device, emit=talk)
    if json:
        found: dict[str, Any] = {"folder": str(where), **encode(record)}
        print(json_module.dumps(found))
        return
    _show(record)
    print(f"wrote {where}" if path.name != RECORD_NAME else f"the same bytes as in {where}; nothing was written")


def _show(record: CompressionRecord) -> None:
    from autopeft.report.tables import Table

    first, last = record.steps[0], record.steps[-1]
    names = tuple(first.metrics)
    rows = tuple(
        (
            step.name,
            f"{step.bytes:,}",
            f"{step.loss:.4f}",
            *(f"{step.metrics[name]:.4f}" for name in names),
        )
        for step in record.steps
    )
    table = Table("steps", ("step", "bytes", "loss", *names), rows, "l" + "r" * (2 + len(names)))
    print(table.text())
    print()
    seen = {True: ", which was trained on too", False: "", None: ""}[record.seen]
    print(f"{first.bytes / last.bytes:.1f} times smaller; loss {record.increase:+.4f} on the outer split{seen}")
    if record.whole:
        print(f"{len(record.whole)} weights were not dropped from: their low-rank factors take less")
    if record.unseen:
        print(f"{len(record.unseen)} weights are divided by 1 - drop: the mean of their input is not known")
    if record.form == "tensors":
        print("only autopeft can run it" + (f": {record.reason}" if record.reason else ""))
    elif record.adapter_bytes < first.bytes:
        print(f"the adapters' own tensors take {record.adapter_bytes:,} bytes before compression: see --of adapters")
