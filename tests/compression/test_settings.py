import math

import pytest

from autopeft.compression.settings import CompressionSettings
from autopeft.core.codec import decode, encode
from autopeft.errors import UsageError


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "--drop"),
        ({"drop": 1.0}, "below 1"),
        ({"bits": 0}, "between 1 and 8"),
        ({"drop": 0.9, "rescale": "darex"}, "dare, darex-q, darex-q-layer"),
        ({"bits": 4, "codes": "nf4"}, "lloyd, uniform"),
        ({"bits": 4, "rescale": "darex-q"}, "--drop too"),
        ({"drop": 0.9, "of": "adapters"}, "--of"),
        ({"drop": 0.9, "samples": 0}, "samples"),
        ({"drop": 0.9, "draws": 0}, "draws"),
        ({"drop": 0.9, "eta": -1.0}, "eta"),
        ({"bits": 4, "max_loss_increase": math.nan}, "max_loss_increase"),
    ],
)
def test_values_out_of_range_are_named(settings, words):
    with pytest.raises(UsageError, match=words):
        CompressionSettings(**settings)


def test_steps_and_folder_say_what_is_done():
    both = CompressionSettings(drop=0.95, rescale="darex-q", bits=1, seed=3)
    assert both.steps == ("drop 0.95, darex-q", "1 bit, lloyd")
    assert both.slug == "drop0.95-darex-q-1bit-lloyd-seed3"
    assert CompressionSettings(bits=2, head=True, of="adapters").slug == "2bit-lloyd-head-adapters-seed0"


def test_settings_survive_json():
    settings = CompressionSettings(bits=3, max_loss_increase=math.inf)
    assert decode(CompressionSettings, encode(settings)) == settings
