"""Laws of exporters.

Subclass `ExporterLaws`, give `make()` and `kind`; pytest does the rest. `BROKEN` holds one exporter per law that breaks
this law and no other.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch

from autopeft.core.contracts import Exporter, Inserted
from autopeft.core.menu import Option
from autopeft.errors import ExportError
from autopeft.export.verify import verify_all
from autopeft.testing._broken_exporters import BROKEN
from autopeft.testing._export_ground import ExportGround, small_vit

__all__ = ["BROKEN", "ExporterLaws"]

_TOLERANCE = 1e-4


class ExporterLaws:
    """Base class of exporters' tests, on a timm vision transformer of two blocks.

    Attributes:
        kind: the format, as `autopeft.export.verify` calls it.
        loader: code that loads the format in a fresh process, for formats that `verify` does not know; see
            `verify_all`.
        stands_alone: False for a format that only autopeft reads, which the first law then says nothing about.
        holds_everything: True for a format that no plan is too mixed for.
    """

    kind: ClassVar[str] = ""
    loader: ClassVar[str] = ""
    stands_alone: ClassVar[bool] = True
    holds_everything: ClassVar[bool] = False

    def make(self) -> Exporter:
        """The exporter under test."""
        raise NotImplementedError

    def ground(self) -> ExportGround:
        """The model and its record."""
        return small_vit()

    def plan(self, ground: ExportGround) -> tuple[Option, ...]:
        """A plan that the format can hold."""
        return (
            ground.option("blocks.0.attn.qkv[q]", "lora", 2),
            ground.option("blocks.0.attn.qkv[v]", "core", 3),
            ground.option("blocks.1.mlp.fc1", "lora", 1),
        )

    def refused_plan(self, ground: ExportGround) -> tuple[Option, ...]:
        """A plan that the format cannot hold; its last option is the reason."""
        return (*self.plan(ground), ground.option("blocks.1.mlp.fc2", "adapter", 1))

    def test_reloaded_gives_the_same_logits(self, tmp_path: Path) -> None:
        """A fresh process that cannot import autopeft gives the same logits."""
        if not self.stands_alone:
            return
        ground = self.ground()
        with ground.borrowed(self.plan(ground)) as inserted:
            self.make().export(inserted, ground.record, tmp_path / "export")
            loaders = {self.kind: self.loader} if self.loader else None
            try:
                found = verify_all(
                    {self.kind: tmp_path / "export"},
                    ground.images,
                    ground.logits(inserted),
                    inserted=inserted,
                    record=ground.record,
                    tolerance=_TOLERANCE,
                    loaders=loaders,
                )
            except ExportError as error:
                raise AssertionError(str(error)) from error
        assert self.kind in found, f"nothing is known that loads {self.kind!r}; give `loader`"

    def test_the_borrowed_model_is_left_alone(self, tmp_path: Path) -> None:
        """Asking and exporting change no tensor, flag or mode of the borrowed model."""
        ground, exporter = self.ground(), self.make()
        with ground.borrowed(self.plan(ground)) as inserted:
            before = _facts(inserted)
            exporter.supports(inserted)
            exporter.export(inserted, ground.record, tmp_path)
            after = _facts(inserted)
        for what, old, new in zip(("tensors", "flags", "modes"), before, after, strict=True):
            assert old.keys() == new.keys(), f"the {what} have other names after the export"
            changed = [name for name, value in old.items() if not _same(value, new[name])]
            assert not changed, f"the export changed the {what} of {', '.join(changed[:3])}"

    def test_every_written_file_is_returned(self, tmp_path: Path) -> None:
        """The returned paths are the files in the folder: none more, none less, none twice."""
        ground = self.ground()
        with ground.borrowed(self.plan(ground)) as inserted:
            returned = self.make().export(inserted, ground.record, tmp_path / "new" / "folder")
        written = sorted(path for path in tmp_path.rglob("*") if path.is_file())
        assert sorted(returned) == written

    def test_two_exports_are_the_same_bytes(self, tmp_path: Path) -> None:
        """Nothing but the plan, its weights and the record goes into the files."""
        ground, exporter = self.ground(), self.make()
        with ground.borrowed(self.plan(ground)) as inserted:
            first, second = (exporter.export(inserted, ground.record, tmp_path / name) for name in ("a", "b"))
        for one, two in zip(first, second, strict=True):
            assert one.read_bytes() == two.read_bytes(), f"{one.name} differs between two exports of one plan"

    def test_what_it_cannot_hold_is_refused(self, tmp_path: Path) -> None:
        """A plan beyond the format is refused with a reason that names the option, and nothing is written."""
        ground, exporter = self.ground(), self.make()
        with ground.borrowed(self.plan(ground)) as inserted:
            assert exporter.supports(inserted) == ""
        options = self.refused_plan(ground)
        with ground.borrowed(options) as inserted:
            reason = exporter.supports(inserted)
            if self.holds_everything:
                assert reason == ""
                return
            assert options[-1].key in reason, f"the reason does not name {options[-1].key}: {reason!r}"
            try:
                exporter.export(inserted, ground.record, tmp_path / "refused")
            except ExportError:
                pass
            else:
                raise AssertionError("a plan that is not supported was exported all the same")
        assert not list(tmp_path.rglob("*")), "a refused export left files behind"


def _facts(inserted: Inserted) -> tuple[dict[str, object], dict[str, object], dict[str, object]]:
    model = inserted.model
    tensors: dict[str, object] = {name: t.detach().clone() for name, t in model.state_dict(keep_vars=True).items()}
    flags: dict[str, object] = {name: p.requires_grad for name, p in model.named_parameters()}
    modes: dict[str, object] = {name: module.training for name, module in model.named_modules()}
    return tensors, flags, modes


def _same(one: object, two: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return torch.equal(one, two)
    return one == two
