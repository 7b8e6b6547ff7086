from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import load_file

from autopeft.errors import CorruptFile, StoreError
from autopeft.export.bases_file import BASES_FILE, recomputed_bases
from autopeft.export.native import NativeExport
from autopeft.export.native_file import load_native
from autopeft.methods import core


@pytest.fixture
def plan(ground):
    return (ground.option("blocks.0.mlp.fc1", "core", 3), ground.option("blocks.1.mlp.fc2", "core", 2))


@pytest.fixture
def exported(ground, plan, tmp_path):
    """Path of the adapter, and the logits it was exported with."""
    with ground.borrowed(plan) as inserted:
        adapter = NativeExport().export(inserted, ground.record, tmp_path)[0]
        return adapter, ground.logits(inserted)


@pytest.fixture
def other_lapack(monkeypatch):
    """A machine whose decomposition turns the first two directions of every basis into each other."""
    here = core.top_singular

    def turned(tensor, rows, rank):
        u, v = here(tensor, rows, rank)
        return u[:, [1, 0, *range(2, rank)]], v[:, [1, 0, *range(2, rank)]]

    monkeypatch.setattr(core, "top_singular", turned)


def test_digests_and_a_copy_lie_beside_the_adapter(exported, ground, plan):
    adapter, _ = exported
    facts = json.loads((adapter.parent / "metadata.json").read_text())
    stored = load_file(adapter.parent / BASES_FILE)
    assert set(facts["bases"]) == set(stored)
    assert set(stored) == {f"{o.key}/{side}" for o in plan for side in ("U", "V")}
    assert not set(stored) & set(load_file(adapter))
    with ground.borrowed(plan, trained=False) as inserted:
        for name, tensor in recomputed_bases(inserted).items():
            assert torch.equal(tensor, stored[name])


def test_equal_bases_need_no_copy(exported, ground, plan, caplog):
    adapter, expected = exported
    (adapter.parent / BASES_FILE).unlink()
    with caplog.at_level(logging.WARNING, "autopeft"), ground.borrowed(plan, trained=False) as inserted:
        load_native(inserted, adapter)
        assert torch.equal(ground.logits(inserted), expected)
    assert not caplog.records


def test_other_bases_give_way_to_the_stored_ones(exported, ground, plan, other_lapack, caplog):
    adapter, expected = exported
    stored = load_file(adapter.parent / BASES_FILE)
    with caplog.at_level(logging.WARNING, "autopeft"), ground.borrowed(plan, trained=False) as inserted:
        assert not all(torch.equal(basis, stored[name]) for name, basis in recomputed_bases(inserted).items())
        load_native(inserted, adapter)
        assert torch.equal(ground.logits(inserted), expected)
        assert all(torch.equal(basis, stored[name]) for name, basis in recomputed_bases(inserted).items())
    assert "4 of 4 bases come out differently" in caplog.text
    (adapter.parent / BASES_FILE).unlink()
    with ground.borrowed(plan, trained=False) as inserted, pytest.raises(StoreError, match="safetensors is missing"):
        load_native(inserted, adapter)


def test_a_changed_copy_is_refused(exported, ground, plan):
    adapter, _ = exported
    path = adapter.parent / BASES_FILE
    facts = json.loads((adapter.parent / "metadata.json").read_text())
    name = next(iter(facts["bases"]))
    facts["bases"][name] = "0" * 64
    (adapter.parent / "metadata.json").write_text(json.dumps(facts))
    with ground.borrowed(plan, trained=False) as inserted, pytest.raises(CorruptFile, match="does not hold the basis"):
        load_native(inserted, adapter)
    path.write_bytes(b"no file")
    with ground.borrowed(plan, trained=False) as inserted, pytest.raises(CorruptFile, match="not a readable"):
        load_native(inserted, adapter)
