"""One network of 48,178 parameters, and a switch for its normalisation.

C is a 3×3 convolution block, c a 1×1 convolution, P a pooling:
C1 C2 c3 P1 C3 C4 C5 c6 P2 C7 C8 C9 GAP C10.

First the network, then a kernel that trains it on a CPU, a block at a time: the same figures, sooner.
"""

import ctypes
import functools
import os
import subprocess
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# name -> builder(channels, num_groups). A further norm is one further line.
NORMS = {
    "batch": lambda channels, num_groups: nn.BatchNorm2d(channels),
    "group": lambda channels, num_groups: nn.GroupNorm(channels if num_groups == "channels" else num_groups, channels),
    "layer": lambda channels, num_groups: nn.GroupNorm(1, channels),
}


class Net(nn.Module):
    """Classifies RGB images into ten classes.

    norm: a name in NORMS. num_groups: groups of "group", which must divide 16 and 32; "channels" gives each channel a
    group of its own, which is instance norm.
    dropout: probability that a block's output channel is zeroed in training.
    skip: add C3's activation to C5's convolution output, and C7's to C9's.
    head_gain: how many times PyTorch's default C10's weights start out as.
    fused: each block in one kernel where there is one: see FusedBlock.
    """

    def __init__(self, norm="batch", num_groups=4, dropout=0.01, skip=True, head_gain=3.0, fused=True):
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"unknown norm {norm!r}: choose one of {', '.join(NORMS)}")
        if num_groups != "channels" and (not isinstance(num_groups, int) or num_groups < 1 or 16 % num_groups):
            raise ValueError(
                f"num_groups={num_groups!r} does not divide the normalised widths 16 and 32: "
                "choose 1, 2, 4, 8, 16 or 'channels'"
            )
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout={dropout!r}: expected a probability, 0 to 1")
        if not head_gain > 0:
            raise ValueError(f"head_gain={head_gain!r}: expected a positive number")

        def block(in_channels, out_channels):
            return ConvBlock(in_channels, out_channels, NORMS[norm](out_channels, num_groups), dropout, fused)

        self.norm = norm
        self.fused = fused
        self.skip = skip  # output of each line for a 32×32 image
        self.C1 = block(3, 16)  # 16, 32, 32
        self.C2 = block(16, 16)  # 16, 32, 32
        self.c3 = nn.Conv2d(16, 8, 1)  # 8, 32, 32
        self.P1 = nn.MaxPool2d(2)  # 8, 16, 16
        self.C3 = block(8, 32)  # 32, 16, 16
        self.C4 = block(32, 32)  # 32, 16, 16
        self.C5 = block(32, 32)  # 32, 16, 16
        self.c6 = nn.Conv2d(32, 16, 1)  # 16, 16, 16
        self.P2 = nn.MaxPool2d(2)  # 16, 8, 8
        self.C7 = block(16, 32)  # 32, 8, 8
        self.C8 = block(32, 32)  # 32, 8, 8
        self.C9 = block(32, 32)  # 32, 8, 8
        self.GAP = AvgPool2d()  # 32, 1, 1
        self.C10 = Conv2d(32, 10, 1)  # 10, 1, 1

        # Filters that start at right angles, as long as PyTorch's default makes them. On 5,000 held-out training
        # images, layer norm then had 66.3 % after seven epochs, against 64.8 %: one seed each, so no more than a hint.
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module is not self.C10:
                nn.init.orthogonal_(module.weight, gain=3**-0.5)
        # C10 sees averages over whole maps, which differ little from image to image; at PyTorch's size its weights
        # would spend the first epoch growing. Held out as above, five epochs, head_gain 1 / 3: batch norm 71.6 / 71.5,
        # group norm 64.1 / 65.9, layer norm 62.4 / 63.7 %, with another seed 62.1 / 62.8; with 8 both had 56.6.
        with torch.no_grad():
            self.C10.weight *= head_gain

    def extra_repr(self):
        return f"norm={self.norm}, skip={self.skip}"

    def forward(self, images):
        """(N, 3, H, W) normalised images -> (N, 10) logits; H and W are multiples of 4, at least 8."""
        if images.dim() != 4 or images.shape[1] != 3 or any(n < 8 or n % 4 for n in images.shape[2:]):
            raise ValueError(
                f"images of shape {tuple(images.shape)}: expected (N, 3, H, W) "
                "with H and W multiples of 4 and at least 8"
            )
        x = self.C2(self.C1(images))
        x = self.squeeze(self.c3, self.P1, x)

        c3 = self.C3(x)
        x = self.C5(self.C4(c3), skip=c3 if self.skip else None)
        x = self.squeeze(self.c6, self.P2, x)

        c7 = self.C7(x)
        x = self.C9(self.C8(c7), skip=c7 if self.skip else None)
        return self.C10(self.GAP(x)).flatten(1)

    def squeeze(self, conv, pool, x):
        if self.fused and FusedSqueeze.takes(conv, pool, x):
            return FusedSqueeze.of(conv, x)
        return pool(conv(x))


class ConvBlock(nn.Sequential):
    """3×3 convolution, the skip if one is given, norm, ReLU, dropout.

    An nn.Sequential because torchsummary gives every other container a row of its own.
    """

    def __init__(self, in_channels, out_channels, norm, dropout, fused=True):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm = norm
        self.dropout = nn.Dropout2d(dropout, inplace=True)
        self.fused = fused

    def forward(self, x, skip=None):
        fused = FusedBlock.takes(self, x)
        if fused and FusedBlock.takes_whole(self, x, skip):
            return FusedBlock.whole(self, x, skip)
        x = self.conv(x)
        if skip is not None:
            x = x + skip
        if fused and FusedBlock.takes_rest(self, x):
            return FusedBlock.rest(self, x)
        # Dropout multiplies by 0 or more, so the ReLU may as well come after it; both then work in place, and a block
        # keeps two activations for its backward pass instead of three.
        return F.relu_(self.dropout(self.norm(x)))


class AvgPool2d(nn.Module):
    """Global average pooling for maps of any size, under the name that the summary shows."""

    def forward(self, x):
        return x.mean((2, 3), keepdim=True)  # in bfloat16 on a CPU ten times as fast as nn.AdaptiveAvgPool2d


class Conv2d(nn.Conv2d):
    """A 1×1 convolution of 1×1 maps, computed as what it is: a linear layer. The summary shows this name."""

    def forward(self, x):
        return F.linear(x.flatten(1), self.weight.flatten(1), self.bias)[..., None, None]


class FusedBlock(torch.autograd.Function):
    """relu(dropout(norm(conv(x) + skip))) in training, on a CPU, each image while it is in the processor's cache.

    One after the other, PyTorch's modules read and write every activation many times over, and not all of them are
    made for channels_last or bfloat16. This kernel is compiled in a few seconds, when it is first needed, by the
    machine's own C++ compiler (the environment variable CXX, or c++), with its vector instructions. In float32, and
    where there are no instructions for bfloat16, PyTorch's convolution is as fast, and the kernel does the rest.
    """

    @staticmethod
    def knows(norm):
        """Whether the kernel computes this kind of norm."""
        return type(norm) is nn.GroupNorm or (type(norm) is nn.BatchNorm2d and norm.track_running_stats)

    @staticmethod
    def takes(block, x):
        """Whether the kernel can stand in for norm and dropout of x, here and now; the modules work everywhere."""
        norm, dropout = block.norm, block.dropout
        return (
            block.fused
            and FusedBlock.knows(norm)
            and type(dropout) is nn.Dropout2d
            and norm.training
            and norm.weight is not None
            and norm.bias is not None
            and norm.weight.dtype == norm.bias.dtype == torch.float32
            and len(norm.weight) % 16 == 0
            and getattr(norm, "momentum", 0.1) is not None
            and not has_hooks(norm)
            and not has_hooks(dropout)
            and trains_with_kernel(x)
        )

    @staticmethod
    def takes_whole(block, x, skip):
        """Whether it can stand in for the convolution too, and is faster at it."""
        conv = block.conv
        return (
            type(conv) is nn.Conv2d
            and conv.kernel_size == (3, 3)
            and conv.stride == conv.padding == conv.dilation == (1, 1)
            and conv.groups == 1
            and conv.padding_mode == "zeros"
            and conv.bias is not None
            and conv.out_channels == len(block.norm.weight)
            and conv.weight.dtype == conv.bias.dtype == torch.float32
            and conv.weight.is_contiguous(memory_format=torch.channels_last)
            and x.shape[1] == conv.in_channels
            and (skip is None or skip.shape == (len(x), conv.out_channels, *x.shape[2:]))
            and compute_dtype(x) == torch.bfloat16
            and not has_hooks(conv)
            and kernel().convolves()
        )

    @staticmethod
    def takes_rest(block, z):
        """Whether it can stand in for what comes after the convolution, whose output is z."""
        return (
            z.dtype in (torch.float32, torch.bfloat16)
            and z.is_contiguous(memory_format=torch.channels_last)
            and z.shape[1] == len(block.norm.weight)
        )

    @staticmethod
    def whole(block, x, skip=None):
        """What the block makes of x and the skip, in bfloat16."""
        conv, norm = block.conv, block.norm
        # One after the other: both at once take PyTorch twice as long.
        x, skip = (
            None if t is None else t.contiguous(memory_format=torch.channels_last).to(torch.bfloat16) for t in (x, skip)
        )
        return FusedBlock.apply(x, skip, conv.weight, conv.bias, norm.weight, norm.bias, norm, block.dropout)

    @staticmethod
    def rest(block, z):
        """What the block makes of its convolution's output, the skip added."""
        norm = block.norm
        return FusedBlock.apply(z, None, None, None, norm.weight, norm.bias, norm, block.dropout)

    @staticmethod
    def forward(ctx, x, skip, filters, offsets, weight, bias, norm, dropout):
        images, inputs, height, width = x.shape
        z = x
        if filters is not None:
            shape = images, len(filters), height, width
            z = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        y = torch.empty_like(z)
        keep = dropout(torch.ones(*z.shape[:2], 1, 1))  # the very random numbers of the module
        mean, variance = torch.empty(2, *z.shape[:2])
        saved = {"x": x, "z": z, "filters": filters, "weight": weight, "bias": bias}
        saved |= {"keep": keep, "mean": mean, "variance": variance}
        running = {}
        if isinstance(norm, nn.BatchNorm2d):
            running = {"running_mean": norm.running_mean, "running_variance": norm.running_var}
            norm.num_batches_tracked += 1
        groups, momentum = getattr(norm, "num_groups", 0), getattr(norm, "momentum", 0)
        ctx.sizes = images, inputs, z.shape[1], height, width, groups, norm.eps, momentum
        Call.of("block_forward", ctx.sizes, **saved, **running, skip=skip, offsets=offsets, y=y)
        ctx.names = list(saved)
        ctx.save_for_backward(*saved.values())
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        saved = dict(zip(ctx.names, ctx.saved_tensors))
        x, z, filters, weight, bias = (saved[name] for name in ("x", "z", "filters", "weight", "bias"))
        grads = {"dweight": torch.empty_like(weight), "dbias": torch.empty_like(bias)}
        if filters is None or ctx.needs_input_grad[1]:
            grads["dz"] = torch.empty_like(z)  # which is the skip's, too
        if filters is not None:
            grads |= {"dfilters": torch.empty_like(filters), "doffsets": torch.empty_like(bias)}
            if ctx.needs_input_grad[0]:
                grads["dx"] = torch.empty_like(x)
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        Call.of("block_backward", ctx.sizes, **saved, gradient=gradient, **grads)
        inputs = ["dx", "dz"] if filters is not None else ["dz", "nothing"]
        return *map(grads.get, [*inputs, "dfilters", "doffsets", "dweight", "dbias"]), None, None


class FusedSqueeze(torch.autograd.Function):
    """pool(conv(x)) in training, on a CPU: a 1×1 convolution to 8 or 16 channels, then the largest of 2×2 pixels."""

    @staticmethod
    def takes(conv, pool, x):
        """Whether the kernel can stand in for the modules, here and now; they themselves work everywhere."""
        return (
            type(conv) is nn.Conv2d
            and conv.kernel_size == conv.stride == conv.dilation == (1, 1)
            and conv.padding == (0, 0)
            and conv.groups == 1
            and conv.bias is not None
            and conv.out_channels in (8, 16)
            and conv.in_channels % 16 == 0
            and conv.weight.dtype == conv.bias.dtype == torch.float32
            and type(pool) is nn.MaxPool2d
            and (pool.kernel_size, pool.stride, pool.padding, pool.dilation) == (2, 2, 0, 1)
            and not pool.return_indices
            and x.shape[1] == conv.in_channels
            and x.shape[2] % 2 == x.shape[3] % 2 == 0
            and x.is_contiguous(memory_format=torch.channels_last)
            and compute_dtype(x) in (torch.float32, torch.bfloat16)
            and not has_hooks(conv)
            and not has_hooks(pool)
            and trains_with_kernel(x)
        )

    @staticmethod
    def of(conv, x):
        return FusedSqueeze.apply(x.to(compute_dtype(x)), conv.weight, conv.bias)

    @staticmethod
    def forward(ctx, x, filters, offsets):
        images, inputs, height, width = x.shape
        shape = images, len(filters), height // 2, width // 2
        y = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        choice = torch.empty_like(y, dtype=torch.uint8)
        ctx.sizes = images, inputs, len(filters), height, width
        Call.of("squeeze_forward", ctx.sizes, x=x, z=choice, y=y, filters=filters, offsets=offsets)
        ctx.save_for_backward(x, choice, filters, offsets)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x, choice, filters, offsets = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        grads = {
            "dx": torch.empty_like(x),
            "dfilters": torch.empty_like(filters),
            "doffsets": torch.empty_like(offsets),
        }
        Call.of("squeeze_backward", ctx.sizes, x=x, z=choice, filters=filters, gradient=gradient, **grads)
        return tuple(grads.values())


def trains_with_kernel(x):
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dim() == 4
        and x.numel() > x.shape[1]  # no image, or one value a channel: the modules know what is wrong
        and kernel() is not None
    )


def has_hooks(module):
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def compute_dtype(x):
    """In which autocast, or else x itself, has convolutions computed."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


class Call(ctypes.Structure):
    """The struct of this name in the kernel."""

    SIZES = "images inputs outputs height width groups".split()
    POINTERS = (
        "x skip z y filters offsets weight bias keep mean variance running_mean running_variance "
        "gradient dx dz dfilters doffsets dweight dbias"
    ).split()
    _fields_ = (
        [(name, ctypes.c_int64) for name in SIZES]
        + [("eps", ctypes.c_double), ("momentum", ctypes.c_double)]
        + [(name, ctypes.c_void_p) for name in POINTERS]
    )

    @classmethod
    def of(cls, function, sizes, **tensors):
        """Calls the kernel's function; tensors that are missing or None are null pointers to it."""
        pointers = {name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None}
        half = tensors["x"].dtype == torch.bfloat16
        getattr(kernel(), function)(half, ctypes.byref(cls(*sizes, **pointers)))


@functools.cache
def kernel():
    """The compiled KERNEL, or None where there is no compiler for it.

    Compiled anew by each process: what was compiled for one machine's processor may not run on another's.
    """
    compiler = os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        source, compiled, library = (Path(folder, f"kernel.{suffix}") for suffix in ("cpp", "o", "so"))
        source.write_text(KERNEL)
        try:
            # Linked without OpenMP's library, so that it shares PyTorch's threads and does not bring its own.
            flags = ["-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC"]
            subprocess.run([compiler, *flags, "-c", source, "-o", compiled], check=True, capture_output=True)
            subprocess.run([compiler, "-shared", compiled, "-o", library], check=True, capture_output=True)
            functions = ctypes.CDLL(library)
        except (OSError, subprocess.CalledProcessError):
            return None
    for name in ("block_forward", "block_backward", "squeeze_forward", "squeeze_backward"):
        getattr(functions, name).argtypes = [ctypes.c_bool, ctypes.POINTER(Call)]
        getattr(functions, name).restype = None
    functions.convolves.argtypes, functions.convolves.restype = [], ctypes.c_bool
    return functions


KERNEL = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

// What Python passes: sizes, and where the values are. Images lie pixel by pixel, each with its channels side by side.
struct Call {
  int64_t images, inputs, outputs, height, width, groups;  // no groups: batch norm
  double eps, momentum;
  const void *x, *skip;            // (images, height, width, inputs); skip, z and y with as many as outputs
  void *z, *y;                     // convolved, and what becomes of it
  const float *filters, *offsets;  // (outputs, 3, 3, inputs), (outputs); without them z is there already
  const float *weight, *bias;      // of the norm, (outputs)
  const float* keep;               // dropout's factors, (images, outputs)
  float *mean, *variance;          // (images, outputs), each set's in all its places
  float *running_mean, *running_variance;  // of batch norm, (outputs)
  const void* gradient;            // of y
  void *dx, *dz;                   // may be missing
  float *dfilters, *doffsets, *dweight, *dbias;
};

namespace {

constexpr int64_t LANES = 16;   // channels, which compilers turn into whatever vector instructions there are
constexpr int64_t TILE = 8;     // pixels of a row that are convolved together
constexpr int64_t PIECES = 16;  // of a batch, each with sums of its own: the same ones for any number of threads

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
struct bfloat16 { uint16_t bits; };

template <typename Value> inline Value read(const void* from) {
  Value value;
  memcpy(&value, from, sizeof value);
  return value;
}
inline Floats load(const float* from) { return read<Floats>(from); }
inline Floats load(const bfloat16* from) { return (Floats)(__builtin_convertvector(read<Halves>(from), Words) << 16); }
inline void store(float* to, Floats values, int64_t count = LANES) { memcpy(to, &values, count * sizeof *to); }
inline void store(bfloat16* to, Floats values, int64_t count = LANES) {  // to the nearest, ties to even
#ifdef __AVX512BF16__
  const auto rounded = _mm512_cvtneps_pbh((__m512)values);
#else
  const Words bits = (Words)values;
  const Halves rounded = __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, Halves);
#endif
  memcpy(to, &rounded, count * sizeof *to);
}
inline void store(bfloat16* to, float value) {
  const uint32_t bits = read<uint32_t>(&value);
  to->bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline Floats where(Ints condition, Floats values) { return (Floats)(condition & (Ints)values); }

// Of words of two bfloat16 each: sum + both products, those of the lower halves and of the upper ones.
inline Floats dot(Floats sum, Words a, uint32_t b) {
#ifdef __AVX512BF16__
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)a, (__m512bh)_mm512_set1_epi32(b));
#else
  const uint32_t low = b << 16, high = b & 0xffff0000;
  return sum + (Floats)(a << 16) * read<float>(&low) + (Floats)(a & 0xffff0000) * read<float>(&high);
#endif
}

// A 3×3 convolution of an image with a border of zeros. In a thread's memory the image has that border, rows of whole
// tiles, and for each pixel a multiple of four channels. Values are multiplied two by two, in words: of neighbouring
// channels for the output and the gradient of the input, of neighbouring pixels for the gradient of the filters.
struct Convolution {
  static int64_t deep(int64_t channels) { return (channels + 3) / 4 * 4; }

  const Call& call;
  const int64_t columns = (call.width + TILE - 1) / TILE * TILE + 2, pixels = (call.height + 2) * columns;
  const int64_t depth = deep(call.inputs), size = 9 * depth * call.outputs;  // of a sum of gradients of the filters

  struct Memory {
    std::vector<bfloat16> image, gradient, dz;
    std::vector<uint32_t> image_pairs[2], gradient_pairs;
  };
  Memory memory() const {
    const int64_t spare = depth + call.outputs + LANES;  // sixteen values are read and written where four are needed
    Memory memory;
    memory.image.resize(pixels * depth + spare);
    if (call.gradient) {
      memory.gradient.resize(pixels * call.outputs + spare);
      memory.dz.resize(call.height * call.width * call.outputs);
      for (int64_t k = 0; k < 2; k++) memory.image_pairs[k].resize(pixels / 2 * depth + spare);
      memory.gradient_pairs.resize(pixels / 2 * call.outputs + spare);
    }
    return memory;
  }

  void pad(const bfloat16* image, int64_t channels, std::vector<bfloat16>& padded) const {
    for (int64_t y = 0; y < call.height; y++) {
      bfloat16* to = &padded[((y + 1) * columns + 1) * deep(channels)];
      const bfloat16* from = image + y * call.width * channels;
      if (deep(channels) == channels)
        memcpy(to, from, call.width * channels * sizeof(bfloat16));
      else
        for (int64_t x = 0; x < call.width; x++)
          for (int64_t c = 0; c < channels; c++) to[x * deep(channels) + c] = from[x * channels + c];
    }
  }

  // The filters in the order in which correlate reads them: (to / 16, row, from / 2, column, 16, 2). On the way back,
  // from outputs to inputs, they are turned by half a circle.
  static std::vector<bfloat16> pack(const float* filters, int64_t from, int64_t to, bool back) {
    const int64_t words = deep(from) / 2;
    std::vector<bfloat16> packed((to + LANES - 1) / LANES * 9 * words * LANES * 2);
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < to; t++)
      for (int64_t k = 0; k < 9; k++)
        for (int64_t f = 0; f < from; f++) {
          const float value = back ? filters[(f * 9 + 8 - k) * to + t] : filters[(t * 9 + k) * from + f];
          const int64_t word = ((t / LANES * 3 + k / 3) * words + f / 2) * 3 + k % 3;
          store(&packed[(word * LANES + t % LANES) * 2 + f % 2], value);
        }
    return packed;
  }

  void correlate(const std::vector<bfloat16>& padded, const std::vector<bfloat16>& packed, int64_t from, int64_t to,
                 const float* offsets, const bfloat16* skip, bfloat16* out) const {
    const int64_t words = deep(from) / 2;
    for (int64_t c = 0; c < to; c += LANES)
      for (int64_t y = 0; y < call.height; y++)
        for (int64_t x = 0; x < call.width; x += TILE) {
          const Floats offset = offsets ? load(offsets + c) : Floats{};
          Floats sums[TILE];
#pragma GCC unroll 8
          for (int64_t p = 0; p < TILE; p++) sums[p] = offset;
          const Words* filter = (const Words*)packed.data() + c / LANES * 9 * words;
          for (int64_t row = 0; row < 3; row++) {
            const uint32_t* word = (const uint32_t*)padded.data() + ((y + row) * columns + x) * words;
            for (int64_t w = 0; w < words; w++, word++, filter += 3) {
              const Words weights[] = {read<Words>(filter), read<Words>(filter + 1), read<Words>(filter + 2)};
#pragma GCC unroll 10
              for (int64_t p = 0; p < TILE + 2; p++)  // a pixel is the left of one, the middle of one, the right of one
#pragma GCC unroll 3
                for (int64_t k = 0; k < 3; k++)
                  if (k <= p && p < TILE + k)
                    sums[p - k] = dot(sums[p - k], weights[k], read<uint32_t>(word + p * words));
            }
          }
          const int64_t start = (y * call.width + x) * to + c;
          const auto finish = [&](int64_t p, int64_t count) {
            if (skip) sums[p] += load(skip + start + p * to);
            store(out + start + p * to, sums[p], count);
          };
          if (c + LANES <= to && x + TILE <= call.width) {
#pragma GCC unroll 8
            for (int64_t p = 0; p < TILE; p++) finish(p, LANES);
          } else {
            for (int64_t p = 0; p < TILE && x + p < call.width; p++) finish(p, to - c < LANES ? to - c : LANES);
          }
        }
  }

  // Values of neighbouring pixels in one word, from the pixel `first` on.
  void pair_up(const std::vector<bfloat16>& padded, int64_t first, int64_t channels,
               std::vector<uint32_t>& pairs) const {
    for (int64_t p = 0; p < pixels / 2 - first; p++)
      for (int64_t c = 0; c < channels; c += LANES) {
        const bfloat16* pixel = &padded[(p * 2 + first) * channels + c];
        const Words words = (Words)load(pixel) >> 16 | (Words)load(pixel + channels);
        memcpy(&pairs[p * channels + c], &words, sizeof words);
      }
  }

  // An image's gradient of the filters, (row, column, depth, outputs): the first of the sums, or added to them.
  template <int64_t BLOCK> void weigh(const Memory& memory, bool first, float* sums) const {
    const int64_t outputs = call.outputs, row_pairs = columns / 2;
    for (int64_t c = 0; c < outputs; c += LANES)
      for (int64_t row = 0; row < 3; row++)
        for (int64_t i = 0; i < depth; i += BLOCK) {
          float* to = sums + (row * 3 * depth + i) * outputs + c;
          Floats sum[3][BLOCK];
#pragma GCC unroll 3
          for (int64_t k = 0; k < 3; k++)
#pragma GCC unroll 8
            for (int64_t b = 0; b < BLOCK; b++) sum[k][b] = first ? Floats{} : load(to + (k * depth + b) * outputs);
          for (int64_t y = 0; y < call.height; y++) {
            const uint32_t* gradient = &memory.gradient_pairs[(y + 1) * row_pairs * outputs + c];
            const uint32_t* image[3];
            for (int64_t k = 0; k < 3; k++)
              image[k] = &memory.image_pairs[k % 2][((y + row) * row_pairs + k / 2) * depth + i];
            for (int64_t p = 0; p < (columns - 2) / 2; p++) {
              const Words words = read<Words>(gradient + p * outputs);
#pragma GCC unroll 3
              for (int64_t k = 0; k < 3; k++)
#pragma GCC unroll 8
                for (int64_t b = 0; b < BLOCK; b++) sum[k][b] = dot(sum[k][b], words, image[k][p * depth + b]);
            }
          }
#pragma GCC unroll 3
          for (int64_t k = 0; k < 3; k++)
#pragma GCC unroll 8
            for (int64_t b = 0; b < BLOCK; b++) store(to + (k * depth + b) * outputs, sum[k][b]);
        }
  }

  void forward(int64_t n, const std::vector<bfloat16>& packed, Memory& memory) const {
    const int64_t area = call.height * call.width, start = n * area * call.outputs;
    pad((const bfloat16*)call.x + n * area * call.inputs, call.inputs, memory.image);
    const bfloat16* skip = call.skip ? (const bfloat16*)call.skip + start : nullptr;
    correlate(memory.image, packed, call.inputs, call.outputs, call.offsets, skip, (bfloat16*)call.z + start);
  }

  void backward(int64_t n, const std::vector<bfloat16>& packed, const void* dz, Memory& memory, bool first,
                float* sums) const {
    const int64_t start = n * call.height * call.width * call.inputs;
    bfloat16* dx = (bfloat16*)call.dx + start;
    pad((const bfloat16*)dz, call.outputs, memory.gradient);
    if (call.dx) correlate(memory.gradient, packed, call.outputs, call.inputs, nullptr, nullptr, dx);
    pad((const bfloat16*)call.x + start, call.inputs, memory.image);
    for (int64_t k = 0; k < 2; k++) pair_up(memory.image, k, depth, memory.image_pairs[k]);
    pair_up(memory.gradient, 1, call.outputs, memory.gradient_pairs);
    depth % 8 ? weigh<4>(memory, first, sums) : weigh<8>(memory, first, sums);
  }

  // The sums of all pieces together, as filters lie.
  void finish(int64_t pieces, const float* sums) const {
#pragma omp parallel for schedule(static)
    for (int64_t k = 0; k < 9; k++)
      for (int64_t i = 0; i < call.inputs; i++)
        for (int64_t c = 0; c < call.outputs; c += LANES) {
          const float* from = sums + (k * depth + i) * call.outputs + c;
          Floats total = {};
          for (int64_t piece = 0; piece < pieces; piece++) total += load(from + piece * size);
          for (int64_t o = 0; o < LANES; o++) call.dfilters[((c + o) * 9 + k) * call.inputs + i] = total[o];
        }
  }
};

// A set of a norm is a rectangle in the table of (image, channel): all images of a channel, or a group of channels of
// an image.
template <typename T> struct Block {
  const Call& call;
  const Convolution convolution = {call};
  const int64_t channels = call.outputs, area = call.height * call.width, length = area * channels;
  const int64_t pieces = std::min(call.images, PIECES);

  // What becomes of sixteen channels of an image: slope * z + intercept, dropout's factor included.
  struct Line { Floats mean, rstd, keep, slope, intercept; };
  Line line(int64_t place, int64_t c) const {
    Line line = {load(call.mean + place), load(call.variance + place), load(call.keep + place)};
    for (int64_t i = 0; i < LANES; i++) line.rstd[i] = 1 / std::sqrt(line.rstd[i] + float(call.eps));
    line.slope = load(call.weight + c) * line.rstd * line.keep;
    line.intercept = load(call.bias + c) * line.keep - line.mean * line.slope;
    return line;
  }

  // Calls body(first value, place in the tables, first channel) for each sixteen channels of an image.
  template <typename Body> void channels_of(int64_t n, Body body) const {
    for (int64_t c = 0; c < channels; c += LANES) body(n * length + c, n * channels + c, c);
  }
  // Calls body(place, channel) for a set.
  template <typename Body> void places_of(int64_t n0, int64_t n1, int64_t c0, int64_t c1, Body body) const {
    for (int64_t n = n0; n < n1; n++)
      for (int64_t c = c0; c < c1; c++) body(n * channels + c, c);
  }
  // Does first for every image, then middle for every set, then last for every image; where the sets lie within an
  // image, all three while the image is in the cache.
  template <typename First, typename Middle, typename Last> void run(First first, Middle middle, Last last) const {
    const int64_t images = call.images, groups = call.groups;
#pragma omp parallel
    {
      auto memory = call.filters ? convolution.memory() : Convolution::Memory();
#pragma omp for schedule(static)
      for (int64_t piece = 0; piece < pieces; piece++)
        for (int64_t n = images * piece / pieces; n < images * (piece + 1) / pieces; n++) {
          first(n, memory);
          for (int64_t g = 0; g < groups; g++) middle(n, n + 1, g * channels / groups, (g + 1) * channels / groups);
          if (groups) last(n, memory, piece);
        }
      if (!groups) {
#pragma omp for schedule(static)
        for (int64_t c = 0; c < channels; c++) middle(0, images, c, c + 1);
#pragma omp for schedule(static)
        for (int64_t piece = 0; piece < pieces; piece++)
          for (int64_t n = images * piece / pieces; n < images * (piece + 1) / pieces; n++) last(n, memory, piece);
      }
    }
  }

  void forward() const {
    const T* z = (const T*)call.z;
    T* y = (T*)call.y;
    std::vector<bfloat16> packed;
    if (call.filters) packed = convolution.pack(call.filters, call.inputs, channels, false);
    run(
        [&](int64_t n, auto& memory) {
          if (call.filters) convolution.forward(n, packed, memory);
          channels_of(n, [&](int64_t start, int64_t place, int64_t) {
            const Floats pivot = load(z + start);  // near the mean, so that the squares do not swallow the variance
            Floats sum = {}, squares = {};
            for (int64_t i = start; i < start + length; i += channels) {
              const Floats distance = load(z + i) - pivot;
              sum += distance;
              squares += distance * distance;
            }
            sum /= float(area);
            store(call.mean + place, pivot + sum);
            store(call.variance + place, squares / float(area) - sum * sum);
          });
        },
        [&](int64_t n0, int64_t n1, int64_t c0, int64_t c1) {
          const float count = (n1 - n0) * (c1 - c0);
          float mean = 0, variance = 0;
          places_of(n0, n1, c0, c1, [&](int64_t place, int64_t) { mean += call.mean[place] / count; });
          places_of(n0, n1, c0, c1, [&](int64_t place, int64_t) {
            const float distance = call.mean[place] - mean;
            variance += (call.variance[place] + distance * distance) / count;
          });
          places_of(n0, n1, c0, c1, [&](int64_t place, int64_t) {
            call.mean[place] = mean;
            call.variance[place] = variance;
          });
          if (call.running_mean) {
            const float unbiased = variance * (count * area / (count * area - 1));
            call.running_mean[c0] += float(call.momentum) * (mean - call.running_mean[c0]);
            call.running_variance[c0] += float(call.momentum) * (unbiased - call.running_variance[c0]);
          }
        },
        [&](int64_t n, auto&, int64_t) {
          channels_of(n, [&](int64_t start, int64_t place, int64_t c) {
            const auto line = this->line(place, c);
            for (int64_t i = start; i < start + length; i += channels) {
              const Floats value = load(z + i) * line.slope + line.intercept;
              store(y + i, where(!(value < 0), value));  // so that NaN stays NaN
            }
          });
        });
  }

  // With h the gradient that passes ReLU and dropout, u = weight * h and v the normalised z, all of a set:
  // dz = (u - mean(u) - v * mean(u * v)) / deviation.
  void backward() const {
    const T *z = (const T*)call.z, *gradient = (const T*)call.gradient;
    const int64_t places = call.images * channels;
    std::vector<float> tables(5 * places);
    const std::unique_ptr<float[]> sums(call.filters ? new float[pieces * convolution.size] : nullptr);
    float *sum_h = &tables[0], *sum_hv = sum_h + places, *mean_u = sum_hv + places, *mean_uv = mean_u + places;
    float* sum_dz = mean_uv + places;
    std::vector<bfloat16> packed;
    if (call.dx) packed = convolution.pack(call.filters, channels, call.inputs, true);
    run(
        [&](int64_t n, auto&) {
          channels_of(n, [&](int64_t start, int64_t place, int64_t c) {
            const auto line = this->line(place, c);
            Floats sum = {}, product = {};
            for (int64_t i = start; i < start + length; i += channels) {
              const Floats value = load(z + i);
              const Floats passed = where(value * line.slope + line.intercept > 0, load(gradient + i));
              sum += passed;
              product += passed * (value - line.mean);
            }
            store(sum_h + place, sum * line.keep);
            store(sum_hv + place, product * line.keep * line.rstd);
          });
        },
        [&](int64_t n0, int64_t n1, int64_t c0, int64_t c1) {
          const float count = (n1 - n0) * (c1 - c0) * area;
          float u = 0, uv = 0;
          places_of(n0, n1, c0, c1, [&](int64_t place, int64_t c) {
            u += call.weight[c] * sum_h[place];
            uv += call.weight[c] * sum_hv[place];
          });
          places_of(n0, n1, c0, c1, [&](int64_t place, int64_t) {
            mean_u[place] = u / count;
            mean_uv[place] = uv / count;
          });
        },
        [&](int64_t n, auto& memory, int64_t piece) {
          T* dz = call.dz ? (T*)call.dz + n * length : (T*)memory.dz.data();
          channels_of(n, [&](int64_t start, int64_t place, int64_t c) {
            const auto line = this->line(place, c);
            const Floats per_value = -line.rstd * line.rstd * load(mean_uv + place);
            const Floats constant = -line.rstd * load(mean_u + place) - line.mean * per_value;
            Floats sum = {};
            for (int64_t i = 0; i < length; i += channels) {
              const Floats value = load(z + start + i);
              const Floats passed = where(value * line.slope + line.intercept > 0, load(gradient + start + i));
              const Floats result = passed * line.slope + value * per_value + constant;
              store(dz + c + i, result);
              sum += result;
            }
            store(sum_dz + place, sum);
          });
          if (call.filters) {
            const bool first = n == call.images * piece / pieces;
            convolution.backward(n, packed, dz, memory, first, &sums[piece * convolution.size]);
          }
        });
    const auto total = [&](const float* table, float* to) {
      for (int64_t c = 0; c < channels; c++) to[c] = 0;
      places_of(0, call.images, 0, channels, [&](int64_t place, int64_t c) { to[c] += table[place]; });
    };
    total(sum_h, call.dbias);
    total(sum_hv, call.dweight);
    if (call.filters) {
      total(sum_dz, call.doffsets);
      convolution.finish(pieces, sums.get());
    }
  }
};

// A word holds two bfloat16 or one float: of two values the word, and sum + the product of what the words hold.
template <typename T> constexpr int64_t PER_WORD = sizeof(uint32_t) / sizeof(T);
template <typename T> inline Words join(Floats first, Floats second) {
  return PER_WORD<T> == 2 ? (Words)first >> 16 | (Words)second : (Words)first;
}
template <typename T> inline Floats multiply(Floats sum, Words a, uint32_t b) {
  return PER_WORD<T> == 2 ? dot(sum, a, b) : sum + (Floats)a * read<float>(&b);
}

// A 1×1 convolution, then the largest of each 2×2 pixels; z keeps which of the four it was.
template <typename T, int64_t outputs> struct Squeeze {
  static constexpr int64_t PAIR = PER_WORD<T>;
  const Call& call;
  const int64_t inputs = call.inputs, row = call.width * inputs;
  const int64_t pieces = std::min(call.images, PIECES), size = outputs * inputs + LANES;  // of a sum of gradients
  const T* x = (const T*)call.x;
  uint8_t* choice = (uint8_t*)call.z;

  const int64_t offset[4] = {0, inputs, row, row + inputs};  // of the four pixels
  // Calls body(first value of the four pixels, first value of what becomes of them).
  template <typename Body> void pixels_of(int64_t n, Body body) const {
    const int64_t height = call.height / 2, width = call.width / 2;
    for (int64_t y = 0; y < height; y++)
      for (int64_t x = 0; x < width; x++)
        body((n * height + y) * 2 * row + x * 2 * inputs, ((n * height + y) * width + x) * outputs);
  }
  static Floats rounded(Floats values) {
    T kept[LANES];
    store(kept, values);
    return load(kept);
  }

  void forward() const {
    std::vector<Words> filters(inputs / PAIR);
    Floats offsets = {};
    for (int64_t o = 0; o < outputs; o++) offsets[o] = call.offsets[o];
    offsets = rounded(offsets);
    for (int64_t i = 0; i < inputs; i += PAIR) {
      Floats first = {}, second = {};
      for (int64_t o = 0; o < outputs; o++) {
        first[o] = call.filters[o * inputs + i];
        second[o] = call.filters[o * inputs + i + PAIR - 1];
      }
      filters[i / PAIR] = join<T>(rounded(first), rounded(second));
    }
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < call.images; n++)
      pixels_of(n, [&](int64_t from, int64_t to) {
        Floats sums[4] = {offsets, offsets, offsets, offsets};
        for (int64_t i = 0; i < inputs; i += PAIR)
#pragma GCC unroll 4
          for (int64_t k = 0; k < 4; k++)
            sums[k] = multiply<T>(sums[k], filters[i / PAIR], read<uint32_t>(x + from + offset[k] + i));
        Floats largest = {};
        Ints place = {};
#pragma GCC unroll 4
        for (int64_t k = 0; k < 4; k++) {
          const Floats value = rounded(sums[k]);
          const Ints larger = k ? (value > largest) | (value != value) : ~Ints{};
          largest = (Floats)(((Ints)value & larger) | ((Ints)largest & ~larger));
          place = (int32_t(k) & larger) | (place & ~larger);
        }
        store((T*)call.y + to, largest, outputs);
        const Bytes places = __builtin_convertvector(place, Bytes);
        memcpy(choice + to, &places, outputs);
      });
  }

  void backward() const {
    const T* gradient = (const T*)call.gradient;
    const int64_t end = call.images * call.height / 2 * call.width / 2 * outputs;
    std::vector<float> sums(pieces * size);
    std::vector<Words> filters(outputs / PAIR * inputs / LANES);
    for (int64_t o = 0; o < outputs; o += PAIR)
      for (int64_t i = 0; i < inputs; i += LANES) {
        const float* filter = call.filters + o * inputs + i;
        const Floats second = rounded(load(filter + (PAIR - 1) * inputs));
        filters[(i / LANES * outputs + o) / PAIR] = join<T>(rounded(load(filter)), second);
      }
#pragma omp parallel for schedule(static)
    for (int64_t piece = 0; piece < pieces; piece++) {
      float *dfilters = &sums[piece * size], *doffsets = dfilters + outputs * inputs;
      for (int64_t n = call.images * piece / pieces; n < call.images * (piece + 1) / pieces; n++)
        for (int64_t i = 0; i < inputs; i += LANES) {
          Floats sum[outputs], offsets = {};
          for (int64_t o = 0; o < outputs; o++) sum[o] = load(dfilters + o * inputs + i);
          pixels_of(n, [&](int64_t from, int64_t to) {
            T passed[4][LANES];  // to each of the four pixels
            Floats value;
            Bytes places = {};
            if (to + LANES <= end) {  // sixteen are read, the next pixel's with them, which nobody looks at
              value = load(gradient + to);
              places = read<Bytes>(choice + to);
            } else {
              T last[LANES] = {};
              memcpy(last, gradient + to, sizeof(T[outputs]));
              value = load(last);
              memcpy(&places, choice + to, outputs);
            }
            offsets += value;
            Floats parts[4], pixels[4];
#pragma GCC unroll 4
            for (int64_t k = 0; k < 4; k++) {
              parts[k] = where(__builtin_convertvector(places, Ints) == int32_t(k), value);
              store(passed[k], parts[k]);
              pixels[k] = load(x + from + offset[k] + i);
            }
#pragma GCC unroll 4
            for (int64_t k = 0; k < 4; k += PAIR) {
              uint32_t pair[LANES];
              const Words joined = join<T>(parts[k], parts[k + PAIR - 1]);
              memcpy(pair, &joined, sizeof joined);
              const Words pixel = join<T>(pixels[k], pixels[k + PAIR - 1]);
#pragma GCC unroll 16
              for (int64_t o = 0; o < outputs; o++) sum[o] = multiply<T>(sum[o], pixel, pair[o]);
            }
            Floats dx[4] = {};
#pragma GCC unroll 16
            for (int64_t o = 0; o < outputs; o += PAIR)
#pragma GCC unroll 4
              for (int64_t k = 0; k < 4; k++)
                dx[k] = multiply<T>(dx[k], filters[(i / LANES * outputs + o) / PAIR], read<uint32_t>(passed[k] + o));
#pragma GCC unroll 4
            for (int64_t k = 0; k < 4; k++) store((T*)call.dx + from + offset[k] + i, dx[k]);
          });
          for (int64_t o = 0; o < outputs; o++) store(dfilters + o * inputs + i, sum[o]);
          if (!i) store(doffsets, load(doffsets) + offsets);
        }
    }
    for (int64_t i = 0; i < outputs * (inputs + 1); i++) {
      float& total = i < outputs * inputs ? call.dfilters[i] : call.doffsets[i - outputs * inputs];
      total = 0;
      for (int64_t piece = 0; piece < pieces; piece++) total += sums[piece * size + i];
    }
  }
};

template <typename Body> void with_squeeze(bool half, const Call& call, Body body) {
  if (call.outputs == 8)
    half ? body(Squeeze<bfloat16, 8>{call}) : body(Squeeze<float, 8>{call});
  else
    half ? body(Squeeze<bfloat16, 16>{call}) : body(Squeeze<float, 16>{call});
}

}  // namespace

extern "C" {
void block_forward(bool half, const Call* call) {
  half ? Block<bfloat16>{*call}.forward() : Block<float>{*call}.forward();
}
void block_backward(bool half, const Call* call) {
  half ? Block<bfloat16>{*call}.backward() : Block<float>{*call}.backward();
}
void squeeze_forward(bool half, const Call* call) {
  with_squeeze(half, *call, [](const auto& squeeze) { squeeze.forward(); });
}
void squeeze_backward(bool half, const Call* call) {
  with_squeeze(half, *call, [](const auto& squeeze) { squeeze.backward(); });
}
// Whether there are the instructions with which the convolution is faster than PyTorch's.
bool convolves() {
#ifdef __AVX512BF16__
  return true;
#else
  return false;
#endif
}
}
"""
