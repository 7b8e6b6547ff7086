from __future__ import annotations

from collections import Counter

import numpy as np
from sklearn.datasets import load_digits

from autopeft.tasks.sources.digits import DIGITS_COUNTS, open_digits


def test_digits_are_all_there() -> None:
    source = open_digits()
    samples = source.parts["all"]
    assert len(samples) == len({s.name for s in samples}) == sum(DIGITS_COUNTS) == 1797
    assert source.classes == tuple("0123456789")
    assert source.counts == (500, 400, 897)
    assert Counter(s.label for s in samples) == Counter(load_digits().target.tolist())


def test_greys_are_stretched_to_bytes() -> None:
    sample = open_digits().parts["all"][17]
    image = np.asarray(sample.load())
    assert image.shape == (8, 8, 3)
    raw = load_digits().images[17]
    assert np.abs(image[..., 0] - raw * 255 / 16).max() <= 0.5
    assert raw.max() == 16
    assert image.max() == 255


def test_no_digit_is_there_twice() -> None:
    assert len({s.load().tobytes() for s in open_digits().parts["all"]}) == 1797
