// Global average pooling, then a linear layer; the output is in float32.
#pragma once

#include "arena.h"
#include "norm_relu.h"
#include "parallel.h"

namespace {

template <typename T> struct AvgPoolLinear {
  const LayerParams& p;
  const int64_t N = p.N, C = p.C, K = p.K, area = p.H * p.W;
  const int64_t dweight_size = K * C, grad_size = dweight_size + K;

  float* take_scratch(Arena& arena, bool) const { return arena.take<float>(area * C); }
  void* pack(Arena&, bool) const { return nullptr; }

  void forward(const Thread&, int64_t begin, int64_t end, Arena arena) const {
    float* x = take_scratch(arena, false);
    for (int64_t n = begin; n < end; n++) {
      float *pooled = p.pooled + n * C, *out = (float*)p.out + n * K;
      read_pixels<T>(p, n, 0, area, x, C);
      for (int64_t c = 0; c < C; c += LANES) {
        vec_f32 sum = {};
        for (int64_t pixel = 0; pixel < area; pixel++) sum += load(x + pixel * C + c);
        store(pooled + c, sum / float(area));
      }
      for (int64_t k = 0; k < K; k++) {
        vec_f32 products = {};
        for (int64_t c = 0; c < C; c += LANES) products += load(pooled + c) * load(p.weight + k * C + c);
        out[k] = p.bias[k];
        for (int64_t l = 0; l < LANES; l++) out[k] += products[l];
      }
    }
  }

  void backward(int64_t begin, int64_t end, Arena, float* grads, bool first) const {
    float *dweight = grads, *dbias = dweight + dweight_size;
    if (first) std::fill_n(grads, grad_size, 0);
    for (int64_t n = begin; n < end; n++) {
      const float *dout = (const float*)p.dout + n * K, *pooled = p.pooled + n * C;
      for (int64_t k = 0; k < K; k++) dbias[k] += dout[k];
      for (int64_t c = 0; c < C; c += LANES) {
        vec_f32 sum = {};
        for (int64_t k = 0; k < K; k++) {
          sum += dout[k] * load(p.weight + k * C + c);
          add(dweight + k * C + c, dout[k] * load(pooled + c));
        }
        T* dx = (T*)p.dx + n * area * C + c;
        for (int64_t pixel = 0; pixel < area; pixel++) store(dx + pixel * C, sum / float(area));
      }
      if (p.source) sum_gradients(*p.source, (const T*)p.dx, n);
    }
  }

  void reduce(const Thread& thread, int64_t chunks) const { reduce_linear(p, thread, chunks, grad_size, dweight_size); }
};

}  // namespace
