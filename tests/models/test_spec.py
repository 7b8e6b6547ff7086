from __future__ import annotations

import pytest

from autopeft.errors import UsageError
from autopeft.models.spec import ModelSpec


def test_default_is_the_bundled_model() -> None:
    assert ModelSpec() == ModelSpec("bundled:vit_tiny_fashion", True, None, None, {})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"spec": " "}, "specification is empty"),
        ({"img_size": 0}, "at least 1 pixel, got 0"),
        ({"kwargs": {"pretrained": True}}, "'pretrained' cannot be given by hand"),
        ({"img_size": 32, "kwargs": {"img_size": 64}}, "given twice and differs: 32 and model argument img_size=64"),
    ],
)
def test_wrong_values(args: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ModelSpec(**args)
