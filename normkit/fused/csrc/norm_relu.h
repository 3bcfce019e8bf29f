// Normalisation, ReLU and dropout of a CONV_NORM_RELU layer, as its readers see them. Their result is not stored: each
// reader computes it from pre_activation, which takes less time than the way to memory and back.
#pragma once

#include "layer_params.h"
#include "vec.h"

namespace {

// The output of one image's vector of channels, as a function of pre_activation.
struct NormReLU {
  vec_f32 scale, shift;

  NormReLU(const LayerParams& p, int64_t n, int64_t k)
      : scale(load(p.scale + n * p.K + k)), shift(load(p.shift + n * p.K + k)) {}
  vec_f32 out(vec_f32 pre_activation) const {
    const vec_f32 value = pre_activation * scale + shift;
    const vec_f32 zero = {};
    return zero > value ? zero : value;  // in this order NaN stays NaN
  }
  // Where a gradient passes ReLU: also at NaN, as in PyTorch.
  vec_i32 passes(vec_f32 pre_activation) const { return !(pre_activation * scale + shift <= 0); }
};

// Copies `count` pixels of image n of a layer's input, from pixel number `first` on, to float32, `stride` values apart.
// Values between C and the next whole vector are arbitrary.
template <typename T>
inline void read_pixels(const LayerParams& p, int64_t n, int64_t first, int64_t count, float* to, int64_t stride) {
  const int64_t C = p.C;
  const T* from = (const T*)p.x + (n * p.H * p.W + first) * C;
  const T* end = (const T*)p.x + p.N * p.H * p.W * C;
  for (int64_t c = 0; c < C; c += LANES)
    if (p.source) {
      const NormReLU norm_relu(*p.source, n, c);
      for (int64_t i = 0; i < count; i++) store(to + i * stride + c, norm_relu.out(load(from + i * C + c)));
    } else {
      for (int64_t i = 0; i < count; i++) store(to + i * stride + c, load(from + i * C + c, C - c, end));
    }
}

// Sums up, over image n, the gradients of the scale and shift of a CONV_NORM_RELU layer from that of its output.
template <typename T> inline void sum_gradients(const LayerParams& p, const T* dout, int64_t n) {
  const int64_t area = p.H * p.W, first = n * area * p.K;
  for (int64_t k = 0; k < p.K; k += LANES) {
    const NormReLU norm_relu(p, n, k);
    const vec_f32 mean = load(p.mean + n * p.K + k);
    const T* pre_activation = (const T*)p.pre_activation + first + k;
    const auto [dscale, dshift] = sum_up<2>(area, [&](int64_t i, vec_f32* sums) {
                                    const vec_f32 value = load(pre_activation + i * p.K),
                                                  h = select(norm_relu.passes(value), load(dout + first + i * p.K + k));
                                    sums[0] += h * (value - mean);
                                    sums[1] += h;
                                  }).values;
    store(p.dscale + n * p.K + k, dscale);
    store(p.dshift + n * p.K + k, dshift);
  }
}

}  // namespace
