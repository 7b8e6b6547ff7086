"""Who was asked to compete and how that went, kept in `contenders.json` so that a continued run knows it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from autopeft.core.codec import decode, encode
from autopeft.core.record import Standing
from autopeft.pipeline.events import Emit, Event
from autopeft.store.atomic import read_json, write_json

if TYPE_CHECKING:
    from autopeft.pipeline.contenders import Group
    from autopeft.pipeline.tune import Tuned
    from autopeft.store.paths import RunFolder

__all__ = ["Standings"]


class Standings:
    """The contenders of one run.

    Args:
        run: the run folder.
    """

    def __init__(self, run: RunFolder) -> None:
        self._path = run.root / "contenders.json"

    def read(self) -> dict[str, Standing]:
        """Contender to its standing; empty before `enter`.

        Raises:
            CorruptFile: when the file is damaged.
        """
        if not self._path.is_file():
            return {}
        return {name: decode(Standing, row, str(self._path)) for name, row in read_json(self._path).items()}

    def enter(self, groups: Iterable[Group], emit: Emit) -> tuple[Group, ...]:
        """Write down everybody, say who cannot compete and why, and return those who can."""
        known, entered = self.read(), tuple(groups)
        for group in entered:
            if group.reason:
                emit(Event("stage", f"{group.name} does not compete: {group.reason}"))
            elif group.note:
                emit(Event("stage", f"{group.name}: {group.note}"))
        fresh = {group.name: Standing(group.reason, group.note, sample_epochs=group.sample_epochs) for group in entered}
        self._write({**fresh, **{name: known[name] for name in fresh if name in known}})
        return tuple(group for group in entered if group.candidates)

    def tuned(self, group: Group, tuned: Tuned, tries: int) -> None:
        """Write down how the variants of a contender did."""
        standing = Standing(group.reason, group.note, dict(tuned.variants), tries, group.sample_epochs)
        self._write({**self.read(), group.name: standing})

    def _write(self, standings: dict[str, Standing]) -> None:
        write_json(self._path, {name: encode(standing) for name, standing in standings.items()})
