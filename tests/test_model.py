import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model
import utils

NORM_LAYERS = {"batch": "BatchNorm2d", "group": "GroupNorm", "layer": "GroupNorm"}

# Layer, output shape and parameters of each row that torchsummary prints.
ROWS = """
Conv2d-1 16,32,32 448 | NORM-2 16,32,32 32 | Dropout2d-3 16,32,32 0 | Conv2d-4 16,32,32 2320
NORM-5 16,32,32 32 | Dropout2d-6 16,32,32 0 | Conv2d-7 8,32,32 136 | MaxPool2d-8 8,16,16 0
Conv2d-9 32,16,16 2336 | NORM-10 32,16,16 64 | Dropout2d-11 32,16,16 0 | Conv2d-12 32,16,16 9248
NORM-13 32,16,16 64 | Dropout2d-14 32,16,16 0 | Conv2d-15 32,16,16 9248 | NORM-16 32,16,16 64
Dropout2d-17 32,16,16 0 | Conv2d-18 16,16,16 528 | MaxPool2d-19 16,8,8 0 | Conv2d-20 32,8,8 4640
NORM-21 32,8,8 64 | Dropout2d-22 32,8,8 0 | Conv2d-23 32,8,8 9248 | NORM-24 32,8,8 64
Dropout2d-25 32,8,8 0 | Conv2d-26 32,8,8 9248 | NORM-27 32,8,8 64 | Dropout2d-28 32,8,8 0
AvgPool2d-29 32,1,1 0 | Conv2d-30 10,1,1 330
"""


@pytest.fixture(params=model.NORMS)
def norm(request):
    return request.param


def images(n=4, size=32):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_the_norms_in_order():
    assert list(model.NORMS) == ["batch", "group", "layer"]


def test_parameter_count(norm):
    count = sum(p.numel() for p in model.Net(norm).parameters())
    assert count == 48_178
    assert count < 50_000


@pytest.mark.parametrize("num_groups", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("skip", [True, False])
def test_parameter_count_whatever_the_options(num_groups, skip):
    assert sum(p.numel() for p in model.Net("group", num_groups, 0.1, skip).parameters()) == 48_178


def test_summary_rows(norm, capsys):
    utils.summarize(model.Net(norm))
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if "[-1" in line]
    printed = [(row[0], "".join(row[2:-1]).rstrip("]"), row[-1].replace(",", "")) for row in rows]
    expected = [
        tuple(row.split())
        for row in ROWS.replace("NORM", NORM_LAYERS[norm]).replace("\n", "|").split("|")
        if row.strip()
    ]
    assert printed == expected
    totals = [
        line.split(": ")[1] for line in lines if line.startswith(("Total p", "Train", "Input", "Forw", "Params", "Est"))
    ]
    assert totals == ["48,178", "48,178", "0.01", "1.57", "0.18", "1.77"]


def test_every_registered_module_runs(norm):
    net, ran = model.Net(norm), set()
    leaves = {name: module for name, module in net.named_modules() if not list(module.children())}
    for name, module in leaves.items():
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
    net(images())
    assert ran == set(leaves)


def test_gradient_reaches_every_parameter(norm):
    net = model.Net(norm, dropout=0)
    F.cross_entropy(net(images(8)), torch.arange(8)).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if not (norm == "batch" and name.endswith("conv.bias")):  # batch norm takes a channel's bias away again
            assert parameter.grad.abs().max() > 0, name


def test_layer_norm_is_layer_norm_over_channels_and_pixels():
    layer, x = model.NORMS["layer"](16, 4), torch.randn(3, 16, 5, 6)
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    weight, bias = (p[:, None, None].expand(16, 5, 6) for p in (layer.weight, layer.bias))
    torch.testing.assert_close(layer(x), F.layer_norm(x, (16, 5, 6), weight, bias))


@pytest.mark.parametrize("num_groups", [1, 2, 4, 8, 16])
def test_group_norm_by_hand(num_groups):
    layer, x = model.NORMS["group"](16, num_groups), torch.randn(3, 16, 5, 6)
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    sets = x.view(3, num_groups, -1)
    normal = (sets - sets.mean(2, keepdim=True)) / (sets.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
    expected = normal.view_as(x) * layer.weight[:, None, None] + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x), expected)


def test_batch_norm_by_hand():
    layer, x = model.NORMS["batch"](16, 4), torch.randn(3, 16, 5, 6)
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    expected = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.running_mean, 0.1 * mean)


def test_one_group_equals_layer_norm():
    torch.manual_seed(0)
    group = model.Net("group", num_groups=1, dropout=0)
    torch.manual_seed(0)
    layer = model.Net("layer", dropout=0)
    assert torch.equal(group(images()), layer(images()))


def test_an_image_does_not_depend_on_its_batch_but_under_batch_norm(norm):
    net, batch = model.Net(norm, dropout=0), images()
    other = torch.cat([batch[:1], 2 * images(7)[4:]])
    with torch.no_grad():
        for mode, depends in ((net.train, norm == "batch"), (net.eval, False)):
            mode()
            assert torch.allclose(net(batch)[0], net(other)[0], atol=1e-4) != depends


def test_the_seed_alone_sets_the_convolutions():
    weights = []
    for norm in model.NORMS:
        torch.manual_seed(5)
        weights.append(model.Net(norm).C9.conv.weight)
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


def test_head_gain_scales_the_start_of_c10_and_nothing_else():
    states = []
    for head_gain in (1, 2.5):
        torch.manual_seed(0)
        states.append(model.Net(head_gain=head_gain).state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(states[1][name], tensor * (2.5 if name == "C10.weight" else 1)), name


@pytest.mark.parametrize("skip", [True, False])
def test_skip_adds_c3_to_c5_and_c7_to_c9_before_the_norm(norm, skip):
    net, seen = model.Net(norm, skip=skip).eval(), {}
    for name, module in net.named_modules():
        module.register_forward_hook(lambda _, args, output, name=name: seen.update({name: (args[0], output)}))
    with torch.no_grad():
        net(images())
    for block, source in (("C5", "C3"), ("C9", "C7")):
        convolved = seen[f"{block}.conv"][1]
        added = seen[source][1] if skip else 0
        assert torch.equal(seen[f"{block}.norm"][0], convolved + added)


def test_a_block_is_convolution_norm_relu_dropout_in_this_order(norm, device):
    block = model.ConvBlock(3, 16, model.NORMS[norm](16, 4), dropout=0.3).to(device)
    nn.init.normal_(block.norm.bias)
    x, seen = images().to(device), []
    for forward in (block, lambda x: nn.Dropout2d(0.3)(F.relu(block.norm(block.conv(x))))):
        torch.manual_seed(0)  # the same channels are dropped
        output = forward(x)
        seen.append([output, *torch.autograd.grad(output.square().sum(), list(block.parameters()))])
    assert 0 < (seen[0][0].flatten(2).amax(2) == 0).float().mean() < 1
    assert all(torch.equal(own, plain) for own, plain in zip(*seen))


@pytest.mark.parametrize("n", [1, 3])
def test_the_head_averages_each_map_and_convolves_the_averages(n, device):
    net, x = model.Net().to(device), torch.randn(n, 32, 3, 5, device=device)
    expected = F.conv2d(F.adaptive_avg_pool2d(x, 1), net.C10.weight, net.C10.bias)
    torch.testing.assert_close(net.C10(net.GAP(x)), expected)


@pytest.mark.parametrize("size", [8, 12, 32, 64])
@pytest.mark.parametrize("n", [1, 3])
def test_any_multiple_of_four(norm, size, n, device):
    assert model.Net(norm).to(device)(images(n, size).to(device)).shape == (n, 10)


@pytest.mark.parametrize("shape", [(1, 3, 30, 32), (1, 3, 4, 4), (1, 1, 32, 32), (3, 32, 32), (1, 32, 32, 3)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(N, 3, H, W\)"):
        model.Net()(torch.zeros(shape))


@pytest.mark.parametrize("name", ["instance", "BATCH", None, ""])
def test_unknown_norm(name):
    with pytest.raises(ValueError, match="batch, group, layer"):
        model.Net(name)


@pytest.mark.parametrize("num_groups", [0, -1, 3, 32, 2.0, None])
def test_groups_that_do_not_divide(num_groups):
    with pytest.raises(ValueError, match="1, 2, 4, 8, 16 or 'channels'"):
        model.Net("group", num_groups)


fused_only = pytest.mark.skipif(model.kernel() is None, reason="no C++ compiler for the kernel")


def block_and_reference(norm, sizes, size, dtype, whole, dropout=0.3):
    """Of a block that the kernel computes, whole or from the norm on, and of its definition in float64: output,
    gradients of the input, the skip and the parameters, the norm's statistics."""
    torch.manual_seed(0)
    n, inputs, outputs = sizes
    layer = model.NORMS["batch" if norm is None else "group"](outputs, norm)
    block = model.ConvBlock(inputs, outputs, layer, dropout).to(memory_format=torch.channels_last)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x, skip, gradient = (torch.randn(n, channels, *size).to(dtype) for channels in (inputs, outputs, outputs))
    exact = copy.deepcopy(block).double()
    found = []
    for module, kind in ((block, dtype), (exact, torch.float64)):
        last = {"memory_format": torch.channels_last, "dtype": kind, "copy": True}
        own, shortcut = x.to(**last).requires_grad_(), skip.to(**last).requires_grad_()
        torch.manual_seed(1)  # the same channels are dropped
        if module is exact or not whole:
            z = module.conv(own.double() if module is exact else own.float()) + shortcut
            z = z + (z.to(dtype).to(z.dtype) - z).detach()  # as it is kept
        if module is exact:
            output = F.relu(module.dropout(module.norm(z)))
        elif whole:
            assert model.FusedBlock.takes(module, own)
            output = model.FusedBlock.whole(module, own, shortcut)
        else:
            z = z.to(dtype, memory_format=torch.channels_last)
            assert model.FusedBlock.takes(module, own) and model.FusedBlock.takes_rest(module, z)
            output = model.FusedBlock.rest(module, z)
        output.backward(gradient.to(kind))
        zero = "conv.bias" if norm in (None, "channels") else ""  # the mean, which a norm of single channels takes away
        gradients = [p.grad for name, p in module.named_parameters() if name != zero]
        found.append([output, own.grad, shortcut.grad, *gradients, *module.buffers()])
    return found


@fused_only
@pytest.mark.parametrize("sizes, size", [((1, 3, 16), (3, 5)), ((2, 12, 32), (18, 26)), ((67, 32, 32), (9, 12))])
@pytest.mark.parametrize("norm", [1, 4, "channels", None])
@pytest.mark.parametrize(
    "whole, dtype, tolerance",
    [
        (False, torch.float32, 1e-5),
        (False, torch.bfloat16, 1e-2),
        (True, torch.float32, 1e-5),
        (True, torch.bfloat16, 3e-2),
    ],
)
def test_the_kernel_computes_what_the_modules_do(whole, norm, dtype, tolerance, sizes, size):
    dropout = 0.3 if dtype == torch.float32 else 0.5  # whose factor, 2, bfloat16 does not round
    own, exact = block_and_reference(norm, sizes, size, dtype, whole, dropout)
    for value, reference in zip(own, exact, strict=True):
        assert value.dtype in (dtype, torch.float32, torch.int64)
        torch.testing.assert_close(
            value.double(), reference.double(), rtol=0, atol=tolerance * float(reference.detach().abs().max())
        )
    torch.testing.assert_close(own[0].double(), exact[0], rtol=0, atol=1e-2 * float(exact[0].detach().abs().max()))


@fused_only
@pytest.mark.parametrize("norm", model.NORMS)
def test_in_bfloat16_the_kernel_is_no_further_from_float64_than_the_modules(norm):
    torch.manual_seed(0)
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    net = model.Net(norm, dropout=0).to(memory_format=torch.channels_last)

    def gradients(net, images, half):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = net(images)
        F.cross_entropy(logits.to(images.dtype), labels).backward()
        return torch.cat([parameter.grad.flatten().double() for parameter in net.parameters()])

    exact = gradients(copy.deepcopy(net).double(), images.double(), False)
    errors = []
    for fused in (True, False):
        of_kind = copy.deepcopy(net)
        for module in of_kind.modules():
            module.fused = fused
        errors.append((gradients(of_kind, images, True) - exact).norm())
    assert errors[0] < 1.1 * errors[1]


@fused_only
@pytest.mark.parametrize("whole", [True, False])
def test_the_kernel_drops_the_channels_that_the_module_drops(whole):
    own, exact = block_and_reference(None, (16, 16, 32), (4, 4), torch.bfloat16, whole)
    dropped = [(output.flatten(2) == 0).all(2) for output in (own[0], exact[0])]
    assert torch.equal(*dropped) and 0 < dropped[0].float().mean() < 1


def rest(x, layer):
    block = model.ConvBlock(x.shape[1], x.shape[1], layer, dropout=0)
    return model.FusedBlock.rest(block, x.to(memory_format=torch.channels_last).requires_grad_())


@fused_only
def test_the_kernel_keeps_the_variance_of_values_far_from_zero():
    x = torch.randn(8, 16, 8, 8) + 1000
    output = rest(x, nn.GroupNorm(2, 16))
    torch.testing.assert_close(output, F.relu(nn.GroupNorm(2, 16).double()(x.double())).float(), rtol=0, atol=1e-3)


@fused_only
def test_the_kernel_lets_nan_through():
    x = torch.zeros(2, 16, 2, 2)
    x[0, 3] = torch.nan
    output = rest(x, nn.BatchNorm2d(16))
    assert output[:, 3].isnan().all() and not output[:, 4].isnan().any()


@fused_only
@pytest.mark.parametrize("norm", [4, None])
def test_the_kernel_gives_the_same_whatever_the_threads(norm):
    found, threads = [], torch.get_num_threads()
    try:
        for torch_threads in (1, 2, 3):
            torch.set_num_threads(torch_threads)
            found.append(block_and_reference(norm, (21, 16, 32), (4, 4), torch.bfloat16, whole=True)[0])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@fused_only
def test_a_block_whose_parameters_are_frozen_passes_its_gradient_on():
    block = model.ConvBlock(16, 16, nn.BatchNorm2d(16), 0).to(memory_format=torch.channels_last)
    x = torch.randn(2, 16, 8, 8).to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_()
    model.FusedBlock.whole(block.requires_grad_(False), x).sum().backward()
    assert x.grad.isfinite().all() and all(parameter.grad is None for parameter in block.parameters())


@fused_only
@pytest.mark.parametrize("inputs, outputs", [(16, 8), (32, 16), (48, 4), (16, 35)])
@pytest.mark.parametrize("n, size", [(1, (2, 6)), (33, (8, 4))])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-6), (torch.bfloat16, 1e-2)])
def test_the_kernel_squeezes_as_the_modules_do(dtype, tolerance, n, size, inputs, outputs):
    torch.manual_seed(0)
    conv, pool = nn.Conv2d(inputs, outputs, 1), nn.MaxPool2d(2)
    exact, found = copy.deepcopy(conv).double(), []
    x, gradient = torch.randn(n, inputs, *size).to(dtype), torch.randn(n, outputs, size[0] // 2, size[1] // 2)
    for module, kind in ((conv, dtype), (exact, torch.float64)):
        own = x.to(kind, memory_format=torch.channels_last, copy=True).requires_grad_()
        if module is exact:
            output = pool(module(own))
        else:
            assert model.FusedSqueeze.takes(module, pool, own)
            output = model.FusedSqueeze.of(module, own)
        output.backward(gradient.to(dtype).to(kind))
        found.append([output, own.grad, module.weight.grad, module.bias.grad])
    for value, reference in zip(*found, strict=True):
        torch.testing.assert_close(
            value.double(), reference, rtol=0, atol=tolerance * float(reference.detach().abs().max())
        )


@fused_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_squeezes_nan_and_equal_values_as_the_modules_do(dtype):
    x = torch.zeros(1, 16, 2, 4).to(dtype, memory_format=torch.channels_last)
    x[0, 3, 0, 1] = torch.nan
    conv, pool = nn.Conv2d(16, 8, 1), nn.MaxPool2d(2)
    own, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    conv.weight.data, conv.bias.data = (p.to(dtype).float() for p in conv.parameters())
    output = model.FusedSqueeze.of(conv, own)
    with utils.autocast(x.device, dtype):
        expected = pool(conv(other))
    output.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(output, expected, equal_nan=True)
    torch.testing.assert_close(own.grad, other.grad)


def gradients(net, x):
    torch.manual_seed(0)
    return torch.autograd.grad(F.cross_entropy(net(x), torch.arange(len(x)) % 10), list(net.parameters()))


@fused_only
def test_a_fused_network_learns_as_one_that_is_not(norm, monkeypatch):
    net = model.Net(norm, dropout=0.2).to(memory_format=torch.channels_last)
    plain = model.Net(norm, dropout=0.2, fused=False)
    plain.load_state_dict(net.state_dict())
    calls = []
    for kind in (model.FusedBlock, model.FusedSqueeze):
        monkeypatch.setattr(kind, "apply", lambda *args, apply=kind.apply: calls.append(args) or apply(*args))
    fused = gradients(net, images())
    assert len(calls) == 10
    for own, other in zip(fused, gradients(plain, images())):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=2e-5)
    assert len(calls) == 10, "a network with fused=False used the kernel"


@fused_only
def test_where_the_kernel_cannot_do_all_that_is_asked_the_modules_run(norm, monkeypatch):
    for kind in (model.FusedBlock, model.FusedSqueeze):
        monkeypatch.setattr(kind, "apply", None)  # using it would be an error
    last = {"memory_format": torch.channels_last}
    model.Net(norm, fused=False).to(**last)(images())
    model.Net(norm)(images())  # contiguous
    assert not model.FusedBlock.takes(model.Net(norm).to(**last).eval().C2, images())
    model.Net(norm).double().to(**last)(images().double())
    with torch.no_grad():
        model.Net(norm).to(**last)(images())
    net, seen = model.Net(norm).to(**last), []
    for module in net.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_: seen.append(1))
    net(images())
    assert len(seen) == 8 * 3 + 2 * 2 + 2
    net = model.Net(norm).to(**last)
    for module in (net.P1, net.c6):
        module.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 32, 4, 4).to(**last)
    assert not model.FusedSqueeze.takes(net.c3, net.P1, x[:, :16].contiguous(**last))
    assert not model.FusedSqueeze.takes(net.c6, net.P2, x)


@fused_only
def test_what_the_kernel_cannot_read_it_leaves_to_the_modules(monkeypatch):
    last = {"memory_format": torch.channels_last}
    monkeypatch.setitem(model.NORMS, "unbiased", lambda channels, num_groups: nn.GroupNorm(4, channels, bias=False))
    assert gradients(model.Net("unbiased").to(**last), images())
    block = model.ConvBlock(16, 16, nn.BatchNorm2d(16), 0).to(**last)
    with pytest.raises(ValueError, match="more than 1 value"):
        block(torch.zeros(1, 16, 1, 1).to(**last))
    for kind in (model.FusedBlock, model.FusedSqueeze):
        monkeypatch.setattr(kind, "apply", None)
    net = model.Net("layer").to(**last)
    assert net(torch.zeros(0, 3, 8, 8)).shape == (0, 10)


def test_without_a_compiler_the_modules_run(norm, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    model.kernel.cache_clear()
    try:
        assert model.kernel() is None
        net = model.Net(norm).to(memory_format=torch.channels_last)
        assert all(gradient.isfinite().all() for gradient in gradients(net, images()))
    finally:
        model.kernel.cache_clear()
