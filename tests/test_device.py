import pytest
import torch
from helpers import NORMS, THREE, run
from torch import nn

import model
from normkit.device import check_norms, choose_memory_format, choose_precision, get_device


def test_bfloat16_where_the_hardware_has_it(monkeypatch):
    cpu = torch.device("cpu")
    for features, dtype in (
        ({}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features, raising=False)
        assert choose_precision("auto", cpu) == dtype
        assert choose_precision("float32", cpu) == torch.float32


@pytest.mark.parametrize("norm", NORMS)
def test_the_self_check_passes_right_norms(data, norm, device):
    net = model.Net(norm).to(device)
    before = torch.get_rng_state()
    check_norms(net, (64, 10))
    assert torch.equal(before, torch.get_rng_state())


def test_the_self_check_passes_right_norms_whatever_the_default():
    net = model.Net()
    with torch.device("meta"):
        check_norms(net, (4,))
    torch.set_default_dtype(torch.float64)
    try:
        check_norms(net, (4,))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("norm", [*THREE, "without parameters"])
@pytest.mark.parametrize("wrong", ["forward", "gradient"])
def test_the_self_check_stops_at_a_wrong_norm(data, norm, wrong, monkeypatch):
    monkeypatch.setitem(model.NORMS, "without parameters", lambda channels, num_groups: nn.InstanceNorm2d(channels))
    kind = type(model.NORMS[norm](16, 4))
    right, calls = kind.forward, iter(range(10**6))

    def forward(self, x):
        y = right(self, x)
        if next(calls) % 2:  # the second of each pair
            return y
        return y + 0.01 * y.mean() + 0.01 if wrong == "forward" else y + (x - x.detach()) * 0.05

    monkeypatch.setattr(kind, "forward", forward)
    with pytest.raises(RuntimeError, match="cpu computes .*Norm.* wrong at batch size 6.*device='cpu'"):
        run(data, norm=norm, self_check=True)


def test_a_device_that_is_not_there_names_those_that_are():
    for device in ("abacus", "tpu:0", "cuda" if not torch.cuda.is_available() else "mps"):
        with pytest.raises(ValueError, match=f"{device}.*choose .*cpu"):
            get_device(device)
    missing = torch.device("cuda:99")
    for device in (missing, str(missing)):
        with pytest.raises(ValueError, match="^device 'cuda:99' is not available here"):
            get_device(device)
    for device in ([], ("cpu", 0), 1.5, True, torch.zeros(2, 2)):
        with pytest.raises(ValueError, match="^device [^\n]* is not available here: choose [^\n]*cpu"):
            get_device(device)
    assert get_device("cpu") == get_device(torch.device("cpu")) == torch.device("cpu")
    assert get_device().type in ("cuda", "mps", "cpu")


def test_the_memory_format_is_the_faster_one_for_the_modules():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    nets = {norm: model.Net(norm) for norm in NORMS}
    for norm, net in nets.items():
        slow = norm == "group"
        assert choose_memory_format("auto", net, cpu, torch.float32) == torch.channels_last
        fast = torch.contiguous_format if slow else torch.channels_last
        assert choose_memory_format("auto", net, cpu, torch.bfloat16) == fast
        on_gpu = torch.channels_last if norm == "batch" else torch.contiguous_format
        assert choose_memory_format("auto", net, cuda, torch.bfloat16) == on_gpu
        assert choose_memory_format("contiguous", net, cpu, torch.float32) == torch.contiguous_format
