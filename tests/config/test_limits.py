"""What a person may write for the limits of a plan."""

import pytest

from autopeft.config.limits import LimitSettings
from autopeft.errors import UsageError


@pytest.mark.parametrize(
    ("text", "flops"), [("1.5T", 1.5e12), ("250 g", 2.5e11), ("7", 7.0), ("3K", 3e3), ("2P", 2e15), ("0.5M", 5e5)]
)
def test_flops(text, flops):
    assert LimitSettings(max_flops=text).flops == pytest.approx(flops)


@pytest.mark.parametrize(("text", "size"), [("200MB", 2e8), ("1.5 gb", 1.5e9), ("12B", 12.0), ("3KB", 3e3)])
def test_memory(text, size):
    assert LimitSettings(max_memory=text).memory == pytest.approx(size)


def test_nothing_is_limited_by_default():
    limits = LimitSettings()
    assert (limits.target, limits.max_rank, limits.flops, limits.memory) == ("any", None, None, None)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"target": "lroa"}, "limits.target must be one of any, timm, peft, lora, got 'lroa'"),
        ({"max_rank": 0}, "limits.max_rank must be a whole number of at least 1, got 0"),
        ({"max_rank": True}, "limits.max_rank must be a whole number of at least 1, got True"),
        ({"max_flops": "12X"}, "limits.max_flops must be a number above 0 .* such as 1.5T, got '12X'"),
        ({"max_flops": "-1G"}, "limits.max_flops must be a number above 0"),
        ({"max_memory": "0MB"}, "limits.max_memory must be a number above 0 .* such as 200MB, got '0MB'"),
        ({"max_memory": "200"}, "limits.max_memory must be a number above 0 with one of B, KB, MB, GB"),
    ],
)
def test_what_cannot_be_read_is_named(setting, said):
    with pytest.raises(UsageError, match=said):
        LimitSettings(**setting)
