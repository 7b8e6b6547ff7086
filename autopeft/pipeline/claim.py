"""A run folder, taken for one study: what is remembered of it, and what is refused."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopeft.config.decode import load_study, study_to_yaml
from autopeft.errors import StaleRun, UsageError
from autopeft.pipeline.trials import study_identity
from autopeft.store.atomic import read_json, write_json, write_text
from autopeft.store.paths import RunFolder
from autopeft.store.storage import masked_url

if TYPE_CHECKING:
    from autopeft.config.study import Study

__all__ = ["claim", "remembered", "removed_on_failure", "run_token"]


@contextlib.contextmanager
def removed_on_failure(missing: Sequence[Path]) -> Iterator[None]:
    """Take a new run folder away again when the run cannot even begin; a folder that was there stays.

    Args:
        missing: the folders that did not exist before, the run folder first.
    """
    try:
        yield
    except BaseException:
        if missing:
            shutil.rmtree(missing[0], ignore_errors=True)
        for folder in missing[1:]:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def remembered(run: RunFolder, storage: str | None, name: str | None) -> tuple[str | None, str | None]:
    """Storage and study name as given, or as they were when the run began.

    A URL with a password is remembered without it, and has to be given again.

    Raises:
        UsageError: when the URL has to be given again.
    """
    path = run.root / "storage.json"
    if storage is not None:
        write_json(path, {"url": masked_url(storage), "study": name})
        return storage, name
    if not path.is_file():
        return None, name
    known = read_json(path)
    if "***" in known["url"]:
        raise UsageError(
            f"the study of {run.root} lies in {known['url']}, whose password is not kept; "
            f"give --storage URL or set AUTOPEFT_STORAGE"
        )
    return known["url"], name or known["study"]


def claim(study: Study, run: RunFolder) -> None:
    """Write the study into a new folder, or refuse a folder that holds another one.

    The number of trials, the time limit and the device may change between two calls; nothing else may.
    """
    text = study_to_yaml(study)
    if not run.study.is_file():
        write_text(run.study, text)
        return
    before = load_study([run.study], {})
    differences = _differences(study_identity(before), study_identity(study))
    if differences:
        path, (old, new) = next(iter(differences.items()))
        raise StaleRun(
            f"{run.root} holds another study: {path} was {old!r} and is {new!r} now. "
            f"Choose another --output, or give the same settings to continue"
        )
    write_text(run.study, text)


def _differences(old: Any, new: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted(set(old) | set(new)):
            found |= _differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return found
    return {} if old == new else {path: (old, new)}


def run_token(run: RunFolder) -> str:
    """A text that is the same whenever this run is continued, and no other run's."""
    path = run.root / "token"
    if not path.is_file():
        write_text(path, secrets.token_hex(16))
    return path.read_text().strip()
