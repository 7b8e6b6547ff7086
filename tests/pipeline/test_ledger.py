import numpy as np

from autopeft.core.outcome import Outcome
from autopeft.pipeline.ledger import Entry, Ledger, training_key


def entry(n=11):
    correct = np.arange(n) % 3 == 0
    return Entry(Outcome("done", {"top1": float(correct.sum())}, ((1, 0.5),), 7, 1.5, seed=4), correct, 123)


def test_entries_come_back_as_they_were(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    assert ledger.get("k") is None
    ledger.put("k", entry())
    found = ledger.get("k")
    assert found.outcome == entry().outcome
    assert found.merits.tolist() == entry().merits.tolist()
    assert found.sample_epochs == 123
    ledger.put("j", entry(0))
    assert ledger.get("j").merits.shape == (0,)
    assert ledger.sample_epochs("outer") == 246
    assert ledger.sample_epochs("inner") == 0


def test_merits_that_are_no_hits_come_back_exactly(tmp_path):
    merits = -np.random.default_rng(0).random(7)
    Ledger(tmp_path).put("k", Entry(entry().outcome, merits, 5))
    found = Ledger(tmp_path).get("k").merits
    assert found.dtype == np.float64
    assert found.tolist() == merits.tolist()


def test_a_damaged_entry_counts_as_absent(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.put("k", entry())
    path = tmp_path / "k.json"
    for text in ("", "{}", path.read_text()[:-20], path.read_text().replace('"done"', '"dune"')):
        path.write_text(text)
        assert ledger.get("k") is None


def test_keys_depend_on_every_fact_and_not_on_their_order():
    facts = {"seed": 1, "train": "a", "splits": ["inner"]}
    assert training_key(facts) == training_key(dict(reversed(facts.items())))
    assert len({training_key({**facts, "seed": s}) for s in range(5)}) == 5
