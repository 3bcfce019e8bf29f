"""One network of 48,178 parameters, and a switch for its normalisation.

C is a 3×3 convolution block, c a 1×1 convolution, P a pooling:
C1 C2 c3 P1 C3 C4 C5 c6 P2 C7 C8 C9 GAP C10.

First the network, then a kernel that computes norm, dropout and ReLU together on a CPU: the same figures, sooner.
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
    fused: norm, dropout and ReLU in one kernel where there is one: see NormDropoutReLU.
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
        self.C10 = nn.Conv2d(32, 10, 1)  # 10, 1, 1

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
        x = self.P1(self.c3(x))

        c3 = self.C3(x)
        x = self.C5(self.C4(c3), skip=c3 if self.skip else None)
        x = self.P2(self.c6(x))

        c7 = self.C7(x)
        x = self.C9(self.C8(c7), skip=c7 if self.skip else None)
        return self.C10(self.GAP(x)).flatten(1)


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
        x = self.conv(x)
        if skip is not None:
            x = x + skip
        if self.fused and NormDropoutReLU.takes(x, self.norm, self.dropout):
            return NormDropoutReLU.apply(x, self.norm.weight, self.norm.bias, self.norm, self.dropout)
        # Dropout multiplies by 0 or more, so the ReLU may as well come after it; both then work in place, and a block
        # keeps two activations for its backward pass instead of three.
        return F.relu_(self.dropout(self.norm(x)))


class AvgPool2d(nn.AdaptiveAvgPool2d):
    """Global average pooling for maps of any size, under the name that the summary shows."""

    def __init__(self):
        super().__init__(1)


class NormDropoutReLU(torch.autograd.Function):
    """relu(dropout(norm(x))) in training, on a CPU: x is read twice forward, x and the gradient twice backward.

    One after the other, the three read and write every activation many times over, and PyTorch's kernels for the
    norms are not all made for channels_last or bfloat16. This one is compiled in a second, when it is first needed,
    by the machine's own C++ compiler (the environment variable CXX, or c++), with its vector instructions.
    """

    @staticmethod
    def knows(norm):
        """Whether the kernel computes this kind of norm."""
        return type(norm) is nn.GroupNorm or (type(norm) is nn.BatchNorm2d and norm.track_running_stats)

    @staticmethod
    def takes(x, norm, dropout):
        """Whether the kernel can stand in for the modules, here and now; they themselves work everywhere."""
        return (
            NormDropoutReLU.knows(norm)
            and not torch.compiler.is_compiling()
            and norm.training
            and norm.affine
            and norm.weight.dtype == torch.float32
            and getattr(norm, "momentum", 0.1) is not None
            and x.device.type == "cpu"
            and x.dtype in (torch.float32, torch.bfloat16)
            and x.is_contiguous(memory_format=torch.channels_last)
            and x.shape[1] % 16 == 0
            and torch.is_grad_enabled()
            and not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in (norm, dropout))
            and kernel() is not None
        )

    @staticmethod
    def forward(ctx, x, weight, bias, norm, dropout):
        images, channels, height, width = x.shape
        keep = dropout(x.new_ones(images, channels, 1, 1)).float()  # the very random numbers of the module
        mean, variance = torch.empty(2, images, channels)
        groups = getattr(norm, "num_groups", 0)
        ctx.sizes = images, channels, height * width, groups, norm.eps
        y = torch.empty_like(x)
        kernel().forward(
            x.dtype == torch.bfloat16, *map(address, (x, y, weight, bias, keep, mean, variance)), *ctx.sizes
        )
        if not groups:
            count = images * height * width
            norm.running_mean.lerp_(mean[0], norm.momentum)
            norm.running_var.lerp_(variance[0] * (count / (count - 1)), norm.momentum)
            norm.num_batches_tracked += 1
        ctx.save_for_backward(x, weight, bias, keep, mean, variance)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x, weight, bias, *tables = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        grads = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
        tensors = (gradient, x, weight, bias, *tables, *grads)
        kernel().backward(x.dtype == torch.bfloat16, *map(address, tensors), *ctx.sizes)
        return *grads, None, None


address = torch.Tensor.data_ptr


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
            flags = ["-O3", "-march=native", "-fopenmp", "-fPIC"]
            subprocess.run([compiler, *flags, "-c", source, "-o", compiled], check=True, capture_output=True)
            subprocess.run([compiler, "-shared", compiled, "-o", library], check=True, capture_output=True)
            functions = ctypes.CDLL(library)
        except (OSError, subprocess.CalledProcessError):
            return None
    sizes = [ctypes.c_int64] * 4 + [ctypes.c_float]
    functions.forward.argtypes = [ctypes.c_bool] + [ctypes.c_void_p] * 7 + sizes
    functions.backward.argtypes = [ctypes.c_bool] + [ctypes.c_void_p] * 10 + sizes
    functions.forward.restype = functions.backward.restype = None
    return functions


# Images lie pixel by pixel, each with its channels side by side. A set of a norm is a rectangle in the table of
# (image, channel): all images of a channel, or a group of channels of an image.
KERNEL = r"""
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// Sixteen channels, which compilers turn into whatever vector instructions there are.
constexpr int64_t LANES = 16;
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
struct bfloat16 { uint16_t bits; };

inline Floats load(const float* from) {
  Floats values;
  memcpy(&values, from, sizeof values);
  return values;
}
inline Floats load(const bfloat16* from) {
  Halves values;
  memcpy(&values, from, sizeof values);
  return (Floats)(__builtin_convertvector(values, Words) << 16);
}
inline void store(float* to, Floats values) { memcpy(to, &values, sizeof values); }
inline void store(bfloat16* to, Floats values) {  // to the nearest, ties to even
  const Words bits = (Words)values;
  const Halves rounded = __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, Halves);
  memcpy(to, &rounded, sizeof rounded);
}
inline Floats where(Ints condition, Floats values) { return (Floats)(condition & (Ints)values); }

struct Norm {
  const float *weight, *bias;           // (channels)
  const float* keep;                    // (images, channels), dropout's factors
  float *mean, *variance;               // (images, channels), each set's in all its places
  int64_t images, channels, pixels, groups;  // no groups: batch norm
  float eps;

  // What becomes of sixteen channels of an image: z = slope * x + intercept, dropout's factor included.
  struct Line { Floats mean, rstd, keep, slope, intercept; };
  Line line(int64_t place, int64_t c) const {
    Line line = {load(mean + place), load(variance + place), load(keep + place)};
    for (int64_t i = 0; i < LANES; i++) line.rstd[i] = 1 / std::sqrt(line.rstd[i] + eps);
    line.slope = load(weight + c) * line.rstd * line.keep;
    line.intercept = load(bias + c) * line.keep - line.mean * line.slope;
    return line;
  }

  // Calls body(first value, place in the tables, first channel) for each sixteen channels of an image.
  template <typename Body> void channels_of(int64_t n, Body body) const {
    for (int64_t c = 0; c < channels; c += LANES) body(n * pixels * channels + c, n * channels + c, c);
  }
  // Calls body(place, channel) for a set.
  template <typename Body> void places_of(int64_t n0, int64_t n1, int64_t c0, int64_t c1, Body body) const {
    for (int64_t n = n0; n < n1; n++)
      for (int64_t c = c0; c < c1; c++) body(n * channels + c, c);
  }
  // Does first for every image, then middle for every set, then last for every image; where the sets lie within an
  // image, all three while the image is in the cache.
  template <typename First, typename Middle, typename Last> void run(First first, Middle middle, Last last) const {
    if (groups) {
#pragma omp parallel for schedule(static)
      for (int64_t n = 0; n < images; n++) {
        first(n);
        for (int64_t g = 0; g < groups; g++) middle(n, n + 1, g * channels / groups, (g + 1) * channels / groups);
        last(n);
      }
    } else {
#pragma omp parallel
      {
#pragma omp for schedule(static)
        for (int64_t n = 0; n < images; n++) first(n);
#pragma omp for schedule(static)
        for (int64_t c = 0; c < channels; c++) middle(0, images, c, c + 1);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < images; n++) last(n);
      }
    }
  }
};

template <typename T> void forward(const Norm& norm, const T* x, T* y) {
  const int64_t channels = norm.channels, length = norm.pixels * channels;
  norm.run(
      [&](int64_t n) {
        norm.channels_of(n, [&](int64_t start, int64_t place, int64_t) {
          const Floats pivot = load(x + start);  // near the mean, so that the squares do not swallow the variance
          Floats sum = {}, squares = {};
          for (int64_t i = start; i < start + length; i += channels) {
            const Floats distance = load(x + i) - pivot;
            sum += distance;
            squares += distance * distance;
          }
          sum /= float(norm.pixels);
          store(norm.mean + place, pivot + sum);
          store(norm.variance + place, squares / float(norm.pixels) - sum * sum);
        });
      },
      [&](int64_t n0, int64_t n1, int64_t c0, int64_t c1) {
        const float count = (n1 - n0) * (c1 - c0);
        float mean = 0, variance = 0;
        norm.places_of(n0, n1, c0, c1, [&](int64_t place, int64_t) { mean += norm.mean[place] / count; });
        norm.places_of(n0, n1, c0, c1, [&](int64_t place, int64_t) {
          const float distance = norm.mean[place] - mean;
          variance += (norm.variance[place] + distance * distance) / count;
        });
        norm.places_of(n0, n1, c0, c1, [&](int64_t place, int64_t) {
          norm.mean[place] = mean;
          norm.variance[place] = variance;
        });
      },
      [&](int64_t n) {
        norm.channels_of(n, [&](int64_t start, int64_t place, int64_t c) {
          const auto line = norm.line(place, c);
          for (int64_t i = start; i < start + length; i += channels) {
            const Floats z = load(x + i) * line.slope + line.intercept;
            store(y + i, where(!(z < 0), z));  // so that NaN stays NaN
          }
        });
      });
}

// With h the gradient that passes ReLU and dropout, u = weight * h and v its normalised input, all of a set:
// dx = (u - mean(u) - v * mean(u * v)) / deviation.
template <typename T>
void backward(const Norm& norm, const T* gradient, const T* x, T* dx, float* dweight, float* dbias) {
  const int64_t channels = norm.channels, length = norm.pixels * channels, places = norm.images * channels;
  std::vector<float> tables(4 * places);
  float *sum_h = &tables[0], *sum_hv = sum_h + places, *mean_u = sum_hv + places, *mean_uv = mean_u + places;
  norm.run(
      [&](int64_t n) {
        norm.channels_of(n, [&](int64_t start, int64_t place, int64_t c) {
          const auto line = norm.line(place, c);
          Floats sum = {}, product = {};
          for (int64_t i = start; i < start + length; i += channels) {
            const Floats value = load(x + i);
            const Floats passed = where(value * line.slope + line.intercept > 0, load(gradient + i));
            sum += passed;
            product += passed * (value - line.mean);
          }
          store(sum_h + place, sum * line.keep);
          store(sum_hv + place, product * line.keep * line.rstd);
        });
      },
      [&](int64_t n0, int64_t n1, int64_t c0, int64_t c1) {
        const float count = (n1 - n0) * (c1 - c0) * norm.pixels;
        float u = 0, uv = 0;
        norm.places_of(n0, n1, c0, c1, [&](int64_t place, int64_t c) {
          u += norm.weight[c] * sum_h[place];
          uv += norm.weight[c] * sum_hv[place];
        });
        norm.places_of(n0, n1, c0, c1, [&](int64_t place, int64_t) {
          mean_u[place] = u / count;
          mean_uv[place] = uv / count;
        });
      },
      [&](int64_t n) {
        norm.channels_of(n, [&](int64_t start, int64_t place, int64_t c) {
          const auto line = norm.line(place, c);
          const Floats per_value = -line.rstd * line.rstd * load(mean_uv + place);
          const Floats constant = -line.rstd * load(mean_u + place) - line.mean * per_value;
          for (int64_t i = start; i < start + length; i += channels) {
            const Floats value = load(x + i);
            const Floats passed = where(value * line.slope + line.intercept > 0, load(gradient + i));
            store(dx + i, passed * line.slope + value * per_value + constant);
          }
        });
      });
  for (int64_t c = 0; c < channels; c++) dweight[c] = dbias[c] = 0;
  norm.places_of(0, norm.images, 0, channels, [&](int64_t place, int64_t c) {
    dweight[c] += sum_hv[place];
    dbias[c] += sum_h[place];
  });
}

}  // namespace

extern "C" void forward(bool half, const void* x, void* y, const float* weight, const float* bias, const float* keep,
                        float* mean, float* variance, int64_t images, int64_t channels, int64_t pixels,
                        int64_t groups, float eps) {
  const Norm norm = {weight, bias, keep, mean, variance, images, channels, pixels, groups, eps};
  if (half)
    forward(norm, (const bfloat16*)x, (bfloat16*)y);
  else
    forward(norm, (const float*)x, (float*)y);
}

extern "C" void backward(bool half, const void* gradient, const void* x, const float* weight, const float* bias,
                         const float* keep, float* mean, float* variance, void* dx, float* dweight, float* dbias,
                         int64_t images, int64_t channels, int64_t pixels, int64_t groups, float eps) {
  const Norm norm = {weight, bias, keep, mean, variance, images, channels, pixels, groups, eps};
  if (half)
    backward(norm, (const bfloat16*)gradient, (const bfloat16*)x, (bfloat16*)dx, dweight, dbias);
  else
    backward(norm, (const float*)gradient, (const float*)x, (float*)dx, dweight, dbias);
}
"""
