"""The kernel's numbers: by definition in float64, beside the modules, whatever the threads."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import model
import utils
from normkit.device import autocast
from normkit.fused import function, fuse, workspace
from normkit.fused.build import library
from normkit.fused.dropout import DropoutScales
from normkit.fused.function import FusedFunction, prepare_call
from normkit.fused.layers import AvgPoolLinear, Conv1x1MaxPool, ConvNormReLU

pytestmark = pytest.mark.skipif(library().reason is not None, reason=f"no kernel: {library().reason}")
CPU = torch.device("cpu")
NORMS = ["batch", "group", "layer"]


def images(n=4, size=32):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def conv_norm_relu(norm, C, K, dropout=0.0, skip_source=-1):
    """A layer with group norm of so many groups, or batch norm (None), with scales and shifts of its own."""
    block = model.ConvBlock(C, K, model.NORMS["batch" if norm is None else "group"](K, norm), dropout)
    nn.init.normal_(block.norm.weight)
    nn.init.normal_(block.norm.bias)
    return ConvNormReLU(block.conv, block.norm, block.dropout, skip_source)


def run_kernel(layers, x, dtype=torch.float32, nchw=False):
    x = x.float().contiguous() if nchw else x.to(dtype, memory_format=torch.channels_last)
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    call = prepare_call(layers, dtype, torch.is_grad_enabled(), x.shape, nchw, torch.get_num_threads())
    return FusedFunction.apply(call, x, *parameters)


def run_by_definition(layers, x, dtype):
    """Computes the same in float64, but for what is stored of the activations, which is rounded to dtype."""

    def stored(values):
        return values + (values.to(dtype).to(values.dtype) - values).detach()

    outputs = []
    for layer in layers:
        if isinstance(layer, ConvNormReLU):
            x = layer.conv(x) + (outputs[layer.skip_source] if layer.skip_source >= 0 else 0)
            x = layer.dropout(F.relu(layer.norm(stored(x))))
        elif isinstance(layer, Conv1x1MaxPool):
            x = stored(layer.pool(layer.conv(x)))
        else:
            x = layer.conv(layer.pool(x))
        outputs.append(x)
    return stored(x) if isinstance(layer, ConvNormReLU) else x


def modules_of(layers):
    return nn.ModuleList([module for layer in layers for module in layer if isinstance(module, nn.Module)])


def head(C, K=10):
    return AvgPoolLinear(model.AvgPool2d(), model.Conv2d(C, K, 1))


def compare(layers, x, dtype, nchw=False):
    """Returns of the kernel, and by definition: output, gradients of images (unless nchw) and parameters, buffers."""
    exact_layers, results = copy.deepcopy(layers), []
    for each, kind in ((layers, torch.float32), (exact_layers, torch.float64)):
        modules = modules_of(each).to(kind)
        own = x.to(dtype).to(kind, copy=True).requires_grad_(not nchw)
        torch.manual_seed(1)  # the same channels are dropped
        output = run_kernel(each, own, dtype, nchw) if each is layers else run_by_definition(each, own, dtype)
        generator = torch.Generator().manual_seed(2)
        output.backward(torch.randn(output.shape, generator=generator).to(dtype).to(output.dtype))
        values = {"output": output, "images": own.grad} | {name: p.grad for name, p in modules.named_parameters()}
        values |= dict(modules.named_buffers())
        results.append({name: value.detach().double() for name, value in values.items() if value is not None})
    assert results[0].keys() == results[1].keys()
    return results


def assert_close(actual, expected, tolerance, zeros=()):
    """Asserts that values differ by the tolerance at most, times the largest of their kind."""
    for name, exact in expected.items():
        if name not in zeros:
            atol = tolerance * float(exact.abs().max())
            torch.testing.assert_close(
                actual[name], exact, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("sizes, size", [((1, 3, 16), (3, 5)), ((2, 12, 32), (18, 26)), ((67, 32, 32), (9, 12))])
@pytest.mark.parametrize("norm", [1, 4, "channels", None])
@pytest.mark.parametrize("nchw", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_conv_norm_relu(dtype, tolerance, nchw, norm, sizes, size):
    torch.manual_seed(0)
    N, C, K = sizes
    dropout = 0.3 if dtype == torch.float32 else 0.5  # whose factor, 2, bfloat16 does not round
    layers = [conv_norm_relu(norm, C, K, dropout)]
    actual, expected = compare(layers, torch.randn(N, C, *size), dtype, nchw)
    # A norm of single channels takes their mean away, and with it what the convolution's bias does.
    assert_close(actual, expected, tolerance, zeros=["0.bias"] if norm in (None, "channels") else [])
    assert_close({"output": actual["output"]}, {"output": expected["output"]}, 1e-2)


@pytest.mark.parametrize("norm", [4, None])
@pytest.mark.parametrize("source", [0, 1])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)])
def test_a_skip_adds_an_earlier_output(dtype, tolerance, source, norm):
    torch.manual_seed(0)
    layers = [conv_norm_relu(norm, *sizes) for sizes in ((3, 16), (16, 16))]
    layers += [conv_norm_relu(norm, 16, 16, skip_source=source)]
    actual, expected = compare(layers, torch.randn(5, 3, 12, 8), dtype)
    assert_close(actual, expected, tolerance, zeros=["0.bias", "3.bias", "6.bias"] if norm is None else [])


@pytest.mark.parametrize("C, K", [(16, 8), (32, 16), (48, 4), (16, 35)])
@pytest.mark.parametrize("n, size", [(1, (2, 6)), (69, (8, 4))])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-6), (torch.bfloat16, 1e-2)])
def test_conv1x1_maxpool(dtype, tolerance, n, size, C, K):
    torch.manual_seed(0)
    layers = [Conv1x1MaxPool(nn.Conv2d(C, K, 1), nn.MaxPool2d(2))]
    assert_close(*compare(layers, torch.randn(n, C, *size), dtype), tolerance)


@pytest.mark.parametrize("C, K", [(16, 10), (32, 3)])
@pytest.mark.parametrize("n, size", [(1, (1, 1)), (69, (3, 5))])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-6), (torch.bfloat16, 1e-2)])
def test_avgpool_linear(dtype, tolerance, n, size, C, K):
    torch.manual_seed(0)
    actual, expected = compare([head(C, K)], torch.randn(n, C, *size), dtype)
    assert_close(actual, expected, tolerance)
    assert_close({"output": actual["output"]}, {"output": expected["output"]}, 5e-6)  # logits are in float32


def gradients(net, x):
    torch.manual_seed(0)
    return torch.autograd.grad(F.cross_entropy(net(x), torch.arange(len(x)) % 10), list(net.parameters()))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("n, size", [(1, 8), (3, 12), (4, 32)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_whole_network_learns_and_predicts_as_its_modules(norm, n, size, memory_format):
    torch.manual_seed(0)
    net = model.Net(norm, dropout=0.2).to(memory_format=memory_format)
    plain = copy.deepcopy(net)
    fused = fuse(net)
    for actual, expected in zip(gradients(fused, images(n, size)), gradients(plain, images(n, size))):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()) + 2e-5)
    assert fused.reason is None
    for actual, expected in zip(net.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(actual, expected)
    fused.eval(), plain.eval()
    with torch.no_grad():
        torch.testing.assert_close(fused(images(n, size)), plain(images(n, size)), rtol=1e-4, atol=1e-5)
    assert fused.reason is None


@pytest.mark.parametrize("rates", [[0.3], [0.1, 0.5], [0, 0.25, 1], [0.2, 0.2, 0], [1]])
def test_dropout_draws_the_numbers_of_its_modules(rates):
    blocks = [model.ConvBlock(3, 16, nn.Identity(), rates[i % len(rates)]) for i in range(8)]
    torch.manual_seed(0)
    expected = [[block.dropout(torch.ones(5, 16, 1, 1)).flatten() for block in blocks] for _ in range(2)]
    torch.manual_seed(0)
    dropout = DropoutScales(blocks, 5)
    for numbers in expected:
        scales = dropout.draw()
        assert all(scale is None for scale, block in zip(scales, blocks) if not block.dropout.p)
        assert all(torch.equal(torch.ones(80) if each is None else each, own) for each, own in zip(scales, numbers))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layout_of_the_weights_changes_no_bit(norm, dtype):
    torch.manual_seed(0)
    net = model.Net(norm, dropout=0.2)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        fused = fuse(copy.deepcopy(net).to(memory_format=memory_format))
        with autocast(CPU, dtype):
            results.append(gradients(fused, images()))
        assert fused.reason is None
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("norm", NORMS)
def test_in_bfloat16_the_kernel_is_no_further_from_float64_than_the_modules(norm):
    torch.manual_seed(0)
    x, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    net = model.Net(norm, dropout=0)

    def gradient(net, x, dtype):
        with autocast(CPU, dtype):
            logits = net(x)
        F.cross_entropy(logits.to(x.dtype), labels).backward()
        return torch.cat([parameter.grad.flatten().double() for parameter in net.parameters()])

    exact = gradient(copy.deepcopy(net).double(), x.double(), torch.float32)
    modules = copy.deepcopy(net).to(memory_format=torch.channels_last)
    errors = [(gradient(each, x, torch.bfloat16) - exact).norm() for each in (fuse(copy.deepcopy(net)), modules)]
    assert errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize("norm", NORMS)
def test_evaluation_leaves_the_network_as_it_is_and_images_to_themselves(norm):
    fused = fuse(model.Net(norm)).eval()
    before = copy.deepcopy(fused.state_dict())
    with torch.no_grad(), autocast(CPU, torch.bfloat16):
        together, alone = fused(images(9)), torch.cat([fused(image[None]) for image in images(9)])
        assert torch.allclose(fused(images(9).bfloat16()), together, atol=0.05)
    assert torch.equal(together, alone) and fused.reason is None
    assert all(torch.equal(value, before[name]) for name, value in fused.state_dict().items())


def passing_on(norm):
    """A layer whose convolution leaves sixteen channels as they are."""
    conv = nn.Conv2d(16, 16, 3, padding=1)
    nn.init.dirac_(conv.weight)
    nn.init.zeros_(conv.bias)
    return ConvNormReLU(conv, norm, nn.Dropout2d(0))


def test_the_variance_of_values_far_from_zero_is_kept():
    x = torch.randn(8, 16, 8, 8) + 1000
    output = run_kernel([passing_on(nn.GroupNorm(2, 16))], x)
    torch.testing.assert_close(output, F.relu(nn.GroupNorm(2, 16).double()(x.double())).float(), rtol=0, atol=1e-3)


def test_nan_comes_through():
    layer, x = passing_on(nn.BatchNorm2d(16)), torch.zeros(2, 16, 2, 2)
    layer.conv.bias.data[3] = torch.nan
    output = run_kernel([layer], x)
    assert output[:, 3].isnan().all() and not output[:, 4].isnan().any()


@pytest.mark.parametrize("norm", NORMS)
def test_nan_in_an_image_reaches_the_gradients_that_it_does_in_the_modules(norm):
    net, x = model.Net(norm, dropout=0), images(17, 16)
    x[5, 0, 0, 0] = torch.nan
    fused = fuse(copy.deepcopy(net))
    found = [[each.isnan() for each in gradients(network, x)] for network in (fused, net)]
    assert fused.reason is None and all(map(torch.equal, *found)) and all(map(torch.any, found[0]))


def test_the_same_channels_are_dropped_as_by_the_module():
    torch.manual_seed(0)
    results = compare([conv_norm_relu(None, 16, 32, 0.5)], torch.randn(16, 16, 4, 4), torch.bfloat16)
    dropped = [(each["output"].flatten(2) == 0).all(2) for each in results]
    assert torch.equal(*dropped) and 0 < dropped[0].float().mean() < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_equal_values_pool_as_in_the_module(dtype):
    x = torch.zeros(1, 16, 2, 4)
    x[0, 3, 0, 1] = torch.nan
    conv, pool = nn.Conv2d(16, 8, 1), nn.MaxPool2d(2)
    conv.weight.data, conv.bias.data = (p.to(dtype).float() for p in conv.parameters())
    results = []
    for compute in (lambda x: run_kernel([Conv1x1MaxPool(conv, pool)], x, dtype), lambda x: pool(conv(x))):
        own = x.clone().requires_grad_()
        with autocast(CPU, dtype):
            output = compute(own)
        output.sum().backward()
        results.append((output, own.grad))
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.fixture
def numbers_of_threads():
    """Yields one number of threads after the other, and has torch use as many."""
    before = torch.get_num_threads()
    yield (torch.set_num_threads(count) or count for count in (1, 2, 3))
    torch.set_num_threads(before)


@pytest.mark.parametrize("nchw", [True, False])
@pytest.mark.parametrize("norm", [4, None])
def test_any_number_of_threads_gives_the_same(norm, nchw, numbers_of_threads):
    results = []
    for _ in numbers_of_threads:
        torch.manual_seed(0)
        layers = [conv_norm_relu(norm, 16, 32), head(32)]
        results.append(compare(layers, torch.randn(21, 16, 4, 4), torch.bfloat16, nchw)[0])
    for other in results[1:]:
        assert all(torch.equal(results[0][name], value) for name, value in other.items())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_whole_network(norm, dtype, numbers_of_threads):
    net, results = model.Net(norm, dropout=0.2), []
    for _ in numbers_of_threads:
        fused = fuse(copy.deepcopy(net))
        with autocast(CPU, dtype):
            results.append([*gradients(fused, images(9, 12)), *fused.buffers()])
        with torch.no_grad(), autocast(CPU, dtype):
            results[-1].append(fused.eval()(images(9, 12)))
        assert fused.reason is None
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_frozen_parameters_pass_their_gradient_on():
    fused, x = fuse(model.Net("batch").requires_grad_(False)), images(2).requires_grad_()
    fused(x).square().sum().backward()
    assert fused.reason is None
    assert x.grad.abs().max() > 0 and all(parameter.grad is None for parameter in fused.parameters())


@pytest.mark.parametrize("norm", NORMS)
def test_passes_that_are_open_at_once_keep_their_activations_apart(norm):
    fused = fuse(model.Net(norm, dropout=0))
    parameters, batches = list(fused.parameters()), images(6).split(3)
    alone = [torch.autograd.grad(fused(batch).square().sum(), parameters) for batch in batches]
    losses = [fused(batch).square().sum() for batch in batches]
    for _ in range(2):
        for loss, expected in zip(losses, alone):
            found = torch.autograd.grad(loss, parameters, retain_graph=True)
            assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_share_their_workspaces_and_what_these_held_does_not_matter(norm, dtype):
    fused, results, used = fuse(model.Net(norm, dropout=0)), [], []
    for _ in range(2):
        with autocast(CPU, dtype):
            results.append([*gradients(fused, images()), fused(images()).detach()])
        for memory in workspace._POOL:
            memory.fill_(255)  # a NaN in either dtype
        used.append({memory.data_ptr() for memory in workspace._POOL})
    assert used[0] == used[1] and len(used[0]) == 2
    assert all(map(torch.equal, *results))


def test_logits_do_not_hold_the_activations():
    with torch.no_grad():
        logits = fuse(model.Net())(images())
    assert logits.untyped_storage().nbytes() == logits.numel() * 4


@pytest.mark.parametrize("norm", NORMS)
def test_a_loop_of_ones_own_learns_what_the_modules_learn(norm):
    states = []
    for wrap in (fuse, lambda net: net):
        torch.manual_seed(0)
        network = wrap(model.Net(norm, dropout=0.1))
        optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(network(images(8)), torch.arange(8)).backward()
            optimizer.step()
        states.append(getattr(network, "model", network).state_dict())
    for name, value in states[0].items():
        if not (norm == "batch" and name.endswith("conv.bias")):  # whose gradient is rounding alone: Adam scales it up
            close = torch.isclose(value, states[1][name], rtol=1e-2, atol=2e-3)
            assert close.float().mean() > 0.999, name  # Adam scales rounding up, too, where a gradient is next to zero


@pytest.mark.parametrize("change", [{"memory_format": torch.channels_last}, {"dtype": torch.float64}])
def test_parameters_that_change_before_the_backward_pass_are_an_error(change):
    net = model.Net("group")
    loss = fuse(net)(images()).sum()
    net.to(**change)
    with pytest.raises(RuntimeError, match="changed its dtype, shape or memory format"):
        loss.backward()


def test_two_threads_go_backward_from_one_forward_pass():
    fused = fuse(model.Net("group", dropout=0))
    parameters, logits = list(fused.parameters()), fused(images(16))

    def go_backward(k):
        return torch.autograd.grad(logits[:, k].sum(), parameters, retain_graph=True)

    expected = [go_backward(k) for k in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        for k, found in zip([0, 1] * 10, pool.map(go_backward, [0, 1] * 10)):
            assert all(map(torch.equal, found, expected[k]))


def test_no_memory_is_an_error(monkeypatch):
    def take(size):
        return torch.empty(2**62, dtype=torch.uint8)

    monkeypatch.setattr(function, "take_workspace", take)
    with pytest.raises(MemoryError, match="batch size 4: try 2"):
        utils.test(model.Net(), DataLoader(TensorDataset(images(), torch.arange(4)), 4), backend="fused")
