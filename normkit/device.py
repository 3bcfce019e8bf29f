"""What computes: device, precision, memory format; and whether the device computes norms right."""

import copy
import itertools

import torch
from torch import nn

from normkit.checks import check_choice, shown


def get_device(device=None):
    """Returns the device asked for, checked; if none is, CUDA, else Apple MPS, else the CPU."""
    backends = {"cuda": torch.cuda, "mps": torch.backends.mps, "cpu": torch.cpu}
    available = [name for name, backend in backends.items() if backend.is_available()]
    if device is None:
        return torch.device(available[0])
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    counts = {"cuda": torch.cuda.device_count()} | dict.fromkeys(("cpu", "mps"), 1)
    if found is None or found.type not in available or (found.index or 0) >= counts[found.type]:
        known = " or ".join(f"{name} (0 to {counts[name] - 1})" if counts[name] > 1 else name for name in available)
        given = shown(device if found is None else str(found))
        raise ValueError(f"device {given} is not available here: choose {known}")
    return found


PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_precision(precision, device):
    """Returns the dtype of a precision by name; "auto" is bfloat16 where the hardware computes in it, else float32."""
    check_choice("precision", precision, ["auto", *PRECISIONS])
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            features = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}  # torch>=2.11
            native = features.get("avx512_bf16") or features.get("amx_bf16")
        precision = "bfloat16" if native else "float32"
    return PRECISIONS[precision]


def device_of(model):
    """Returns the one device of a model's parameters and buffers, or None where it has none."""
    devices = {tensor.device for tensors in (model.parameters(), model.buffers()) for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(
            f"the model lies on several devices, {', '.join(sorted(map(str, devices)))}: move it to one with "
            "model.to(device)"
        )
    return devices.pop() if devices else None


def dtype_of(model):
    """Returns the dtype of a model's first floating-point parameter: float32 where it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def place_of(model, loader, precision):
    """Returns the device and dtype to move images to, and the dtype for autocast."""
    device = device_of(model) or getattr(loader, "device", torch.device("cpu"))
    dtype = dtype_of(model)
    # Autocast only for float32 networks: others compute in their own dtype.
    compute_dtype = choose_precision(precision, device)
    return device, dtype, compute_dtype if dtype == torch.float32 else torch.float32


def autocast(device, dtype):
    """Returns the context in which convolutions are computed in dtype."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def choose_memory_format(memory_format, model, device, dtype):
    """Returns a memory format by name; "auto" is the faster one for the model's modules.

    Measured, ms a step at batch size 64, channels_last / contiguous. Two Zen 4 cores: bfloat16 batch 21 / 25,
    group 34 / 25 (PyTorch's kernel is not vectorised there), layer 20 / not tried; float32 batch 31 / 45, group
    32 / 42. H200, in CUDA graphs: bfloat16 batch 0.88 / 1.24, group 1.18 / 1.19, layer 1.20 / 1.21; float32 batch
    1.12 / 1.23, group 1.33 / 1.18, layer 1.35 / 1.20.
    """
    check_choice("memory_format", memory_format, ["auto", *MEMORY_FORMATS])
    if memory_format == "auto":
        groups = [module.num_groups for module in model.modules() if isinstance(module, nn.GroupNorm)]
        slow = device.type == "cuda" and groups or dtype == torch.bfloat16 and any(number > 1 for number in groups)
        memory_format = "channels_last" if device.type in ("cpu", "cuda") and not slow else "contiguous"
    return MEMORY_FORMATS[memory_format]


def check_norms(model, batch_sizes):
    """Raises unless each kind of torch's norm layers in the model gives on its device what a copy gives on the CPU.

    Outputs and gradients in float32, at every batch size given: Apple's MPS has had silently wrong norms
    (pytorch issues 175189, 182805, 177116).
    """
    device = next(model.parameters()).device
    kinds = nn.BatchNorm2d | nn.GroupNorm | nn.InstanceNorm2d
    layers = {str(m): m for m in model.modules() if isinstance(m, kinds)}
    own = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float32, "device": "cpu"}
    for (name, layer), batch_size in itertools.product(layers.items(), sorted(set(batch_sizes))):
        channels = layer.num_channels if isinstance(layer, nn.GroupNorm) else layer.num_features
        x = torch.randn(batch_size, channels, 8, 8, **own) * 3 + 1
        weight = torch.randn(x.shape, **own)  # makes the gradients differ from value to value
        results = []
        for where in (device, torch.device("cpu")):
            layer_copy = copy.deepcopy(layer).to(where).train().requires_grad_()
            inputs = x.to(where, copy=True).requires_grad_()
            output = layer_copy(inputs)
            gradients = torch.autograd.grad((output * weight.to(where)).sum(), [inputs, *layer_copy.parameters()])
            results.append([tensor.detach().cpu() for tensor in (output, *gradients)])
        for actual, expected in zip(*results):
            if not torch.allclose(actual, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
                raise RuntimeError(
                    f"{device} computes {name} wrong at batch size {batch_size} (off by "
                    f"{(actual - expected).abs().max():.2g}): choose device='cpu', or try another version of torch"
                )
