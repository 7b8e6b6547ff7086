from __future__ import annotations

import pytest
from PIL import Image

from autopeft.errors import DataError
from autopeft.tasks.sources.source import Sample, Source


def sample(name: str, label: int) -> Sample:
    return Sample(name, label, lambda: Image.new("RGB", (2, 2)))


PAIR = (sample("a", 0), sample("b", 1))


def test_train_alone_becomes_one_tree() -> None:
    assert Source("it", ("a", "b"), {"train": PAIR}).parts == {"all": PAIR}


def test_bad_sources_are_refused() -> None:
    with pytest.raises(DataError, match="it holds no images"):
        Source("it", ("a", "b"), {"all": ()})
    with pytest.raises(DataError, match="it holds only the class 'a'"):
        Source("it", ("a",), {"all": PAIR[:1]})
    with pytest.raises(DataError, match="it has no image of class 'b'; every"):
        Source("it", ("a", "b"), {"all": PAIR[:1]})
    with pytest.raises(DataError, match="it has no image of class 'b' in its test part"):
        Source("it", ("a", "b"), {"train": PAIR, "test": PAIR[:1]})
    with pytest.raises(DataError, match="it has val and test but no train"):
        Source("it", ("a", "b"), {"val": PAIR, "test": PAIR})
    with pytest.raises(ValueError, match="parts must be among"):
        Source("it", ("a", "b"), {"rest": PAIR})  # type: ignore[dict-item]
