"""The CUDA path without a GPU: on a fake device, where any mix of devices is an error. Only values are missing."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import model
import utils
from normkit import checks
from normkit.backend import choose_backend
from normkit.device import place_of
from normkit.meter import Meter, count_correct


@pytest.fixture(params=["cuda", "cuda:1"])
def device(request, monkeypatch):
    """A device of which the kit believes that it is there."""
    device = torch.device(request.param)
    monkeypatch.setattr(utils, "get_device", lambda asked=None: device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    return device


@pytest.mark.parametrize("norm", model.NORMS)
@pytest.mark.parametrize("augment", [True, False])
def test_loaders_forward_loss_and_metrics_stay_on_the_device(data, device, norm, augment):
    with FakeTensorMode(allow_non_fake_inputs=True):
        train_loader, test_loader = utils.get_loaders(data, 64, augment, device)
        with device:
            net = model.Net(norm)
        network, line = choose_backend("auto", net)
        assert network is net and line.startswith("eager")
        found, dtype, compute_dtype = place_of(network, train_loader, "auto")
        assert found.type == "cuda" and (dtype, compute_dtype) == (torch.float32, torch.bfloat16)
        for loader in (train_loader, test_loader):
            sizes = []
            for images, labels in loader:
                images = checks.check_images(images, found, dtype)
                logits = utils.compute_logits(network, images, compute_dtype)
                labels = checks.check_labels(labels, logits, batch_id=1)  # values are checked in the first batch
                loss = F.cross_entropy(logits, labels)
                correct = count_correct(logits, labels)
                for tensor in (images, labels, logits, loss, correct):
                    assert tensor.device.type == "cuda" and tensor.device.index == (device.index or 0)
                assert logits.dtype == torch.float32
                sizes.append(len(labels))
            assert sum(sizes) == len(loader.labels) and sizes[-1] == len(loader.labels) % 64
        meter = Meter()
        meter.add(loss, correct, 64)
        [(numbers, _)] = meter.waiting
        assert numbers.device == loss.device and meter.total == 0  # nothing was waited for


def test_the_kernel_is_refused_with_its_reason(device):
    with FakeTensorMode(allow_non_fake_inputs=True):
        with device:
            net = model.Net("group")
        with pytest.raises(ValueError, match="backend='fused' cannot be had: .*Choose 'auto' or 'eager'"):
            choose_backend("fused", net)
