import pytest

from autopeft.cli.duration import seconds_of
from autopeft.errors import UsageError


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("150s", 150), ("20m", 1200), ("2h", 7200), ("1h30m", 5400), ("1.5h", 5400)]
)
def test_durations(text, seconds):
    assert seconds_of(text) == seconds
    assert seconds_of(None) is None


@pytest.mark.parametrize("text", ["", "soon", "5 min", "-3s", "0s", "2d", "h"])
def test_what_is_no_duration(text):
    with pytest.raises(UsageError, match=r"duration|above 0"):
        seconds_of(text)
