"""Models, optimizers and settings of one's own in the kit's loops."""

from collections import namedtuple

import numpy as np
import pytest
import torch
from helpers import fit, linear
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

import model
import utils
from normkit import checks, stepper

pytestmark = pytest.mark.usefixtures("float32_by_default")


# ----------------------------------------------------------------------- models and optimizers


class Watched(torch.optim.SGD):
    """Notes in how many threads it steps; fails where it is told to."""

    def step(self, closure=None):
        self.threads = torch.get_num_threads()
        if getattr(self, "failing", False):
            raise ValueError("as it was told")
        return super().step()


@pytest.mark.parametrize("fused", [True, False])
def test_small_fused_optimizers_step_in_one_thread(loaders, fused):
    model, threads = linear(), torch.get_num_threads()
    large = torch.zeros(10 * stepper.SMALL, requires_grad=True)
    optimizer = Watched(model.parameters(), 0.1, fused=fused)
    try:
        torch.set_num_threads(3)
        utils.train(model, loaders[0], optimizer, progress=False)
        assert (optimizer.threads, torch.get_num_threads()) == (1 if fused else 3, 3)
        optimizer.failing = True
        with pytest.raises(ValueError, match="as it was told"):
            stepper.Stepper(optimizer).step(None, float)
        assert torch.get_num_threads() == 3
        optimizer.add_param_group({"params": [large]})
        assert not stepper.steps_alone(optimizer)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["frozen", "scripted", "no parameters", "quantized"])
def test_models_without_parameters_are_evaluated(loaders, kind):
    net = linear().eval()
    images = next(iter(loaders[1]))[0]
    if kind == "frozen":
        net = torch.jit.freeze(torch.jit.trace(net, images))
    elif kind == "scripted":
        net = torch.jit.script(net)
    elif kind == "quantized":
        net = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, torch.qint8)
    else:
        net = nn.Sequential(nn.AdaptiveAvgPool2d((2, 5)), nn.Flatten(), nn.Linear(30, 10).requires_grad_(False))
        net[2] = nn.Identity()
        net = nn.Sequential(*net, nn.AdaptiveAvgPool1d(10))
    metrics = utils.test(net, loaders[1])
    assert metrics.total == 101 and 0 <= metrics.accuracy <= 100


def test_a_criterion_has_a_batch_at_a_time(pairs):
    """As one needs that looks at the images or activations of that batch, to distil a teacher's knowledge, say."""
    net, teacher, seen = linear(), linear().requires_grad_(False), {}
    net.register_forward_pre_hook(lambda module, args: seen.update(images=args[0], learns=torch.is_grad_enabled()))

    def criterion(logits, labels):
        assert torch.is_grad_enabled() == seen["learns"] == net.training
        return nn.functional.cross_entropy(logits, teacher(seen["images"]).softmax(1))

    loader = DataLoader(pairs, 30)  # a ragged last batch
    metrics = utils.test(net, loader, criterion=criterion, precision="float32")
    net.eval()
    with torch.no_grad():
        losses = [(criterion(net(images), labels).item(), len(labels)) for images, labels in loader]
    assert len({size for _, size in losses}) == 2
    assert metrics.loss == pytest.approx(sum(loss * size for loss, size in losses) / metrics.total, rel=1e-5)
    (row,) = fit(net, (loader, loader), epochs=1, criterion=criterion)
    assert row["test_loss"] == pytest.approx(utils.test(net, loader, criterion=criterion).loss)


def test_a_model_on_two_devices_is_one_clear_error(loaders):
    net = nn.Sequential(linear(), nn.Linear(10, 10, device="meta"))
    for call in (lambda: utils.test(net, loaders[1]), lambda: fit(net, loaders)):
        with pytest.raises(ValueError, match=r"several devices, cpu, meta: .*model.to\(device\)"):
            call()


Outputs = namedtuple("Outputs", "logits aux")


@pytest.mark.parametrize(
    "output",
    [lambda x: Outputs(x, x), lambda x: {"logits": x}, lambda x: (x, None), lambda x: x[:-1], lambda x: x.sum(1)],
)
def test_other_outputs_than_logits_are_one_clear_error(loaders, output):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = linear()

        def forward(self, images):
            return output(self.net(images))

    for call in (lambda: utils.test(Model(), loaders[1]), lambda: fit(Model(), loaders)):
        with pytest.raises(TypeError, match=r"the model returns .*expected logits \(\d+, classes\)"):
            call()


def test_images_in_any_memory_layout(pairs):
    images, labels = pairs.tensors
    net, expected = model.Net("group").eval(), None
    wide = torch.zeros(*images.shape[:3], 2 * images.shape[3])
    wide[..., ::2] = images
    layouts = [images, images.to(memory_format=torch.channels_last), wide[..., ::2], images.flip(0).flip(0)]
    for each in layouts:
        metrics = utils.test(net, [(each, labels)])
        expected = expected or metrics
        assert metrics == pytest.approx(expected, rel=1e-5)


# --------------------------------------------------------------------------------- any scalars


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 400),
    st.sampled_from([int, np.int64, np.uint16, torch.tensor]),
    st.sampled_from([int, np.int32, torch.tensor, float, str, np.float64, lambda n: None, bool]),
)
def test_whole_numbers_of_any_library_are_whole_numbers(n, good, kind):
    assert checks.whole_number("n", good(n)) == n and type(checks.whole_number("n", good(n))) is int
    if kind in (int, np.int32, torch.tensor):
        assert checks.whole_number("n", kind(n)) == n
    else:
        with pytest.raises(ValueError, match="n=.*expected a whole number"):
            checks.whole_number("n", kind(n))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.floats(1e-6, 10), st.sampled_from([float, np.float32, np.float64, torch.tensor]))
def test_rates_of_any_library_are_rates(rate, kind):
    recipe = utils.get_recipe(lr=kind(rate), momentum=kind(0.5))
    assert type(recipe.lr) is float and recipe.lr == pytest.approx(rate, rel=1e-5)
    assert "tensor" not in str(recipe) and "np." not in str(recipe)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), None, "0.1", True])
def test_rates_that_are_none_are_refused_before_anything_runs(value):
    if value is None:
        assert utils.get_recipe(lr=None) == utils.get_recipe()
        return
    with pytest.raises(ValueError, match="lr=.*expected a number above 0"):
        utils.get_recipe(lr=value)


def test_what_a_process_shares_is_not_set_back_in_it(pairs, tmp_path):
    """A loader that counts in its class, and stops once: run again, it goes on."""

    class Stopping(DataLoader):
        passes = 0

        def __iter__(self):
            Stopping.passes += 1
            if Stopping.passes == 2:
                raise KeyboardInterrupt
            return super().__iter__()

    net = linear()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for epochs in (1, 3):
        history = fit(net, (Stopping(pairs, 16), DataLoader(pairs, 64)), optimizer, epochs=3, checkpoint=tmp_path / "c")
        assert len(history) == epochs
