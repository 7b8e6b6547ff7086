"""What a person meets who compresses something that cannot be compressed."""

import pytest


def refused(result, code, *words):
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    assert "Traceback" not in result.stdout + result.stderr
    for word in words:
        assert word in result.stderr, (word, result.stderr)


def test_help_names_what_can_be_done(cli):
    text = cli("compress", "--help").stdout
    for word in ("--drop", "--rescale", "darex-q-layer", "--bits", "--max-loss-increase", "RUN_OR_PLAN"):
        assert word in text
    assert "compress" in cli("--help").stdout


def test_a_typo_in_the_command(cli):
    refused(cli("comprss", "run"), 2, "comprss", "compress")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--drop", "--bits"]),
        (["--drop", "90"], ["above 0 and below 1", "90"]),
        (["--bits", "16"], ["between 1 and 8", "16"]),
        (["--drop", "0.9", "--rescale", "darexq"], ["darexq", "darex-q-layer"]),
        (["--bits", "4", "--rescale", "darex-q"], ["--drop too"]),
        (["--bits", "4", "--codes", "nf4"], ["nf4", "lloyd"]),
    ],
)
def test_flags_out_of_range(cli, tmp_path, flags, words):
    refused(cli("compress", tmp_path, *flags), 2, *words)


def test_a_run_that_does_not_exist(cli):
    refused(cli("compress", "no-run", "--bits", "4"), 6, "no-run")
    refused(cli("compress", "no-run/compress.json"), 6, "no-run/compress.json")


def test_a_run_that_is_not_finished(cli, tmp_path):
    (tmp_path / "study.yaml").write_text("")
    refused(cli("compress", tmp_path, "--bits", "4"), 6, "record.json", "plan.json")


def test_a_plan_that_was_not_trained(cli, tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    refused(cli("compress", tmp_path / "plan.json", "--bits", "4"), 6, "autopeft train", "adapter.safetensors")


def test_a_trial_that_is_no_number(cli, tmp_path):
    refused(cli("compress", f"{tmp_path}#best", "--bits", "4"), 2, "RUN#NUMBER")


def test_a_record_and_settings_at_once(cli, tmp_path):
    (tmp_path / "compress.json").write_text("{}")
    refused(cli("compress", tmp_path / "compress.json", "--bits", "4"), 2, "leave --drop and --bits out")
    refused(cli("compress", tmp_path / "compress.json"), 6, "compress.json")
