"""Where the kernel cannot compute what is asked, the modules run, and the reason says why."""

import copy
import importlib
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from helpers import THREE
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import model
from normkit.fused import fuse
from normkit.fused.build import library

pytestmark = [
    pytest.mark.skipif(library().reason is not None, reason=f"no kernel: {library().reason}"),
    pytest.mark.filterwarnings("ignore:PyTorch's modules ran in place of the fused kernel"),
]
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def own_forward(module):
    module.forward = type(module).forward.__get__(module)


def own_conv_forward(conv):
    conv._conv_forward = lambda x, weight, bias: F.conv2d(x, weight, bias, padding=1)


def plain_weight(conv):
    weight = conv.weight.detach() * 2
    del conv.weight
    conv.weight = weight


class Subclass(model.Net):
    def forward(self, images):
        return super().forward(images) + 1


CHANGES = {  # what is done to the network -> what the reason says
    "forward hook": (lambda net: net.C7.register_forward_hook(lambda *_: None), "C7 has a hook"),
    "pre-hook": (lambda net: net.C2.conv.register_forward_pre_hook(lambda *_: None), "C2.conv has a hook"),
    "backward hook": (lambda net: net.P1.register_full_backward_hook(lambda *_: None), "P1 has a hook"),
    "backward pre-hook": (lambda net: net.C9.norm.register_full_backward_pre_hook(lambda *_: None), "C9.norm has a"),
    "hook of the head": (lambda net: net.GAP.register_forward_hook(lambda *_: None), "GAP has a hook"),
    "hook of the network": (lambda net: net.register_forward_hook(lambda *_: None), "the network has a hook"),
    "forward of its own": (lambda net: own_forward(net.c6), "c6 has a forward of its own"),
    "network's forward": (lambda net: own_forward(net), "the network has a forward of its own"),
    "parametrization": (lambda net: parametrizations.weight_norm(net.C4.conv), "C4.conv is a ParametrizedConv2d"),
    "spectral norm": (lambda net: parametrizations.spectral_norm(net.c3), "c3 is a ParametrizedConv2d"),
    "pruning": (lambda net: prune.l1_unstructured(net.C4.conv, "weight", 0.5), "C4.conv has a hook"),
    "another block": (lambda net: setattr(net, "C4", nn.Identity()), "C4 is a Identity"),
    "no block": (lambda net: delattr(net, "C4"), "C4 is a NoneType"),
    "5×5": (lambda net: setattr(net.C4, "conv", nn.Conv2d(32, 32, 5, padding=2)), "C4.conv is another convolution"),
    "padding mode": (lambda net: setattr(net.C4.conv, "padding_mode", "reflect"), "C4.conv is another convolution"),
    "48 channels": (lambda net: setattr(net, "C8", model.ConvBlock(32, 48, nn.GroupNorm(4, 48), 0)), "C9.conv is anot"),
    "24 channels": (lambda net: setattr(net, "C8", model.ConvBlock(32, 24, nn.GroupNorm(4, 24), 0)), "multiples of 16"),
    "narrow skip": (
        lambda net: (
            setattr(net, "C9", model.ConvBlock(32, 16, nn.GroupNorm(4, 16), 0)),
            setattr(net, "C10", model.Conv2d(16, 10, 1)),
        ),
        "different widths",
    ),
    "instance norm": (lambda net: setattr(net.C9, "norm", nn.InstanceNorm2d(32, affine=True)), "C9.norm is a Instance"),
    "no norm": (lambda net: setattr(net.C9, "norm", nn.Identity()), "C9.norm is a Identity"),
    "norm of 16": (lambda net: setattr(net.C9, "norm", nn.BatchNorm2d(16)), "another number of channels"),
    "norm without bias": (lambda net: net.C9.norm.register_parameter("bias", None), "lacks a weight or a bias"),
    "norm without affine": (lambda net: setattr(net.C9, "norm", nn.BatchNorm2d(32, affine=False)), "lacks a weight or"),
    "cumulative average": (lambda net: setattr(net.C9, "norm", nn.BatchNorm2d(32, momentum=None)), "keeps no expo"),
    "eps 0": (lambda net: setattr(net.C9.norm, "eps", 0.0), "C9.norm has eps=0.0"),
    "eps 1e-40": (lambda net: setattr(net.C9.norm, "eps", 1e-40), "C9.norm has eps=1e-40"),
    "momentum as text": (lambda net: setattr(net.C9.norm, "momentum", "0.1"), "C9.norm has momentum='0.1'"),
    "dropout 1.5": (lambda net: setattr(net.C9.dropout, "p", 1.5), "C9.dropout has p=1.5"),
    "dropout as a tensor": (lambda net: setattr(net.C9.dropout, "p", torch.tensor(0.5)), "has p=tensor(0.5"),
    "no statistics": (
        lambda net: setattr(net.C9, "norm", nn.BatchNorm2d(32, track_running_stats=False)),
        "C9.norm keeps no exponential running average",
    ),
    "statistics switched off": (
        lambda net: setattr(net.C9.norm, "track_running_stats", False),
        "C9.norm keeps no exponential running average",
    ),
    "statistics of another shape": (
        lambda net: setattr(net.C9.norm, "running_mean", torch.zeros(32, 1, 1, 1)),
        "C9.norm is for another number of channels",
    ),
    "3×3 weight in c3": (
        lambda net: setattr(net.c3, "weight", nn.Parameter(torch.ones(8, 16, 3, 3))),
        "c3 has a weight",
    ),
    "1×1 weight in C4": (
        lambda net: setattr(net.C4.conv, "weight", nn.Parameter(torch.ones(32, 32, 1, 1))),
        "C4.conv has a weight",
    ),
    "bias of one": (lambda net: setattr(net.C10, "bias", nn.Parameter(torch.ones(1))), "C10 has a weight"),
    "own _conv_forward": (lambda net: own_conv_forward(net.C4.conv), "C4.conv has a _conv_forward of its own"),
    "a module behind another": (lambda net: vars(net).update(C4=net.C5), "the network has a C4 of its own"),
    "own statistics": (lambda net: vars(net.C4.norm).update(running_mean=torch.ones(32)), "C4.norm has a running_mean"),
    "no count of batches": (lambda net: delattr(net.C4.norm, "num_batches_tracked"), "C4.norm keeps no"),
    "a block compiled": (lambda net: net.C4.compile(backend="eager"), "C4 has a _compiled_call_impl of its own"),
    "plain weight": (lambda net: plain_weight(net.C4.conv), "C4.conv"),
    "no dropout": (lambda net: setattr(net.C4, "dropout", None), "C4 lacks a part"),
    "one more part": (lambda net: net.C4.add_module("more", nn.ReLU()), "C4 lacks a part, or has one more"),
    "Dropout": (lambda net: setattr(net.C9, "dropout", nn.Dropout(0.1)), "C9.dropout is a Dropout"),
    "AvgPool2d": (lambda net: setattr(net, "P2", nn.AvgPool2d(2)), "P2 is a AvgPool2d"),
    "3×3 pooling": (lambda net: setattr(net, "P2", nn.MaxPool2d(3, 2, 1)), "P2 is another pooling"),
    "no bias": (lambda net: setattr(net.c3, "bias", None), "c3 lacks a weight or a bias"),
    "float64": (lambda net: net.double(), "C1.conv is torch.float64"),
    "half a network": (lambda net: net.C9.bfloat16(), "C9.conv is torch.bfloat16"),
    "float64 statistics": (
        lambda net: setattr(net.C9.norm, "running_mean", torch.zeros(32, dtype=torch.float64)),
        "C9.norm is torch.float64",
    ),
    "strided weights": (
        lambda net: setattr(net.C9.conv, "weight", nn.Parameter(torch.zeros(32, 32, 3, 6)[..., ::2])),
        "C9.conv has a tensor of strides",
    ),
    "meta": (lambda net: net.to("meta"), "C1.conv is on meta"),
    "gradients in evaluation": (lambda net: net.eval(), "batch norm is in evaluation mode"),
    "one norm in evaluation": (lambda net: net.C4.norm.eval(), "batch norm is in evaluation mode"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_network_runs_as_its_modules(name):
    change, reason = CHANGES[name]
    torch.manual_seed(0)
    net = model.Net("batch", dropout=0)
    fused = fuse(net)
    fused(IMAGES)
    assert fused.reason is None
    change(net)
    images = IMAGES.to(net.C1.conv.weight)
    torch.manual_seed(1)
    before = copy.deepcopy(net.state_dict())
    try:
        logits = fused(images)
        failed = None
    except (RuntimeError, AttributeError, NotImplementedError, TypeError, ValueError) as error:
        failed = error
    assert reason in fused.reason
    net.load_state_dict(before)
    torch.manual_seed(1)
    if failed is None:
        expected = net(images)
        assert logits.shape == expected.shape
        assert logits.is_meta or torch.equal(logits, expected)
    else:  # what PyTorch's modules cannot compute either
        with pytest.raises(type(failed)):
            net(images)


def test_a_subclass_and_other_models_run_as_they_are():
    for net in (Subclass(), nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))):
        fused = fuse(net)
        assert f"the model is a {type(net).__name__}" in fused.reason
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it was known from the start
            assert torch.equal(fused.eval()(IMAGES), net(IMAGES))


def test_a_subclass_in_the_networks_place_runs_as_it_is(monkeypatch):
    class Doubled(model.Net):
        def forward(self, images):
            return 2 * super().forward(images)

    monkeypatch.setattr(model, "Net", Doubled)
    fused = fuse(model.Net("layer", dropout=0))
    assert fused.reason == "the model is a Doubled: the kernel computes model.Net alone"
    assert torch.equal(fused(IMAGES), fused.model(IMAGES))


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Listening(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "context, reason",
    [
        (Watching, "TorchDispatchMode"),
        (Listening, "TorchFunctionMode"),
        (forward_ad.dual_level, "forward-mode"),
        (lambda: torch.autocast("cpu", torch.float16), "autocast asks for torch.float16"),
    ],
)
def test_whoever_watches_sees_the_modules(context, reason):
    fused = fuse(model.Net("group", dropout=0))
    with context():
        logits = fused(IMAGES)
        assert reason in fused.reason and torch.equal(logits, fused.model(IMAGES))
    fused(IMAGES)
    assert fused.reason is None


def test_a_global_hook_sees_the_modules():
    fused, seen = fuse(model.Net("group")), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        fused(IMAGES)
    finally:
        handle.remove()
    assert "all modules" in fused.reason and nn.GroupNorm in seen


def test_a_default_device_and_dtype_change_nothing():
    fused = fuse(model.Net("batch", dropout=0.5))
    torch.manual_seed(0)
    expected = fused(IMAGES)
    try:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)
        torch.random.default_generator.manual_seed(0)
        logits = fused(IMAGES)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert fused.reason is None and torch.equal(logits, expected)


@pytest.mark.parametrize(
    "images, reason",
    [
        (IMAGES.double(), "torch.float64"),
        (IMAGES[0], r"(3, 32, 32)"),
        (IMAGES[:, :1], "(4, 1, 32, 32)"),
        (IMAGES[..., :30], "32×30 pixels"),
        (IMAGES[:0], "(0, 3, 32, 32)"),
        (IMAGES.to("meta"), "meta"),
        (IMAGES.to_sparse(), "torch.sparse"),
        (torch._neg_view(IMAGES), "negative view"),
        (torch._efficientzerotensor(2, 3, 32, 32), "zero tensor"),
        (torch.zeros(1, 3, 96, 96), "the kernel is for 1600 at most"),
    ],
)
def test_images_that_the_kernel_does_not_take_are_the_modules_matter(images, reason):
    fused = fuse(model.Net("layer", dropout=0))
    try:
        logits = fused(images)
    except (RuntimeError, ValueError, NotImplementedError):
        with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
            fused.model(images)
    else:
        assert torch.equal(logits, fused.model(images))
    assert reason in fused.reason


def test_a_new_reason_is_told_once():
    fused = fuse(model.Net("batch"))
    with pytest.warns(UserWarning, match="in place of the fused kernel: C4.norm has a hook"):
        fused.model.C4.norm.register_forward_hook(lambda *_: None)
        fused(IMAGES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused(IMAGES)


def test_where_the_kernel_is_required_a_reason_is_an_error():
    fused = fuse(model.Net("batch"))
    fused.required = True
    fused(IMAGES)
    with pytest.raises(RuntimeError, match="required.*torch.float64"):
        fused(IMAGES.double())


def test_a_second_derivative_is_refused_with_advice():
    fused, images = fuse(model.Net("group")), IMAGES.clone().requires_grad_()
    loss = F.cross_entropy(fused(images), torch.arange(4))
    with pytest.raises(RuntimeError, match="no second derivative and no batched gradients: call the model itself"):
        torch.autograd.grad(loss, images, create_graph=True)


def test_a_parameter_changed_between_forward_and_backward_is_noticed():
    fused = fuse(model.Net("group"))
    loss = fused(IMAGES).sum()
    with torch.no_grad():
        fused.model.C4.conv.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "owner, name",
    [
        (model.ConvBlock, "forward"),
        (nn.GroupNorm, "forward"),
        (nn.Conv2d, "_conv_forward"),
        (nn.Module, "__call__"),
        (nn.Dropout2d, "__call__"),
        (model.Net, "_call_impl"),
        (F, "relu"),
        (F, "group_norm"),
        (F, "linear"),
    ],
)
def test_what_is_replaced_for_all_networks_is_seen(owner, name, monkeypatch):
    fused, original = fuse(model.Net("group", dropout=0)), getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **how: original(*args, **how) * 2)
    assert torch.equal(fused.forward(IMAGES), fused.model(IMAGES))
    assert f"{owner.__name__}.{name} was replaced" in fused.reason


EDITS = {
    "another activation": ("F.relu(", "F.gelu(", "ConvBlock.forward"),
    "logits doubled": (".flatten(1)\n\n\nclass ConvBlock", ".flatten(1) * 2\n\n\nclass ConvBlock", "Net.forward"),
    "another pooling": ("x.mean((2, 3)", "x.amax((2, 3)", "AvgPool2d.forward"),
    "one skip": ("skip=c7 if self.skip else None", "skip=None", "Net.forward"),
    "a comment, and a docstring": ("x = self.conv(x)", '"""A block."""\n        x = self.conv(x)  # 3×3', None),
}


@pytest.mark.parametrize("old, new, edited", EDITS.values(), ids=EDITS)
def test_who_edits_the_network_in_model_py_gets_that_network(old, new, edited, tmp_path, kit_forgotten, monkeypatch):
    source = Path(model.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1
    (tmp_path / "model.py").write_text(source.replace(old, new), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    theirs, fused = importlib.import_module("model"), importlib.import_module("normkit.fused")
    network = fused.fuse(theirs.Net("group", dropout=0))
    torch.testing.assert_close(network(IMAGES), network.model(IMAGES))
    assert network.reason == (edited and f"{edited} in model.py is another one than the kernel was written for")


def test_a_gradient_without_memory_of_its_own_or_behind_a_minus_sign():
    net, g = model.Net("group", dropout=0), torch.randn(4, 10)
    for dout in (torch._neg_view(g), torch._efficientzerotensor(4, 10)):
        results = []
        for network in (fuse(net), net):
            net.zero_grad()
            network(IMAGES).backward(dout)
            results.append(net.C4.conv.weight.grad)
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_settings_that_change_in_place_are_read_anew(norm):
    fused, eps = fuse(model.Net(norm, dropout=0)), torch.tensor(1e-5)
    fused.model.C4.norm.eps = eps
    for value in (1e-5, 1.0):
        eps.fill_(value)
        with torch.no_grad():
            torch.testing.assert_close(fused(IMAGES), fused.model(IMAGES))
    assert "C4.norm has eps=tensor(1.)" in fused.reason


def test_a_fused_network_is_not_fused_again():
    fused = fuse(model.Net())
    assert fuse(fused) is fused


WIDE = torch.randn(4, 4, 32, 64, generator=torch.Generator().manual_seed(2)).to(memory_format=torch.channels_last)
STRIDED = {
    "three of four channels": WIDE[:, :3, :, :32],
    "a crop": WIDE[:, :3, 4:20, 4:20],
    "every second column": WIDE[:, :3, :, ::2],
    "expanded": WIDE[:1, :1, :, :32].expand(4, 3, 32, 32),
    "flipped": IMAGES.flip(3).transpose(2, 3),
}


@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("needs_grad", [True, False])
def test_images_of_any_strides(name, needs_grad):
    fused, results = fuse(model.Net("group", dropout=0)), []
    for network in (fused, fused.model):
        images = STRIDED[name].detach().requires_grad_(needs_grad)
        logits = network(images)
        logits.square().sum().backward()
        results.append((logits.detach(), images.grad if needs_grad else logits.detach()))
    assert fused.reason is None
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_hooks_of_saved_tensors_and_checkpointing():
    fused, losses = fuse(model.Net("batch", dropout=0)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy().copy(), torch.from_numpy):
        losses.append(fused(IMAGES).square().sum())
    assert "packs saved tensors" in fused.reason
    for n in (2, 4, 3):
        images = IMAGES[:n].clone().requires_grad_()
        torch.utils.checkpoint.checkpoint(fused, images, use_reentrant=False).sum().backward()
        assert images.grad.isfinite().all()
    losses[0].backward()


@pytest.mark.parametrize("mode", [True, False])
def test_a_compiled_fused_network_is_the_compiled_model(mode):
    torch.compiler.reset()
    graphs = []
    fused = fuse(model.Net("group", dropout=0)).train(mode)
    compiled = torch.compile(fused, backend=lambda graph, inputs: graphs.append(graph) or graph.forward, fullgraph=True)
    assert torch.equal(compiled(IMAGES), fused.model(IMAGES)) and len(graphs) == 1
    torch.compiler.reset()


def test_batched_gradients_are_refused_with_advice():
    fused, images = fuse(model.Net("group", dropout=0)), IMAGES[:1].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no batched gradients"):
        torch.autograd.functional.jacobian(lambda x: fused(x).sum(0), images, vectorize=True)


def test_threads_do_not_take_each_others_reasons():
    fused = fuse(model.Net("group", dropout=0)).eval()
    with torch.no_grad():
        expected = {torch.float32: fused(IMAGES), torch.float64: None}

    def ask(i):
        with torch.inference_mode():
            return fused(IMAGES) if i % 2 else pytest.raises(RuntimeError, fused, IMAGES.double())

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(80)))
    assert all(torch.equal(answer, expected[torch.float32]) for answer in answers[1::2])


@pytest.mark.parametrize("norm", THREE)
def test_flat_images_are_no_nan(norm):
    fused = fuse(model.Net(norm, dropout=0))
    for images in (torch.zeros(4, 3, 40, 40), torch.full((2, 3, 32, 32), 3.7)):
        torch.testing.assert_close(fused(images), fused.model(images), rtol=1e-3, atol=1e-3)
    assert fused.reason is None
