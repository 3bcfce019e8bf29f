// Global average pooling, then a linear layer; the output is in float32.
#pragma once

#include "layer_params.h"
#include "parallel.h"
#include "vec.h"

namespace {

template <typename T> struct AvgPoolLinear {
  const LayerParams& p;
  const int64_t N = p.N, C = p.C, K = p.K, area = p.H * p.W;

  void forward() const {
    parallel_for(N, [&](int64_t n) {
      const T* x = (const T*)p.x + n * area * C;
      float *pooled = p.pooled + n * C, *out = (float*)p.out + n * K;
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
    });
  }

  void backward() const {
    const float *dout = (const float*)p.dout, *pooled = p.pooled;
    parallel_for(N, [&](int64_t n) {
      for (int64_t c = 0; c < C; c += LANES) {
        vec_f32 sum = {};
        for (int64_t k = 0; k < K; k++) sum += dout[n * K + k] * load(p.weight + k * C + c);
        T* dx = (T*)p.dx + n * area * C + c;
        for (int64_t pixel = 0; pixel < area; pixel++) store(dx + pixel * C, sum / float(area));
      }
    });
    for (int64_t k = 0; k < K; k++) {
      p.dbias[k] = 0;
      for (int64_t n = 0; n < N; n++) p.dbias[k] += dout[n * K + k];
      for (int64_t c = 0; c < C; c += LANES) {
        vec_f32 sum = {};
        for (int64_t n = 0; n < N; n++) sum += dout[n * K + k] * load(pooled + n * C + c);
        store(p.dweight + k * C + c, sum);
      }
    }
  }
};

}  // namespace
