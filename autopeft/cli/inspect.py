"""`autopeft inspect`: what is in a model."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer

from autopeft.cli import options as o

__all__ = ["inspect"]


def inspect(
    model: Annotated[str, typer.Argument(help="model, as for search --model")] = "bundled:vit_tiny_fashion",
    pretrained: Annotated[bool, typer.Option("--pretrained/--no-pretrained", help="load pre-trained weights")] = False,
    img_size: o.ImgSize = None,
    model_kwargs: o.ModelKwargs = None,
    budget: Annotated[str, typer.Option(help="budget to translate into parameters")] = "0.1%",
    json: o.Json = False,
) -> None:
    """List the sites of a model, what can be put on them, and what a budget means for it."""
    from autopeft.cli.flags import read_study, study_flags
    from autopeft.core.codec import encode
    from autopeft.models.load import load_model
    from autopeft.models.scan import scan
    from autopeft.pipeline.budget import resolve_budget

    study = read_study(
        None,
        study_flags(
            model=model,
            pretrained=pretrained or model.startswith("bundled:"),
            img_size=img_size,
            model_kwargs=model_kwargs,
            budget=budget,
        ),
        None,
    )
    loaded = load_model(study.model)
    catalog = scan(loaded.model)
    limit = resolve_budget(budget, catalog, study.methods)
    legal = {s.name: [key for key, method in study.methods.items() if method.slots(s)] for s in catalog}
    if json:
        found = {"schema": "autopeft.inspect/1", "model": loaded.name, "fingerprint": catalog.fingerprint}
        print(json_module.dumps({**found, "budget": encode(limit), "catalog": encode(catalog), "methods": legal}))
        return
    print(f"{loaded.name} ({catalog.architecture}): {catalog.n_base:,} base parameters, head {catalog.n_head:,}")
    print(f"budget {budget} = {limit.limit:,} {limit.unit}")
    print()
    width = max(len(s.name) for s in catalog)
    for site in catalog:
        shape = "x".join(map(str, site.shape)) + ("+bias" if site.has_bias else "")
        usable = ", ".join(legal[site.name]) or "nothing: its forward is never called"
        print(f"{site.name:<{width}}  {site.kind:<11} {shape:<16} depth {site.depth:<3} {site.role:<10} {usable}")
