"""What was found out about a network is remembered no longer than it holds."""

import copy
import gc
import pickle
import re

import numpy as np
import pytest
import torch
from helpers import QUIET, stand_in
from torch import nn

import model
import utils
from normkit.fused import fuse
from normkit.fused.build import library

pytestmark = [
    pytest.mark.skipif(library().reason is not None, reason=f"no kernel: {library().reason}"),
    pytest.mark.filterwarnings("ignore:PyTorch's modules ran in place of the fused kernel"),
]
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class EqualToAll(nn.GroupNorm):
    """A norm that calls any other norm equal, as one with settings compared by a dataclass may."""

    __hash__ = nn.Module.__hash__

    def __eq__(self, other):
        return isinstance(other, nn.GroupNorm)


class Doubling(nn.GroupNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class Awkward:
    """What has no answer to ==."""

    def __eq__(self, other):
        raise ValueError("no truth value")

    __hash__ = None


def equal_norm(net, seed):
    norm = EqualToAll(4, 32)
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(seed))
    net.C4.norm = norm


CHANGES = {  # done to a network that the kernel has computed before
    "a new weight": lambda net: setattr(net.C4.conv, "weight", nn.Parameter(torch.randn(32, 32, 3, 3))),
    "a weight's numbers": lambda net: net.C4.conv.weight.data.mul_(2),
    "a weight's memory": lambda net: setattr(net.C4.conv.weight, "data", torch.randn(32, 32, 3, 3)),
    "a weight's layout": lambda net: net.to(memory_format=torch.channels_last),
    "a weight's dtype": lambda net: setattr(net.C4.conv.weight, "data", torch.randn(32, 32, 3, 3).double()),
    "a weight's shape": lambda net: setattr(net.C4.conv.weight, "data", torch.randn(9)),
    "a weight's only number": lambda net: setattr(net.C4.conv.weight, "data", torch.tensor(1.0)),
    "a weight behind a minus sign": lambda net: setattr(
        net.C4.conv.weight, "data", torch._neg_view(net.C4.conv.weight.data)
    ),
    "another module": lambda net: setattr(net, "C4", copy.deepcopy(net.C5)),
    "another class": lambda net: setattr(net.C4.norm, "__class__", Doubling),
    "an equal norm": lambda net: equal_norm(net, 1),
    "eps": lambda net: setattr(net.C4.norm, "eps", 1.0),
    "all attributes at once": lambda net: setattr(net.C4.norm, "__dict__", vars(net.C4.norm) | {"eps": 1.0}),
    "the number of groups": lambda net: setattr(net.C4.norm, "num_groups", 8),
    "no skips": lambda net: setattr(net, "skip", False),
    "a hook": lambda net: net.C4.register_forward_hook(lambda module, args, output: output * 2),
    "dropout of all": lambda net: setattr(net.C4.dropout, "p", 1.0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen_at_the_next_call(name):
    net = model.Net("group", dropout=0)
    fused = fuse(net)
    for _ in range(2):
        fused(IMAGES)
    assert fused.reason is None
    CHANGES[name](net)
    try:
        expected = net(IMAGES)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error))):
            fused(IMAGES)
    else:
        torch.testing.assert_close(fused(IMAGES), expected, rtol=1e-3, atol=1e-4)


def test_one_number_replaced_by_an_equal_one_is_another_parameter():
    net = model.Net("group", dropout=0)
    net.C10 = model.Conv2d(32, 1, 1)
    fused = fuse(net)
    fused(IMAGES)
    net.C10.bias = nn.Parameter(net.C10.bias.detach().clone())
    fused(IMAGES).sum().backward()
    assert fused.reason is None and float(net.C10.bias.grad) == 4


SETTINGS = [  # module, attribute, value, and whether PyTorch's modules take it
    ("C4.norm", "num_groups", -4, False),
    ("C4.norm", "num_groups", 0, False),
    ("C4.norm", "num_groups", 5, False),
    ("C4.norm", "num_groups", 4.0, False),
    ("C4.norm", "num_groups", np.int64(4), True),
    ("C4.dropout", "training", 1, False),
    ("C4.dropout", "inplace", True, False),
    ("C4.conv", "groups", True, False),
    ("C4.conv", "kernel_size", np.array([3, 3]), True),
    ("c3", "stride", np.int64(2), True),
    ("c3", "stride", [1, 1], True),
    ("C10", "padding", np.float32(0.3), True),
    ("P1", "padding", False, False),
    ("P1", "ceil_mode", 0, False),
    ("P1", "return_indices", 0, True),
]


@pytest.mark.parametrize("module, attribute, value, taken", SETTINGS)
def test_settings_of_other_kinds_are_the_modules_matter(module, attribute, value, taken):
    """Whether they compute with them, or say what is wrong."""
    net = model.Net("group", dropout=0.2)
    fused = fuse(net)
    fused(IMAGES)
    setattr(net.get_submodule(module), attribute, value)
    results = []
    for network in (fused, net):
        torch.manual_seed(0)
        try:
            logits = network(IMAGES)
            logits.sum().backward()
        except (RuntimeError, TypeError, ZeroDivisionError) as error:
            assert not taken
            results.append(str(error))
        else:
            results.append(logits.tolist())
    assert results[0] == results[1] and module in fused.reason


@pytest.mark.parametrize("attribute, module", [("skip", "the network"), ("num_groups", "C4.norm")])
def test_settings_that_may_change_in_place_are_the_modules_matter(attribute, module):
    net = model.Net("group", dropout=0)
    setattr(net.C4.norm if attribute == "num_groups" else net, attribute, torch.tensor(1))
    fused = fuse(net)
    assert fused.reason.startswith(f"{module} has") and torch.equal(fused(IMAGES), net(IMAGES))


@pytest.mark.parametrize("put", [setattr, lambda network, name, net: network._modules.update({name: net})])
def test_another_model_in_its_place_is_the_one_that_is_computed(put):
    """As one whose weights are an average of the first one's."""
    nets = [model.Net("group", dropout=0) for _ in range(2)]
    fused = fuse(nets[0])
    fused(IMAGES)
    put(fused, "model", nets[1])
    logits = fused(IMAGES)
    torch.testing.assert_close(logits, nets[1](IMAGES), rtol=1e-3, atol=1e-4)
    logits.sum().backward()
    assert fused.reason is None and nets[0].C10.bias.grad is None and nets[1].C10.bias.grad is not None


def test_attributes_of_ones_own_do_no_harm():
    net = model.Net("group", dropout=0)
    fused = fuse(net)
    for value in (Awkward(), torch.arange(3), torch.arange(4)):
        net.note = value
        torch.testing.assert_close(fused(IMAGES), net(IMAGES), rtol=1e-3, atol=1e-4)
    assert fused.reason is None


@pytest.mark.parametrize("where", ["", "C4.conv", "C10"])
@pytest.mark.parametrize("module", [None, nn.ReLU()], ids=["None", "a module"])
def test_a_module_that_no_forward_calls_does_no_harm(where, module):
    """PyTorch takes None for a module, too."""
    net = model.Net("group", dropout=0)
    net.get_submodule(where).add_module("unused", module)
    torch.testing.assert_close(fuse(net)(IMAGES), net(IMAGES), rtol=1e-3, atol=1e-4)
    assert fuse(net).reason is None


def test_a_network_that_holds_its_own_fused_one_does_not_grow():
    net = model.Net("group").eval()
    net.fast = fuse(net)
    with torch.no_grad():
        counts = []
        for _ in range(3):
            for _ in range(5):
                net.fast(IMAGES)
            gc.collect()
            counts.append(len(gc.get_objects()))
    assert net.fast.reason is None and counts[2] - counts[1] < 50


def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))


def with_sparse_buffer():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    net.register_buffer("table", torch.eye(3).to_sparse_csr())
    return net


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:Lazy modules")
@pytest.mark.parametrize("build", [lazy, with_sparse_buffer])
def test_other_models_are_not_looked_through(build):
    net = build()
    assert "the kernel computes model.Net alone" in fuse(net).reason
    batches = list(utils.get_loaders(stand_in(20, 10), 10, device="cpu")[0])
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    assert utils.train(net, batches, optimizer, **QUIET).total == 20


def test_a_lazy_layer_in_the_network_is_the_modules_matter():
    net = model.Net("group", dropout=0)
    net.C4.conv = nn.LazyConv2d(32, 3, padding=1)
    assert fuse(net).reason.startswith("C4.conv")


@pytest.mark.parametrize("freed", ["images", "C4.conv.weight"])
def test_memory_that_was_given_back_is_an_error(freed):
    net, images = model.Net("group"), torch.randn(2, 3, 32, 32)
    network = fuse(net)
    network(images)
    (images if freed == "images" else net.get_parameter(freed)).untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="memory|allocated"):
        network(images)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit:FutureWarning")
def test_a_trace_or_script_of_a_fused_network_is_one_of_its_modules():
    network, images = fuse(model.Net("group")).eval(), torch.randn(2, 3, 32, 32)
    for compiled in (
        torch.jit.trace(network, images),
        torch.jit.script(network),
        torch.jit.script(nn.Sequential(network)),
    ):
        assert torch.allclose(compiled(images), network.model(images), atol=1e-5)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_biases_may_change_before_the_backward_pass(norm):
    """As in PyTorch: no gradient depends on them."""

    def gradients(call, net):
        images, labels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(4)
        loss = torch.nn.functional.cross_entropy(call(images), labels)
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if name.endswith("bias"):
                    parameter.add_(float("nan"))
        loss.backward()
        return [parameter.grad for parameter in net.parameters()]

    torch.manual_seed(0)
    net = model.Net(norm, dropout=0.0).double().float()
    copied = copy.deepcopy(net)
    for a, b in zip(gradients(net, net), gradients(fuse(copied), copied), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def test_copies_and_pickles_are_networks_of_their_own():
    fused = fuse(model.Net("group", dropout=0))
    expected = fused(IMAGES)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        torch.testing.assert_close(twin(IMAGES), expected)
        with torch.no_grad():
            twin.model.C4.conv.weight.mul_(2)
        torch.testing.assert_close(twin(IMAGES), twin.model(IMAGES), rtol=1e-3, atol=1e-4)
        assert not torch.allclose(twin(IMAGES), expected)
    torch.testing.assert_close(fused(IMAGES), expected)


def test_code_that_is_changed_in_place_is_computed(monkeypatch):
    """As by IPython's autoreload, when model.py is edited."""

    def forward(self, x, skip=None):
        return self.dropout(nn.functional.gelu(self.norm(self.conv(x) if skip is None else self.conv(x) + skip)))

    network, code = fuse(model.Net("group").eval()), model.ConvBlock.forward.__code__
    assert network.reason is None
    monkeypatch.setattr(model.ConvBlock.forward, "__code__", forward.__code__)
    assert torch.equal(network(IMAGES), network.model(IMAGES))
    other = "ConvBlock.forward in model.py is another one than the kernel was written for"
    assert network.reason == fuse(network.model).reason == other
    monkeypatch.setattr(model.ConvBlock.forward, "__code__", code.replace(co_firstlineno=1))  # fewer lines above it
    assert fuse(network.model).reason is None
