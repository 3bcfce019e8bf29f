"""The kernel as a function that autograd can differentiate once."""

import functools
import operator
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from normkit.fused import params
from normkit.fused.build import library
from normkit.fused.dropout import DropoutScales
from normkit.fused.workspace import give_back, shared, take_workspace


class Call(NamedTuple):
    """Describes a pass over layers that legality.py allows, without its tensors."""

    plan: "Plan"
    blocks: list  # the ConvNormReLU among the layers
    out_shape: tuple
    out_dtype: torch.dtype


def prepare_call(layers, dtype, needs_grad, shape, nchw, threads):
    """Returns the Call for x of a shape, (N, C, H, W).

    dtype: of the activations, float32 or bfloat16. nchw: x is contiguous and float32, and no gradient leads back to it;
    otherwise x is channels_last, in dtype. Logits, an AvgPoolLinear's output, are in float32.
    """
    sizes, out_shape = sizes_of(layers, shape, nchw)
    threads = min(threads, shape[0])  # as each takes whole images
    plan = make_plan(sizes, "bf16" if dtype == torch.bfloat16 else "float", needs_grad, threads)
    blocks = [layer for layer in layers if layer.kind == params.CONV_NORM_RELU]
    return Call(plan, blocks, out_shape, torch.float32 if layers[-1].kind == params.AVGPOOL_LINEAR else dtype)


def forward_pass(call, x, parameters):
    """Returns the last layer's output, channels_last, and what backward_pass takes: structs, activations, inputs.

    The activations are a workspace to give back.
    """
    plan, structs, workspace = call.plan, call.plan.structs.copy(), take_workspace(call.plan.forward_bytes)
    out = torch.empty(call.out_shape, dtype=call.out_dtype, device="cpu", memory_format=torch.channels_last)
    inputs = [x, *parameters, *DropoutScales(call.blocks, x.shape[0]).draw()]
    params.set_addresses(structs, plan.inputs, inputs)
    norms = [layer.norm for layer in call.blocks]
    params.set_addresses(structs, plan.outputs, [out, *running_stats(norms)])
    count_batch(norms)
    plan.forward(structs.ctypes.data, workspace.data_ptr())
    return out, structs, workspace, inputs


def backward_pass(plan, structs, activations, gradients, dout, dx=None):
    """Writes the gradients of the parameters and, if given, dx."""
    if torch.is_grad_enabled() or is_batched(dout):
        raise RuntimeError(
            "the fused kernel has no second derivative and no batched gradients: call the model itself in place of "
            "fuse(model), or train with backend='eager'"
        )
    if dout._is_zerotensor():  # which has no memory
        dout = torch.zeros(dout.shape, dtype=dout.dtype, device="cpu")
    dout = dout.resolve_neg().contiguous(memory_format=torch.channels_last)
    workspace = take_workspace(plan.backward_bytes)
    params.set_addresses(structs, plan.gradients, [dout, dx, *gradients])
    plan.backward(structs.ctypes.data, activations.data_ptr(), workspace.data_ptr())
    give_back(workspace)


class FusedFunction(torch.autograd.Function):
    """Computes the last layer's output, and in backward the gradients of x and of each parameter."""

    @staticmethod
    def forward(ctx, call, x, *parameters):
        out, structs, workspace, inputs = forward_pass(call, x, parameters)
        if call.plan.needs_grad:
            # Biases are not saved: backward does not read them, so they may change in between, as in PyTorch.
            read_again = [inputs[i] for i in call.plan.read_again]
            ctx.plan, ctx.structs, ctx.layouts = call.plan, structs, layouts_of(read_again)
            ctx.parameter_layouts = layouts_of(parameters)
            ctx.save_for_backward(shared(workspace), *read_again)
        else:
            give_back(workspace)
        return out

    @staticmethod
    def backward(ctx, dout):
        plan, (activations, *inputs) = ctx.plan, ctx.saved_tensors
        # Which autograd does not notice where it was done by .data, as in to().
        if layouts_of(inputs) != ctx.layouts:
            raise RuntimeError(
                "a parameter changed its dtype, shape or memory format between the fused kernel's forward and backward "
                "pass: call the network again"
            )
        structs = ctx.structs.copy()  # another thread may be going backward from here, too
        # Anew: saved tensors may have been moved in between.
        params.set_addresses(structs, plan.inputs[plan.read_again], inputs)
        dx = torch.empty_like(inputs[0]) if ctx.needs_input_grad[1] else None
        gradients = [
            torch.empty_strided(shape, stride, dtype=dtype, device="cpu")
            for _, (dtype, _, shape), stride, _ in ctx.parameter_layouts
        ]
        backward_pass(plan, structs, activations, gradients, dout, dx)
        return None, dx, *gradients


def is_batched(tensor):
    """Returns whether a tensor is batched, by vmap or by torch.autograd.grad(is_grads_batched=True)."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


dtype_device_shape = operator.attrgetter("dtype", "device", "shape")


def layouts_of(tensors):
    """Returns type, dtype, device, shape, strides and negative bit of each tensor but None: .data = may change them."""
    tensors = [each for each in tensors if each is not None]
    kinds, negated = map(type, tensors), map(torch.Tensor.is_neg, tensors)
    return list(zip(kinds, map(dtype_device_shape, tensors), map(torch.Tensor.stride, tensors), negated))


def sizes_of(layers, shape, nchw):
    """Returns the sizes that each layer's struct begins with, and the last output's shape."""
    sizes, (N, C, H, W) = [], shape
    for layer in layers:
        weight = layer.conv._parameters["weight"]
        K, (_, c_stride, _, tap_stride) = weight.shape[0], weight.stride()
        num_groups = use_running_stats = eps = momentum = 0
        if layer.kind == params.CONV_NORM_RELU:
            eps = layer.norm.eps
            if type(layer.norm) is nn.GroupNorm:
                num_groups = layer.norm.num_groups
            else:
                use_running_stats, momentum = not layer.norm.training, layer.norm.momentum
        skip_source = getattr(layer, "skip_source", -1)
        ints = (layer.kind, skip_source, N, C, K, H, W, num_groups, nchw, use_running_stats, 0, c_stride, tap_stride)
        sizes.append((*ints, eps, momentum))
        (H, W), C, nchw = layer.out_size(H, W), K, False
    return tuple(sizes), (N, C, H, W)


class Plan(NamedTuple):
    """Holds what a pass over layers of certain sizes needs: structs without addresses, and where these go."""

    structs: np.ndarray
    inputs: np.ndarray  # of x, the parameters, the dropout scales
    outputs: np.ndarray  # of the last output, the running statistics
    gradients: np.ndarray  # of dout, dx, the parameters' gradients
    read_again: list  # which of the inputs the backward pass reads
    activation: str  # of build.ACTIVATIONS
    needs_grad: bool
    threads: int
    forward_bytes: int = 0  # of workspace
    backward_bytes: int = 0
    step_bytes: int = 0

    def forward(self, structs, workspace):
        return self.function("forward")(structs, len(self.structs), self.needs_grad, self.threads, workspace)

    def backward(self, structs, activations, workspace):
        return self.function("backward")(structs, len(self.structs), self.threads, activations, workspace)

    def step(self, structs, labels, scores, workspace):
        return self.function("step")(structs, len(self.structs), self.threads, labels, scores, workspace)

    def function(self, name):
        return getattr(library().functions, f"{name}_{self.activation}")


@functools.lru_cache(maxsize=64)
def make_plan(sizes, activation, needs_grad, threads):
    """Returns the Plan for layers of these sizes."""
    norms = [i for i, (kind, *_) in enumerate(sizes) if kind == params.CONV_NORM_RELU]
    parameters = [
        (i, name)
        for i in range(len(sizes))
        for name in ("weight", "bias", "norm_weight", "norm_bias")[: 4 if i in norms else 2]
    ]
    inputs = [(0, "x"), *parameters, *((i, "dropout_scale") for i in norms)]
    outputs = [(-1, "out"), *((i, f"running_{name}") for i in norms for name in ("mean", "var"))]
    gradients = [(-1, "dout"), (0, "dx"), *((i, f"d{name}") for i, name in parameters)]
    structs = params.make_structs(sizes)
    places = (params.offsets_of(fields, len(sizes)) for fields in (inputs, outputs, gradients))
    read_again = [i for i, (_, name) in enumerate(inputs) if name not in ("bias", "norm_bias")]
    plan = Plan(structs, *places, read_again, activation, needs_grad, threads)
    address = structs.ctypes.data
    # At least a byte: an empty tensor has no address.
    return plan._replace(
        forward_bytes=max(1, plan.forward(address, None)),
        backward_bytes=max(1, plan.backward(address, None, None)),
        step_bytes=max(1, plan.step(address, None, None, None)),
    )


def running_stats(norms):
    """Returns each norm's running mean and variance, one after the other; Nones for group norm."""
    return [norm._buffers.get(f"running_{name}") for norm in norms for name in ("mean", "var")]


def count_batch(norms):
    """Counts the batch where a batch norm in training mode does."""
    counts = [norm._buffers.get("num_batches_tracked") for norm in norms if norm.training]
    counts = [each for each in counts if each is not None]
    if len({*map(id, counts)}) < len(counts):  # one norm in several places
        for each in counts:
            each += 1
    elif counts:
        torch._foreach_add_(counts, 1)
