import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner


@pytest.fixture
def cli(monkeypatch, tmp_path):
    """Runs a command in an empty folder: exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    from autopeft.cli.main import app

    def run(*args):
        return CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)

    return run


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder per class with small pictures whose colour gives the class away."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for label, name in enumerate(("blue", "green", "red")):
        folder = root / name
        folder.mkdir()
        for i in range(20):
            array = rng.integers(0, 90, (12, 12, 3), dtype=np.uint8)
            array[..., 2 - label] += 120
            Image.fromarray(array).save(folder / f"{i:02d}.png")
    return root
