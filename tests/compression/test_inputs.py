import pytest
import torch
import torch.nn.functional as F
from timm.layers import ScaledStdConv2d
from torch import nn

from autopeft.compression.inputs import contributions, droppable, mean_inputs


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, (3, 2), stride=2, padding=(2, 0), dilation=(1, 2)),
        nn.Conv2d(4, 6, 3, padding="same", groups=2),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    ],
)
def test_the_sum_of_contributions_is_the_mean_change_of_the_output(conv):
    """`sum_j c_ij` is the mean, over samples and positions, of what the change adds to channel `i`."""
    x, change, bias = random(3, 4, 7, 8), random(*conv.weight.shape, seed=1), random(6, seed=2)
    means = mean_inputs(nn.Sequential(conv), ["0.weight"], lambda: conv(x))
    found = contributions(change, means["0.weight"], bias).sum(dim=1)
    with torch.no_grad():
        before = conv(x)
        conv.weight += change
        conv.bias += bias
        expected = (conv(x) - before).mean(dim=(0, 2, 3))
    torch.testing.assert_close(found.float(), expected, atol=1e-4, rtol=1e-4)


def test_a_linear_layer_that_is_called_twice():
    linear, x, y = nn.Linear(5, 3), random(2, 7, 5), random(4, 5, seed=1)
    means = mean_inputs(linear, ["weight"], lambda: [linear(x), linear(y)])
    rows = torch.cat([x.flatten(0, 1), y])
    torch.testing.assert_close(means["weight"], rows.double().mean(dim=0))
    change = random(3, 5, seed=2)
    torch.testing.assert_close(
        contributions(change, means["weight"]).sum(dim=1).float(), F.linear(rows, change).mean(dim=0)
    )
    assert not linear._forward_pre_hooks


def test_layers_that_are_not_linear_in_their_weight_or_never_called_are_left_out():
    model = nn.Sequential(ScaledStdConv2d(3, 4, 3), nn.Linear(2, 2))
    assert mean_inputs(model, ["0.weight", "1.weight"], lambda: model[0](random(1, 3, 5, 5))) == {}


def test_what_may_be_dropped_from():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_embed = nn.Parameter(torch.zeros(1, 4, 8))
            self.table = nn.Embedding(5, 8)
            self.stem = nn.Conv2d(3, 8, 2)
            self.norm = nn.LayerNorm(8)
            self.attn = nn.MultiheadAttention(8, 2)
            self.head = nn.Linear(8, 3)

    found = droppable(Model(), ("head.weight", "head.bias"))
    assert found == ("stem.weight", "attn.in_proj_weight", "attn.out_proj.weight")
