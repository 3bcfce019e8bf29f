"""The GPU kernels have the numbers of PyTorch's modules; without a GPU Triton's interpreter runs them, in float32."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import NORMS, QUIET, THREE
from torch import nn

import model
import utils
from normkit.device import autocast
from normkit.fused.layers import layers_of
from normkit.gpu import step

triton = pytest.importorskip("triton")


@triton.jit
def count(total, N):
    for _ in range(triton.language.cdiv(N, 2)):
        triton.language.store(total, triton.language.load(total) + 1)


@pytest.fixture(scope="module", autouse=True)
def interpreter():
    """That of an older version takes no new NumPy."""
    if not torch.cuda.is_available():
        total = torch.zeros(1, dtype=torch.int32)
        try:
            count[(1,)](total, 3)
        except Exception as error:
            if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8):
                raise
            pytest.skip(f"Triton {triton.__version__} cannot interpret: {error}")
        assert total == 2


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def dtype(device):
    return torch.float32 if device.type == "cpu" else torch.bfloat16


@pytest.fixture(autouse=True)
def few_programs(device, monkeypatch):
    """As the interpreter runs one after the other; but several, so that there are shares to be summed up."""
    if device.type == "cpu":
        few(2, monkeypatch)
        monkeypatch.setattr(step, "SUM_BLOCK", 16384)


def few(programs, monkeypatch):
    monkeypatch.setattr(step, "programs_of", lambda N: programs)
    monkeypatch.setattr(step, "CONV_PROGRAMS", programs)


def net_of(norm, device, **settings):
    """A network whose norms and biases are not what they are at the start."""
    torch.manual_seed(0)
    net = model.Net(norm, **{"dropout": 0.0} | settings)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape)
    return net.to(device)


def images_of(*shape, device):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(device)


def step_of(net, images, labels, dtype):
    """Returns loss, correct images, and gradients by name, by the kernels."""
    layers, names = layers_of(net), {id(each): name for name, each in net.named_parameters()}
    torch.manual_seed(1)
    with torch.no_grad():
        loss, correct, gradients = step.training_step(layers, images, labels.to(images.device), dtype)
    parameters = [each for layer in layers for each in layer.parameters()]
    assert [each.stride() for each in gradients] == [each.stride() for each in parameters]
    return loss, correct, dict(zip([names[id(each)] for each in parameters], gradients, strict=True))


def expected_of(net, images, labels, dtype):
    """The same by the modules."""
    torch.manual_seed(1)
    with autocast(images.device, dtype):
        logits = net(images)
    labels = labels.to(images.device)
    loss = F.cross_entropy(logits.to(images.dtype), labels)
    names, parameters = zip(*net.named_parameters())
    return loss, (logits.argmax(1) == labels).sum(), dict(zip(names, torch.autograd.grad(loss, parameters)))


def assert_same(net, images, labels, dtype):
    """Compares with float64; in bfloat16 with float32, and by what autocast makes of that."""
    exact, rough = copy.deepcopy(net).double(), copy.deepcopy(net)
    if dtype == torch.float32:
        expected, tolerances = expected_of(exact, images.double(), labels, dtype), {}
    else:
        expected = expected_of(copy.deepcopy(net), images, labels, torch.float32)
        rounded = expected_of(rough, images, labels, dtype)[2]
        tolerances = {name: 0.02 + 2 * relative(each, expected[2][name]) for name, each in rounded.items()}
    loss, correct, gradients = step_of(net, images, labels, dtype)
    assert loss.item() == pytest.approx(expected[0].item(), rel=1e-5 if dtype == torch.float32 else 2e-2)
    for name, gradient in gradients.items():
        if net.norm == "batch" and name.endswith("conv.bias"):
            assert not gradient.any()  # batch norm takes away what it adds
        elif expected[2][name].norm() > 1e-9:  # and so does instance norm
            assert relative(gradient, expected[2][name]) < tolerances.get(name, 1e-5), name
    if dtype == torch.float32:
        assert correct == expected[1]
        for (name, one), other in zip(net.named_buffers(), exact.buffers()):
            torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-6, msg=name)


def relative(one, other):
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("norm", THREE)
def test_a_step_is_that_of_the_modules(norm, device, dtype):
    """With dropout, and maps that fill no block."""
    assert_same(
        net_of(norm, device, dropout=0.3), images_of(3, 3, 8, 12, device=device), torch.tensor([3, 9, 0]), dtype
    )


@pytest.mark.parametrize("layout, programs", [("channels_last", 1), ("every second pixel", 4)])
def test_other_layouts(layout, programs, device, dtype, monkeypatch):
    """One program adds up all; of four, more than there are blocks in the small maps, some have nothing to do."""
    few(programs, monkeypatch)
    net, images = net_of("batch", device), images_of(2, 3, 8, 16, device=device)[..., ::2]
    if layout == "channels_last":
        net, images = (each.to(memory_format=torch.channels_last) for each in (net, images))
    assert_same(net, images, torch.tensor([5, 5]), dtype)


def test_instance_norm_of_one_image_no_skips_and_three_classes(device, dtype, monkeypatch):
    few(4, monkeypatch)  # three of which have no image
    net = net_of("group", device, num_groups="channels", skip=False)
    net.C10 = model.Conv2d(32, 3, 1).to(device)
    assert_same(net, images_of(1, 3, 8, 8, device=device), torch.tensor([2, 1])[::2], dtype)


def test_all_is_dropped(device, dtype):
    net = net_of("batch", device, dropout=1.0)
    loss, _, gradients = step_of(net, images_of(4, 3, 8, 8, device=device), torch.arange(4), dtype)
    assert loss.isfinite() and [name for name, each in gradients.items() if each.any()] == ["C10.bias"]


def test_a_value_that_is_not_finite_reaches_the_loss(device, dtype):
    images = images_of(1, 3, 8, 8, device=device)
    images[0, 2, 3, 4] = torch.nan
    assert step_of(net_of("layer", device), images, torch.tensor([1]), dtype)[0].isnan()


@pytest.mark.parametrize("label", [-100, 10])
def test_a_label_that_is_no_class_makes_the_loss_nan(label, device, dtype):
    images = images_of(2, 3, 8, 8, device=device)
    loss, correct, _ = step_of(net_of("group", device), images, torch.tensor([1, label]), dtype)
    assert loss.isnan() and correct <= 1


def changed(change):
    net = model.Net("group")
    change(net)
    return net


def widen(net):
    net.C1.conv, net.C1.norm = nn.Conv2d(3, 48, 3, padding=1), nn.GroupNorm(4, 48)


REASONS = {
    "a layer has 48 channels": lambda: (changed(widen), None),
    "there are 200 classes": lambda: (changed(lambda net: setattr(net, "C10", model.Conv2d(32, 200, 1))), None),
    "images have 36×32 pixels": lambda: (model.Net(), torch.empty(1, 3, 36, 32)),
    "a batch has 40000 images": lambda: (model.Net(), torch.empty(40_000, 3, 32, 32, device="meta")),
    "batch norm is in evaluation mode": lambda: (model.Net(), torch.empty(1, 3, 8, 8), True),
}


@pytest.mark.parametrize("reason", REASONS)
def test_reasons(reason):
    net, *batch = REASONS[reason]()
    assert step.reason_against(layers_of(net), *batch).startswith(reason)


def test_without_triton(monkeypatch):
    layers = layers_of(model.Net())
    assert step.reason_against(layers, torch.empty(2, 3, 8, 8)) is None
    step.kernels.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "normkit.gpu.kernels", None)
        patch.delattr(sys.modules["normkit.gpu"], "kernels")
        assert "Triton cannot be imported" in step.reason_against(layers)
    step.kernels.cache_clear()
    assert step.reason_against(layers) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("recipe", ["classic", "best"])
def test_a_run_learns_as_by_the_modules(norm, recipe, data, capsys):
    how = {"epochs": 3, "batch_size": 16, "recipe": recipe, "device": "cuda", "precision": "bfloat16"}
    runs = [utils.run(norm, data, backend=backend, **how, **QUIET).history[-1] for backend in ("auto", "eager")]
    assert "No " not in capsys.readouterr().out
    assert runs[0]["train_loss"] == pytest.approx(runs[1]["train_loss"], rel=5e-2)
