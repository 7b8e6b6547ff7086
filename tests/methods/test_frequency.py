from __future__ import annotations

import pytest
import torch

from autopeft.methods._frequency import low_pass


@pytest.mark.parametrize(("height", "width", "reach"), [(8, 8, 1), (8, 8, 0), (7, 5, 2), (6, 9, 3), (4, 4, 2)])
def test_against_the_transform(height: int, width: int, reach: int) -> None:
    maps = torch.randn(2, height, width, 3, dtype=torch.float64)
    rows, columns = (torch.fft.fftfreq(n, 1 / n).round().abs() <= reach for n in (height, width))
    kept = torch.fft.fft2(maps, dim=(1, 2)) * (rows[:, None] & columns)[..., None]
    back = torch.fft.ifft2(kept, dim=(1, 2))
    assert back.imag.abs().max() < 1e-12
    torch.testing.assert_close(low_pass(maps, reach), back.real)


def test_hand_worked() -> None:
    maps = torch.tensor([[1.0, 2], [3, 6]]).view(1, 2, 2, 1)
    assert low_pass(maps, 0).flatten().tolist() == [3.0] * 4
    assert torch.equal(low_pass(maps, 1), maps)


def test_bfloat16_is_filtered_in_float32() -> None:
    maps = torch.randn(1, 16, 16, 2).bfloat16()
    low = low_pass(maps, 2)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low, low_pass(maps.float(), 2).bfloat16(), rtol=0, atol=0)
