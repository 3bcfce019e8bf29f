"""The kernel as a function that autograd can differentiate once."""

import torch
from torch import nn

from normkit.fused import params
from normkit.fused.build import library
from normkit.fused.workspace import take_workspace


class FusedFunction(torch.autograd.Function):
    """The last layer's output of x (N, C, H, W), from layers that legality.reason_against has passed.

    The output is channels_last, in dtype; but logits (N, K, 1, 1), an AvgPoolLinear's, are in float32.

    dtype: of the activations, float32 or bfloat16. nchw: x is contiguous and float32, and no gradient leads back to it;
    otherwise x is channels_last, in dtype.
    """

    @staticmethod
    def forward(ctx, layers, dtype, needs_grad, nchw, x, *parameters):
        structs, fields, tensors, shape = fill_params(layers, x, parameters)
        structs[0].nchw = nchw
        out_dtype = torch.float32 if layers[-1].kind == params.AVGPOOL_LINEAR else dtype
        out = torch.empty(shape, dtype=out_dtype, device="cpu", memory_format=torch.channels_last)
        set_pointers([*fields, (structs[-1], "out")], [*tensors, out])
        use_bf16 = dtype == torch.bfloat16
        workspace = call(library().functions.forward, use_bf16, structs, len(structs), needs_grad)
        if needs_grad:
            ctx.use_bf16, ctx.structs, ctx.fields = use_bf16, structs, fields
            ctx.save_for_backward(workspace, *tensors)
        return out

    @staticmethod
    def backward(ctx, dout):
        if torch.is_grad_enabled() or is_batched(dout):
            raise RuntimeError(
                "the fused kernel has no second derivative and no batched gradients: call the model itself in place of "
                "fuse(model), or train with backend='eager'"
            )
        workspace, *tensors = ctx.saved_tensors
        dout = dout.contiguous(memory_format=torch.channels_last)
        indices = [i for i, (_, name) in enumerate(ctx.fields) if name in PARAMETERS]
        gradients = [torch.empty_like(tensors[i]) for i in indices]
        dx = torch.empty_like(tensors[0]) if ctx.needs_input_grad[4] else None
        set_pointers(ctx.fields, tensors)  # anew: saved tensors may have been moved in between
        set_pointers([(ctx.structs[-1], "dout"), (ctx.structs[0], "dx")], [dout, dx])
        set_pointers([(ctx.fields[i][0], f"d{ctx.fields[i][1]}") for i in indices], gradients)
        call(library().functions.backward, ctx.use_bf16, ctx.structs, len(ctx.structs), workspace.data_ptr())
        return None, None, None, None, dx, *gradients


def is_batched(tensor):
    """Whether a tensor stands for many, as in vmap, or in torch.autograd.grad(is_grads_batched=True)."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


PARAMETERS = {"weight", "bias", "norm_weight", "norm_bias"}


def fill_params(layers, x, parameters):
    """Returns the layers' structs, which of their fields point to which tensor's values, and the output's shape."""
    structs, parameters = (params.LayerParams * len(layers))(), iter(parameters)
    fields, tensors = [(structs[0], "x")], [x]
    N, C, H, W = x.shape
    for struct, layer in zip(structs, layers):
        weight, *others = [next(parameters) for _ in layer.parameter_names]
        fields += [(struct, name) for name in layer.parameter_names]
        tensors += [weight, *others]
        K, (_, c_stride, _, tap_stride) = len(weight), weight.stride()
        struct.weight_c_stride, struct.weight_tap_stride = c_stride, tap_stride
        struct.kind, struct.N, struct.C, struct.K, struct.H, struct.W = layer.kind, N, C, K, H, W
        if layer.kind == params.CONV_NORM_RELU:
            struct.skip_source = layer.skip_source
            set_norm(struct, layer.norm)
            scale = torch.ones(N, K, 1, 1, dtype=torch.float32, device="cpu")
            fields.append((struct, "dropout_scale"))  # drawn as the module would draw it
            tensors.append(torch.feature_dropout_(scale, layer.dropout.p, layer.dropout.training))
        H, W = layer.out_size(H, W)
        C = K
    return structs, fields, tensors, (N, C, H, W)


def set_norm(struct, norm):
    """Sets the norm's fields of a struct, and counts the batch where batch norm does."""
    struct.eps = norm.eps
    if type(norm) is nn.GroupNorm:
        struct.num_groups = norm.num_groups
        return
    statistics = norm._buffers
    struct.use_running_stats, struct.momentum = not norm.training, norm.momentum
    struct.running_mean, struct.running_var = (statistics[f"running_{name}"].data_ptr() for name in ("mean", "var"))
    if norm.training and statistics["num_batches_tracked"] is not None:
        statistics["num_batches_tracked"].add_(1)


def set_pointers(fields, tensors):
    """Points each (struct, name) of the fields to a tensor's values."""
    for (struct, name), tensor in zip(fields, tensors, strict=True):
        setattr(struct, name, None if tensor is None else tensor.data_ptr())


def call(function, *args):
    """Calls one of the kernel's functions with as much workspace as it asks for; returns the workspace."""
    workspace = take_workspace(max(1, function(*args, None)))  # an empty tensor has no address
    if function(*args, workspace.data_ptr()) < 0:
        raise MemoryError("the fused kernel ran out of memory: try a smaller batch size")
    return workspace
