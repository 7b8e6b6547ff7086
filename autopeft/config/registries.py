"""One registry per room of plug-ins; reading this module imports no plug-in."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from autopeft import allocation, backends, export, methods, regularisers, rewards, scoring, search, tasks
from autopeft.core.contracts import Allocator, Backend, Exporter, Method, Regulariser, Reward, Sampler, Scorer, TaskSpec
from autopeft.core.registry import Registry

__all__ = [
    "ALLOCATORS",
    "BACKENDS",
    "EXPORTERS",
    "METHODS",
    "REGULARISERS",
    "REWARDS",
    "ROOMS",
    "SAMPLERS",
    "SCORERS",
    "TASKS",
]

METHODS: Registry[Method] = Registry("method", "autopeft.methods", methods.BUILTIN)
SCORERS: Registry[Scorer] = Registry("scorer", "autopeft.scoring", scoring.BUILTIN)
ALLOCATORS: Registry[Allocator] = Registry("allocator", "autopeft.allocation", allocation.BUILTIN)
BACKENDS: Registry[Backend] = Registry("backend", "autopeft.backends", backends.BUILTIN)
TASKS: Registry[TaskSpec] = Registry("task", "autopeft.tasks", tasks.BUILTIN)
REGULARISERS: Registry[Regulariser] = Registry("regulariser", "autopeft.regularisers", regularisers.BUILTIN)
REWARDS: Registry[Reward] = Registry("reward", "autopeft.rewards", rewards.BUILTIN)
SAMPLERS: Registry[Sampler] = Registry("sampler", "autopeft.search", search.BUILTIN)
EXPORTERS: Registry[Exporter] = Registry("export format", "autopeft.export", export.BUILTIN)

ROOMS: Mapping[str, Registry[Any]] = MappingProxyType(
    {
        "methods": METHODS,
        "scoring": SCORERS,
        "allocation": ALLOCATORS,
        "backends": BACKENDS,
        "tasks": TASKS,
        "regularisers": REGULARISERS,
        "rewards": REWARDS,
        "search": SAMPLERS,
        "export": EXPORTERS,
    }
)
"""Room to registry."""
