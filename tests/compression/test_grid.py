import pytest

from autopeft.compression.grid import coarse_to_fine


def test_a_valley_is_found_to_the_last_rounds_spacing():
    calls = []
    best, trace = coarse_to_fine(lambda x: calls.append(x) or (x - 0.437) ** 2, 0.1, 1.0)
    # Spacings 0.18, 0.072 and 0.0288.
    assert abs(best - 0.437) <= 0.0288 / 2
    assert len(calls) == len(set(calls)) == len(trace)
    assert dict(trace)[best] == min(value for _, value in trace)


@pytest.mark.parametrize(("sign", "end"), [(1, 0.1), (-1, 1.0)])
def test_the_ends_are_tried(sign, end):
    assert coarse_to_fine(lambda x: sign * x, 0.1, 1.0)[0] == end


def test_of_equals_the_smallest():
    assert coarse_to_fine(lambda x: 1.0, 0.2, 0.8)[0] == 0.2
