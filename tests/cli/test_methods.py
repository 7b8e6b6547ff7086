"""`autopeft methods`, and a method that another package brings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_METHOD = '''"""Gate: one gain per site, from a package that autopeft knows nothing of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from autopeft.core.budget import Cost
from autopeft.methods.base import Adapter


@dataclass(frozen=True, slots=True)
class Gate:
    """`(1 + g) y` with one trained g (arXiv 0000.00000)."""

    family: ClassVar[str] = "vector"

    def slots(self, site):
        """`output` of a Linear with a bias."""
        return ("output",) if site.kind == "linear" and site.has_bias and "output" in site.slots else ()

    def sizes(self, site):
        """1."""
        return (1,) if self.slots(site) else ()

    def cost(self, site, size):
        """One scalar."""
        return Cost.plain(1, entries=site.n_weight + site.n_bias)

    def mergeable(self, site):
        """Yes."""
        return True

    def build(self, site, option, host, generator):
        """g zero."""
        return GateAdapter(site, ("output",), "output")

    def gains(self, site, evidence, sizes):
        """The squared derivative of the loss by g."""
        weight, bias = evidence["weight"], evidence["bias"]
        slope = (weight.signal * weight.value).sum() + (bias.signal * bias.value).sum()
        return (float(slope) ** 2,) * len(sizes)

    def select(self, site, evidence, size):
        """None."""
        return None


class GateAdapter(Adapter):
    def __init__(self, site, slots, form):
        super().__init__(site, slots, form)
        self.g = torch.nn.Parameter(torch.zeros(()))

    def transform(self, y):
        return y * (1 + self.g.to(y.dtype))

    def merge(self, tensors):
        return {slot: tensor * (1 + self.g.to(tensor.dtype)) for slot, tensor in tensors.items()}
'''

_TEST = """from autopeft.testing.method_laws import MethodLaws
from gatekeeper.gate import Gate


class TestGate(MethodLaws):
    models = ("vit",)

    def make(self):
        return Gate()
"""


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installed package with one method under the entry-point group."""
    root = tmp_path_factory.mktemp("site")
    package, facts = root / "gatekeeper", root / "gatekeeper-1.0.dist-info"
    package.mkdir()
    facts.mkdir()
    (package / "__init__.py").write_text('"""Gates."""\n')
    (package / "gate.py").write_text(_METHOD)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: gatekeeper\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[autopeft.methods]\ngate = gatekeeper.gate:Gate\n")
    (root / "test_gate.py").write_text(_TEST)
    return root


def run(root: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(root), "COLUMNS": "120", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *args], cwd=root, env=env, capture_output=True, text=True, check=False)


def test_a_method_of_another_package_is_listed_beside_ours(foreign: Path) -> None:
    done = run(foreign, "-m", "autopeft", "methods", "gate", "lora", "--json")
    assert done.returncode == 0, done.stderr
    cards = {card["name"]: card for card in json.loads(done.stdout)["methods"]}
    assert list(cards) == ["gate", "lora"]
    gate = cards["gate"]
    assert gate["title"] == "One gain per site, from a package that autopeft knows nothing of"
    assert (gate["count"], gate["smallest"], gate["mergeable"]) == ("One scalar", 48, "yes")
    assert gate["source"] == "0000.00000"
    assert not gate["default"]


def test_a_method_of_another_package_passes_the_law_kit(foreign: Path) -> None:
    done = run(foreign, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_gate.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_a_name_nobody_knows(foreign: Path) -> None:
    done = run(foreign, "-m", "autopeft", "methods", "gatte")
    assert done.returncode == 2
    assert "Did you mean 'gate'?" in done.stderr
    assert "Traceback" not in done.stderr
