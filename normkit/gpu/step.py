"""A training step of the network on a GPU: forward pass, loss and gradients, by the kernels in kernels.py."""

import functools
import itertools

import torch
from torch import nn

from normkit.fused import params
from normkit.fused.dropout import DropoutScales
from normkit.fused.function import count_batch
from normkit.fused.layers import parameters_of

WIDTHS = (8, 16, 32)  # channels of a layer
MAX_PIXELS = 32 * 32  # of an image, which group norm's kernels keep in registers
MAX_BATCH = 2**15  # images: indices of an activation's elements have 32 bits
MAX_CLASSES = 128  # whose weights a program keeps in registers
CONV_PROGRAMS = 256  # about two for each multiprocessor of an H200, where 128 and 512 were slower
SUM_BLOCK = 64  # columns of shares that a program sums up


def programs_of(N):
    """Returns the size of most grids, which is the number of shares that a sum has."""
    return 128 if N <= 128 else 256  # on an H200: 0.36 and 0.38 ms a step of 64 images, 1.08 and 0.97 of 512


@functools.cache
def kernels():
    """Returns the module of the kernels, and why it cannot be used, in words, or None."""
    try:
        from normkit.gpu import kernels
    except Exception as error:  # there is none for macOS, nor in PyTorch's wheels for Windows, and one may be broken
        return None, f"Triton cannot be imported: {type(error).__name__}: {error}"
    return kernels, None


def reason_against(layers, images=None, frozen=False):
    """Returns why the kernels cannot compute a training step, in words, or None; of layers that legality.py allows.

    Without images, what depends on them is left out. frozen: a batch norm is in evaluation mode.
    """
    for layer in layers:
        K = len(parameters_of(layer.conv)[0])
        if layer.kind != params.AVGPOOL_LINEAR and K not in WIDTHS:
            return f"a layer has {K} channels, and the kernels take {', '.join(map(str, WIDTHS))}"
        if layer.kind == params.AVGPOOL_LINEAR and K > MAX_CLASSES:
            return f"there are {K} classes, and the kernels take {MAX_CLASSES} at most"
    if images is not None:
        N, _, H, W = images.shape
        if H * W > MAX_PIXELS:
            return f"images have {H}×{W} pixels, and the kernels take {MAX_PIXELS} at most"
        if N > MAX_BATCH:
            return f"a batch has {N} images, and the kernels take {MAX_BATCH} at most"
        if images.is_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
            return "the GPU does not compute in bfloat16"
    if frozen:
        return "batch norm is in evaluation mode"
    return kernels()[1]


def power_of_two(number):
    """Returns the smallest power of two that is not below a number, nor below 16, the least that tl.dot takes."""
    return max(16, 1 << (number - 1).bit_length())


def training_step(layers, images, labels, dtype=torch.bfloat16):
    """Returns the mean cross-entropy, the number of correct images, and a gradient for each parameter of the layers."""
    step = Step(layers, len(images), dtype)
    x = images
    for i in range(len(layers) - 1):
        x = step.forward(i, x)
    dout = step.loss(x, labels)
    for i in reversed(range(len(layers) - 1)):
        dout = step.backward(i, dout)
    return step.sums()


class Step:
    """Runs layers forward and backward; keeps activations, and the programs' shares of the gradients."""

    def __init__(self, layers, N, dtype):
        self.layers, self.kernels, self.dtype = layers, kernels()[0], dtype
        self.device = parameters_of(layers[0].conv)[0].device
        parameters = [parameter for layer in layers for parameter in layer.parameters()]
        self.parameters, sizes = parameters, [each.numel() for each in parameters]
        # A row for each program; a column for each parameter's element, the loss, and the correct images.
        self.grid, self.rows = (programs_of(N),), -(-(sum(sizes) + 2) // 16) * 16
        self.shares = self.empty(*self.grid, self.rows)
        self.columns = list(itertools.accumulate(sizes, initial=0))
        columns = iter(self.columns)
        self.gradients = [[self.shares[:, next(columns) :] for _ in layer.parameters()] for layer in layers]
        blocks = [layer for layer in layers if layer.kind == params.CONV_NORM_RELU]
        count_batch([block.norm for block in blocks])
        scales = iter(DropoutScales(blocks, N, self.device).draw())
        self.scales = [next(scales) if layer.kind == params.CONV_NORM_RELU else None for layer in layers]
        self.inputs, self.kept, self.skipped = [], [], {}

    def sums(self):
        """Returns the loss, the number of correct images, and the gradients, in the parameters' shapes and strides."""
        total = self.empty(self.rows)
        self.kernels.sum_shares[(-(-self.rows // SUM_BLOCK),)](
            self.shares, total, self.rows, SHARES=len(self.shares), BLOCK=SUM_BLOCK
        )
        gradients = [
            total.as_strided(each.shape, each.stride(), column) for each, column in zip(self.parameters, self.columns)
        ]
        return *total[self.columns[-1] :][:2], gradients

    def forward(self, i, x):
        """Returns layer i's output for x."""
        self.inputs.append(x)
        out, kept = (self.conv_norm_relu if self.is_block(i) else self.conv1x1_maxpool)(i, x)
        self.kept.append(kept)
        return out

    def backward(self, i, dout):
        """Returns the gradient of layer i's input from dout, that of its output."""
        return (self.conv_norm_relu_backward if self.is_block(i) else self.conv1x1_maxpool_backward)(i, dout)

    def is_block(self, i):
        return self.layers[i].kind == params.CONV_NORM_RELU

    # -------------------------------------------------------------------------- the layers

    def conv_norm_relu(self, i, x):
        layer, scale = self.layers[i], self.scales[i]
        weight, bias, norm_weight, norm_bias = layer.parameters()
        norm, N, K = layer.norm, len(x), len(weight)
        skip = self.inputs[layer.skip_source + 1] if layer.skip_source >= 0 else None  # that layer's output
        if type(norm) is nn.GroupNorm:
            z = self.conv3x3(x, weight, bias, skip)
            out = torch.empty_like(z)
            self.kernels.group_norm_relu[(N,)](
                z, norm_weight, norm_bias, scale, out, norm.eps, K=K, **image_of(z, norm.num_groups)
            )
            return out, (z, None)
        moments, statistics = self.empty(CONV_PROGRAMS, 2, K), self.empty(2, K)
        z = self.conv3x3(x, weight, bias, skip, moments)
        out, running = torch.empty_like(z), (norm._buffers["running_mean"], norm._buffers["running_var"])
        self.kernels.batch_norm_relu[self.grid](
            z, moments, norm_weight, norm_bias, scale, out, statistics, *running, N, norm.momentum, norm.eps,
            MOMENTS_BLOCK=block_of(x), MOMENTS_ROWS=len(moments), **blocks_of(z),
        )  # fmt: skip
        return out, (z, statistics)

    def conv_norm_relu_backward(self, i, dout):
        layer, scale, x, (z, statistics) = self.layers[i], self.scales[i], self.inputs[i], self.kept[i]
        weight, _, norm_weight, norm_bias = layer.parameters()
        dweight, dbias, dnorm_weight, dnorm_bias = self.gradients[i]
        norm, dz = layer.norm, torch.empty_like(z)
        if type(norm) is nn.GroupNorm:
            self.kernels.group_norm_backward[self.grid](
                z, dout, norm_weight, norm_bias, scale, dz, dnorm_weight, dnorm_bias, dbias, len(z), norm.eps,
                self.rows, K=z.shape[1], **image_of(z, norm.num_groups),
            )  # fmt: skip
        else:
            tensors = (z, dout, statistics, norm_weight, norm_bias, scale, dnorm_weight, dnorm_bias)
            self.kernels.batch_norm_sums[self.grid](*tensors, len(z), self.rows, **blocks_of(z))
            self.kernels.batch_norm_backward[self.grid](
                *tensors, dz, dbias, len(z), self.rows, SUMS_ROWS=len(self.shares), **blocks_of(z)
            )
        if layer.skip_source >= 0:
            self.skipped[layer.skip_source] = dz
        self.kernels.conv3x3_weight_grad[(*self.grid, 3)](
            x, dz, dweight, len(x), *strides_of(x), *taps_of(weight), self.rows, **maps_of(x), K=z.shape[1], BLOCK=64,
            num_stages=1,
        )  # fmt: skip
        return self.conv3x3(dz, weight, skip=self.skipped.pop(i - 1, None), flip=True) if i else None

    def conv3x3(self, x, weight, bias=None, skip=None, moments=None, flip=False):
        """Returns x convolved with a weight; with flip, the gradient of the input of such a convolution."""
        (N, _, H, W), (k, c, tap) = x.shape, taps_of(weight)
        if flip:
            k, c = c, k
        K = weight.shape[1 if flip else 0]
        out = self.empty(N, K, H, W, dtype=self.dtype, memory_format=torch.channels_last)
        # With loads that run ahead (num_stages 2 or 3) a multiprocessor has memory for fewer programs: 12 % slower.
        self.kernels.conv3x3[(CONV_PROGRAMS,)](
            x, weight, bias, skip, out, moments, N, *strides_of(x), k, c, tap, **maps_of(x), K=K, FLIP=flip,
            BLOCK=block_of(x), num_stages=1,
        )  # fmt: skip
        return out

    def conv1x1_maxpool(self, i, x):
        (weight, bias), (N, C, H, W) = self.layers[i].parameters(), x.shape
        shape = (N, len(weight), H // 2, W // 2)
        out = self.empty(*shape, dtype=self.dtype, memory_format=torch.channels_last)
        argmax = torch.empty_like(out, dtype=torch.int8)
        self.kernels.conv1x1_maxpool[(CONV_PROGRAMS,)](
            x, weight, bias, out, argmax, N, H=H, W=W, C=C, K=len(weight), BLOCK=64
        )
        return out, argmax

    def conv1x1_maxpool_backward(self, i, dout):
        x, (weight, _), argmax = self.inputs[i], self.layers[i].parameters(), self.kept[i]
        dx, (N, C, H, W) = torch.empty_like(x), x.shape
        self.kernels.conv1x1_maxpool_backward[self.grid](
            x, weight, argmax, dout, dx, *self.gradients[i], N, self.rows, H=H, W=W, C=C, K=len(weight), BLOCK=64
        )
        return dx

    def loss(self, x, labels):
        """Returns the gradient of the last layer's input x."""
        (weight, bias), (N, C, H, W) = self.layers[-1].parameters(), x.shape
        dx, column, labels = torch.empty_like(x), self.columns[-1], labels.contiguous()
        self.kernels.avgpool_linear_loss[self.grid](
            x, weight, bias, labels, dx, *self.gradients[-1], self.shares[:, column:], self.shares[:, column + 1 :], N,
            self.rows,
            HW=H * W, C=C, K=power_of_two(len(weight)), CLASSES=len(weight), PIXELS=power_of_two(H * W),
        )  # fmt: skip
        return dx

    def empty(self, *shape, dtype=torch.float32, memory_format=torch.contiguous_format):
        return torch.empty(*shape, dtype=dtype, device=self.device, memory_format=memory_format)


def strides_of(x):
    """Returns the distances in memory of images, of rows of pixels, and of channels."""
    n, c, h, _ = x.stride()
    return n, h, c


def taps_of(weight):
    """Returns the distances in memory of a 3×3 weight's output channels, input channels and taps."""
    k, c, _, tap = weight.stride()
    return k, c, tap


def maps_of(x):
    """Returns the sizes of the images that a 3×3 convolution takes, and the columns that three of its taps see."""
    _, C, H, W = x.shape
    return {"H": H, "W": W, "stride_w": x.stride(3), "C": C, "COLUMNS": power_of_two(3 * C)}


def block_of(x):
    """Returns the pixels of a block of a 3×3 convolution."""
    return 64 if x.shape[1] > 16 else 128


def blocks_of(z):
    """Returns the sizes of what batch norm's kernels take at a time, 16 elements in each thread."""
    _, K, H, W = z.shape
    return {"HW": H * W, "K": K, "BLOCK": 4096 // K, "num_warps": 8}


def image_of(z, groups):
    """Returns the sizes of what group norm's kernels take at a time: an image, 32 elements in each thread."""
    _, K, H, W = z.shape
    pixels = power_of_two(H * W)
    return {"HW": H * W, "GROUPS": groups, "PIXELS": pixels, "num_warps": min(max(pixels * K // 1024, 1), 16)}
