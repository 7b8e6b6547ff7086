import dataclasses

from autopeft.report.verdict import verdict


def replaced(record, index, **changes):
    contenders = list(record.contenders)
    contenders[index] = dataclasses.replace(contenders[index], **changes)
    return dataclasses.replace(record, contenders=tuple(contenders))


def test_a_sure_gain_is_told_over_the_best_baseline(record):
    judged = verdict(record)
    assert (judged.gained, judged.sure) == (True, True)
    assert "+5.0 [+2.0, +8.0] over the best baseline (uniform lora (attn))" in judged.headline


def test_an_interval_around_zero_is_told(record):
    judged = verdict(replaced(record, 1, interval=(-0.01, 0.08)))
    assert (judged.gained, judged.sure) == (True, False)
    assert "uniform lora (attn) includes 0" in judged.headline


def test_no_gain_is_the_first_thing_said(record):
    for gain in (0.0, -0.02):
        judged = verdict(replaced(record, 1, gain=gain))
        assert judged.gained is False
        assert judged.headline.startswith("No gain over uniform lora (attn)")


def test_our_own_default_plan_is_no_outside_baseline(record):
    judged = verdict(replaced(record, 1, gain=-0.02, role="default"))
    assert judged.gained is True
    assert "head only" in judged.headline


def test_a_baseline_that_wins_has_gained_nothing(record):
    assert verdict(replaced(record, 0, role="baseline")).gained is False


def test_without_a_baseline_nothing_is_claimed(record):
    judged = verdict(dataclasses.replace(record, contenders=record.contenders[:1]))
    assert judged.gained is None
    assert "no gain is claimed" in judged.headline


def test_an_unfinished_run_claims_nothing(record):
    judged = verdict(dataclasses.replace(record, contenders=()))
    assert judged.gained is None
    assert "trial 3 with top1 90.0 %" in judged.headline
    assert verdict(dataclasses.replace(record, contenders=(), trials=(), best=-1)).headline == "No trial is done yet."
