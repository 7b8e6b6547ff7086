import inspect

import pytest

from autopeft.export.delta import DeltaExport
from autopeft.export.native import NativeExport
from autopeft.export.peft import PeftExport
from autopeft.export.peft_init import PeftInitExport
from autopeft.export.timm import TimmExport
from autopeft.testing.exporter_laws import BROKEN, ExporterLaws

SLOW = "test_reloaded_gives_the_same_logits"
"""A fresh process each; test_verify reloads every format in one process, these repeat it one by one."""

LAWS = [name for name, _ in inspect.getmembers(ExporterLaws, inspect.isfunction) if name.startswith("test_")]


class TestTimmExport(ExporterLaws):
    kind = "timm"

    def make(self):
        return TimmExport()


class TestPeftExport(ExporterLaws):
    kind = "peft"
    test_reloaded_gives_the_same_logits = pytest.mark.slow(ExporterLaws.test_reloaded_gives_the_same_logits)

    def make(self):
        return PeftExport()


class TestPeftExportUniform(ExporterLaws):
    kind = "peft"
    test_reloaded_gives_the_same_logits = pytest.mark.slow(ExporterLaws.test_reloaded_gives_the_same_logits)

    def make(self):
        return PeftExport(uniform_rank=True, base="never")


class TestPeftInitExport(ExporterLaws):
    kind = "peft-init"
    test_reloaded_gives_the_same_logits = pytest.mark.slow(ExporterLaws.test_reloaded_gives_the_same_logits)

    def make(self):
        return PeftInitExport()


class TestDeltaExport(ExporterLaws):
    kind = "delta"
    test_reloaded_gives_the_same_logits = pytest.mark.slow(ExporterLaws.test_reloaded_gives_the_same_logits)

    def make(self):
        return DeltaExport()


class TestNativeExport(ExporterLaws):
    kind = "native"
    stands_alone = False
    holds_everything = True

    def make(self):
        return NativeExport()


def laws_of(exporter):
    class Laws(ExporterLaws):
        kind = "timm"

        def make(self):
            return exporter

    return Laws()


def test_every_law_has_a_broken_exporter():
    assert sorted(BROKEN) == sorted(LAWS)


@pytest.mark.parametrize("law", LAWS)
def test_a_broken_exporter_fails_its_law_and_no_other(law, tmp_path):
    laws = laws_of(BROKEN[law])
    with pytest.raises(AssertionError):
        getattr(laws, law)(tmp_path / "broken")
    for other in LAWS:
        if other not in (law, SLOW):
            getattr(laws, other)(tmp_path / other)


@pytest.mark.slow
@pytest.mark.parametrize("law", [law for law in LAWS if law != SLOW])
def test_the_other_broken_exporters_reload(law, tmp_path):
    laws_of(BROKEN[law]).test_reloaded_gives_the_same_logits(tmp_path)
