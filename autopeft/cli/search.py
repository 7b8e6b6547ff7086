"""`autopeft search`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autopeft.cli import options as o
from autopeft.cli.flags import read_study, study_flags
from autopeft.cli.progress import Talk
from autopeft.errors import UsageError

__all__ = ["run_name", "search"]


def search(
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
    epochs: o.Epochs = None,
    trials: Annotated[int | None, typer.Option(help="trials in all, baselines not counted", show_default="10")] = None,
    tier: Annotated[
        str | None,
        typer.Option(
            help="what the search may cost in full trainings, baselines apart: default (0.3: default plan and its "
            "learning rate), race (1: a race of known candidates), search (4: as many short trials as that buys)",
            show_default="as many as --trials",
        ),
    ] = None,
    time_limit: Annotated[
        str | None, typer.Option(help="time for the whole search, such as 150s, 20m or 2h; fewer epochs if need be")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="seeds of the trainings at the end", show_default="3")] = None,
    space: Annotated[
        str | None, typer.Option(help="search space: a name or a YAML file", show_default="mixed_methods")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="tpe, random, nsga2 (fronts) or gp (few full trials)", show_default="tpe")
    ] = None,
    contenders: Annotated[
        str | None,
        typer.Option(
            help="whom to compare with: default, all, or names such as dora,full,s3delta", show_default="default"
        ),
    ] = None,
    warm_start: Annotated[
        list[Path] | None,
        typer.Option(help="run folder of an earlier search on the same model, to start from; repeatable"),
    ] = None,
    study: Annotated[str | None, typer.Option(help="name of the Optuna study", show_default="the run's name")] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="Optuna storage URL, shared by several workers",
            show_default="SQLite in the run folder",
            envvar="AUTOPEFT_STORAGE",
        ),
    ] = None,
    seed: o.Seed = None,
    device: o.Device = None,
    config: o.Config = None,
    output: o.Output = None,
    dry_run: o.DryRun = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Search where the budget goes, retrain the best plan, compare it with the baselines, export it.

    The same command continues the same run folder.
    """
    from autopeft.cli._finish import show_record
    from autopeft.cli.duration import seconds_of
    from autopeft.pipeline.demo import with_demo_limits
    from autopeft.pipeline.estimate import estimate, show_estimate
    from autopeft.pipeline.search import run_search
    from autopeft.store.paths import RunFolder

    if tier is not None and trials is not None:
        raise UsageError("--tier says what the search may cost, --trials how many trials it has; give one of them")
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
        epochs=epochs,
        trials=trials,
        time_limit=seconds_of(time_limit),
        seeds=seeds,
        space=space,
        sampler=sampler,
        contenders=contenders,
        tier=tier,
        warm_start=warm_start,
        seed=seed,
        device=device,
    )
    resolved = with_demo_limits(read_study(config, flags, overrides), asked=set(flags))
    if dry_run:
        print(show_estimate(estimate(resolved), as_json=json))
        return
    run = output if output is not None else Path("runs") / run_name(resolved.model.spec, resolved.data.spec, budget)
    with Talk(quiet=quiet or json) as talk:
        record = run_search(resolved, RunFolder(run), emit=talk, storage=storage, study_name=study)
    show_record(record, run, as_json=json)


def run_name(model: str, data: str, budget: str | None) -> str:
    """The default name of a run folder: model, data and budget, without characters that a file system minds."""
    text = "-".join([model.rpartition(":")[2], Path(data).name or data, budget or "0.1%"])
    return "".join(c if c.isalnum() or c in "._-" else "pct" if c == "%" else "_" for c in text)
