"""Wrong inputs: one clear sentence, the right exit code, no traceback, nothing half-written."""

import os
import shutil
from pathlib import Path

import pytest

TINY = ("--model", "py:autopeft.testing.tiny:tiny_vit", "--img-size", "8", "--data")


def snapshot(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def check(result, code, *words, wrote=()):
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    text = result.stderr
    if code != 2 or lines:
        assert len(lines) == 1, result.stderr
        text = lines[0]
    assert "Traceback" not in result.stdout + result.stderr
    for word in words:
        assert word in text, (word, text)


@pytest.fixture
def refused(cli, tmp_path):
    """Runs a command that must fail and leave the folder as it found it."""

    def run(code, *args, words=()):
        before = snapshot(tmp_path)
        result = cli(*args)
        check(result, code, *words)
        assert snapshot(tmp_path) == before, snapshot(tmp_path) - before

    return run


def test_typo_in_a_model_name(refused, pictures):
    refused(
        2, "search", "--model", "vit_smal_patch16_224", "--data", pictures,
        words=["vit_smal_patch16_224", "vit_small_patch16_224"],
    )  # fmt: skip


def test_model_name_with_an_owner_and_no_prefix(refused, pictures):
    refused(2, "search", "--model", "timm/resnet18", "--data", pictures, words=["hf-hub:timm/resnet18"])


def test_function_that_does_not_exist(refused, pictures):
    refused(2, "search", "--model", "py:autopeft.testing.tiny:huge_vit", "--data", pictures, words=["huge_vit"])


def test_weights_file_that_does_not_exist(refused, pictures):
    refused(
        2, "search", "--model", "resnet18", "--pretrained-path", "none.safetensors", "--data", pictures,
        words=["none.safetensors"],
    )  # fmt: skip


def test_typo_in_a_command(refused):
    refused(2, "serch", words=["serch", "search"])


def test_unknown_flag(refused):
    refused(2, "search", "--bugdet", "1%", words=["--bugdet"])


def test_budget_zero(refused, pictures):
    refused(2, "search", *TINY, pictures, "--budget", "0", words=["'0'", "buys nothing"])


def test_budget_that_is_no_budget(refused, pictures):
    refused(2, "plan", *TINY, pictures, "--budget", "lots", words=["lots", "0.1%"])


def test_budget_below_one_parameter(refused, pictures):
    refused(2, "plan", *TINY, pictures, "--budget", "0.00001%", words=["less than 1"])


def test_budget_below_the_cheapest_option(refused, pictures):
    refused(3, "plan", *TINY, pictures, "--budget", "3", "--methods", "lora", words=["lora", "Raise the budget"])


def test_typo_in_a_setting(refused, pictures):
    refused(2, "plan", *TINY, pictures, "train.epoch=3", words=["epoch", "epochs"])


def test_setting_without_a_value(refused, pictures):
    refused(2, "plan", *TINY, pictures, "train.epochs", words=["train.epochs"])


def test_unknown_method(refused, pictures):
    refused(2, "plan", *TINY, pictures, "--methods", "lorra", words=["lorra", "lora"])


def test_unknown_scorer(refused, pictures):
    refused(2, "plan", *TINY, pictures, "--scorer", "fischer", words=["fischer", "fisher"])


def test_folder_that_does_not_exist(refused):
    refused(4, "search", *TINY, "no-such/folder", words=["no-such/folder"])
    refused(2, "search", *TINY, "nosuchfolder", words=["nosuchfolder", "digits"])


def test_folder_without_pictures(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(4, "search", *TINY, "empty", words=["empty"])


def test_one_class(refused, pictures, tmp_path):
    shutil.copytree(pictures / "red", tmp_path / "one" / "red")
    refused(4, "plan", *TINY, "one", words=["class"])


def test_a_class_without_pictures(refused, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "data")
    (tmp_path / "data" / "white").mkdir()
    refused(4, "plan", *TINY, "data", words=["white"])


def test_unreadable_picture(refused, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "data")
    (tmp_path / "data" / "red" / "00.png").write_bytes(b"not a picture")
    refused(4, "plan", *TINY, "data", words=["00.png"])


def test_loss_that_becomes_nan(cli, pictures, tmp_path):
    result = cli(
        "search", *TINY, pictures, "--output", "run", "--epochs", "2", "--trials", "1", "--budget", "200",
        "train.lr.head=1e30", "train.clip=0", "search.tries=1", "head_warmup=false",
    )  # fmt: skip
    check(result, 8, "no plan could be trained")
    assert not (tmp_path / "run" / "record.json").exists()
    assert not list(tmp_path.rglob("*.tmp*"))


def test_folder_that_cannot_be_written_to(refused, pictures, tmp_path):
    # Nobody, not even root, makes folders in /proc.
    locked = tmp_path / "locked" if os.geteuid() else Path("/proc")
    locked.mkdir(mode=0o500, exist_ok=True)
    refused(6, "search", *TINY, pictures, "--output", locked / "run", words=[str(locked)])


def test_file_where_the_run_folder_should_be(refused, pictures, tmp_path):
    (tmp_path / "run").write_text("")
    refused(6, "search", *TINY, pictures, "--output", "run", words=["run"])


def test_missing_extra(refused, pictures, monkeypatch):
    import sys

    for name in [n for n in sys.modules if n == "datasets" or n.startswith("datasets.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(5, "plan", *TINY, "hfds/owner/name", words=["datasets", "hf-datasets"])


def test_configuration_file_that_is_no_yaml(refused, tmp_path):
    (tmp_path / "study.yaml").write_text("train: [1, 2\n")
    refused(2, "plan", "-c", "study.yaml", words=["study.yaml"])


def test_device_that_is_not_there(refused, pictures):
    import torch

    if torch.cuda.is_available():
        name, word = "cuda:99", "cuda:99"
    else:
        name, word = "cuda", "cuda"
    refused(2, "plan", *TINY, pictures, "--device", name, words=[word])


def test_run_that_does_not_exist(refused):
    refused(6, "report", "no-run", words=["no-run"])
    refused(6, "resume", "no-run", words=["no-run"])
    refused(6, "export", "no-run", words=["no-run"])
    refused(6, "worker", "no-run", words=["no-run"])


def test_storage_that_does_not_exist(refused):
    refused(6, "study", "ls", "sqlite:///nowhere.db", words=["nowhere.db"])


def test_plan_that_is_no_plan(refused, tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    refused(6, "train", "plan.json", words=["plan.json"])


def test_spt_file_that_holds_code(refused, tmp_path, pictures):
    import pickle
    import zipfile

    class Evil:
        def __reduce__(self):
            return (os.system, ("touch evil",))

    with zipfile.ZipFile(tmp_path / "evil.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil()))
        archive.writestr("archive/version", "3")
    refused(6, "plan", *TINY, pictures, "--from-spt", "evil.pth", words=["evil.pth"])
