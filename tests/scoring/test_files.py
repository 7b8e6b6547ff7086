from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from autopeft.core.contracts import Scorer
from autopeft.core.scores import Scores
from autopeft.core.site import Catalog
from autopeft.errors import CorruptFile, StoreError, UsageError
from autopeft.models.scan import scan
from autopeft.scoring.calibrated import Calibrated
from autopeft.scoring.files import load_scores, save_scores
from autopeft.scoring.fisher import Fisher
from autopeft.scoring.gradient import Gradient
from autopeft.scoring.magnitude import Magnitude
from autopeft.testing.tiny import tiny_convnet, tiny_vit
from autopeft.testing.toy_task import ToyTask

FIELDS = ("value", "signal", "score", "half_a", "half_c", "square", "memory")


@pytest.fixture(scope="module")
def scored() -> tuple[Scores, Catalog]:
    model = tiny_vit()
    catalog = scan(model)
    return Gradient(halves=True, squares=True).score(model, catalog, ToyTask()), catalog


@pytest.mark.parametrize("scorer", [Gradient(halves=True), Fisher(), Magnitude(), Calibrated(memory="gap")])
def test_round_trip_is_exact(scorer: Scorer, tmp_path: Path) -> None:
    model = tiny_vit()
    catalog = scan(model)
    scores = scorer.score(model, catalog, ToyTask())
    save_scores(scores, tmp_path / "new" / "scores")
    found = load_scores(tmp_path / "new" / "scores", catalog)
    assert found.origin == scores.origin
    assert found.totals == scores.totals
    assert list(found.evidence) == list(scores.evidence)
    for name, evidence in scores.evidence.items():
        assert found.evidence[name].site == evidence.site
        assert set(found.evidence[name].slots) == set(evidence.slots)
        for slot, tensors in evidence.slots.items():
            for field in FIELDS:
                mine, theirs = getattr(tensors, field), getattr(found.evidence[name][slot], field)
                assert (mine is None) == (theirs is None)
                assert mine is None or (mine.dtype == theirs.dtype and torch.equal(mine, theirs))


def test_slices_are_written_once_and_come_back_as_views(scored: tuple[Scores, Catalog], tmp_path: Path) -> None:
    scores, catalog = scored
    save_scores(scores, tmp_path)
    assert not [key for key in load_file(tmp_path / "scores.safetensors") if "[" in key]
    found = load_scores(tmp_path, catalog)
    whole = found.evidence["blocks.0.attn.qkv"]["weight"].signal
    assert found.evidence["blocks.0.attn.qkv[k]"]["weight"].signal.data_ptr() == whole[16:].data_ptr()


def test_slices_of_their_own_are_kept(scored: tuple[Scores, Catalog], tmp_path: Path) -> None:
    scores, catalog = scored
    name = "blocks.0.attn.qkv[v]"
    own = scores.evidence[name]
    changed = dataclasses.replace(own["weight"], signal=own["weight"].signal.clone() + 1)
    evidence = {**scores.evidence, name: dataclasses.replace(own, slots={"weight": changed})}
    save_scores(dataclasses.replace(scores, evidence=evidence), tmp_path)
    assert torch.equal(load_scores(tmp_path, catalog).evidence[name]["weight"].signal, changed.signal)


def test_without_evidence(scored: tuple[Scores, Catalog], tmp_path: Path) -> None:
    scores, catalog = scored
    save_scores(dataclasses.replace(scores, evidence={}), tmp_path)
    found = load_scores(tmp_path, catalog)
    assert found.totals == scores.totals
    assert not found.evidence


def shorten(folder: Path) -> None:
    path = folder / "scores.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def flip(folder: Path) -> None:
    path = folder / "scores.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def edit(change: Callable[[dict], None]) -> Callable[[Path], None]:  # type: ignore[type-arg]
    def apply(folder: Path) -> None:
        path = folder / "scores.json"
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return apply


def lose_tensor(folder: Path) -> None:
    """A digest that fits, a tensor that is missing."""
    path = folder / "scores.safetensors"
    tensors = load_file(path)
    tensors.pop("pos_embed/tokens/score")
    save_file(tensors, path)
    edit(lambda d: d.update(sha256=hashlib.sha256(path.read_bytes()).hexdigest()))(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shorten, "sha256"),
        (flip, "sha256"),
        (lose_tensor, "pos_embed/tokens/score"),
        (lambda f: (f / "scores.json").write_text("{"), "not valid JSON"),
        (edit(lambda d: d.update(schema="autopeft.scores/9")), "autopeft.scores/9"),
        (edit(lambda d: d.pop("origin")), "'origin' is missing"),
        (edit(lambda d: d["totals"][0].update(score=-1.0)), "not negative"),
        (edit(lambda d: d["totals"][0].update(slot="wait")), "no place"),
        (edit(lambda d: d["totals"][0].update(score="many")), "totals"),
    ],
)
def test_damage_is_found(
    damage: Callable[[Path], None], message: str, scored: tuple[Scores, Catalog], tmp_path: Path
) -> None:
    scores, catalog = scored
    save_scores(scores, tmp_path)
    damage(tmp_path)
    with pytest.raises(CorruptFile, match=message):
        load_scores(tmp_path, catalog)


def test_missing_and_foreign(scored: tuple[Scores, Catalog], tmp_path: Path) -> None:
    scores, catalog = scored
    with pytest.raises(StoreError, match="cannot read"):
        load_scores(tmp_path, catalog)
    save_scores(scores, tmp_path)
    with pytest.raises(UsageError, match="another catalog"):
        load_scores(tmp_path, scan(tiny_convnet()))
    (tmp_path / "scores.safetensors").unlink()
    with pytest.raises(StoreError, match="cannot read"):
        load_scores(tmp_path, catalog)
