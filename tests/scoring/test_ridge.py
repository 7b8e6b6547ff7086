from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge as Reference

from autopeft.scoring.ridge import Ridge


@pytest.mark.parametrize("samples", [6, 40])
def test_against_scikit_learn(samples: int) -> None:
    """With fewer samples than features, and with more."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 12, generator=generator, dtype=torch.float64) + 1
    y = torch.randn(samples, 3, generator=generator, dtype=torch.float64)
    fitted = Ridge(x, y)
    for alpha in (1e-3, 1.0, 30.0):
        weight, bias = fitted.solve(alpha)
        expected = Reference(alpha=alpha, solver="svd").fit(x.numpy(), y.numpy())
        np.testing.assert_allclose(weight.numpy(), expected.coef_, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(bias.numpy(), expected.intercept_, rtol=1e-7, atol=1e-9)
