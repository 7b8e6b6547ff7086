"""What is written is what is read back, here and where nothing of this package can be imported."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from autopeft.compression.dare import drop_change
from autopeft.compression.file import LOADER_NAME, contents, loader_source, quantise_parts, read_parts
from autopeft.compression.loader import patched, read_compressed
from autopeft.compression.quantise import Quantised
from autopeft.errors import CorruptFile


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


BASE = {
    "conv.weight": random(8, 4, 3, 3),
    "fc.weight": random(40, 30, seed=1),
    "fc.bias": random(40, seed=2),
    "sparse.weight": random(40, 40, seed=3),
    "qkv.weight": random(60, 20, seed=4),
    "head.weight": random(3, 40, seed=5),
}
PARTS = {
    "conv.weight.A": random(2, 36, seed=6),
    "conv.weight.B": random(8, 2, seed=7),
    "fc.weight.delta": random(40, 30, seed=8),
    "fc.bias.delta": random(40, seed=9),
    "sparse.weight.idx": torch.arange(0, 1600, 4, dtype=torch.int32),
    "sparse.weight.val": random(400, seed=10),
    "qkv.weight.delta": torch.cat([random(20, 20, seed=11), torch.zeros(20, 20), random(20, 20, seed=12)]),
    "head.weight.full": random(3, 40, seed=13),
}
WEIGHTS = ("conv.weight", "fc.weight", "sparse.weight", "qkv.weight")
Q = {"fc.weight": 0.4, "sparse.weight": 0.5, "qkv.weight": 0.6}


def written(path, *, drop=None, bits=None, codes="lloyd", head=False):
    dropped = None
    parts = dict(PARTS)
    if drop:
        shapes = {name: tuple(t.shape) for name, t in BASE.items()}
        dropped = drop_change(PARTS, shapes, WEIGHTS, drop, seed=5)
        parts = dropped.rescaled(Q)
    if bits:
        parts = quantise_parts(parts, bits, codes, head=frozenset({"head.weight.full"} if head else ()))
    tensors, metadata = contents(parts, dropped, {"plan": "p"})
    save_file(tensors, path, metadata)
    return parts, dropped


def test_nothing_done_gives_the_change_itself(tmp_path):
    written(tmp_path / "c")
    found = read_compressed(tmp_path / "c")
    assert found.keys() == PARTS.keys()
    assert all(torch.equal(found[name].to(part.dtype), part) for name, part in PARTS.items())
    state = patched(BASE, found)
    torch.testing.assert_close(
        state["conv.weight"].flatten(1),
        BASE["conv.weight"].flatten(1) + PARTS["conv.weight.B"] @ PARTS["conv.weight.A"],
    )
    torch.testing.assert_close(state["fc.bias"], BASE["fc.bias"] + PARTS["fc.bias.delta"])
    torch.testing.assert_close(state["head.weight"], PARTS["head.weight.full"])
    moved = (state["sparse.weight"] - BASE["sparse.weight"]).flatten()
    torch.testing.assert_close(moved[::4], PARTS["sparse.weight.val"])
    assert not moved[1::4].any()


def test_dropped_entries_are_found_again_from_the_seed(tmp_path):
    _, dropped = written(tmp_path / "c", drop=0.7)
    assert set(dropped.kept) == {"fc.weight", "sparse.weight", "qkv.weight"}, "the factors of conv are smaller"
    stored = load_file(tmp_path / "c")
    assert "fc.weight.idx" not in stored
    assert "qkv.weight.idx" not in stored
    found = read_compressed(tmp_path / "c")
    for name, q in Q.items():
        assert torch.equal(found[f"{name}.idx"].long(), dropped.kept[name].positions)
        torch.testing.assert_close(found[f"{name}.val"], dropped.kept[name].values / q)
    moved = patched(BASE, found)["qkv.weight"] - BASE["qkv.weight"]
    assert not moved[20:40].any()
    mask = moved != 0
    torch.testing.assert_close(moved[mask] * 0.6, PARTS["qkv.weight.delta"][mask], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("codes", ["lloyd", "uniform"])
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_codes_survive_the_file(tmp_path, bits, codes):
    parts, _ = written(tmp_path / "c", drop=0.7, bits=bits, codes=codes)
    found = read_compressed(tmp_path / "c")
    quantised = {name: part for name, part in parts.items() if isinstance(part, Quantised)}
    # conv.weight.B has 16 numbers: describing its codes would take more than they save.
    assert set(quantised) == {
        "conv.weight.A",
        "fc.weight.kept",
        "fc.bias.delta",
        "sparse.weight.val",
        "qkv.weight.kept",
    }
    for name, part in quantised.items():
        values = found[name.replace(".kept", ".val")]
        assert torch.equal(values, part.values())
    assert torch.equal(found["head.weight.full"], PARTS["head.weight.full"])
    with_head, _ = written(tmp_path / "h", bits=bits, codes=codes, head=True)
    assert isinstance(with_head["head.weight.full"], Quantised)


@pytest.mark.parametrize(
    ("positions", "how", "size"),
    [
        (range(0, 4000, 4), "mask", 500),
        (range(9, 300_000, 200), "gaps1", 1500),
        (range(9, 1_000_000, 60_000), "gaps2", 34),
        ([0, 70_000, 200_000], "", 12),
        ([0], "mask", 1),
        ([255], "gaps2", 2),
        ([254], "gaps1", 1),
        ([5, 3], "", 8),
    ],
)
def test_positions_take_the_smallest_of_their_forms(tmp_path, positions, how, size):
    exact = torch.tensor(list(positions), dtype=torch.int32)
    parts = {"w.idx": exact, "w.val": torch.ones(len(exact))}
    tensors, metadata = contents(parts, None, {})
    assert json.loads(metadata["layout"]).get("w.idx", {}).get("positions", "") == how
    assert tensors["w.idx"].numel() * tensors["w.idx"].element_size() == size
    save_file(tensors, tmp_path / "c", metadata)
    assert torch.equal(read_compressed(tmp_path / "c")["w.idx"].long(), exact.long())


def test_the_loader_alone_gives_the_same_bits_in_a_fresh_process(tmp_path):
    written(tmp_path / "c.safetensors", drop=0.7, bits=3)
    (tmp_path / LOADER_NAME).write_text(loader_source())
    save_file(BASE, tmp_path / "base.safetensors")
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "autopeft":
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, {str(tmp_path)!r})
from load_compressed import apply_compressed
from safetensors.torch import load_file, save_file
class Model:
    def state_dict(self):
        return load_file({str(tmp_path / "base.safetensors")!r})
    def load_state_dict(self, state):
        save_file(state, {str(tmp_path / "there.safetensors")!r})
apply_compressed(Model(), {str(tmp_path / "c.safetensors")!r})
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    here, there = patched(BASE, read_parts(tmp_path / "c.safetensors")), load_file(tmp_path / "there.safetensors")
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_the_header_says_how(tmp_path):
    _, dropped = written(tmp_path / "c", drop=0.7, bits=2)
    _, metadata = contents({"qkv.weight.kept": dropped.kept["qkv.weight"].values}, dropped, {"plan": "p"})
    assert json.loads(metadata["layout"]) == {"qkv.weight.kept": {"of": [60, 20], "rows": [[0, 20], [40, 60]]}}
    assert (metadata["seed"], metadata["format"], metadata["plan"]) == ("5", "autopeft-compressed", "p")
    assert int(metadata["threshold"]) == pytest.approx(0.3 * 2**64)


def test_files_that_are_something_else_are_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(CorruptFile, match="no compressed change"):
        read_parts(tmp_path / "other")
    with pytest.raises(CorruptFile, match="no compressed change"):
        read_parts(tmp_path / "absent")
    (tmp_path / "noise").write_bytes(b"\0" * 40)
    with pytest.raises(CorruptFile, match="no compressed change"):
        read_parts(tmp_path / "noise")
