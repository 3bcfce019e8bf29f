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

    One after the other, PyTorch's modules read and write every activation many times over, not all of them are made
    for channels_last or bfloat16, and its convolutions multiply four times as often as they have to. This kernel is
    compiled in a few seconds, when it is first needed, by the machine's own C++ compiler (the environment variable CXX,
    or c++), with its vector instructions. It computes in float32 whatever the activations are kept in; only where they
    are bfloat16, and the processor multiplies that, do its convolutions' gradients come from factors in bfloat16.
    """

    @staticmethod
    def knows(norm):
        """Whether the kernel computes this kind of norm."""
        return type(norm) is nn.GroupNorm or (type(norm) is nn.BatchNorm2d and norm.track_running_stats)

    @staticmethod
    def takes(block, x):
        """Whether the kernel can stand in for norm and dropout of x, here and now; the modules work everywhere."""
        _, norm, dropout = block
        return (
            block.fused
            and FusedBlock.knows(norm)
            and type(dropout) is nn.Dropout2d
            and norm.training
            and (weight := norm.weight) is not None
            and (bias := norm.bias) is not None
            and weight.dtype == bias.dtype == torch.float32
            and weight.shape[0] % 16 == 0
            and getattr(norm, "momentum", 0.1) is not None
            and not has_hooks(norm)
            and not has_hooks(dropout)
            and trains_with_kernel(x)
        )

    @staticmethod
    def takes_whole(block, x, skip):
        """Whether it can stand in for the convolution too, and is faster at it."""
        conv, norm, _ = block
        return (
            type(conv) is nn.Conv2d
            and conv.kernel_size == (3, 3)
            and conv.stride == conv.padding == conv.dilation == (1, 1)
            and conv.groups == 1
            and conv.padding_mode == "zeros"
            and (offsets := conv.bias) is not None
            and (filters := conv.weight).dtype == offsets.dtype == torch.float32
            and filters.is_contiguous(memory_format=torch.channels_last)
            and conv.out_channels == norm.weight.shape[0]
            and x.shape[1] == conv.in_channels
            and (skip is None or skip.shape == (len(x), conv.out_channels, *x.shape[2:]))
            and compute_dtype(x) in (torch.float32, torch.bfloat16)
            and not has_hooks(conv)
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
        """What the block makes of x and the skip."""
        conv, norm, dropout = block
        # One after the other: both at once take PyTorch twice as long.
        x, skip = (
            None if t is None else t.contiguous(memory_format=torch.channels_last).to(compute_dtype(x))
            for t in (x, skip)
        )
        return FusedBlock.apply(x, skip, conv.weight, conv.bias, norm.weight, norm.bias, norm, dropout)

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
        mean, variance = torch.empty(z.shape[:2]), torch.empty(z.shape[:2])
        saved = {"x": x, "z": z, "filters": filters, "weight": weight, "bias": bias}
        saved |= {"keep": keep, "mean": mean, "variance": variance}
        running = {}
        if isinstance(norm, nn.BatchNorm2d):
            running = {"running_mean": norm.running_mean, "running_variance": norm.running_var}
            norm.num_batches_tracked.add_(1)
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
    """pool(conv(x)) in training, on a CPU: a 1×1 convolution, then the largest of 2×2 pixels."""

    @staticmethod
    def takes(conv, pool, x):
        """Whether the kernel can stand in for the modules, here and now; they themselves work everywhere."""
        return (
            type(conv) is nn.Conv2d
            and conv.kernel_size == conv.stride == conv.dilation == (1, 1)
            and conv.padding == (0, 0)
            and conv.groups == 1
            and conv.bias is not None
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
        choice = torch.empty_like(y)
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
            flags = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC"]
            subprocess.run([compiler, *flags, "-c", source, "-o", compiled], check=True, capture_output=True)
            subprocess.run([compiler, "-shared", compiled, "-o", library], check=True, capture_output=True)
            functions = ctypes.CDLL(library)
        except (OSError, subprocess.CalledProcessError):
            return None
    for name in ("block_forward", "block_backward", "squeeze_forward", "squeeze_backward"):
        getattr(functions, name).argtypes = [ctypes.c_bool, ctypes.POINTER(Call)]
        getattr(functions, name).restype = None
    return functions


KERNEL = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
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

// Values that are computed side by side, one of each channel, and how many such vectors the processor holds.
#if defined __AVX512F__
constexpr int64_t LANES = 16, REGISTERS = 32;
#elif defined __AVX2__
constexpr int64_t LANES = 8, REGISTERS = 16;
#else
constexpr int64_t LANES = 4, REGISTERS = 32;
#endif
constexpr int64_t ROWS = REGISTERS / 4, WIDTH = 2;  // of a product's block: its sums fill half of them
constexpr int64_t PIECES = 16;  // of a batch, each with sums of its own: the same ones for any number of threads
constexpr int64_t whole(int64_t count, int64_t of) { return (count + of - 1) / of * of; }

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
struct bfloat16 { uint16_t bits; };

template <typename Value> inline Value read(const void* from) {
  Value value;
  memcpy(&value, from, sizeof value);
  return value;
}
inline Floats load(const float* from) { return read<Floats>(from); }
inline Words widen(Halves halves) {
#ifdef __AVX512BF16__
  return (Words)_mm512_cvtepu16_epi32((__m256i)halves);  // one instruction, for which compilers take four
#else
  return __builtin_convertvector(halves, Words);
#endif
}
inline Floats load(const bfloat16* from) { return (Floats)(widen(read<Halves>(from)) << 16); }
inline void store(float* to, Floats values, int64_t count = LANES) {
  count < LANES ? memcpy(to, &values, count * sizeof *to) : memcpy(to, &values, sizeof values);
}
inline Halves round(Floats values) {  // to the nearest bfloat16, ties to even
#ifdef __AVX512BF16__
  return (Halves)_mm512_cvtneps_pbh((__m512)values);
#else
  const Words bits = (Words)values;
  return __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, Halves);
#endif
}
inline void store(bfloat16* to, Floats values, int64_t count = LANES) {
  const Halves rounded = round(values);
#ifdef __AVX512BF16__
  _mm256_mask_storeu_epi16(to, (1 << count) - 1, (__m256i)rounded);
#else
  count < LANES ? memcpy(to, &rounded, count * sizeof *to) : memcpy(to, &rounded, sizeof rounded);
#endif
}
inline Floats where(Ints condition, Floats values) { return (Floats)(condition & (Ints)values); }

// A vector of which `count` values matter: whatever lies behind them comes along, but nothing from behind the end.
template <typename T> inline Floats load(const T* from, int64_t count, const T* end) {
  if (from + LANES <= end) return load(from);
  T last[LANES] = {};
  memcpy(last, from, std::min(count, LANES) * sizeof(T));
  return load(last);
}

// What products multiply and add up: floats, or where there are instructions for it, two bfloat16 at once, side by side
// in a word.
inline Floats add_product(Floats sum, float a, Floats b) { return sum + a * b; }
#ifdef __AVX512BF16__
typedef uint32_t Pair;
inline Floats add_product(Floats sum, Pair a, Words b) {
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(Words{} + a), (__m512bh)b);
}
#else
typedef float Pair;
#endif
template <typename Factor> constexpr bool paired = !std::is_same_v<Factor, float>;

// Values of four bytes that nobody has written yet, in whole vectors and lying where these are fast to read.
template <typename Value = float> struct Room {
  std::unique_ptr<Floats[]> vectors;
  Room(int64_t count) : vectors(new Floats[count / LANES]) {}
  operator Value*() const { return (Value*)vectors.get(); }
};

// A product of matrices: to (rows, columns) = a (rows, count) · b (count, columns), or that added to it. In a, rows are
// `row` apart, neighbours in a row `next`, both in factors, as is the count. Whole blocks of rows are read and written.
template <int64_t down, int64_t across, typename Factor>
void multiply_in_blocks(const Factor* a, int64_t row, int64_t next, const Factor* b, float* to, int64_t rows,
                        int64_t count, int64_t columns, bool add) {
  typedef std::conditional_t<paired<Factor>, Words, Floats> Factors;
  for (int64_t r = 0; r < rows; r += down)
    for (int64_t c = 0; c < columns; c += across * LANES) {
      float* out = to + r * columns + c;
      Floats sums[down][across];
#pragma GCC unroll 8
      for (int64_t i = 0; i < down; i++)
#pragma GCC unroll 2
        for (int64_t j = 0; j < across; j++) sums[i][j] = add ? load(out + i * columns + j * LANES) : Floats{};
      for (int64_t k = 0; k < count; k++) {
        Factors values[across];
#pragma GCC unroll 2
        for (int64_t j = 0; j < across; j++) values[j] = read<Factors>(b + k * columns + c + j * LANES);
#pragma GCC unroll 8
        for (int64_t i = 0; i < down; i++)
#pragma GCC unroll 2
          for (int64_t j = 0; j < across; j++)
            sums[i][j] = add_product(sums[i][j], a[(r + i) * row + k * next], values[j]);
      }
#pragma GCC unroll 8
      for (int64_t i = 0; i < down; i++)
#pragma GCC unroll 2
        for (int64_t j = 0; j < across; j++) store(out + i * columns + j * LANES, sums[i][j]);
    }
}
template <typename Factor>
inline void multiply(const Factor* a, int64_t row, int64_t next, const Factor* b, float* to, int64_t rows,
                     int64_t count, int64_t columns, bool add = false) {
  const auto product = columns % (WIDTH * LANES) ? multiply_in_blocks<ROWS, 1, Factor>
                       : rows <= ROWS / 2        ? multiply_in_blocks<ROWS / 2, WIDTH, Factor>
                                                 : multiply_in_blocks<ROWS, WIDTH, Factor>;
  product(a, row, next, b, to, rows, count, columns, add);
}

// The transforms of Winograd's minimal filtering F(4, 3) (Lavin and Gray 2016) and their gradients, of values `s` apart
// into values `r` apart. Pixels and filter are taken as polynomials, and multiplied by their values at 0, A, -A, B, -B
// and infinity, here called points. With these A and B rounding errors stay small.
constexpr float A = 0.70710678f, B = 1.41421356f, AA = 0.5f, BB = 2, BOTH = AA + BB;
constexpr float IN_A = -2 / 3.f, IN_B = 1 / 6.f;  // 1 / the product of the distances to the other points

inline void filter_points(const Floats* g, int64_t s, Floats* u, int64_t r) {
  const Floats a = IN_A * (g[0] + AA * g[2 * s]), da = IN_A * A * g[s];
  const Floats b = IN_B * (g[0] + BB * g[2 * s]), db = IN_B * B * g[s];
  u[0] = g[0], u[r] = a + da, u[2 * r] = a - da, u[3 * r] = b + db, u[4 * r] = b - db, u[5 * r] = g[2 * s];
}
inline void filter_gradient(const Floats* u, int64_t s, Floats* g, int64_t r) {
  const Floats a = IN_A * (u[s] + u[2 * s]), da = IN_A * A * (u[s] - u[2 * s]);
  const Floats b = IN_B * (u[3 * s] + u[4 * s]), db = IN_B * B * (u[3 * s] - u[4 * s]);
  g[0] = u[0] + a + b, g[r] = da + db, g[2 * r] = AA * a + BB * b + u[5 * s];
}
inline void image_points(const Floats* d, int64_t s, Floats* v, int64_t r) {
  const Floats a = d[4 * s] - BB * d[2 * s], da = A * (d[3 * s] - BB * d[s]);
  const Floats b = d[4 * s] - AA * d[2 * s], db = B * (d[3 * s] - AA * d[s]);
  v[0] = d[0] - BOTH * d[2 * s] + d[4 * s], v[r] = a + da, v[2 * r] = a - da;
  v[3 * r] = b + db, v[4 * r] = b - db, v[5 * r] = d[s] - BOTH * d[3 * s] + d[5 * s];
}
inline void image_gradient(const Floats* v, int64_t s, Floats* d, int64_t r) {
  const Floats a = v[s] + v[2 * s], da = A * (v[s] - v[2 * s]);
  const Floats b = v[3 * s] + v[4 * s], db = B * (v[3 * s] - v[4 * s]);
  d[0] = v[0], d[r] = v[5 * s] - BB * da - AA * db, d[2 * r] = -BOTH * v[0] - BB * a - AA * b;
  d[3 * r] = da + db - BOTH * v[5 * s], d[4 * r] = v[0] + a + b, d[5 * r] = v[5 * s];
}
inline void result(const Floats* m, int64_t s, Floats* y, int64_t r) {
  const Floats a = m[s] + m[2 * s], da = A * (m[s] - m[2 * s]);
  const Floats b = m[3 * s] + m[4 * s], db = B * (m[3 * s] - m[4 * s]);
  y[0] = m[0] + a + b, y[r] = da + db, y[2 * r] = AA * a + BB * b, y[3 * r] = AA * da + BB * db + m[5 * s];
}
inline void result_gradient(const Floats* y, int64_t s, Floats* m, int64_t r) {
  const Floats a = y[0] + AA * y[2 * s], da = A * (y[s] + AA * y[3 * s]);
  const Floats b = y[0] + BB * y[2 * s], db = B * (y[s] + BB * y[3 * s]);
  m[0] = y[0], m[r] = a + da, m[2 * r] = a - da, m[3 * r] = b + db, m[4 * r] = b - db, m[5 * r] = y[3 * s];
}
// One of them down the columns of a square, then along its rows.
template <int64_t from, int64_t to, typename Line> inline void transform(const Floats* in, Floats* out, Line line) {
  Floats half[to * from];
#pragma GCC unroll 6
  for (int64_t x = 0; x < from; x++) line(in + x, from, half + x, from);
#pragma GCC unroll 6
  for (int64_t y = 0; y < to; y++) line(half + y * from, 1, out + y * to, 1);
}
inline void gather(Floats* values, const float* from, int64_t step) {
#pragma GCC unroll 36
  for (int64_t p = 0; p < 36; p++) values[p] = load(from + p * step);
}
template <typename T> inline void scatter(const Floats* values, T* to, int64_t step) {
#pragma GCC unroll 36
  for (int64_t p = 0; p < 36; p++) store(to + p * step, values[p]);
}
// Into a row of a matrix whose rows are added up: of pairs, two rows share one, the even first.
template <typename Factor>
inline void scatter(const Floats* values, Factor* to, int64_t step, int64_t row, int64_t columns) {
  if constexpr (paired<Factor>) {
    to += row / 2 * columns;
#pragma GCC unroll 36
    for (int64_t p = 0; p < 36; p++) {
      const Words half = widen(round(values[p])), both = row % 2 ? read<Words>(to + p * step) | half << 16 : half;
      memcpy(to + p * step, &both, sizeof both);
    }
  } else {
    scatter(values, to + row * columns, step);
  }
}

// A 3×3 convolution of images with a border of zeros. They are cut into tiles of 6×6 pixels, four apart. Each becomes
// 36 points, as each filter does; their products, summed over the channels, become 4×4 pixels of the result: 36
// multiplications where there would be 144. The gradients go back the same way, step by step.
// Factors are pairs on the way back alone. There, rounded points hardly add to what rounded activations do (to a batch
// of CIFAR-10, 6.9 % of the gradient with batch norm, 1.4 % with group norm, before and after); on the way there they
// would put each convolution off by 1 %, four times as much as bfloat16 does otherwise.
template <typename T, typename Factor> struct Convolution {
  static constexpr int64_t CHUNK = 32;  // tiles, whose points fit into the cache
  static constexpr int64_t EACH = paired<Factor> ? 2 : 1;  // values in a factor

  const Call& call;
  const int64_t inputs = call.inputs, outputs = call.outputs, height = call.height, width = call.width;
  const int64_t depth = whole(inputs, std::max(LANES, ROWS));  // of the image where a thread keeps it, with its border
  const int64_t down = (height + 3) / 4, across = (width + 3) / 4, tiles = down * across;
  const int64_t stack = std::clamp(CHUNK / tiles, int64_t(1), call.images);  // images that fill a chunk together
  const int64_t columns = across * 4 + 2, padded = (down * 4 + 2) * columns * depth;
  const int64_t size = 9 * inputs * outputs;  // of the gradients of the filters

  // What a thread works in. Points and their products lie (36, tiles of a chunk, channels), gradients of the filters'
  // points (36, depth, outputs). Pairs are of two tiles, but in dacross of two channels.
  struct Memory {
    Room<> image;
    Room<Factor> points;
    Room<> products, dimage;
    Room<Factor> dpoints, dacross;
    Room<> dfilters, dz;
  };
  Memory memory() const {
    const int64_t on = call.filters != nullptr, back = on && call.gradient, most = std::max(depth, outputs);
    Memory memory = {on * stack * padded, on * 36 * plane(depth), on * 36 * plane(most), back * stack * padded,
                     back * 36 * plane(outputs), paired<Factor> * back * 36 * plane(outputs),
                     back * 36 * depth * outputs, back * stack * height * width * outputs};
    std::fill_n((float*)memory.image, on * stack * padded, 0);
    return memory;
  }
  // A bit more than the tiles need, or all planes would begin in the same set of the cache.
  static int64_t plane(int64_t channels) { return CHUNK * channels + LANES; }

  // The filters' points, (36, inputs, outputs), or for the way back (36, outputs, depth).
  Room<Factor> pack(bool back) const {
    const int64_t rows = back ? outputs : inputs, columns = back ? depth : outputs, count = back ? inputs : outputs;
    const int64_t row = back ? 9 * inputs : 1, column = back ? 1 : 9 * inputs;
    Room<Factor> packed(36 * rows * columns);
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < columns; c += LANES)
      for (int64_t r = 0; r < rows; r++) {
        Floats taps[9] = {}, points[36];
        for (int64_t k = 0; k < 9; k++)
          for (int64_t l = 0; l < LANES && c + l < count; l++)
            taps[k][l] = call.filters[r * row + k * inputs + (c + l) * column];
        transform<3, 6>(taps, points, filter_points);
        scatter(points, packed + c, rows / EACH * columns, r, columns);
      }
    return packed;
  }

  void pad(int64_t begin, int64_t end, float* to) const {
    const T* last = (const T*)call.x + end * height * width * inputs;
    for (int64_t n = begin; n < end; n++, to += padded)
      for (int64_t y = 0; y < height; y++) {
        const T* row = (const T*)call.x + (n * height + y) * width * inputs;
        float* line = to + ((y + 1) * columns + 1) * depth;
        if (inputs == depth)
          for (int64_t i = 0; i < width * depth; i += LANES) store(line + i, load(row + i));
        else
          for (int64_t x = 0; x < width; x++)
            for (int64_t i = 0; i < inputs; i += LANES)
              store(line + x * depth + i, load(row + x * inputs + i, inputs - i, last));
      }
  }

  struct Tile { int64_t place, image, y, x; };  // place: in its chunk; image: of the stack
  // Calls body(tile, first channel) for each tile of a chunk and vector of channels.
  template <typename Body> void tiles_of(int64_t start, int64_t count, int64_t channels, Body body) const {
    for (int64_t t = start; t < start + count; t++) {
      const Tile tile = {t - start, t / tiles, t % tiles / across * 4, t % across * 4};
      for (int64_t c = 0; c < channels; c += LANES) body(tile, c);
    }
  }
  // Calls body(which of the 16 pixels, place in the result) for those of a tile's that lie in the image.
  template <typename Body> void pixels_of(const Tile& tile, Body body) const {
    const int64_t first = ((tile.image * height + tile.y) * width + tile.x) * outputs;
#pragma GCC unroll 16
    for (int64_t k = 0; k < 16; k++)
      if (tile.y + k / 4 < height && tile.x + k % 4 < width) body(k, first + (k / 4 * width + k % 4) * outputs);
  }
  // Calls body(which of the 36 pixels, place in the image with its border) for all of a tile.
  template <typename Body> void square_of(const Tile& tile, Body body) const {
    const int64_t first = tile.image * padded + (tile.y * columns + tile.x) * depth;
#pragma GCC unroll 36
    for (int64_t k = 0; k < 36; k++) body(k, first + (k / 6 * columns + k % 6) * depth);
  }

  // Flattened: with calls left in, each pixel would be looked up anew.
  [[gnu::flatten]] void read_points(int64_t start, int64_t count, const Memory& memory) const {
    tiles_of(start, count, depth, [&](const Tile& tile, int64_t c) {
      Floats square[36], points[36];
      square_of(tile, [&](int64_t k, int64_t pixel) { square[k] = load(memory.image + pixel + c); });
      transform<6, 6>(square, points, image_points);
      scatter(points, memory.points + c, plane(depth), tile.place, depth);
    });
  }

  [[gnu::flatten]] void forward(int64_t n, int64_t end, const Factor* packed, const Memory& memory) const {
    const int64_t begin = n * height * width, total = (end - n) * tiles;
    pad(n, end, memory.image);
    T* z = (T*)call.z + begin * outputs;
    const T* skip = call.skip ? (const T*)call.skip + begin * outputs : nullptr;
    for (int64_t start = 0; start < total; start += CHUNK) {
      const int64_t count = std::min(CHUNK, total - start);
      read_points(start, count, memory);
      for (int64_t p = 0; p < 36; p++)
        multiply<Factor>(memory.points + p * plane(depth), depth, 1, packed + p * inputs * outputs,
                         memory.products + p * plane(outputs), count, inputs, outputs);
      tiles_of(start, count, outputs, [&](const Tile& tile, int64_t c) {
        Floats products[36], pixels[16];
        gather(products, memory.products + tile.place * outputs + c, plane(outputs));
        transform<6, 4>(products, pixels, result);
        const Floats offsets = load(call.offsets + c);
        pixels_of(tile, [&](int64_t k, int64_t pixel) {
          pixels[k] += offsets;
          if (skip) pixels[k] += load(skip + pixel + c);
          store(z + pixel + c, pixels[k]);
        });
      });
    }
  }

  // From dz of a stack, its dx and its share of the gradients of the filters' points: the first, or added to others.
  [[gnu::flatten]] void backward(int64_t n, int64_t end, const Factor* packed, const T* dz, const Memory& memory,
                                 bool first) const {
    const int64_t total = (end - n) * tiles;
    pad(n, end, memory.image);
    std::fill_n((float*)memory.dimage, stack * padded, 0);
    for (int64_t start = 0; start < total; start += CHUNK) {
      const int64_t count = std::min(CHUNK, total - start);
      read_points(start, count, memory);
      tiles_of(start, count, outputs, [&](const Tile& tile, int64_t c) {
        Floats pixels[16] = {}, points[36];
        pixels_of(tile, [&](int64_t k, int64_t pixel) { pixels[k] = load(dz + pixel + c); });
        transform<4, 6>(pixels, points, result_gradient);
        scatter(points, memory.dpoints + c, plane(outputs), tile.place, outputs);
        if (paired<Factor>)
          scatter(points, (bfloat16*)(Factor*)memory.dacross + tile.place * outputs + c, 2 * plane(outputs));
      });
      for (int64_t p = 0; p < 36; p++)
        multiply<Factor>(memory.points + p * plane(depth), 1, depth, memory.dpoints + p * plane(outputs),
                         memory.dfilters + p * depth * outputs, inputs, (count + EACH - 1) / EACH, outputs,
                         !first || start);
      if (!call.dx) continue;
      for (int64_t p = 0; p < 36; p++)
        multiply<Factor>((paired<Factor> ? memory.dacross : memory.dpoints) + p * plane(outputs), outputs / EACH, 1,
                         packed + p * outputs / EACH * depth, memory.products + p * plane(depth), count, outputs / EACH,
                         depth);
      tiles_of(start, count, depth, [&](const Tile& tile, int64_t c) {
        Floats points[36], square[36];
        gather(points, memory.products + tile.place * depth + c, plane(depth));
        transform<6, 6>(points, square, image_gradient);
        square_of(tile, [&](int64_t k, int64_t pixel) {
          float* to = memory.dimage + pixel + c;
          store(to, load(to) + square[k]);
        });
      });
    }
    if (!call.dx) return;
    T* dx = (T*)call.dx + n * height * width * inputs;
    for (const float* image = memory.dimage; image < memory.dimage + (end - n) * padded; image += padded)
      for (int64_t y = 1; y <= height; y++)
        for (int64_t x = 1; x <= width; x++, dx += inputs)
          for (int64_t i = 0; i < inputs; i += LANES)
            store(dx + i, load(image + (y * columns + x) * depth + i), std::min(LANES, inputs - i));
  }

  // The gradients of the filters themselves, (9, inputs, outputs), of the images that a thread has summed up.
  void weigh(const Memory& memory, float* dfilters) const {
    for (int64_t i = 0; i < inputs; i++)
      for (int64_t c = 0; c < outputs; c += LANES) {
        Floats points[36], taps[9];
        gather(points, memory.dfilters + i * outputs + c, depth * outputs);
        transform<6, 3>(points, taps, filter_gradient);
        for (int64_t k = 0; k < 9; k++) store(dfilters + (k * inputs + i) * outputs + c, taps[k]);
      }
  }

  // Those of all pieces together, as filters lie.
  void finish(int64_t pieces, const float* sums) const {
    const int64_t places = 9 * inputs;
#pragma omp parallel for schedule(static)
    for (int64_t place = 0; place < places; place++)
      for (int64_t c = 0; c < outputs; c += LANES) {
        Floats total = {};
        for (int64_t piece = 0; piece < pieces; piece++) total += load(sums + piece * size + place * outputs + c);
        for (int64_t o = 0; o < LANES; o++) call.dfilters[(c + o) * places + place] = total[o];
      }
  }
};

// A set of a norm is a rectangle in the table of (image, channel): all images of a channel, or a group of channels of
// an image.
template <typename T, typename Factor = float> struct Block {
  const Call& call;
  const Convolution<T, Factor> convolution = {call};
  const int64_t channels = call.outputs, area = call.height * call.width, length = area * channels;
  const int64_t pieces = std::min(call.images, PIECES);

  // What becomes of a vector of channels of an image: slope * z + intercept, dropout's factor included.
  struct Line { Floats mean, rstd, keep, slope, intercept; };
  Line line(int64_t place, int64_t c) const {
    Line line = {load(call.mean + place), load(call.variance + place), load(call.keep + place)};
    for (int64_t i = 0; i < LANES; i++) line.rstd[i] = 1 / std::sqrt(line.rstd[i] + float(call.eps));
    line.slope = load(call.weight + c) * line.rstd * line.keep;
    line.intercept = load(call.bias + c) * line.keep - line.mean * line.slope;
    return line;
  }

  // Calls body(first value, place in the tables, first channel) for each vector of channels of images.
  template <typename Body> void channels_of(int64_t begin, int64_t end, Body body) const {
    for (int64_t n = begin; n < end; n++)
      for (int64_t c = 0; c < channels; c += LANES) body(n * length + c, n * channels + c, c);
  }
  // Calls body(place, channel) for a set.
  template <typename Body> void places_of(int64_t n0, int64_t n1, int64_t c0, int64_t c1, Body body) const {
    for (int64_t n = n0; n < n1; n++)
      for (int64_t c = c0; c < c1; c++) body(n * channels + c, c);
  }
  // Calls body(first image, end) for each stack of a piece.
  int64_t start_of(int64_t piece) const { return call.images * piece / pieces; }
  template <typename Body> void stacks_of(int64_t piece, Body body) const {
    const int64_t end = start_of(piece + 1);
    for (int64_t n = start_of(piece); n < end; n += convolution.stack) body(n, std::min(n + convolution.stack, end));
  }
  // Does first for every stack of images, then middle for every set, then last for every stack; where the sets lie
  // within an image, all three while the stack is in the cache.
  template <typename First, typename Middle, typename Last> void run(First first, Middle middle, Last last) const {
    const int64_t groups = call.groups;
#pragma omp parallel
    {
      const auto memory = convolution.memory();
#pragma omp for schedule(static)
      for (int64_t piece = 0; piece < pieces; piece++)
        stacks_of(piece, [&](int64_t begin, int64_t end) {
          first(begin, end, memory);
          if (!groups) return;
          for (int64_t n = begin; n < end; n++)
            for (int64_t g = 0; g < groups; g++) middle(n, n + 1, g * channels / groups, (g + 1) * channels / groups);
          last(begin, end, memory, piece);
        });
      if (!groups) {
#pragma omp for schedule(static)
        for (int64_t c = 0; c < channels; c++) middle(0, call.images, c, c + 1);
#pragma omp for schedule(static)
        for (int64_t piece = 0; piece < pieces; piece++)
          stacks_of(piece, [&](int64_t begin, int64_t end) { last(begin, end, memory, piece); });
      }
    }
  }

  void forward() const {
    const T* z = (const T*)call.z;
    T* y = (T*)call.y;
    const auto packed = call.filters ? convolution.pack(false) : Room<Factor>(0);
    run(
        [&](int64_t begin, int64_t end, auto& memory) {
          if (call.filters) convolution.forward(begin, end, packed, memory);
          channels_of(begin, end, [&](int64_t start, int64_t place, int64_t) {
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
        [&](int64_t begin, int64_t end, auto&, int64_t) {
          channels_of(begin, end, [&](int64_t start, int64_t place, int64_t c) {
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
    const auto packed = call.dx ? convolution.pack(true) : Room<Factor>(0);
    run(
        [&](int64_t begin, int64_t end, auto&) {
          channels_of(begin, end, [&](int64_t start, int64_t place, int64_t c) {
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
        [&](int64_t begin, int64_t end, auto& memory, int64_t piece) {
          T* dz = call.dz ? (T*)call.dz + begin * length : (T*)(float*)memory.dz;
          channels_of(begin, end, [&](int64_t start, int64_t place, int64_t c) {
            const auto line = this->line(place, c);
            const Floats per_value = -line.rstd * line.rstd * load(mean_uv + place);
            const Floats constant = -line.rstd * load(mean_u + place) - line.mean * per_value;
            Floats sum = {};
            for (int64_t i = 0; i < length; i += channels) {
              const Floats value = load(z + start + i);
              const Floats passed = where(value * line.slope + line.intercept > 0, load(gradient + start + i));
              const Floats result = passed * line.slope + value * per_value + constant;
              store(dz + start - begin * length + i, result);
              sum += result;
            }
            store(sum_dz + place, sum);
          });
          if (call.filters) {
            convolution.backward(begin, end, packed, dz, memory, begin == start_of(piece));
            if (end == start_of(piece + 1)) convolution.weigh(memory, &sums[piece * convolution.size]);
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

// A 1×1 convolution in float32, then the largest of each 2×2 pixels; z keeps which of the four it was. The images are
// taken by strips, of two rows of pixels each.
template <typename T> struct Squeeze {
  const Call& call;
  const int64_t inputs = call.inputs, outputs = call.outputs, width = call.width, pixels = 2 * width;
  const int64_t strips = call.images * call.height / 2, pieces = std::min(strips, PIECES);
  const int64_t room = whole(pixels, ROWS), high = whole(outputs, ROWS), wide = whole(outputs, LANES);
  const int64_t size = high * inputs + wide;  // of a sum of gradients
  const int64_t offset[4] = {0, 1, width, width + 1};  // of the four pixels

  // Calls body(first of the four pixels, place of what becomes of them, first channel, how many) for a strip.
  template <typename Body> void results_of(int64_t strip, Body body) const {
    for (int64_t x = 0; x < width / 2; x++)
      for (int64_t o = 0; o < outputs; o += LANES)
        body(2 * x, (strip * width / 2 + x) * outputs + o, o, std::min(LANES, outputs - o));
  }
  void widen(int64_t strip, float* image) const {
    const T* x = (const T*)call.x + strip * pixels * inputs;
    for (int64_t i = 0; i < pixels * inputs; i += LANES) store(image + i, load(x + i));
  }

  void forward() const {
    const Room<> filters((inputs + 1) * wide);  // the last row are the offsets
    std::fill_n((float*)filters, (inputs + 1) * wide, 0);
    for (int64_t o = 0; o < outputs; o++) {
      for (int64_t i = 0; i < inputs; i++) filters[i * wide + o] = call.filters[o * inputs + i];
      filters[inputs * wide + o] = call.offsets[o];
    }
#pragma omp parallel
    {
      const Room<> image(room * inputs), convolved(room * wide);
#pragma omp for schedule(static)
      for (int64_t strip = 0; strip < strips; strip++) {
        widen(strip, image);
        multiply<float>(image, inputs, 1, filters, convolved, pixels, inputs, wide);
        results_of(strip, [&](int64_t first, int64_t place, int64_t o, int64_t count) {
          Floats largest = {}, choice = {};
#pragma GCC unroll 4
          for (int64_t k = 0; k < 4; k++) {
            const Floats value = load(convolved + (first + offset[k]) * wide + o);
            const Ints larger = k ? (value > largest) | (value != value) : ~Ints{};
            largest = where(larger, value) + where(~larger, largest);
            choice = where(larger, Floats{} + float(k)) + where(~larger, choice);
          }
          store((T*)call.y + place, largest + load(filters + inputs * wide + o), count);
          store((T*)call.z + place, choice, count);
        });
      }
    }
  }

  void backward() const {
    const int64_t end = strips * width / 2 * outputs;
    const T *gradient = (const T*)call.gradient, *choice = (const T*)call.z;
    const Room<> sums(pieces * size);
#pragma omp parallel
    {
      const Room<> image(room * inputs), dconvolved(room * wide), dimage(room * inputs);
#pragma omp for schedule(static)
      for (int64_t piece = 0; piece < pieces; piece++) {
        float *dfilters = sums + piece * size, *doffsets = dfilters + high * inputs;
        std::fill_n(dfilters, size, 0);
        for (int64_t strip = strips * piece / pieces; strip < strips * (piece + 1) / pieces; strip++) {
          widen(strip, image);
          results_of(strip, [&](int64_t first, int64_t place, int64_t o, int64_t count) {
            const Floats value = load(gradient + place, count, gradient + end);
            const Floats chosen = load(choice + place, count, choice + end);
            store(doffsets + o, load(doffsets + o) + value);
            for (int64_t k = 0; k < 4; k++)
              store(dconvolved + (first + offset[k]) * wide + o, where(chosen == float(k), value));
          });
          multiply<float>(dconvolved, 1, wide, image, dfilters, outputs, pixels, inputs, true);
          multiply<float>(dconvolved, wide, 1, call.filters, dimage, pixels, outputs, inputs);
          T* dx = (T*)call.dx + strip * pixels * inputs;
          for (int64_t i = 0; i < pixels * inputs; i += LANES) store(dx + i, load(dimage + i));
        }
      }
    }
    for (int64_t o = 0; o < outputs; o++) {
      call.doffsets[o] = 0;
      std::fill_n(call.dfilters + o * inputs, inputs, 0);
      for (int64_t piece = 0; piece < pieces; piece++) {
        const float *dfilters = sums + piece * size, *doffsets = dfilters + high * inputs;
        call.doffsets[o] += doffsets[o];
        for (int64_t i = 0; i < inputs; i++) call.dfilters[o * inputs + i] += dfilters[o * inputs + i];
      }
    }
  }
};

}  // namespace

extern "C" {
void block_forward(bool half, const Call* call) {
  half ? Block<bfloat16>{*call}.forward() : Block<float>{*call}.forward();
}
void block_backward(bool half, const Call* call) {
  half ? Block<bfloat16, Pair>{*call}.backward() : Block<float>{*call}.backward();
}
void squeeze_forward(bool half, const Call* call) {
  half ? Squeeze<bfloat16>{*call}.forward() : Squeeze<float>{*call}.forward();
}
void squeeze_backward(bool half, const Call* call) {
  half ? Squeeze<bfloat16>{*call}.backward() : Squeeze<float>{*call}.backward();
}
}
"""
