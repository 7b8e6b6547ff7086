"""The flags that several commands share, spelled as timm and Optuna spell them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "Allocator",
    "Backend",
    "BatchSize",
    "Budget",
    "Config",
    "Data",
    "Device",
    "DryRun",
    "Epochs",
    "EveryBlock",
    "Forbid",
    "ImgSize",
    "Json",
    "MaxFlops",
    "MaxMemory",
    "MaxMethods",
    "MaxOptions",
    "MaxRank",
    "MaxSize",
    "Methods",
    "Model",
    "ModelKwargs",
    "Output",
    "Overrides",
    "Pretrained",
    "PretrainedPath",
    "Quiet",
    "Require",
    "Scorer",
    "Seed",
    "Target",
    "Task",
    "Tie",
]

Model = Annotated[
    str | None,
    typer.Option(
        help="timm name, hf-hub:OWNER/NAME, local-dir:FOLDER, diffusers:FOLDER#unet, py:package.module:build or "
        "bundled:vit_tiny_fashion",
        show_default="bundled:vit_tiny_fashion",
    ),
]
Pretrained = Annotated[bool | None, typer.Option("--pretrained/--no-pretrained", help="load pre-trained weights")]
PretrainedPath = Annotated[
    Path | None, typer.Option(help="weights file (.safetensors, .pth) for a timm architecture; the head is replaced")
]
ImgSize = Annotated[int | None, typer.Option(help="input size in pixels")]
ModelKwargs = Annotated[list[str] | None, typer.Option(help="KEY=VALUE for the model's constructor; repeatable")]
Data = Annotated[
    str | None,
    typer.Option(
        help="folder of images, torch/NAME, hfds/OWNER/NAME, csv:FILE?image=COLUMN&label=COLUMN or digits",
        show_default="digits",
    ),
]
Task = Annotated[str | None, typer.Option(help="classification or diffusion", show_default="classification")]
Budget = Annotated[
    str | None,
    typer.Option(
        help="0.1%, 86k, 1.2M (trainable), 2000stored, 500KB (of the exported file), 2000entries or like:lora-r8; "
        "the head is not counted",
        show_default="0.1%",
    ),
]
Methods = Annotated[
    str | None,
    typer.Option(
        help="comma-separated methods to choose from; `autopeft methods` lists them", show_default="starred ones"
    ),
]
Scorer = Annotated[str | None, typer.Option(help="how sensitivity is measured", show_default="fisher")]
Allocator = Annotated[str | None, typer.Option(help="how the budget is spent", show_default="knapsack")]
_SELECTOR = "a name, a glob (blocks.11.*), role:ROLE (role:attn.*, role:mlp)"
Require = Annotated[
    list[str] | None, typer.Option(help=f"buy something at these sites: {_SELECTOR} or method:KEY; repeatable")
]
Forbid = Annotated[
    list[str] | None, typer.Option(help=f"buy nothing at these sites: {_SELECTOR} or method:KEY; repeatable")
]
Tie = Annotated[
    list[str] | None, typer.Option(help=f"one size for these sites: {_SELECTOR}, or role for each role; repeatable")
]
MaxOptions = Annotated[int | None, typer.Option(help="largest number of options")]
MaxMethods = Annotated[int | None, typer.Option(help="largest number of different methods")]
MaxSize = Annotated[list[str] | None, typer.Option(help="METHOD=SIZE: largest size of a method; repeatable")]
EveryBlock = Annotated[bool | None, typer.Option("--every-block", help="at least one option in every block")]
Target = Annotated[
    str | None,
    typer.Option(
        help="format that every plan can leave in: any, timm (merged), peft (one type) or lora", show_default="any"
    ),
]
MaxRank = Annotated[int | None, typer.Option(help="largest rank of the low-rank changes of a layer")]
MaxFlops = Annotated[str | None, typer.Option(help="FLOPs of a training step, such as 1.5T")]
MaxMemory = Annotated[
    str | None, typer.Option(help="bytes that a training step keeps for its backward pass, such as 200MB")
]
Backend = Annotated[str | None, typer.Option(help="how adapters are inserted", show_default="native")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", "-b", help="samples per batch")]
Epochs = Annotated[int | None, typer.Option(help="epochs of a full training")]
Seed = Annotated[int | None, typer.Option(help="seed of splits, initialisation, order and search")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:0", show_default="auto")]
Config = Annotated[
    list[Path] | None, typer.Option("--config", "-c", help="study file (YAML); several are merged left to right")
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="run folder; the same folder continues")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="settings of the study")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="say nothing on stderr but warnings and errors")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="resolve and check everything, estimate, write nothing")]
