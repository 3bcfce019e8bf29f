"""The further norms: each by its definition, and in the network."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import QUIET, stand_in
from torch import nn

import model
import utils
from normkit.norms import MORE_NORMS


def activations(N=20, C=32, size=6):
    return torch.randn(N, C, size, size, dtype=torch.float64) * torch.linspace(1, 3, C)[:, None, None] + 1


def build(name, C=32):
    """A norm in float64, with scales and shifts of its own."""
    norm = MORE_NORMS[name](C, 4).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def scaled(norm, x):
    return x * norm.weight[:, None, None] + norm.bias[:, None, None]


def test_none_changes_nothing():
    x = activations()
    assert torch.equal(build("none")(x), x)


def test_instance_norm_takes_each_channel_of_each_image():
    norm, x = build("instance"), activations()
    expected = F.instance_norm(x, weight=norm.weight, bias=norm.bias)
    torch.testing.assert_close(norm(x), expected)


def test_rms_norm_divides_each_image_by_its_root_mean_square():
    norm, x = build("RMS"), activations()
    expected = torch.stack([image / (image.square().mean() + 1e-5).sqrt() for image in x])
    torch.testing.assert_close(norm(x), scaled(norm, expected))


def test_pixel_norm_takes_the_channels_of_each_pixel():
    norm, x = build("pixel"), activations()
    mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    torch.testing.assert_close(norm(x), scaled(norm, (x - mean) / (variance + 1e-5).sqrt()))


def test_ghost_batch_norm_takes_sixteen_images_at_a_time_in_training_alone():
    norm, x = build("ghost"), activations(N=37)
    plain = copy.deepcopy(nn.BatchNorm2d(32).double())
    plain.load_state_dict(norm.state_dict())
    expected = torch.cat([plain(x[:16]), plain(x[16:32]), plain(x[32:])])
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm.state_dict(), plain.state_dict())
    torch.testing.assert_close(norm.eval()(x), plain.eval()(x))


def test_standardised_filters_have_mean_0_and_keep_a_signals_size(monkeypatch):
    monkeypatch.setitem(model.NORMS, "standardised", MORE_NORMS["standardised"])
    torch.manual_seed(1)
    net = model.Net("standardised")
    torch.manual_seed(1)
    other = model.Net("group")
    assert type(other.C4.conv) is nn.Conv2d and type(other.C4.norm) is nn.GroupNorm
    assert all(map(torch.equal, net.parameters(), other.parameters()))  # they start from the same numbers
    x, conv = torch.randn(2, 32, 5, 5), net.C4.conv
    weight = conv.weight - conv.weight.mean((1, 2, 3), keepdim=True)
    weight = weight / weight.square().sum((1, 2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(conv(x), F.conv2d(x, weight, conv.bias, padding=1), rtol=0, atol=1e-4)
    assert model.Net("standardised", num_groups="channels").C4.norm.num_groups == 32
    own = type("OwnConv2d", (nn.Conv2d,), {})
    block = model.ConvBlock(3, 32, nn.Identity(), 0)
    block.conv = own(3, 32, 3)
    block.norm = MORE_NORMS["standardised"](32, 4)
    assert type(block.conv) is own  # whose forward is the user's


@pytest.mark.parametrize("name", MORE_NORMS)
def test_the_network_learns_with_it_and_is_the_same_when_copied(name, monkeypatch):
    monkeypatch.setitem(model.NORMS, name, MORE_NORMS[name])
    result = utils.run(name, stand_in(198, 101), 3, recipe="best", batch_size=20, **QUIET)
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    images = torch.randn(3, 3, 16, 16)
    expected = result.model.eval()(images)
    for twin in (copy.deepcopy(result.model), pickle.loads(pickle.dumps(result.model))):
        torch.testing.assert_close(twin(images), expected)


@pytest.mark.parametrize("name", MORE_NORMS)
def test_a_single_image_and_a_ragged_batch(name, monkeypatch):
    monkeypatch.setitem(model.NORMS, name, MORE_NORMS[name])
    net = model.Net(name)
    for N in (1, 17):
        assert net(torch.randn(N, 3, 32, 32)).isfinite().all()
