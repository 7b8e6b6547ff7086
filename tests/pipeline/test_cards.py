from __future__ import annotations

from pathlib import Path

import pytest

from autopeft.config.registries import METHODS
from autopeft.config.study import DEFAULT_METHODS
from autopeft.errors import UnknownPlugin
from autopeft.pipeline.cards import method_cards, method_table

README = Path(__file__).parents[2] / "README.md"
_BEGIN, _END = "<!-- methods: made by `autopeft methods --markdown` -->\n", "<!-- end of methods -->"


def test_a_card_says_what_the_method_says() -> None:
    """LoRA of rank 1 on the 48 matrices of ViT-B/16's blocks costs 147,456, and 1,536 on the patch embedding."""
    (card,) = method_cards(["lora"])
    assert card.title == "A low-rank change of a Linear or Conv2d weight"
    assert (card.family, card.slots, card.kinds) == ("matrix", ("weight",), ("conv2d", "linear"))
    assert card.count == "`r (in_features + out_features)`"
    assert card.smallest == 147_456 + 768 + 768
    assert (card.mergeable, card.exports, card.source) == ("yes", ("timm", "delta", "peft", "native"), "2106.09685")
    assert card.default


def test_cards_tell_methods_apart() -> None:
    cards = {card.name: card for card in method_cards(["adapter", "bias", "sparse", "ssf"])}
    assert cards["adapter"].mergeable == "no"
    assert cards["adapter"].exports == ("native",)
    assert cards["bias"].smallest == 102_912, "BitFit of ViT-B/16"
    assert cards["ssf"].smallest == 205_824
    assert cards["sparse"].exports == ("timm", "delta", "native")


def test_every_method_has_a_card() -> None:
    cards = {card.name: card for card in method_cards()}
    assert list(cards) == sorted(METHODS)
    assert {str(p["type"]) for p in DEFAULT_METHODS.values()} == {card.name for card in cards.values() if card.default}
    for card in cards.values():
        assert card.title, card.name
        assert card.count, card.name
    usable = [card for card in cards.values() if card.kinds]
    assert len(usable) >= len(cards) - 1, "only a method with required settings may be unusable"
    with pytest.raises(UnknownPlugin, match=r"Did you mean .lora."):
        method_cards(["loraa"])


def test_the_table_of_the_readme_is_this_one() -> None:
    text = README.read_text(encoding="utf-8")
    assert _BEGIN in text, "README.md has lost the place of the methods' table"
    shown = text.partition(_BEGIN)[2].partition(_END)[0]
    assert shown == method_table(method_cards()), "paste the output of `autopeft methods --markdown` into README.md"
