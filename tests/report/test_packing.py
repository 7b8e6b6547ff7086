from __future__ import annotations

from autopeft.report.packing import packing_lines

LORA = {"method": "lora", "size": 2, "site": "blocks.0.mlp.fc1", "cost": 160, "gain": 0.5}
CORE = {"method": "core", "size": 12, "site": "blocks.1.mlp.fc1", "cost": 144, "gain": 0.49}
FACTS = {"gain": 2.0, "value": None, "bound": 2.0, "gap": 0.0, "price": 0.001, "unspent": 1234, "next_best": None}


def test_proof_price_and_what_is_left() -> None:
    # 1 % of 10,000 units at 0.001 each adds 0.1 to 2.0: 5 %.
    assert packing_lines(FACTS, 10_000) == (
        "proven optimal; 1 % more budget would add about 5.00% of predicted gain",
        "predicted gain 2, upper bound 2, 0.001 per further unit of budget; 1,234 unspent",
    )
    assert packing_lines({**FACTS, "bound": 2.5, "gap": 0.2}, 10_000)[0].startswith("within 2.0e-01 of the optimum")


def test_a_curve_is_judged_by_what_it_maximised() -> None:
    assert "predicted gain 4, upper bound 4" in packing_lines({**FACTS, "value": 4.0, "bound": 4.0}, 100)[1]


def test_the_next_best_plan() -> None:
    rival = {"gain": 1.99, "spent": 1, "loss": 0.005, "removed": [LORA], "added": [CORE], "proven": True}
    text = packing_lines({**FACTS, "next_best": rival}, 100)[-1]
    start = "the next best plan gains 0.005 of this less: "
    assert text == start + "core 12 at blocks.1.mlp.fc1 in place of lora 2 at blocks.0.mlp.fc1"
    cut = packing_lines({**FACTS, "next_best": {**rival, "added": [CORE] * 5, "proven": False}}, 100)[-1]
    assert cut.count("core 12") == 3
    assert ", 2 more in place of" in cut
    assert cut.endswith("(the search for it was cut short)")
    bare = packing_lines({**FACTS, "next_best": {**rival, "loss": 0.0, "added": []}}, 100)[-1]
    assert bare == "the next best plan gains as much: nothing in place of lora 2 at blocks.0.mlp.fc1"


def test_what_happens_to_memorisation() -> None:
    assert packing_lines({"memory": -0.25}, 100) == (
        "predicted change of memorisation -0.25 (less), its price taken off the gain",
    )
    assert "+0.5 (more)" in packing_lines({"memory": 0.5}, 100)[0]


def test_nothing_is_said_where_nothing_is_known() -> None:
    assert packing_lines({}, 100) == ()
    assert packing_lines({**FACTS, "bound": None, "gap": None}, 100) == ()
