"""An export is believed once a fresh process, which cannot import autopeft, has given the same logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from autopeft.core.contracts import Inserted
from autopeft.core.record import Record
from autopeft.errors import ExportError
from autopeft.export._base import write_base
from autopeft.export._loaders import DRIVER, LOADERS
from autopeft.export._model import states_of
from autopeft.export._timm_folder import rebuild

__all__ = ["verify", "verify_all"]

_ON_A_BASE = frozenset({"peft", "peft-init", "delta", "compressed", "diffusers-lora"})
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def verify(
    kind: str,
    folder: Path,
    images: Tensor,
    logits: Tensor,
    *,
    inserted: Inserted,
    record: Record,
    tolerance: float = 1e-4,
) -> float | None:
    """Load one export in a fresh process and compare its logits; see `verify_all`.

    Returns:
        The largest absolute difference; None for formats that only autopeft reads.

    Raises:
        ExportError: when the export does not load or gives other logits.
    """
    found = verify_all({kind: folder}, images, logits, inserted=inserted, record=record, tolerance=tolerance)
    return found.get(kind)


def verify_all(
    exports: Mapping[str, Path],
    images: Tensor,
    logits: Tensor,
    *,
    inserted: Inserted,
    record: Record,
    tolerance: float = 1e-4,
    timeout: float = 600.0,
    loaders: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Load exports in one fresh process and compare their logits with the model's.

    The process runs `python -I` in another folder, offline, and with an import hook that refuses autopeft. Formats that
    change a base model are loaded on the base that the export holds, or on one written for the occasion.

    Args:
        exports: format to folder: `timm`, `transformers` (a timm folder, loaded by transformers), `peft`, `peft-init`,
            `delta`, `compressed`, `diffusers`, `diffusers-lora`, `onnx`. Others are left out.
        images: a few images as the model takes them, float32, (n, channels, height, width).
        logits: what the model gives for them, (n, classes); of a denoiser, what it predicts at timestep 0 with labels
            and texts of zeros, as `autopeft.models.calling.output_on` has it. For `peft-init` the untrained start is
            computed instead.
        inserted: the plan the exports were made of.
        record: the record the exports were made with.
        tolerance: largest absolute difference of a logit.
        timeout: seconds the process may take.
        loaders: code for further formats: Python that finds `folder`, `base`, `images` and `run_torch(model)`, and
            leaves `logits`.

    Returns:
        Format to the largest absolute difference.

    Raises:
        ExportError: when an export does not load or gives other logits.
    """
    codes = {**LOADERS, **(loaders or {})}
    wanted = {kind: folder for kind, folder in exports.items() if kind in codes}
    if not wanted:
        return {}
    with tempfile.TemporaryDirectory(prefix="autopeft-verify-") as name:
        place = Path(name)
        jobs = {}
        for index, (kind, folder) in enumerate(wanted.items()):
            base = folder / "base"
            if kind in _ON_A_BASE and not base.is_dir():
                base = place / "base"
                if not base.is_dir():
                    write_base(inserted, states_of(inserted), record, base)
            jobs[kind] = {
                "folder": str(folder.resolve()),
                "base": str(base.resolve()),
                "code": codes[kind],
                "logits": str(place / f"logits{index}.safetensors"),
            }
        _run(jobs, images, place, timeout)
        return {
            kind: _compare(
                kind,
                wanted[kind],
                load_file(job["logits"])["logits"],
                _start(inserted, images, record) if kind == "peft-init" else logits.detach().float().cpu(),
                tolerance,
            )
            for kind, job in jobs.items()
        }


def _run(jobs: Mapping[str, Mapping[str, str]], images: Tensor, place: Path, timeout: float) -> None:
    """Run the jobs in a fresh process; each leaves its logits in its file."""
    names = ", ".join(jobs)
    save_file({"images": images.detach().float().cpu().contiguous()}, place / "images.safetensors")
    failures = place / "failures.json"
    request = {"images": str(place / "images.safetensors"), "failures": str(failures), "jobs": jobs}
    (place / "request.json").write_text(json.dumps(request), encoding="utf-8")
    (place / "driver.py").write_text(DRIVER, encoding="utf-8")
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-X", "utf8", str(place / "driver.py"), str(place / "request.json")],
            cwd=place,
            env={**os.environ, **_OFFLINE},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"the exports {names} did not load within {timeout:.0f} seconds") from error
    if done.returncode != 0 or not failures.is_file():
        raise ExportError(
            f"the process that loads the exports {names} ended with {done.returncode}: {_last_line(done.stderr)}"
        )
    failed: dict[str, str] = json.loads(failures.read_text(encoding="utf-8"))
    for kind, trace in failed.items():
        raise ExportError(
            f"the {kind} export in {jobs[kind]['folder']} does not load in a fresh process: {_last_line(trace)}"
        )


def _compare(kind: str, folder: Path, found: Tensor, expected: Tensor, tolerance: float) -> float:
    if found.shape != expected.shape:
        raise ExportError(
            f"the {kind} export in {folder} gives logits of shape {tuple(found.shape)}, "
            f"the model {tuple(expected.shape)}"
        )
    difference = float((found - expected).abs().max())
    # Written so that NaN, which compares as false, is refused.
    if not difference <= tolerance:
        raise ExportError(
            f"the {kind} export in {folder} does not reproduce the model: its logits differ by {difference:.3g}, "
            f"more than {tolerance:g}"
        )
    return difference


def _start(inserted: Inserted, images: Tensor, record: Record) -> Tensor:
    """Logits of the base model with the classifier as it is: what every untrained adapter starts from."""
    model = rebuild(inserted.model, states_of(inserted).base, record)
    with torch.no_grad():
        logits: Tensor = model(images.float().cpu()).float()
    return logits


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
