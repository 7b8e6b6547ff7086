"""Hosts that are not what they seem."""

from __future__ import annotations

import pytest
import timm.layers
import torch
from torch import nn

from autopeft.errors import UsageError
from autopeft.methods._host import host_tensor, is_linear_in_weight, is_plain, new_parameter


@pytest.mark.parametrize(
    ("host", "plain", "linear"),
    [
        (nn.Linear(3, 3), True, True),
        (nn.Conv2d(3, 3, 3), True, True),
        (nn.Conv2d(3, 3, 3, padding="same", dilation=2), True, True),
        (nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), False, True),
        (timm.layers.StdConv2d(3, 3, 3), False, False),
        (timm.layers.ScaledStdConv2d(3, 3, 3), False, False),
        (timm.layers.Conv2dSame(3, 3, 3), False, True),
        (nn.LayerNorm(3), False, False),
    ],
)
def test_what_may_be_added_to(host: nn.Module, plain: bool, linear: bool) -> None:
    assert (is_plain(host), is_linear_in_weight(host)) == (plain, linear)


def test_an_overridden_forward_is_not_plain() -> None:
    host = nn.Linear(3, 3)
    host.forward = lambda x: x
    assert not is_plain(host)


def test_parameters_are_float32_but_on_a_float64_host() -> None:
    start = torch.zeros(2)
    assert new_parameter(nn.Linear(2, 2).half(), start).dtype == torch.float32
    assert new_parameter(nn.Linear(2, 2).double(), start).dtype == torch.float64
    assert new_parameter(nn.Identity(), start).dtype == torch.float32


def test_missing_and_misshapen_tensors(site_of) -> None:
    site = site_of(nn.Linear(3, 4))
    with pytest.raises(UsageError, match="holds no parameter 'weight'"):
        host_tensor(site, nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), "weight")
    with pytest.raises(UsageError, match="another model"):
        host_tensor(site, nn.Linear(4, 4), "weight")
