from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autopeft.allocation.from_spt import read_spt, spt_allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import Method
from autopeft.core.site import Catalog
from autopeft.errors import CorruptFile, InfeasibleBudget, UsageError

RELEASED = Path(
    os.environ.get("AUTOPEFT_SPT_FILES") or Path(__file__).parents[2].parent / "shared/data/spt_allocations"
)
NAMES = [f"{method}_{task}_{target}" for method in ("lora", "adapter") for task in ("cifar", "svhn")
         for target in ("0.1", "0.4")]  # fmt: skip


def released(name: str) -> Path:
    path = RELEASED / f"{name}.pth"
    if not path.exists():
        pytest.skip("the released SPT allocation files are not here; name their folder in AUTOPEFT_SPT_FILES")
    return path


# ---------------------------------------------------------------- T9: the released files


@pytest.mark.parametrize("name", NAMES)
def test_released_files_keep_their_accounting(name: str, vit_b: Catalog, methods: Mapping[str, Method]) -> None:
    file = read_spt(released(name))
    method = name.partition("_")[0]
    lengths = {"attn.q": 768, "attn.k": 768, "attn.v": 768, "attn.proj": 768, "mlp.fc1": 3072, "mlp.fc2": 768}

    def module(matrix: str) -> int:
        operation = matrix.split(".", 2)[2]
        wide = operation in ("mlp.fc1", "mlp.fc2")
        if method == "lora":
            return 8 * (768 + (3072 if wide else 768))
        out = lengths[operation]
        return 2 * out * 8 + 8 + out

    def length(vector: str) -> int:
        return 768 if "norm" in vector else lengths[vector.split(".", 2)[2].removesuffix(".bias")]

    structured = sum(map(module, file.matrices)) + sum(map(length, file.vectors))
    entries = sum(len(positions) for positions in file.entries.values())
    assert structured == file.structured_params
    assert entries == file.unstructured_params
    assert structured + entries + 768 == file.params

    plan = spt_allocation(file, vit_b, methods, method)
    assert plan.spent == file.params
    assert plan.budget == Budget(file.params)
    assert sum(o.method == method for o in plan) == len(file.matrices)
    assert sum(o.method in ("vector", "bias") for o in plan) == len(file.vectors)
    assert sum(o.cost.trainable for o in plan if o.method in ("sparse", "sparse_bias")) == file.unstructured_params
    assert [o.site for o in plan if o.method == "tokens"] == ["cls_token"]


def test_a_released_file_in_numbers(vit_b: Catalog, methods: Mapping[str, Method]) -> None:
    file = read_spt(released("lora_cifar_0.4"))
    assert (file.params, file.structured_params, file.unstructured_params, file.token_params) == (
        380_909,
        356_352,
        23_789,
        768,
    )
    assert (len(file.matrices), len(file.vectors)) == (14, 69)
    plan = spt_allocation(file, vit_b, methods)
    sites = {o.site for o in plan if o.method == "lora"}
    assert any(site.endswith("attn.qkv[v]") for site in sites)
    assert not any(site.endswith("attn.qkv") for site in {o.site for o in plan})
    # Entries inside of norms are on the norms: the released code counts them and never trains them.
    norms = {o.site for o in plan if o.method == "sparse" and "norm" in o.site}
    assert norms == {"blocks.9.norm2", "blocks.10.norm2", "blocks.11.norm2"}
    with pytest.raises(InfeasibleBudget):
        spt_allocation(file, vit_b, methods, budget=Budget(380_908))


# ---------------------------------------------------------------- files made here


def content() -> dict[str, Any]:
    """The layout of a released file, for the tiny ViT: two blocks of width 16."""
    shapes = {
        "blocks.0.attn.q.weight": torch.Size([16, 16]),
        "blocks.0.norm1.weight": torch.Size([16]),
        "blocks.1.mlp.fc1.bias": torch.Size([64]),
        "blocks.1.mlp.fc1.weight": torch.Size([64, 16]),
    }
    return {
        "unstructured_name_shapes": shapes,
        "unstructured_name_shapes_int": {k: np.int64(s.numel()) for k, s in shapes.items()},
        # 2 and 255 in q.weight, 5 in norm1.weight, 63 in fc1.bias; fc1.weight has none.
        "unstructured_indexes": torch.tensor([2, 255, 256 + 5, 272 + 63]),
        "unstructured_params": torch.tensor(4.0),
        "structured_params": 1 * 32 + 80 + 16 + 16,
        "params": torch.tensor((32 + 80 + 16 + 16 + 4 + 16) / 1e6),
        "tuned_matrices": [[0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1]],
        "tuned_vectors": ["blocks.0.norm2.weight", "blocks.1.attn.k.bias"],
    }


def saved(folder: Path, data: Any) -> Path:
    path = folder / "param_req.pth"
    torch.save(data, path)
    return path


def test_a_file_becomes_a_plan(tmp_path: Path, vit: Catalog, methods: Mapping[str, Method]) -> None:
    file = read_spt(saved(tmp_path, content()))
    assert file.matrices == ("blocks.0.attn.v", "blocks.1.mlp.fc2")
    assert {k: v.tolist() for k, v in file.entries.items()} == {
        "blocks.0.attn.q.weight": [2, 255],
        "blocks.0.norm1.weight": [5],
        "blocks.1.mlp.fc1.bias": [63],
    }
    plan = spt_allocation(file, vit, methods, rank=1)
    assert plan.spent == file.params == 164
    assert {o.key: (o.size, o.indices and o.indices.values.tolist()) for o in plan} == {
        "blocks.0.attn.qkv[v]/lora": (1, None),
        "blocks.1.mlp.fc2/lora": (1, None),
        "blocks.0.norm2/vector": (1, None),
        "blocks.1.attn.qkv[k]/bias": (1, None),
        "blocks.0.attn.qkv[q]/sparse": (2, [2, 255]),
        "blocks.0.norm1/sparse": (1, [5]),
        "blocks.1.mlp.fc1/sparse_bias": (1, [63]),
        "cls_token/tokens": (1, None),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tuned_matrices": [[0, 1]]}, "6 columns"),
        ({"tuned_matrices": [[0, 0, 2, 0, 0, 0]]}, "0 and 1"),
        ({"unstructured_indexes": torch.tensor([5, 5])}, "distinct positions"),
        ({"unstructured_indexes": torch.tensor([1360])}, "among 1,360"),
        ({"tuned_vectors": ["a", "a"]}, "a vector twice"),
        ({"unstructured_name_shapes": 3}, "no SPT allocation"),
        ({"params": None}, "no SPT allocation"),
    ],
)
def test_content_that_makes_no_sense(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CorruptFile, match=message):
        read_spt(saved(tmp_path, {**content(), **change}))


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    data = content()
    del data["tuned_vectors"]
    with pytest.raises(CorruptFile, match="lacks tuned_vectors"):
        read_spt(saved(tmp_path, data))
    with pytest.raises(CorruptFile, match="lacks params"):
        read_spt(saved(tmp_path, [1, 2]))


def test_a_plan_for_another_model_is_refused(
    tmp_path: Path, vit: Catalog, convnet: Catalog, vit_b: Catalog, methods: Mapping[str, Method]
) -> None:
    file = read_spt(saved(tmp_path, content()))
    with pytest.raises(UsageError, match=r"does not have; the released files belong to ViT-B/16"):
        spt_allocation(file, convnet, methods, rank=1)
    with pytest.raises(UsageError, match=r"in shape \(16, 16\), this model has it in \(768, 768\)"):
        spt_allocation(file, vit_b, methods)
    with pytest.raises(UsageError, match="add one of the methods vector or bias"):
        spt_allocation(file, vit, {"lora": methods["lora"]}, rank=1)
    with pytest.raises(UsageError, match="needs the method 'adapter'"):
        spt_allocation(file, vit, {"lora": methods["lora"]}, "adapter", rank=1)


# ---------------------------------------------------------------- nothing in a file is ever run


class Bomb:
    """Unpickles to a call of os.mkdir."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def archive(path: Path, pickled: bytes, *more: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("archive/data.pkl", pickled)
        for name, data in more:
            z.writestr(f"archive/{name}", data)
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "was here"
    path = archive(tmp_path / "evil.pth", pickle.dumps({**_plain(), "params": Bomb(mark)}, protocol))
    with pytest.raises(CorruptFile, match=r"\.mkdir, which no SPT allocation holds"):
        read_spt(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark), protocol))
    assert mark.exists(), "the pickle of this test does nothing, so it proves nothing"


def _plain() -> dict[str, Any]:
    return {"tuned_matrices": [], "tuned_vectors": []}


@pytest.mark.parametrize(
    "code",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"(S'1'\nibuiltins\neval\n.",
        b"cbuiltins\ngetattr\n.",
        b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93.",
        b"ctorch._utils\n_rebuild_tensor\n.",
        b"ctorch\nLongStorage.__init__.__globals__\n.",
        b"\x80\x04\x8c\x05torch\x8c\x11LongStorage.dtype\x93.",
        b"cnumpy.core.multiarray\n_reconstruct\n.",
        b"c_codecs\nopen\n.",
    ],
)
def test_names_off_the_list_are_refused(tmp_path: Path, code: bytes) -> None:
    with pytest.raises(CorruptFile, match="which no SPT allocation holds; refused"):
        read_spt(archive(tmp_path / "evil.pth", code))


@pytest.mark.parametrize(
    "code",
    [
        b"ctorch\nLongStorage\n(tR.",  # calls a storage
        b"c_codecs\nencode\n(S'x'\nS'zip'\ntR.",  # another codec
        b"cnumpy\ndtype\n(S'O8'\ntR.",  # object arrays
        b"ctorch\nSize\n((I-1\nttR.",  # a negative size
        b"S'nonsense'\nQ.",  # a persistent id that is no storage
        b"(S'module'\nctorch\nLongStorage\nS'0'\nS'cpu'\nI1\ntQ.",
        b"(S'storage'\nctorch\nLongStorage\nS'../secret'\nS'cpu'\nI1\ntQ.",
        b"(S'storage'\nctorch\nLongStorage\nS'9'\nS'cpu'\nI1\ntQ.",  # no such storage
        b"(S'storage'\nctorch\nLongStorage\nS'0'\nS'cpu'\nI2\ntQ.",  # one value promised more than there is
        b"ctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\nLongStorage\nS'0'\nS'cpu'\nI1\ntQI0\n(I5\nt(I1\ntI00\nNtR.",
        b"\x80\x02}q",
        b"",
    ],
)
def test_tricks_with_listed_names_are_refused(tmp_path: Path, code: bytes) -> None:
    with pytest.raises(CorruptFile):
        read_spt(archive(tmp_path / "evil.pth", code, ("data/0", bytes(8)), ("secret", bytes(8))))


def test_files_of_other_kinds(tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match="cannot read"):
        read_spt(tmp_path / "absent.pth")
    with pytest.raises(CorruptFile, match="cannot read"):
        read_spt(tmp_path)
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(CorruptFile, match="damaged or no SPT allocation"):
        read_spt(tmp_path / "text.pth")
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as z:
        z.writestr("readme.txt", "hello")
    with pytest.raises(CorruptFile, match=r"no data\.pkl"):
        read_spt(tmp_path / "other.pth")
    whole = saved(tmp_path, content()).read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptFile, match="damaged"):
        read_spt(tmp_path / "cut.pth")


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autopeft.allocation import _released

    monkeypatch.setattr(_released, "_MAX_BYTES", 1000)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("archive/data.pkl", bytes(100_000))
    (tmp_path / "bomb.pth").write_bytes(buffer.getvalue())
    assert len(buffer.getvalue()) < 1000
    with pytest.raises(CorruptFile, match="unpacks to more than 1,000 bytes"):
        read_spt(tmp_path / "bomb.pth")
