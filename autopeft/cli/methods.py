"""`autopeft methods`: what can be put into a model."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer

from autopeft.cli import options as o

__all__ = ["methods"]


def methods(
    names: Annotated[list[str] | None, typer.Argument(help="only these; all when none is given")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="print the table of the README")] = False,
    json: o.Json = False,
) -> None:
    """List the methods that a plan may mix: what each changes, costs and exports, and where it comes from."""
    from autopeft.core.codec import encode
    from autopeft.pipeline.cards import method_cards, method_table

    cards = method_cards(names or None)
    if json:
        print(json_module.dumps({"schema": "autopeft.methods/1", "methods": [encode(card) for card in cards]}))
        return
    if markdown:
        print(method_table(cards), end="")
        return
    width = max(len(card.name) for card in cards)
    for card in cards:
        mark = "*" if card.default else " "
        print(f"{card.name:<{width}} {mark} {card.title}")
        merges = {"yes": "merges", "some": "merges in part", "no": "does not merge"}.get(card.mergeable, "")
        facts = [", ".join(card.slots), card.count.replace("`", ""), merges, "exports " + ", ".join(card.exports)]
        print(f"{'':<{width}}   {' | '.join(fact for fact in facts if fact)}")
        source = f"arXiv {card.source}" if card.source else ""
        smallest = f"ViT-B/16 at its smallest everywhere: {card.smallest:,}" if card.smallest else ""
        print(f"{'':<{width}}   {' | '.join(fact for fact in (f'family {card.family}', smallest, source) if fact)}")
    print("\n* offered when a study names no methods; --methods a,b chooses, methods.NAME.KEY=VALUE sets")
