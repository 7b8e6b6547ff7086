import dataclasses

import pytest

from autopeft.report._text import (
    bar,
    gain_text,
    metric_text,
    number,
    search_metric,
    search_sign,
    share_text,
    stage_seconds,
)


@pytest.mark.parametrize(
    ("share", "text"), [(0, "    "), (1, "████"), (0.5, "██  "), (1 / 32, "▏   "), (2, "████"), (-1, "    ")]
)
def test_bar_counts_eighths(share, text):
    assert bar(share, 4) == text


def test_numbers():
    assert number(85798) == "85,798"
    assert number(0.123456) == "0.1235"
    assert metric_text("top1", 0.8731) == "87.3 %"
    assert metric_text("nll", 0.8731) == "0.8731"
    assert gain_text("top1", -0.012) == "-1.2"
    assert gain_text("nll", 0.5) == "+0.5"
    assert share_text(1, 0) == "-"
    assert stage_seconds(3725) == "1 h 02 min"
    assert stage_seconds(119.9) == "2 min 00 s"


def test_the_search_metric_is_the_rewards(record):
    assert search_metric(record) == "top1"
    assert search_metric(dataclasses.replace(record, study={"reward": {"name": "nll"}})) == "nll"
    assert search_metric(dataclasses.replace(record, study={"reward": {"name": "unmeasured"}})) == "top1"
    assert search_sign(record) == 1
    assert search_sign(dataclasses.replace(record, study={"reward": {"direction": "minimize"}})) == -1
    assert search_metric(dataclasses.replace(record, study={}, trials=(), contenders=())) == "top1"
