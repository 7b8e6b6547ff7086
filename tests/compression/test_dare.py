import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autopeft.compression.dare import dense_change, drop_change, output_moments, threshold_of
from autopeft.compression.loader import kept_positions, patched
from autopeft.errors import UsageError


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_mean_and_variance_of_the_outputs_change_are_those_of_the_draws():
    change, x, drop = random(3, 40), random(40, seed=1), 0.8
    for q in (None, 0.5):
        outputs = []
        for seed in range(4000):
            dropped = drop_change({"w.delta": change}, {"w": change.shape}, ["w"], drop, seed)
            parts = dropped.resolved({"w": 0.2 if q is None else q})
            outputs.append(patched({"w": torch.zeros(3, 40)}, parts)["w"] @ x)
        found = torch.stack(outputs).double()
        mean, variance = output_moments(change.double(), x.double(), drop, q)
        # Three standard errors of a mean over 4000 draws; a variance has a relative error of about sqrt(2 / 4000).
        assert torch.all((found.mean(dim=0) - mean).abs() <= 3 * (variance / 4000).sqrt())
        torch.testing.assert_close(found.var(dim=0), variance, rtol=0.08, atol=0)
    # With q = 1 - p the mean is the change's own output.
    torch.testing.assert_close(output_moments(change, x, drop)[0], change @ x)


def test_moments_by_hand():
    mean, variance = output_moments(torch.tensor([[2.0, 1.0]]), torch.tensor([1.0, 3.0]), 0.75)
    assert mean.item() == pytest.approx(5.0)
    # p / (1 - p) * (2^2 + 3^2)
    assert variance.item() == pytest.approx(39.0)


def test_the_draw_is_this_one():
    """The same on every machine and in every version, or files that hold no positions cannot be read back."""
    found = kept_positions("blocks.0.mlp.fc1.weight", (4, 8), [(0, 4)], "0", threshold_of(0.75))
    assert found.tolist() == [0, 6, 7, 8, 13, 14, 23, 28]
    again = kept_positions("blocks.0.mlp.fc1.weight", (4, 8), [(0, 4)], "1", threshold_of(0.75))
    assert found.tolist() != again.tolist()


@given(st.integers(0, 10), st.sampled_from([0.1, 0.5, 0.9]))
def test_the_share_that_is_kept(seed, drop):
    n = 20_000
    kept = len(kept_positions("w", (n, 1), [(0, n)], str(seed), threshold_of(drop)))
    assert abs(kept - n * (1 - drop)) < 5 * (n * drop * (1 - drop)) ** 0.5


def test_only_changed_rows_are_drawn_in():
    change = torch.zeros(9, 50)
    change[2:4], change[7:9] = random(2, 50), random(2, 50, seed=1)
    dropped = drop_change({"w.delta": change}, {"w": (9, 50)}, ["w"], 0.5, 0)
    kept = dropped.kept["w"]
    assert kept.rows == ((2, 4), (7, 9))
    assert set((kept.positions // 50).tolist()) == {2, 3, 7, 8}
    torch.testing.assert_close(kept.values, change.flatten()[kept.positions])


def test_a_sparse_change_stays_sparse():
    parts = {"w.idx": torch.arange(0, 3000, 3, dtype=torch.int32), "w.val": random(1000), "b.delta": random(3)}
    dropped = drop_change(parts, {"w": (100, 30), "b": (3,)}, ["w"], 0.9, 0)
    found = dropped.rescaled({"w": 0.1})
    assert set(found) == {"w.idx", "w.val", "b.delta"}
    assert 60 < len(found["w.idx"]) < 140
    torch.testing.assert_close(found["w.val"] * 0.1, parts["w.val"][found["w.idx"].long() // 3])
    assert not any(position % 3 for position in found["w.idx"].tolist())


def test_low_rank_factors_stay_where_they_are_smaller():
    down, up = random(2, 100), random(100, 2, seed=1)
    parts = {"w.A": down, "w.B": up}
    shapes = {"w": (100, 10, 10)}
    # 400 numbers against about 1,000.
    assert drop_change(parts, shapes, ["w"], 0.9, 0).rescaled({}) == parts
    forced = drop_change(parts, shapes, ["w"], 0.9, 0, even_larger=True)
    torch.testing.assert_close(forced.kept["w"].values, (up @ down).flatten()[forced.kept["w"].positions])
    assert not drop_change(parts, shapes, ["w"], 0.99, 0).rescaled({"w": 0.01}).keys() & parts.keys()


def test_dense_change_of_every_form():
    dense = torch.zeros(2, 3, 1)
    dense[1, 0, 0] = 5.0
    forms = [
        {"w.delta": dense},
        {"w.idx": torch.tensor([3]), "w.val": torch.tensor([5.0])},
        {"w.A": torch.tensor([[5.0, 0, 0]]), "w.B": torch.tensor([[0.0], [1.0]])},
    ]
    for parts in forms:
        torch.testing.assert_close(dense_change(parts, "w", (2, 3, 1)), dense)
    assert not dense_change({}, "w", (2, 3, 1)).any()


@pytest.mark.parametrize("drop", [0, 1, -0.5, 1.5, float("nan"), True])
def test_other_shares_are_refused(drop):
    with pytest.raises(UsageError, match="above 0 and below 1"):
        threshold_of(drop)


def test_the_threshold_is_exact():
    assert threshold_of(0.5) == 2**63
    assert threshold_of(1e-30) == 2**64 - 1
    assert np.uint64(threshold_of(1e-30)) == np.iinfo(np.uint64).max
