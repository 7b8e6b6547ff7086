"""`autopeft doctor`: is this machine ready."""

from __future__ import annotations

import json as json_module
import os

import typer

from autopeft.cli import options as o

__all__ = ["doctor"]

_NEEDED = ("torch", "timm", "optuna", "optuna-dashboard", "peft", "numpy", "scipy", "networkx", "safetensors")
_EXTRAS = {
    "transformers": "transformers",
    "diffusers": "diffusion",
    "psycopg": "postgres",
    "onnx": "onnx",
    "datasets": "hf-datasets",
}


def doctor(json: o.Json = False) -> None:
    """Show versions, devices, extras and offline settings; exit with 5 when something needed is absent."""
    import platform

    found = {name: _version(name) for name in _NEEDED}
    extras = {name: _version(name) for name in _EXTRAS}
    device = _device() if found["torch"] else "torch is not installed"
    report = {
        "schema": "autopeft.doctor/1",
        "autopeft": _version("autopeft"),
        "python": platform.python_version(),
        "device": device,
        "cores": os.cpu_count(),
        "packages": found,
        "extras": extras,
        "offline": os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "TRUE"),
    }
    if json:
        print(json_module.dumps(report))
    else:
        print(f"autopeft {report['autopeft']}, Python {report['python']}, {device}, {report['cores']} cores")
        for name, value in found.items():
            print(f"  {name:<18} {value or 'MISSING: pip install autopeft'}")
        for name, value in extras.items():
            print(f"  {name:<18} {value or f'not installed; pip install autopeft[{_EXTRAS[name]}]'}")
        print(f"hub: {'offline (HF_HUB_OFFLINE is set)' if report['offline'] else 'asked when a model needs it'}")
    if not all(found.values()):
        raise typer.Exit(5)


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return f"{torch.cuda.device_count()} x {', '.join(sorted(names))}"
    return "CPU only"
