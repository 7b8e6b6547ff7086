import dataclasses

import pytest

from autopeft.core.outcome import Outcome
from autopeft.report.rows import allocation_rows
from autopeft.report.tables import (
    Table,
    allocation_table,
    contender_table,
    cost_table,
    environment_table,
    mix_text,
    spending_tables,
    trial_table,
)


def test_text_pads_and_aligns():
    table = Table("t", ("a", "bb"), (("x", "1"), ("longer", "22")), "lr")
    assert table.text().splitlines() == ["a       bb", "------  --", "x        1", "longer  22"]


def test_markdown_escapes_what_would_break_the_table():
    table = Table("t", ("a",), (("x|y\nz",),), "l")
    assert table.markdown().splitlines() == ["| a |", "| :--- |", "| x\\|y z |"]


def test_a_ragged_table_is_refused():
    with pytest.raises(ValueError, match="2 columns"):
        Table("t", ("a", "b"), (("x",),), "ll")


def test_contenders_show_mean_deviation_gain_and_interval(record):
    rows = contender_table(record).rows
    # (0.90 + 0.92) / 2 = 0.91, standard deviation sqrt(2 * 0.01^2 / 1) = 0.0141
    assert rows[0] == ("trial 3 (winner)", "trial", "100", "2", "91.0 % ± 1.4", "", "")
    assert rows[1] == ("uniform lora (attn)", "baseline", "100", "2", "86.0 % ± 0.0", "+5.0", "[+2.0, +8.0]")
    assert rows[2][2] == "head only"


def test_a_failed_seed_is_visible(record):
    broken = dataclasses.replace(
        record.contenders[1], outcomes=(record.contenders[1].outcomes[0], Outcome("failed", reason="nan"))
    )
    rows = contender_table(dataclasses.replace(record, contenders=(record.contenders[0], broken))).rows
    assert rows[1][3:5] == ("1 of 2", "86.0 %")


def test_trials_mark_the_best_and_show_what_was_pruned(record):
    rows = trial_table(record).rows
    assert [row[0] for row in rows] == ["0", "1", "2", "3*", "4"]
    assert rows[4][2:4] == ("pruned", "-")
    assert rows[3][3] == "90.0 %"
    assert rows[0][5] == "head only"


def test_mix_is_ordered_by_size(record):
    assert mix_text(record.trials[3]) == "core 75 %, bias 25 %"


def test_allocation_shares_are_of_the_plan(options, sites):
    rows = allocation_table(allocation_rows(options, sites)).rows
    assert [row[5] for row in rows] == ["40.0 %", "40.0 %", "20.0 %"]


def test_spending_by_method_role_and_block(options, sites):
    method, role, block = spending_tables(allocation_rows(options, sites))
    assert [row[:2] for row in method.rows] == [("core", "32"), ("bias", "8")]
    assert [row[:2] for row in role.rows] == [("attn.qkv", "32"), ("mlp.fc1", "8")]
    assert [row[:2] for row in block.rows] == [("0", "16"), ("1", "24")]
    assert method.rows[0][3] == "█" * 20
    assert method.rows[1][3].rstrip() == "█" * 5


def test_blocks_are_left_out_where_depths_are_unknown(options):
    assert len(spending_tables(allocation_rows(options))) == 2


def test_costs_are_in_units_of_one_full_training(record):
    rows = cost_table(record).rows
    assert rows[0] == ("scores", "50", "0.25", "", "1.0 s")
    assert rows[1] == ("search", "400", "2.00", "", "1 min 15 s")
    assert rows[2][:3] == ("search in all", "450", "2.25")
    assert rows[3][:3] == ("one full training", "200", "1.00")


def test_environment_lists_what_is_known(record):
    assert environment_table(record).rows == (("device", "cpu"), ("threads", "1"))
