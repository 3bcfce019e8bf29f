"""One network of 48,178 parameters, and a switch for its normalisation.

C is a 3×3 convolution block, c a 1×1 convolution, P a pooling:
C1 C2 c3 P1 C3 C4 C5 c6 P2 C7 C8 C9 GAP C10.

First the network, then a kernel that computes its layers on a CPU: the same figures, sooner.
"""

import collections
import ctypes
import functools
import os
import subprocess
import tempfile
import weakref
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
    fused: all layers in one kernel where there is one: see FusedLayers.
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
            return ConvBlock(in_channels, out_channels, NORMS[norm](out_channels, num_groups), dropout)

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
        if self.fused and (logits := FusedLayers.of(self.layers(), images)) is not None:
            return logits.flatten(1)

        x = self.C2(self.C1(images))
        x = self.P1(self.c3(x))

        c3 = self.C3(x)
        x = self.C5(self.C4(c3), skip=c3 if self.skip else None)
        x = self.P2(self.c6(x))

        c7 = self.C7(x)
        x = self.C9(self.C8(c7), skip=c7 if self.skip else None)
        return self.C10(self.GAP(x)).flatten(1)

    def layers(self):
        """The same, in the pairs that FusedLayers is made for."""
        first = (self.C1, None), (self.C2, None), (self.c3, self.P1)
        second = (self.C3, None), (self.C4, None), (self.C5, self.C3 if self.skip else None), (self.c6, self.P2)
        third = (self.C7, None), (self.C8, None), (self.C9, self.C7 if self.skip else None), (self.GAP, self.C10)
        return first + second + third


class ConvBlock(nn.Sequential):
    """3×3 convolution, the skip if one is given, norm, ReLU, dropout.

    An nn.Sequential because torchsummary gives every other container a row of its own.
    """

    def __init__(self, in_channels, out_channels, norm, dropout):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm = norm
        self.dropout = nn.Dropout2d(dropout, inplace=True)

    def forward(self, x, skip=None):
        x = self.conv(x)
        if skip is not None:
            x = x + skip
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


class FusedLayers(torch.autograd.Function):
    """The network's layers in one call of a kernel, on a CPU, each image while it is in the processor's cache.

    They come in pairs: a ConvBlock with the one whose output it adds, or None; a 1×1 convolution with its max pooling;
    average pooling with the 1×1 convolution of what it leaves. No output is added twice.
    One after the other, PyTorch's modules read and write every activation many times over, not all of them are made
    for channels_last or bfloat16, and its convolutions multiply four times as often as they have to. This kernel is
    compiled in a few seconds, when it is first needed, by the machine's own C++ compiler (the environment variable CXX,
    or c++), with its vector instructions. It computes in float32 whatever the activations are kept in; only where they
    are bfloat16, and the processor multiplies that, do its convolutions' gradients come from factors in bfloat16.
    """

    @staticmethod
    def of(layers, images):
        """What becomes of images, (N, C, H, W) both; None where the kernel cannot stand in for the modules."""
        dtype = compute_dtype()
        if (
            not (images.is_cpu and len(images))
            or dtype not in (torch.float32, torch.bfloat16)
            or images.dtype not in (torch.float32, dtype)
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
        ):
            return None
        parameters, width, widths = [], images.shape[1], {}
        for layer, other in layers:
            found = parameters_of(layer, other)
            if found is None or found[0].shape[1] != width:
                return None
            width = widths[layer] = len(found[0])
            if widths.get(other, width) != width:
                return None
            parameters += found
        if kernel() is None:
            return None
        learns = torch.is_grad_enabled()
        planes = not (learns and images.requires_grad)  # so they mostly come; but no gradient leads back to planes
        images = images.float().contiguous() if planes else images.to(dtype, memory_format=torch.channels_last)
        return FusedLayers.apply(layers, dtype, learns, planes, images, *parameters)

    @staticmethod
    def forward(ctx, layers, dtype, learns, planes, x, *parameters):
        steps, places, parameters = (Step * len(layers))(), {None: -1}, iter(parameters)
        steps[0].planes = planes
        fields, tensors = [(steps[0], "x")], [x]
        images, inputs, height, width = x.shape
        for place, (step, (layer, other)) in enumerate(zip(steps, layers)):
            names = Step.PARAMETERS if type(layer) is ConvBlock else Step.PARAMETERS[:2]
            fields += [(step, name) for name in names]
            tensors += [next(parameters) for _ in names]
            outputs = len(tensors[-1])
            step.images, step.inputs, step.outputs, step.height, step.width = images, inputs, outputs, height, width
            if type(layer) is ConvBlock:
                _, norm, dropout = layer
                step.kind, step.source = Step.BLOCK, places[other]
                step.set_norm(norm)
                fields.append((step, "keep"))
                keep = torch.ones(images, outputs, 1, 1)  # from the very random numbers that the module would draw
                tensors.append(torch.feature_dropout_(keep, dropout.p, dropout.training))
            elif type(layer) is AvgPool2d:
                step.kind, height, width = Step.HEAD, 1, 1
            else:
                step.kind, height, width = Step.SQUEEZE, height // 2, width // 2
            inputs, places[layer] = outputs, place
        kind = torch.float32 if step.kind == Step.HEAD else dtype
        y = torch.empty(images, outputs, height, width, dtype=kind, memory_format=torch.channels_last)
        point([*fields, (step, "y")], [*tensors, y])
        half = dtype == torch.bfloat16
        room = in_room(kernel().forward, half, steps, len(steps), learns)
        if learns:
            ctx.half, ctx.steps, ctx.fields = half, steps, fields
            ctx.save_for_backward(room, *tensors)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        room, *tensors = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        places = [place for place, (_, name) in enumerate(ctx.fields) if name in Step.PARAMETERS]
        gradients = [torch.empty_like(tensors[place]) for place in places]
        dx = torch.empty_like(tensors[0]) if ctx.needs_input_grad[4] else None
        point(ctx.fields, tensors)
        point([(ctx.steps[-1], "gradient"), (ctx.steps[0], "dx")], [gradient, dx])
        point([(ctx.fields[place][0], f"d{ctx.fields[place][1]}") for place in places], gradients)
        in_room(kernel().backward, ctx.half, ctx.steps, len(ctx.steps), room.data_ptr())
        return None, None, None, None, dx, *gradients


def compute_dtype():
    """In which autocast, or else the network itself, has convolutions computed."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32


def point(fields, tensors):
    """Has each of the steps' fields point to a tensor's values."""
    for (step, name), tensor in zip(fields, tensors, strict=True):
        setattr(step, name, None if tensor is None else tensor.data_ptr())


def in_room(function, *args):
    """Calls one of the kernel's functions with as much room as it asks for, and returns that."""
    room = lend(max(1, function(*args, None)))  # an empty tensor has no address
    function(*args, room.data_ptr())
    return room


def lend(size):
    """A tensor of at least size bytes, whose memory goes back to SPARE once nobody holds it any more.

    Were it asked of the system at each step, the processor would spend a tenth of the time on having it mapped; and in
    what the C library keeps, small things settle, so that a large room no longer fits and the peak rises.
    """
    try:
        memory = SPARE.pop()
    except IndexError:
        memory = torch.empty(0, dtype=torch.uint8)
    if len(memory) < size:
        memory = torch.empty(size, dtype=torch.uint8)
    lent = memory.numpy()
    weakref.finalize(lent, SPARE.append, memory).atexit = False
    return torch.from_numpy(lent)


SPARE = collections.deque(maxlen=2)  # what a forward and a backward pass need


def parameters_of(layer, other):
    """A pair's filters and offsets, with a block's norm's weight and bias; None if the kernel cannot compute it."""
    block = type(layer) is ConvBlock
    if block:
        modules = layer.conv, layer.norm, layer.dropout, layer
        fits = is_plain(layer.conv, nn.Conv2d, 3) and computes_norm(layer.norm) and type(layer.dropout) is nn.Dropout2d
    elif type(layer) is AvgPool2d:
        modules = other, layer
        fits = is_plain(other, Conv2d, 1)
    else:
        modules = layer, other
        fits = (
            is_plain(layer, nn.Conv2d, 1)
            and type(other) is nn.MaxPool2d
            and (other.kernel_size, other.stride, other.padding, other.dilation) == (2, 2, 0, 1)
            and not other.return_indices
        )
    if not fits or any(map(is_watched, modules)):
        return None
    filters, *others = [p for module in modules[: 2 if block else 1] for p in (module.weight, module.bias)]
    if not is_readable(filters, torch.channels_last) or not all(map(is_readable, others)):
        return None
    fits = filters.shape[0 if block else 1] % 16 == 0 and all(len(values) == len(filters) for values in others)
    return [filters, *others] if fits else None


def is_plain(conv, kind, size):
    """Whether this is a convolution of size×size pixels that leaves an image its size."""
    if type(conv) is not kind:
        return False
    given = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
    return given == ((size, size), (1, 1), (size // 2, size // 2), (1, 1), 1, "zeros")


def computes_norm(norm):
    """Whether the kernel computes this norm. Gradients through statistics that stay as they are, it does not."""
    if type(norm) is nn.BatchNorm2d:
        moves = norm.training or not torch.is_grad_enabled()
        return norm.track_running_stats and norm.momentum is not None and moves
    return type(norm) is nn.GroupNorm


def is_readable(parameter, memory_format=torch.contiguous_format):
    return (
        parameter is not None
        and parameter.is_cpu
        and parameter.dtype == torch.float32
        and parameter.is_contiguous(memory_format=memory_format)
    )


def is_watched(module):
    """Whether somebody has hooks in this module, or gave it a forward pass of its own."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in vars(module)


class Step(ctypes.Structure):
    """The struct of this name in the kernel."""

    BLOCK, SQUEEZE, HEAD = range(3)
    NUMBERS = "kind source images inputs outputs height width groups planes fixed added".split()
    PARAMETERS = "filters offsets weight bias".split()
    POINTERS = (
        "x skip z y filters offsets weight bias keep mean variance running_mean running_variance "
        "gradient dx dz dfilters doffsets dweight dbias"
    ).split()
    _fields_ = (
        [(name, ctypes.c_int64) for name in NUMBERS]
        + [("eps", ctypes.c_double), ("momentum", ctypes.c_double)]
        + [(name, ctypes.c_void_p) for name in POINTERS]
    )

    def set_norm(self, norm):
        self.eps = norm.eps
        if type(norm) is nn.GroupNorm:
            self.groups = norm.num_groups
            return
        self.fixed, self.momentum = not norm.training, norm.momentum
        self.running_mean, self.running_variance = norm.running_mean.data_ptr(), norm.running_var.data_ptr()
        if norm.training:
            norm.num_batches_tracked.add_(1)


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
    steps = [ctypes.c_bool, ctypes.POINTER(Step), ctypes.c_int64]
    functions.forward.argtypes = [*steps, ctypes.c_bool, ctypes.c_void_p]
    functions.backward.argtypes = [*steps, ctypes.c_void_p, ctypes.c_void_p]
    functions.forward.restype = functions.backward.restype = ctypes.c_int64
    return functions


KERNEL = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

// What Python passes for each pair of layers: sizes, and where the values are. Images lie pixel by pixel, each with its
// channels side by side.
enum { BLOCK, SQUEEZE, HEAD };
struct Step {
  int64_t kind, source;  // source: the step whose output is added, or -1
  int64_t images, inputs, outputs, height, width, groups;  // no groups: batch norm
  int64_t planes;  // whether x lies channel by channel instead, in float32
  int64_t fixed;   // whether batch norm takes its running statistics
  int64_t added;   // whether a block's dx is added to what is there
  double eps, momentum;
  const void *x, *skip;            // (images, height, width, inputs); skip, z and y with as many as outputs
  void *z, *y;                     // convolved, and what becomes of it; the same place where nothing is learnt
  const float *filters, *offsets;  // (outputs, 3, 3, inputs), (outputs)
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
template <typename T, typename Factor> struct Winograd {
  static constexpr int64_t CHUNK = 32;  // tiles, whose points fit into the cache
  static constexpr int64_t EACH = paired<Factor> ? 2 : 1;  // values in a factor

  const Step& step;
  const int64_t inputs = step.inputs, outputs = step.outputs, height = step.height, width = step.width;
  const int64_t depth = whole(inputs, std::max(LANES, ROWS));  // of the image where a thread keeps it, with its border
  const int64_t down = (height + 3) / 4, across = (width + 3) / 4, tiles = down * across;
  const int64_t stack = std::clamp(CHUNK / tiles, int64_t(1), step.images);  // images that fill a chunk together
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
    const int64_t back = step.gradient != nullptr, most = std::max(depth, outputs);
    Memory memory = {stack * padded, 36 * plane(depth), 36 * plane(most), back * stack * padded,
                     back * 36 * plane(outputs), paired<Factor> * back * 36 * plane(outputs),
                     back * 36 * depth * outputs, back * stack * height * width * outputs};
    std::fill_n((float*)memory.image, stack * padded, 0);
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
            taps[k][l] = step.filters[r * row + k * inputs + (c + l) * column];
        transform<3, 6>(taps, points, filter_points);
        scatter(points, packed + c, rows / EACH * columns, r, columns);
      }
    return packed;
  }

  void pad(int64_t begin, int64_t end, float* to) const {
    const T* last = (const T*)step.x + end * height * width * inputs;
    for (int64_t n = begin; n < end; n++, to += padded)
      for (int64_t y = 0; y < height; y++) {
        const T* row = (const T*)step.x + (n * height + y) * width * inputs;
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
    T* z = (T*)step.z + begin * outputs;
    const T* skip = step.skip ? (const T*)step.skip + begin * outputs : nullptr;
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
        const Floats offsets = load(step.offsets + c);
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
      if (!step.dx) continue;
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
    if (!step.dx) return;
    T *dx = (T*)step.dx + n * height * width * inputs, *last = (T*)step.dx + end * height * width * inputs;
    for (const float* image = memory.dimage; image < memory.dimage + (end - n) * padded; image += padded)
      for (int64_t y = 1; y <= height; y++)
        for (int64_t x = 1; x <= width; x++, dx += inputs)
          for (int64_t i = 0; i < inputs; i += LANES) {
            Floats values = load(image + (y * columns + x) * depth + i);
            if (step.added) values += load(dx + i, inputs - i, last);
            store(dx + i, values, std::min(LANES, inputs - i));
          }
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
};

// The same with few inputs, whose vectors would stay mostly empty: of images in planes, each row of the result as a
// product. Its factors are the rows that it is made of, in three copies, a pixel apart.
template <typename T> struct Direct {
  const Step& step;
  const int64_t inputs = step.inputs, outputs = step.outputs, height = step.height, width = step.width;
  const int64_t wide = whole(width, std::max(LANES, ROWS)), row = 3 * inputs * wide;
  const int64_t places = 9 * inputs, size = places * outputs;  // of the gradients of the filters
  const int64_t stack = 1;

  struct Memory { Room<> line, rows, products, dfilters, dz; };  // rows: (height + 2, 3, inputs, wide)
  Memory memory() const {
    const int64_t room = (height + 2) * row + ROWS * wide;
    Memory memory = {wide + 2 * LANES, room, wide * outputs, whole(places, ROWS) * outputs, height * width * outputs};
    std::fill_n((float*)memory.line, wide + 2 * LANES, 0);
    std::fill_n((float*)memory.rows, room, 0);
    return memory;
  }
  Room<> pack(bool) const {
    Room<> packed(size);
    for (int64_t place = 0; place < places; place++)
      for (int64_t o = 0; o < outputs; o++) packed[place * outputs + o] = step.filters[o * places + place];
    return packed;
  }
  void read(int64_t n, const Memory& memory) const {
    const float* from = (const float*)step.x + n * inputs * height * width;
    float *line = memory.line + LANES, *to = memory.rows + row;
    for (int64_t i = 0; i < inputs; i++)
      for (int64_t y = 0; y < height; y++, from += width) {
        std::copy_n(from, width, line);
        for (int64_t k = 0; k < 3; k++)
          for (int64_t x = 0; x < wide; x += LANES)
            store(to + y * row + (k * inputs + i) * wide + x, load(line + x + k - 1));
      }
  }
  void forward(int64_t begin, int64_t end, const float* packed, const Memory& memory) const {
    for (int64_t n = begin; n < end; n++) {
      read(n, memory);
      T* z = (T*)step.z + n * height * width * outputs;
      for (int64_t y = 0; y < height; y++, z += width * outputs) {
        multiply<float>(memory.rows + y * row, 1, wide, packed, memory.products, width, places, outputs);
        for (int64_t i = 0; i < width * outputs; i += outputs)
          for (int64_t c = 0; c < outputs; c += LANES)
            store(z + i + c, load(memory.products + i + c) + load(step.offsets + c));
      }
    }
  }
  void backward(int64_t begin, int64_t end, const float*, const T* dz, const Memory& memory, bool first) const {
    for (int64_t n = begin; n < end; n++) {
      read(n, memory);
      for (int64_t y = 0; y < height; y++, dz += width * outputs, first = false) {
        for (int64_t i = 0; i < width * outputs; i += LANES) store(memory.products + i, load(dz + i));
        multiply<float>(memory.rows + y * row, wide, 1, memory.products, memory.dfilters, places, width, outputs,
                        !first);
      }
    }
  }
  void weigh(const Memory& memory, float* dfilters) const { std::copy_n((float*)memory.dfilters, size, dfilters); }
};

// A set of a norm is a rectangle in the table of (image, channel): all images of a channel, or a group of channels of
// an image.
template <typename T, typename Convolution> struct Block {
  const Step& step;
  const Convolution convolution = {step};
  const int64_t channels = step.outputs, area = step.height * step.width, length = area * channels;
  const int64_t pieces = std::min(step.images, PIECES);

  // What becomes of a vector of channels of an image: slope * z + intercept, dropout's factor included.
  struct Line { Floats mean, rstd, keep, slope, intercept; };
  Line line(int64_t place, int64_t c) const {
    Line line = {load(step.mean + place), load(step.variance + place), load(step.keep + place)};
    for (int64_t i = 0; i < LANES; i++) line.rstd[i] = 1 / std::sqrt(line.rstd[i] + float(step.eps));
    line.slope = load(step.weight + c) * line.rstd * line.keep;
    line.intercept = load(step.bias + c) * line.keep - line.mean * line.slope;
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
  int64_t start_of(int64_t piece) const { return step.images * piece / pieces; }
  template <typename Body> void stacks_of(int64_t piece, Body body) const {
    const int64_t end = start_of(piece + 1);
    for (int64_t n = start_of(piece); n < end; n += convolution.stack) body(n, std::min(n + convolution.stack, end));
  }
  // Does first for every stack of images, then middle for every set, then last for every stack; where the images do not
  // depend on each other, all three while the stack is in the cache.
  template <typename First, typename Middle, typename Last> void run(First first, Middle middle, Last last) const {
    const int64_t sets = step.groups ? step.groups : channels;
    const bool apart = step.groups || step.fixed;
#pragma omp parallel
    {
      const auto memory = convolution.memory();
#pragma omp for schedule(static)
      for (int64_t piece = 0; piece < pieces; piece++)
        stacks_of(piece, [&](int64_t begin, int64_t end) {
          first(begin, end, memory);
          if (!apart) return;
          for (int64_t n = begin; n < end; n++)
            for (int64_t s = 0; s < sets; s++) middle(n, n + 1, s * channels / sets, (s + 1) * channels / sets);
          last(begin, end, memory, piece);
        });
      if (!apart) {
#pragma omp for schedule(static)
        for (int64_t c = 0; c < channels; c++) middle(0, step.images, c, c + 1);
#pragma omp for schedule(static)
        for (int64_t piece = 0; piece < pieces; piece++)
          stacks_of(piece, [&](int64_t begin, int64_t end) { last(begin, end, memory, piece); });
      }
    }
  }

  void forward() const {
    const T* z = (const T*)step.z;
    T* y = (T*)step.y;
    const auto packed = convolution.pack(false);
    run(
        [&](int64_t begin, int64_t end, auto& memory) {
          convolution.forward(begin, end, packed, memory);
          if (step.fixed) return;
          channels_of(begin, end, [&](int64_t start, int64_t place, int64_t) {
            const Floats pivot = load(z + start);  // near the mean, so that the squares do not swallow the variance
            Floats sum = {}, squares = {};
            for (int64_t i = start; i < start + length; i += channels) {
              const Floats distance = load(z + i) - pivot;
              sum += distance;
              squares += distance * distance;
            }
            sum /= float(area);
            store(step.mean + place, pivot + sum);
            store(step.variance + place, squares / float(area) - sum * sum);
          });
        },
        [&](int64_t n0, int64_t n1, int64_t c0, int64_t c1) {
          const float count = (n1 - n0) * (c1 - c0);
          float mean = 0, variance = 0;
          if (step.fixed) {
            step.mean[n0 * channels + c0] = step.running_mean[c0];
            step.variance[n0 * channels + c0] = step.running_variance[c0];
            return;
          }
          places_of(n0, n1, c0, c1, [&](int64_t place, int64_t) { mean += step.mean[place] / count; });
          places_of(n0, n1, c0, c1, [&](int64_t place, int64_t) {
            const float distance = step.mean[place] - mean;
            variance += (step.variance[place] + distance * distance) / count;
          });
          places_of(n0, n1, c0, c1, [&](int64_t place, int64_t) {
            step.mean[place] = mean;
            step.variance[place] = variance;
          });
          if (step.running_mean) {
            const float unbiased = variance * (count * area / (count * area - 1));
            step.running_mean[c0] += float(step.momentum) * (mean - step.running_mean[c0]);
            step.running_variance[c0] += float(step.momentum) * (unbiased - step.running_variance[c0]);
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
    const T *z = (const T*)step.z, *gradient = (const T*)step.gradient;
    const int64_t places = step.images * channels;
    const Room<> sum_h(places), sum_hv(places), mean_u(places), mean_uv(places), sum_dz(places);
    const Room<> sums(pieces * convolution.size);
    const auto packed = convolution.pack(true);
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
            u += step.weight[c] * sum_h[place];
            uv += step.weight[c] * sum_hv[place];
          });
          places_of(n0, n1, c0, c1, [&](int64_t place, int64_t) {
            mean_u[place] = u / count;
            mean_uv[place] = uv / count;
          });
        },
        [&](int64_t begin, int64_t end, auto& memory, int64_t piece) {
          T* dz = step.dz ? (T*)step.dz + begin * length : (T*)(float*)memory.dz;
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
          convolution.backward(begin, end, packed, dz, memory, begin == start_of(piece));
          if (end == start_of(piece + 1)) convolution.weigh(memory, sums + piece * convolution.size);
        });
    const auto total = [&](const float* table, float* to) {
      for (int64_t c = 0; c < channels; c += LANES) {
        Floats sum = {};
        for (int64_t n = 0; n < step.images; n++) sum += load(table + n * channels + c);
        store(to + c, sum);
      }
    };
    total(sum_h, step.dbias);
    total(sum_hv, step.dweight);
    total(sum_dz, step.doffsets);
    const int64_t factors = 9 * step.inputs;  // of a value
#pragma omp parallel for schedule(static)
    for (int64_t f = 0; f < factors; f++)  // the pieces' gradients together, as filters lie
      for (int64_t c = 0; c < channels; c += LANES) {
        Floats total = {};
        for (int64_t p = 0; p < pieces; p++) total += load(sums + p * convolution.size + f * channels + c);
        for (int64_t o = 0; o < LANES; o++) step.dfilters[(c + o) * factors + f] = total[o];
      }
  }
};

// A 1×1 convolution in float32, then the largest of each 2×2 pixels; z keeps which of the four it was. The images are
// taken by strips, of two rows of pixels each.
template <typename T> struct Squeeze {
  const Step& step;
  const int64_t inputs = step.inputs, outputs = step.outputs, width = step.width, pixels = 2 * width;
  const int64_t strips = step.images * step.height / 2, pieces = std::min(strips, PIECES);
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
    const T* x = (const T*)step.x + strip * pixels * inputs;
    for (int64_t i = 0; i < pixels * inputs; i += LANES) store(image + i, load(x + i));
  }

  void forward() const {
    const Room<> filters((inputs + 1) * wide);  // the last row are the offsets
    std::fill_n((float*)filters, (inputs + 1) * wide, 0);
    for (int64_t o = 0; o < outputs; o++) {
      for (int64_t i = 0; i < inputs; i++) filters[i * wide + o] = step.filters[o * inputs + i];
      filters[inputs * wide + o] = step.offsets[o];
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
          store((T*)step.y + place, largest + load(filters + inputs * wide + o), count);
          if (step.z) store((T*)step.z + place, choice, count);
        });
      }
    }
  }

  void backward() const {
    const int64_t end = strips * width / 2 * outputs;
    const T *gradient = (const T*)step.gradient, *choice = (const T*)step.z;
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
          multiply<float>(dconvolved, wide, 1, step.filters, dimage, pixels, outputs, inputs);
          T* dx = (T*)step.dx + strip * pixels * inputs;
          for (int64_t i = 0; i < pixels * inputs; i += LANES) store(dx + i, load(dimage + i));
        }
      }
    }
    for (int64_t o = 0; o < outputs; o++) {
      step.doffsets[o] = 0;
      std::fill_n(step.dfilters + o * inputs, inputs, 0);
      for (int64_t piece = 0; piece < pieces; piece++) {
        const float *dfilters = sums + piece * size, *doffsets = dfilters + high * inputs;
        step.doffsets[o] += doffsets[o];
        for (int64_t i = 0; i < inputs; i++) step.dfilters[o * inputs + i] += dfilters[o * inputs + i];
      }
    }
  }
};

// The mean of each map, kept in z, and what a linear layer makes of these; y is in float32.
template <typename T> struct Head {
  const Step& step;
  const int64_t inputs = step.inputs, outputs = step.outputs, area = step.height * step.width;

  void forward() const {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < step.images; n++) {
      const T* x = (const T*)step.x + n * area * inputs;
      float *means = (float*)step.z + n * inputs, *y = (float*)step.y + n * outputs;
      for (int64_t i = 0; i < inputs; i += LANES) {
        Floats sum = {};
        for (int64_t pixel = 0; pixel < area; pixel++) sum += load(x + pixel * inputs + i);
        store(means + i, sum / float(area));
      }
      for (int64_t o = 0; o < outputs; o++) {
        Floats products = {};
        for (int64_t i = 0; i < inputs; i += LANES) products += load(means + i) * load(step.filters + o * inputs + i);
        y[o] = step.offsets[o];
        for (int64_t l = 0; l < LANES; l++) y[o] += products[l];
      }
    }
  }

  void backward() const {
    const float *gradient = (const float*)step.gradient, *means = (const float*)step.z;
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < step.images; n++)
      for (int64_t i = 0; i < inputs; i += LANES) {
        Floats sum = {};
        for (int64_t o = 0; o < outputs; o++) sum += gradient[n * outputs + o] * load(step.filters + o * inputs + i);
        T* dx = (T*)step.dx + n * area * inputs + i;
        for (int64_t pixel = 0; pixel < area; pixel++) store(dx + pixel * inputs, sum / float(area));
      }
    for (int64_t o = 0; o < outputs; o++) {
      step.doffsets[o] = 0;
      for (int64_t n = 0; n < step.images; n++) step.doffsets[o] += gradient[n * outputs + o];
      for (int64_t i = 0; i < inputs; i += LANES) {
        Floats sum = {};
        for (int64_t n = 0; n < step.images; n++) sum += gradient[n * outputs + o] * load(means + n * inputs + i);
        store(step.dfilters + o * inputs + i, sum);
      }
    }
  }
};

// Gives out one place after another in a room.
struct Places {
  int64_t next;
  template <typename Value> void take(Value*& place, int64_t bytes) {
    place = (Value*)next;
    next += whole(bytes, 64);  // of a line of the cache
  }
};

template <typename T> struct Network {
  Step* const steps;
  const int64_t count;

  static int64_t bytes_of_y(const Step& step) {
    const int64_t values = step.images * step.outputs;
    return step.kind == HEAD      ? values * sizeof(float)
           : step.kind == SQUEEZE ? values * (step.height / 2 * step.width / 2) * sizeof(T)
                                  : values * step.height * step.width * sizeof(T);
  }
  // Where what the steps compute lies in a room, but for the last y; returns the room's size.
  int64_t lay_out(bool learns, int64_t room) const {
    Places places = {room};
    for (int64_t i = 0; i < count; i++) {
      Step& step = steps[i];
      if (i) step.x = steps[i - 1].y;
      if (i < count - 1) places.take(step.y, bytes_of_y(step));
      if (step.kind == HEAD) {
        places.take(step.z, step.images * step.inputs * sizeof(float));
      } else if (learns) {
        places.take(step.z, bytes_of_y(step));
      } else if (step.kind == BLOCK) {
        step.z = step.y;
      }
      if (step.kind == BLOCK) {
        step.skip = step.source < 0 ? nullptr : steps[step.source].y;
        for (float** table : {&step.mean, &step.variance})
          places.take(*table, step.images * step.outputs * sizeof(float));
      }
    }
    return places.next - room;
  }
  // The same for the gradients. Those of two steps next to each other are needed at a time, and those of a skip.
  int64_t lay_out_gradients(int64_t room) const {
    Places places = {room};
    int64_t most = 0;
    for (int64_t i = 0; i < count - 1; i++) {
      steps[i].gradient = nullptr;
      most = std::max(most, bytes_of_y(steps[i]));
    }
    const void* halves[2];
    for (const void*& half : halves) places.take(half, most);
    for (int64_t i = count; i--;) {
      Step& step = steps[i];
      if (step.kind == BLOCK && step.skip) {
        places.take(step.dz, bytes_of_y(step));
        steps[step.source].gradient = step.dz;
      }
      if (!i) continue;
      step.added = steps[i - 1].gradient != nullptr;
      if (!step.added) steps[i - 1].gradient = halves[i % 2];
      step.dx = (void*)steps[i - 1].gradient;
    }
    return places.next - room;
  }

  // Calls body(what computes a step).
  template <typename Factor, typename Body> static void kind_of(const Step& step, Body body) {
    step.kind == HEAD      ? body(Head<T>{step})
    : step.kind == SQUEEZE ? body(Squeeze<T>{step})
    : step.planes          ? body(Block<T, Direct<T>>{step})
                           : body(Block<T, Winograd<T, Factor>>{step});
  }
  // Both return how much room they want, and where none is given, do no more.
  int64_t forward(bool learns, int64_t room) const {
    const int64_t size = lay_out(learns, room);
    for (int64_t i = 0; room && i < count; i++) kind_of<float>(steps[i], [](const auto& layer) { layer.forward(); });
    return size;
  }
  template <typename Factor> int64_t backward(int64_t activations, int64_t room) const {
    lay_out(true, activations);
    const int64_t size = lay_out_gradients(room);
    for (int64_t i = count; room && i--;) kind_of<Factor>(steps[i], [](const auto& layer) { layer.backward(); });
    return size;
  }
};

}  // namespace

extern "C" {
int64_t forward(bool half, Step* steps, int64_t count, bool learns, int64_t room) {
  return half ? Network<bfloat16>{steps, count}.forward(learns, room)
              : Network<float>{steps, count}.forward(learns, room);
}
int64_t backward(bool half, Step* steps, int64_t count, int64_t activations, int64_t room) {
  return half ? Network<bfloat16>{steps, count}.backward<Pair>(activations, room)
              : Network<float>{steps, count}.backward<float>(activations, room);
}
}
"""
