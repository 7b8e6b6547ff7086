"""`autopeft plan`: score and allocate, without training."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from autopeft.cli import options as o
from autopeft.cli.flags import read_study, study_flags
from autopeft.cli.progress import Talk

__all__ = ["plan"]


def plan(
    overrides: o.Overrides = None,
    model: o.Model = None,
    pretrained: o.Pretrained = None,
    pretrained_path: o.PretrainedPath = None,
    img_size: o.ImgSize = None,
    model_kwargs: o.ModelKwargs = None,
    data: o.Data = None,
    task: o.Task = None,
    budget: o.Budget = None,
    methods: o.Methods = None,
    scorer: o.Scorer = None,
    allocator: o.Allocator = None,
    require: o.Require = None,
    forbid: o.Forbid = None,
    tie: o.Tie = None,
    max_options: o.MaxOptions = None,
    max_methods: o.MaxMethods = None,
    max_size: o.MaxSize = None,
    every_block: o.EveryBlock = None,
    target: o.Target = None,
    max_rank: o.MaxRank = None,
    max_flops: o.MaxFlops = None,
    max_memory: o.MaxMemory = None,
    backend: o.Backend = None,
    batch_size: o.BatchSize = None,
    from_spt: Annotated[
        Path | None, typer.Option(help="allocation file released with SPT (param_req_*.pth) instead of scoring")
    ] = None,
    seed: o.Seed = None,
    device: o.Device = None,
    config: o.Config = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="plan file to write")] = Path("plan.json"),
    dry_run: o.DryRun = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Score the model on the data, spend the budget, write plan.json and print where it goes."""
    from autopeft.pipeline.planfile import plan_to_json, write_plan
    from autopeft.pipeline.planning import plan_from_spt, plan_study
    from autopeft.report.packing import packing_lines
    from autopeft.report.rows import allocation_rows
    from autopeft.report.tables import allocation_table, spending_tables

    flags = study_flags(
        model=model,
        pretrained=pretrained,
        pretrained_path=pretrained_path,
        img_size=img_size,
        model_kwargs=model_kwargs,
        data=data,
        task=task,
        budget=budget,
        methods=methods,
        scorer=scorer,
        allocator=allocator,
        require=require,
        forbid=forbid,
        tie=tie,
        max_options=max_options,
        max_methods=max_methods,
        max_size=max_size,
        every_block=every_block,
        target=target,
        max_rank=max_rank,
        max_flops=max_flops,
        max_memory=max_memory,
        backend=backend,
        batch_size=batch_size,
        seed=seed,
        device=device,
    )
    study = read_study(config, flags, overrides)
    with Talk(quiet=quiet or json) as talk:
        made = plan_from_spt(study, from_spt, emit=talk) if from_spt else plan_study(study, emit=talk)
    data_object = plan_to_json(made)
    if not dry_run:
        write_plan(made, output)
    if json:
        print(json_module.dumps(data_object))
        return
    spent, limit = made.allocation.spent, made.allocation.budget.limit
    print(f"{spent:,} of {limit:,} {made.allocation.budget.unit} ({spent / max(limit, 1):.1%}), head not counted")
    for line in packing_lines(made.packing, limit):
        print(line)
    print()
    rows = allocation_rows(data_object["options"])
    print(allocation_table(rows).text())
    for table in spending_tables(rows):
        print()
        print(table.text())
    print()
    print("nothing was written" if dry_run else f"wrote {output}; train it with: autopeft train {output}")
