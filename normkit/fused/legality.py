"""Where the kernel may stand in for the modules: named conditions, each with the reason it gives where it fails.

Each function yields the reasons it finds; the first one counts.
"""

import ast
import inspect
import textwrap
import zlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.utils import _device, _python_dispatch

import model
from model import AvgPool2d, Conv2d, ConvBlock, Net, check_images  # where another model.py is found, this names it
from normkit.fused import params
from normkit.fused.build import library
from normkit.fused.layers import layers_of, parameters_of

MAX_PIXELS = 40 * 40  # of an image: in larger maps the kernel's float32 sums lose digits of a norm's variance
MIN_EPS = 1e-30  # of a norm: in float32 much smaller ones underflow, and their inverses overflow
PLACES = {"cpu": "the kernel is for CPUs", "cuda": "graphs are for CUDA"}

# The classes as they were when this was imported: somebody may put a subclass in their place.
CHILDREN = dict.fromkeys("C1 C2 C3 C4 C5 C7 C8 C9".split(), ConvBlock)
CHILDREN |= {"c3": nn.Conv2d, "c6": nn.Conv2d, "P1": nn.MaxPool2d, "P2": nn.MaxPool2d}
CHILDREN |= {"GAP": AvgPool2d, "C10": Conv2d}
PARTS = ("conv", "norm", "dropout")  # of a ConvBlock

# What the kernel stands in for, as it was when this was imported: somebody may replace it later.
KINDS = {*CHILDREN.values(), Net, nn.BatchNorm2d, nn.GroupNorm, nn.Dropout2d}
CALLED = [(kind, name) for name in ("__call__", "_call_impl", "forward") for kind in (nn.Module, *KINDS)]
CALLED += [(nn.Conv2d, "_conv_forward"), (model, "check_images")]
CALLED += [(F, name) for name in "conv2d batch_norm group_norm relu dropout2d max_pool2d linear".split()]
CALLED = [(owner, name, getattr(owner, name)) for owner, name in CALLED]
# What an instance may have of its own: a forward, what compile() makes of it, a tensor that is no parameter.
OVERRIDES = {"forward", "_call_impl", "_compiled_call_impl", "_conv_forward", "weight", "bias"}


def replaced(called):
    """Yields the names of those that are no longer what they were: (owner, name, what it was) each."""
    for owner, name, original in called:
        if getattr(owner, name) is not original:
            yield f"{owner.__name__}.{name}"


def mark_of_code(function):
    """Returns a checksum of what a function does, without its comments and its docstring; None without its source."""
    try:
        [definition] = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError):
        return None
    statements = definition.body[1:] if ast.get_docstring(definition) else definition.body
    return zlib.crc32("\n".join(map(ast.unparse, [definition.args, *statements])).encode())


# The kernel was written for these; who edits one gets the modules, until kernel and mark follow.
MARKS = {
    Net.forward: 0x73D4F97D,
    ConvBlock.forward: 0xA2BC5584,
    AvgPool2d.forward: 0x7B1EB2A6,
    Conv2d.forward: 0x3956F826,
    check_images: 0x01569620,
}
EDITED = [function.__qualname__ for function, mark in MARKS.items() if mark_of_code(function) != mark]
CODES = {function: function.__code__ for function in MARKS}  # which IPython's autoreload replaces in a function


def does_the_same(code, original):
    """Returns whether two codes are the same but for the lines where they stand."""
    if code is original:
        return True
    here, there = (each.replace(co_firstlineno=1, co_linetable=b"") for each in (code, original))
    return here == there


def reason_against(images=None, frozen=False):
    """Returns why the kernel cannot be used now, in words, or None; the network has passed of_network.

    images: None leaves out the conditions on a single call. frozen: a batch norm is in evaluation mode.
    """
    conditions = [of_code()]
    if images is not None:
        conditions += [of_call(), of_images(images), of_mode(frozen)]
    conditions.append(of_library())
    return next((reason for condition in conditions for reason in condition), None)


def compute_dtype():
    """Returns the dtype of activations: autocast's, or float32."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32


def of_library():
    if library().reason is not None:
        yield library().reason


def of_call():
    """Yields a reason for each active tool of PyTorch that must see every operation.

    Also yields one if autocast asks for another dtype than float32 and bfloat16.
    """
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        yield "torch.compile or torch.export traces the call"
    if torch.jit.is_tracing():
        yield "torch.jit traces the call"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        yield "a transform of torch.func is at work"
    if forward_ad._current_level >= 0:
        yield "forward-mode derivatives are asked for"
    if _python_dispatch._len_torch_dispatch_stack():
        yield "a TorchDispatchMode watches every operation"
    if any(type(mode) is not _device.DeviceContext for mode in torch.overrides._get_current_function_mode_stack()):
        yield "a TorchFunctionMode watches every operation"
    if nn_module._has_any_global_hook():
        yield "a hook watches all modules"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        yield "a hook packs saved tensors"
    if compute_dtype() not in (torch.float32, torch.bfloat16):
        yield f"autocast asks for {compute_dtype()}: the kernel computes in float32 and bfloat16"


def of_images(images):
    if type(images) not in (torch.Tensor, nn.Parameter):
        yield f"the images are a {type(images).__name__}"
    elif images.device.type != "cpu":
        yield f"the images are on {images.device}: the kernel is for CPUs"
    elif images.layout != torch.strided or images.dim() != 4 or images.shape[1] != 3 or not images.shape[0]:
        yield f"the images are {images.layout} {tuple(images.shape)}: expected (N, 3, H, W) with N at least 1"
    elif any(size < 8 or size % 4 for size in images.shape[2:]):
        yield f"the images have {images.shape[2]}×{images.shape[3]} pixels: expected multiples of 4, at least 8"
    elif images.shape[2] * images.shape[3] > MAX_PIXELS:
        yield f"the images have {images.shape[2]}×{images.shape[3]} pixels: the kernel is for {MAX_PIXELS} at most"
    elif images.is_neg() or images._is_zerotensor():
        yield "the images are a negative view or a zero tensor, whose memory holds something else"
    elif images.dtype not in (torch.float32, compute_dtype()):
        yield f"the images are {images.dtype}: expected {compute_dtype()}"


def of_mode(frozen):
    """Yields a reason if gradients would be taken through batch norm in evaluation mode."""
    if frozen and torch.is_grad_enabled():
        yield "gradients are on, and batch norm is in evaluation mode"


def of_code():
    """Yields a reason for each edited or replaced function of model.py or PyTorch that the kernel stands in for."""
    changed = [each.__qualname__ for each, code in CODES.items() if not does_the_same(each.__code__, code)]
    for name in EDITED + changed:
        yield f"{name} in model.py is another one than the kernel was written for"
    for name in replaced(CALLED):
        yield f"{name} was replaced"


def of_network(net, device_type="cpu"):
    """Yields the reasons unless net is a model.Net with its own module types, float32, on device_type, unhooked."""
    if type(net) is not Net:
        again = " of another loading of model.py" if type(net).__qualname__ == "Net" else ""
        yield f"the model is a {type(net).__name__}{again}: the kernel computes model.Net alone"
        return
    for name, kind in CHILDREN.items():
        child = net._modules.get(name)
        if type(child) is not kind:
            yield f"{name} is a {type(child).__name__}"
            return
        if kind is ConvBlock and (len(child._modules) != len(PARTS) or None in map(child._modules.get, PARTS)):
            yield f"{name} lacks a part, or has one more"
            return
    for module in modules_of(net):
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            yield f"{name_of(module, net)} has a hook"
        # An attribute goes before a parameter, a buffer or a module of the same name.
        own = OVERRIDES.union(module._parameters, module._buffers, module._modules).intersection(module.__dict__)
        if own:
            yield f"{name_of(module, net)} has a {min(own)} of its own"
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and tensor.device.type != device_type:
                yield f"{name_of(module, net)} is on {tensor.device}: {PLACES[device_type]}"
    if not is_number(net.skip):
        yield f"the network has skip={net.skip!r}"
    width, widths = 3, []
    for layer in layers_of(net):
        for module, reason in of_layer(layer, width):
            yield f"{name_of(module, net)} {reason}"
        width = parameters_of(layer.conv)[0].shape[0]
        widths.append(width)
        if layer.kind == params.CONV_NORM_RELU and widths[layer.skip_source] != width:
            yield "a skip joins layers of different widths"


def modules_of(net):
    """Returns the network and the modules that its forward pass calls, without asking any but nn.Module's dicts."""
    modules = [net]
    for name, kind in CHILDREN.items():
        child = net._modules[name]
        modules += [child, *map(child._modules.get, PARTS)] if kind is ConvBlock else [child]
    return modules


def name_of(module, net):
    name = next((name for name, each in net.named_modules() if each is module), "a module")
    return name or "the network"


def of_layer(layer, width):
    """Yields (module, reason) for what is wrong with a layer of `width` input channels."""
    conv = layer.conv
    size = 3 if layer.kind == params.CONV_NORM_RELU else 1
    if layer.kind == params.CONV_NORM_RELU and type(conv) is not nn.Conv2d:  # the others are in CHILDREN
        yield conv, f"is a {type(conv).__name__}"
        return
    weight, bias = parameters_of(conv)
    yield from of_tensors(conv, weight, bias)
    settings = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
    expected = (size, size), (1, 1), (size // 2, size // 2), (1, 1), 1, "zeros"
    if weight.shape[1:2] != (width,) or not are(settings, expected):
        yield conv, f"is another convolution than {size}×{size} of {width} channels"
    K = weight.shape[0]
    if weight.shape != (K, width, size, size) or bias.shape != (K,):
        yield conv, f"has a weight {tuple(weight.shape)} and a bias {tuple(bias.shape)}"
    if (K if layer.kind == params.CONV_NORM_RELU else width) % 16:
        yield conv, f"has {K} output and {width} input channels: the kernel's vectors take multiples of 16"
    if layer.kind == params.CONV_NORM_RELU:
        yield from of_norm(layer.norm, K)
        yield from of_dropout(layer.dropout)
    elif layer.kind == params.CONV1X1_MAXPOOL:
        pool = layer.pool
        settings = pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode, pool.return_indices
        if not are(settings, (2, 2, 0, 1, False, False)):
            yield pool, "is another pooling than 2×2"


def of_norm(norm, K):
    if type(norm) not in (nn.BatchNorm2d, nn.GroupNorm):
        yield norm, f"is a {type(norm).__name__}: the kernel computes BatchNorm2d and GroupNorm"
        return
    tensors = parameters_of(norm)
    if type(norm) is nn.BatchNorm2d:
        statistics = norm._buffers.get("running_mean"), norm._buffers.get("running_var")
        counted = norm.track_running_stats and "num_batches_tracked" in norm._buffers
        if not counted or any(each is None for each in (*statistics, norm.momentum)):
            yield norm, "keeps no exponential running average"
        elif not is_number(norm.momentum):
            yield norm, f"has momentum={norm.momentum!r}"
        tensors += statistics
    elif type(norm.num_groups) is not int or norm.num_groups < 1 or K % norm.num_groups:
        yield norm, f"has {norm.num_groups!r} groups for {K} channels"
    if not is_number(norm.eps) or not norm.eps >= MIN_EPS:
        yield norm, f"has eps={norm.eps!r}"
    yield from of_tensors(norm, *tensors)
    if any(tensor.shape != (K,) for tensor in tensors):
        yield norm, f"is for another number of channels than {K}"


def of_dropout(dropout):
    if type(dropout) is not nn.Dropout2d:
        yield dropout, f"is a {type(dropout).__name__}"
    elif not is_number(dropout.p) or not 0 <= dropout.p <= 1:
        yield dropout, f"has p={dropout.p!r}"
    elif type(dropout.training) is not bool or dropout.inplace is not False:
        yield dropout, f"has training={dropout.training!r} and inplace={dropout.inplace!r}"


def of_tensors(module, *tensors):
    for tensor in tensors:
        if tensor is None:
            yield module, "lacks a weight or a bias"
        elif type(tensor) not in (torch.Tensor, nn.Parameter):
            yield module, f"holds a {type(tensor).__name__}"
        elif tensor.dtype != torch.float32 or tensor.layout != torch.strided:
            yield module, f"is {tensor.dtype}, {tensor.layout}: the kernel takes float32, strided"
        elif not (tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)):
            yield module, f"has a tensor of strides {tensor.stride()}"
        elif tensor.is_neg():
            yield module, "holds a negative view"


def are(settings, expected):
    """Returns whether settings equal these, in type too: modules refuse many others, and an array's == is no answer."""
    return all(type(setting) is type(each) and setting == each for setting, each in zip(settings, expected))


def is_number(value):
    """Returns whether a setting is a Python number, which modules take as it is: a tensor, say, may change in place."""
    return isinstance(value, int | float)
