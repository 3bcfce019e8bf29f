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


def some_block(norm, inputs, outputs, dropout=0.0):
    """A block with group norm of so many groups, or batch norm (None), with scales and shifts of its own."""
    block = model.ConvBlock(inputs, outputs, model.NORMS["batch" if norm is None else "group"](outputs, norm), dropout)
    nn.init.normal_(block.norm.weight)
    nn.init.normal_(block.norm.bias)
    return block.to(memory_format=torch.channels_last)


def modules_of(layers):
    return nn.ModuleList(dict.fromkeys(module for pair in layers for module in pair if module is not None))


def by_definition(layers, x, dtype):
    """What FusedLayers computes, in float64 but for activations, which are rounded to dtype."""

    def kept(values):
        return values + (values.to(dtype).to(values.dtype) - values).detach()

    outputs = {None: 0}
    for layer, other in layers:
        if isinstance(layer, model.ConvBlock):
            z = kept(layer.conv(x) + outputs[other])
            x = kept(F.relu(layer.dropout(layer.norm(z))))
        elif isinstance(layer, model.AvgPool2d):
            x = other(layer(x))
        else:
            x = kept(other(layer(x)))
        outputs[layer] = x
    return x


def both_ways(layers, x, dtype, planes=False):
    """Of layers that the kernel computes, and of their definition: output, gradients of images (unless they come in
    planes) and parameters, statistics; each by name."""
    exact_layers, found = copy.deepcopy(layers), []
    for pairs, kind in ((layers, torch.float32), (exact_layers, torch.float64)):
        modules = modules_of(pairs).to(kind)
        own = x.to(dtype).to(kind, copy=True).requires_grad_(not planes)
        torch.manual_seed(1)  # the same channels are dropped
        if pairs is layers:
            with utils.autocast(own.device, dtype):
                output = model.FusedLayers.of(pairs, own)
        else:
            output = by_definition(pairs, own, dtype)
        generator = torch.Generator().manual_seed(2)
        output.backward(torch.randn(output.shape, generator=generator).to(dtype).to(output.dtype))
        values = {"output": output, "images": own.grad} | {name: p.grad for name, p in modules.named_parameters()}
        values |= dict(modules.named_buffers())
        found.append({name: value.detach().double() for name, value in values.items() if value is not None})
    assert found[0].keys() == found[1].keys()
    return found


def assert_close(own, exact, tolerance, zeros=()):
    """Whether values are as far apart as the tolerance says, times the largest of their kind."""
    for name, reference in exact.items():
        if name not in zeros:
            atol = tolerance * float(reference.abs().max())
            torch.testing.assert_close(
                own[name], reference, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
            )


@fused_only
@pytest.mark.parametrize("sizes, size", [((1, 3, 16), (3, 5)), ((2, 12, 32), (18, 26)), ((67, 32, 32), (9, 12))])
@pytest.mark.parametrize("norm", [1, 4, "channels", None])
@pytest.mark.parametrize("planes", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_the_kernel_computes_what_a_block_does(dtype, tolerance, planes, norm, sizes, size):
    torch.manual_seed(0)
    images, inputs, outputs = sizes
    dropout = 0.3 if dtype == torch.float32 else 0.5  # whose factor, 2, bfloat16 does not round
    layers = [(some_block(norm, inputs, outputs, dropout), None)]
    own, exact = both_ways(layers, torch.randn(images, inputs, *size), dtype, planes)
    # A norm of single channels takes their mean away, and with it what the convolution's bias does.
    assert_close(own, exact, tolerance, zeros=["0.conv.bias"] if norm in (None, "channels") else [])
    assert_close({"output": own["output"]}, {"output": exact["output"]}, 1e-2)


@fused_only
@pytest.mark.parametrize("norm", [4, None])
@pytest.mark.parametrize("source", [0, 1])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)])
def test_the_kernel_adds_an_earlier_output(dtype, tolerance, source, norm):
    torch.manual_seed(0)
    blocks = [some_block(norm, *sizes) for sizes in ((3, 16), (16, 16), (16, 16))]
    layers = [(blocks[0], None), (blocks[1], None), (blocks[2], blocks[source])]
    own, exact = both_ways(layers, torch.randn(5, 3, 12, 8), dtype)
    assert_close(own, exact, tolerance, zeros=[f"{i}.conv.bias" for i in range(3)] if norm is None else [])


@fused_only
@pytest.mark.parametrize("inputs, outputs", [(16, 8), (32, 16), (48, 4), (16, 35)])
@pytest.mark.parametrize("n, size", [(1, (2, 6)), (33, (8, 4))])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-6), (torch.bfloat16, 1e-2)])
def test_the_kernel_squeezes_as_the_modules_do(dtype, tolerance, n, size, inputs, outputs):
    torch.manual_seed(0)
    layers = [(nn.Conv2d(inputs, outputs, 1), nn.MaxPool2d(2))]
    assert_close(*both_ways(layers, torch.randn(n, inputs, *size), dtype), tolerance)


@fused_only
@pytest.mark.parametrize("inputs, outputs", [(16, 10), (32, 3)])
@pytest.mark.parametrize("n, size", [(1, (1, 1)), (33, (3, 5))])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-6), (torch.bfloat16, 1e-2)])
def test_the_kernel_has_the_head_that_the_modules_have(dtype, tolerance, n, size, inputs, outputs):
    torch.manual_seed(0)
    layers = [(model.AvgPool2d(), model.Conv2d(inputs, outputs, 1))]
    own, exact = both_ways(layers, torch.randn(n, inputs, *size), dtype)
    assert_close(own, exact, tolerance)
    assert_close({"output": own["output"]}, {"output": exact["output"]}, 5e-6)  # logits are in float32


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
        of_kind.fused = fused
        errors.append((gradients(of_kind, images, True) - exact).norm())
    assert errors[0] < 1.1 * errors[1]


@fused_only
def test_the_kernel_drops_the_channels_that_the_module_drops():
    torch.manual_seed(0)
    own, exact = both_ways([(some_block(None, 16, 32, 0.5), None)], torch.randn(16, 16, 4, 4), torch.bfloat16)
    dropped = [(found["output"].flatten(2) == 0).all(2) for found in (own, exact)]
    assert torch.equal(*dropped) and 0 < dropped[0].float().mean() < 1


def passing_on(norm):
    """A block whose convolution leaves sixteen channels as they are."""
    block = model.ConvBlock(16, 16, norm, dropout=0).to(memory_format=torch.channels_last)
    nn.init.dirac_(block.conv.weight)
    nn.init.zeros_(block.conv.bias)
    return block


@fused_only
def test_the_kernel_keeps_the_variance_of_values_far_from_zero():
    x = torch.randn(8, 16, 8, 8) + 1000
    output = model.FusedLayers.of([(passing_on(nn.GroupNorm(2, 16)), None)], x)
    torch.testing.assert_close(output, F.relu(nn.GroupNorm(2, 16).double()(x.double())).float(), rtol=0, atol=1e-3)


@fused_only
def test_the_kernel_lets_nan_through():
    block, x = passing_on(nn.BatchNorm2d(16)), torch.zeros(2, 16, 2, 2)
    block.conv.bias.data[3] = torch.nan
    output = model.FusedLayers.of([(block, None)], x)
    assert output[:, 3].isnan().all() and not output[:, 4].isnan().any()


@fused_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_squeezes_nan_and_equal_values_as_the_modules_do(dtype):
    x = torch.zeros(1, 16, 2, 4).to(memory_format=torch.channels_last)
    x[0, 3, 0, 1] = torch.nan
    conv, pool = nn.Conv2d(16, 8, 1), nn.MaxPool2d(2)
    conv.weight.data, conv.bias.data = (p.to(dtype).float() for p in conv.parameters())
    found = []
    for way in (lambda x: model.FusedLayers.of([(conv, pool)], x), lambda x: pool(conv(x))):
        own = x.clone().requires_grad_()
        with utils.autocast(x.device, dtype):
            output = way(own)
        output.sum().backward()
        found.append((output, own.grad))
    for own, expected in zip(*found):
        torch.testing.assert_close(own, expected, equal_nan=True)


@fused_only
@pytest.mark.parametrize("planes", [True, False])
@pytest.mark.parametrize("norm", [4, None])
def test_the_kernel_gives_the_same_whatever_the_threads(norm, planes):
    found, threads = [], torch.get_num_threads()
    try:
        for torch_threads in (1, 2, 3):
            torch.set_num_threads(torch_threads)
            torch.manual_seed(0)
            layers = [(some_block(norm, 16, 32), None), (model.AvgPool2d(), model.Conv2d(32, 10, 1))]
            found.append(both_ways(layers, torch.randn(21, 16, 4, 4), torch.bfloat16, planes)[0])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], value) for name, value in other.items())


@fused_only
def test_layers_whose_parameters_are_frozen_pass_their_gradient_on():
    block = some_block(None, 16, 16).requires_grad_(False)
    x = torch.randn(2, 16, 8, 8).requires_grad_()
    model.FusedLayers.of([(block, None)], x).sum().backward()
    assert x.grad.abs().max() > 0 and all(parameter.grad is None for parameter in block.parameters())


def gradients(net, x):
    torch.manual_seed(0)
    return torch.autograd.grad(F.cross_entropy(net(x), torch.arange(len(x)) % 10), list(net.parameters()))


@pytest.fixture
def calls(monkeypatch):
    """The calls of FusedLayers so far."""
    made, apply = [], model.FusedLayers.apply
    monkeypatch.setattr(model.FusedLayers, "apply", lambda *args: made.append(args) or apply(*args))
    return made


@fused_only
@pytest.mark.parametrize("n, size", [(1, 8), (3, 12), (4, 32)])
def test_a_fused_network_learns_and_predicts_as_one_that_is_not(norm, n, size, calls):
    torch.manual_seed(0)
    net = model.Net(norm, dropout=0.2).to(memory_format=torch.channels_last)
    plain = model.Net(norm, dropout=0.2, fused=False)
    plain.load_state_dict(net.state_dict())
    fused = gradients(net, images(n, size))
    assert len(calls) == 1
    for own, other in zip(fused, gradients(plain, images(n, size))):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()) + 2e-5)
    for own, other in zip(net.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(own, other)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(images(n, size)), plain.eval()(images(n, size)), rtol=1e-4, atol=1e-5)
    assert len(calls) == 2, "a network with fused=False used the kernel"


@fused_only
def test_evaluation_in_the_kernel_leaves_the_network_as_it_is_and_images_to_themselves(norm, calls):
    net = model.Net(norm).to(memory_format=torch.channels_last).eval()
    before = copy.deepcopy(net.state_dict())
    with torch.no_grad(), utils.autocast(torch.device("cpu"), torch.bfloat16):
        together, alone = net(images(9)), torch.cat([net(image[None]) for image in images(9)])
        assert torch.allclose(net(images(9).bfloat16()), together, atol=0.05)
    assert torch.equal(together, alone) and len(calls) == 11
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@fused_only
def test_passes_that_are_open_at_once_keep_their_activations_apart(norm):
    net = model.Net(norm, dropout=0).to(memory_format=torch.channels_last)
    parameters, batches = list(net.parameters()), images(6).split(3)
    alone = [torch.autograd.grad(net(batch).square().sum(), parameters) for batch in batches]
    losses = [net(batch).square().sum() for batch in batches]
    for _ in range(2):
        for loss, expected in zip(losses, alone):
            found = torch.autograd.grad(loss, parameters, retain_graph=True)
            assert all(torch.equal(*pair) for pair in zip(found, expected))


@fused_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_share_their_memory_and_what_it_held_does_not_matter(norm, dtype):
    net, found, rooms = model.Net(norm, dropout=0).to(memory_format=torch.channels_last), [], []
    for _ in range(2):
        with utils.autocast(torch.device("cpu"), dtype):
            found.append([*gradients(net, images()), net(images()).detach()])
        for memory in model.SPARE:
            memory.fill_(255)  # a NaN in either
        rooms.append({memory.data_ptr() for memory in model.SPARE})
    assert rooms[0] == rooms[1] and len(rooms[0]) == 2
    assert all(torch.equal(*pair) for pair in zip(*found))


@fused_only
def test_logits_do_not_hold_the_activations(norm):
    with torch.no_grad():
        logits = model.Net(norm).to(memory_format=torch.channels_last)(images())
    assert logits.untyped_storage().nbytes() == logits.numel() * 4


ALTERATIONS = {
    "fused=False": lambda net: setattr(net, "fused", False),
    "contiguous": lambda net: net.to(memory_format=torch.contiguous_format),
    "evaluation with gradients": lambda net: net.C4.norm.eval(),
    "a hook": lambda net: net.C7.register_forward_hook(lambda *_: None),
    "a hook deep down": lambda net: net.C2.conv.register_forward_pre_hook(lambda *_: None),
    "a hook of the pooling": lambda net: net.P1.register_full_backward_hook(lambda *_: None),
    "a hook of the head": lambda net: net.GAP.register_forward_hook(lambda *_: None),
    "a forward pass of one's own": lambda net: setattr(net.c6, "forward", lambda x: F.conv2d(x, net.c6.weight)),
    "another block": lambda net: setattr(net, "C4", nn.Identity()),
    "another convolution": lambda net: setattr(net.C4, "conv", nn.Conv2d(32, 32, 5, padding=2)),
    "another padding": lambda net: setattr(net.C4.conv, "padding_mode", "reflect"),
    "another width": lambda net: setattr(net, "C8", model.ConvBlock(32, 48, nn.GroupNorm(4, 48), 0)),
    "another width to add": lambda net: (
        setattr(net, "C9", model.ConvBlock(32, 16, nn.GroupNorm(4, 16), 0)),
        setattr(net, "C10", model.Conv2d(16, 10, 1)),
    ),
    "another norm": lambda net: setattr(net.C9, "norm", nn.InstanceNorm2d(32, affine=True)),
    "a norm without a bias": lambda net: setattr(net.C9, "norm", nn.GroupNorm(4, 32, bias=False)),
    "a cumulative average": lambda net: setattr(net.C9, "norm", nn.BatchNorm2d(32, momentum=None)),
    "another dropout": lambda net: setattr(net.C9, "dropout", nn.Dropout(0.1)),
    "another pooling": lambda net: setattr(net, "P2", nn.AvgPool2d(2)),
    "a larger pooling": lambda net: setattr(net, "P2", nn.MaxPool2d(3, 2, 1)),
    "no bias": lambda net: setattr(net.c3, "bias", None),
    "other numbers": lambda net: net.double(),
}


@fused_only
@pytest.mark.parametrize("name", ALTERATIONS)
def test_where_the_kernel_cannot_do_all_that_is_asked_the_modules_run(name, calls):
    net = model.Net("batch").to(memory_format=torch.channels_last)
    net(images())
    assert len(calls) == 1
    ALTERATIONS[name](net)
    for module in net.modules():
        module.to(memory_format=torch.channels_last) if name != "contiguous" else None
    try:
        net(images().to(net.C1.conv.weight.dtype))
    except RuntimeError as error:
        assert "width" in name, error  # which PyTorch's modules cannot compute either
    assert len(calls) == 1


@fused_only
@pytest.mark.parametrize("of_images, of_net", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_images_of_another_precision_than_the_network_are_an_error_as_ever(of_images, of_net):
    net = model.Net().to(of_net, memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="type"):
        net(images().to(of_images))


@fused_only
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace:FutureWarning")
def test_no_image_and_traces_are_left_to_the_modules(norm, calls):
    net = model.Net(norm).to(memory_format=torch.channels_last)
    if norm == "layer":
        assert net(torch.zeros(0, 3, 8, 8)).shape == (0, 10)
    traced = torch.jit.trace(net.eval(), images(), check_trace=False)
    assert not calls
    assert torch.allclose(traced(images()), net(images()), atol=1e-5)


def test_without_a_compiler_the_modules_run(norm, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    model.kernel.cache_clear()
    try:
        assert model.kernel() is None
        net = model.Net(norm).to(memory_format=torch.channels_last)
        assert all(gradient.isfinite().all() for gradient in gradients(net, images()))
    finally:
        model.kernel.cache_clear()
