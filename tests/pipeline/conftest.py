import numpy as np
import pytest
from PIL import Image

from autopeft.config.decode import load_study
from autopeft.pipeline.prepare import prepare

KWARGS = ("patch_size=4", "embed_dim=16", "depth=2", "num_heads=2")
SMALL = ["--model", "vit_tiny_patch16_224", "--no-pretrained", "--img-size", "8", "--budget", "5%", "-b", "16"]
SMALL += [text for pair in KWARGS for text in ("--model-kwargs", pair)]


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_verify):
    """Every export of these tests is verified, by a process that is warm."""


@pytest.fixture(scope="session")
def small():
    """Flags of a model that trains in a fraction of a second."""
    return SMALL


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """60 pictures of three classes that differ in colour."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for label, name in enumerate(("blue", "green", "red")):
        (root / name).mkdir()
        for i in range(20):
            array = rng.integers(0, 220, (8, 8, 3), dtype=np.uint8)
            array[..., 2 - label] += rng.integers(0, 36, dtype=np.uint8)
            Image.fromarray(array).save(root / name / f"{i:02d}.png")
    return root


@pytest.fixture(scope="session")
def study(pictures):
    """A study of a model that trains in a fraction of a second, at a budget that every contender can express."""
    kwargs = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return load_study(
        [],
        {
            "model.spec": "vit_tiny_patch16_224",
            "model.pretrained": False,
            "model.img_size": 8,
            "model.kwargs": kwargs,
            "data.spec": str(pictures),
            "data.batch_size": 12,
            "budget": "20%",
            "train.epochs": 2,
            "train.threads": 1,
            "device": "cpu",
        },
    )


@pytest.fixture(scope="session")
def prepared(study):
    """Model, task, head and scores of `study`; nothing is kept on disk."""
    return prepare(study)
