// 1×1 convolution in float32, then 2×2 max pooling. Images are taken by strips of two rows of pixels.
#pragma once

#include "gemm.h"
#include "layer_params.h"
#include "parallel.h"

namespace {

template <typename T> struct Conv1x1MaxPool {
  const LayerParams& p;
  const int64_t C = p.C, K = p.K, W = p.W, pixels = 2 * W;  // of a strip
  const int64_t strips = p.N * p.H / 2, chunks = std::min(strips, REDUCTION_CHUNKS);
  const int64_t pixels_padded = round_up(pixels, MR), K_rows = round_up(K, MR), K_columns = round_up(K, LANES);
  const int64_t grad_size = K_rows * C + K_columns;  // of a chunk's dweight and dbias
  const int64_t window[4] = {0, 1, W, W + 1};        // the pixels that one maximum is taken of

  struct Scratch {
    Buffer<> x, conv, dx;  // of a strip: (pixels_padded, C), (pixels_padded, K_columns), (pixels_padded, C)
  };
  Scratch make_scratch() const { return {pixels_padded * C, pixels_padded * K_columns, pixels_padded * C}; }

  // Calls body(first pixel, index in out, first channel, how many channels) for each window of a strip.
  template <typename Body> void for_each_window(int64_t strip, Body body) const {
    for (int64_t x = 0; x < W / 2; x++)
      for (int64_t k = 0; k < K; k += LANES) body(2 * x, (strip * W / 2 + x) * K + k, k, std::min(LANES, K - k));
  }
  void read_strip(int64_t strip, float* to) const {
    const T* x = (const T*)p.x + strip * pixels * C;
    for (int64_t i = 0; i < pixels * C; i += LANES) store(to + i, load(x + i));
  }

  void forward() const {
    const Buffer<> packed((C + 1) * K_columns);  // (C, K_columns), and the bias as one more row
    std::fill_n((float*)packed, (C + 1) * K_columns, 0);
    for (int64_t k = 0; k < K; k++) {
      for (int64_t c = 0; c < C; c++) packed[c * K_columns + k] = p.weight[k * C + c];
      packed[C * K_columns + k] = p.bias[k];
    }
    const PerThread<Scratch> scratches([&] { return make_scratch(); });
    parallel([&](const Thread& thread) {
      const Scratch& scratch = scratches[thread];
      thread.for_each(strips, [&](int64_t strip) {
        read_strip(strip, scratch.x);
        gemm<float>(scratch.x, C, 1, packed, scratch.conv, pixels, C, K_columns);
        for_each_window(strip, [&](int64_t first, int64_t index, int64_t k, int64_t count) {
          vec_f32 largest = {}, argmax = {};
          UNROLL(4)
          for (int64_t i = 0; i < 4; i++) {
            const vec_f32 value = load(scratch.conv + (first + window[i]) * K_columns + k);
            const vec_i32 larger = i ? (value > largest) | (value != value) : ~vec_i32{};  // NaN counts as largest
            largest = select(larger, value) + select(~larger, largest);
            argmax = select(larger, vec_f32{} + float(i)) + select(~larger, argmax);
          }
          store((T*)p.out + index, largest + load(packed + C * K_columns + k), count);
          if (p.argmax) store((T*)p.argmax + index, argmax, count);
        });
      });
    });
  }

  void backward() const {
    const int64_t out_size = strips * W / 2 * K;
    const T *dout = (const T*)p.dout, *argmax = (const T*)p.argmax;
    const Buffer<> grads(chunks * grad_size);
    const PerThread<Scratch> scratches([&] { return make_scratch(); });
    parallel([&](const Thread& thread) {
      const Scratch& scratch = scratches[thread];
      thread.for_each(chunks, [&](int64_t chunk) {
        float *dweight = grads + chunk * grad_size, *dbias = dweight + K_rows * C;
        std::fill_n(dweight, grad_size, 0);
        for (int64_t strip = strips * chunk / chunks; strip < strips * (chunk + 1) / chunks; strip++) {
          read_strip(strip, scratch.x);
          for_each_window(strip, [&](int64_t first, int64_t index, int64_t k, int64_t count) {
            const vec_f32 value = load(dout + index, count, dout + out_size);
            const vec_f32 chosen = load(argmax + index, count, argmax + out_size);
            store(dbias + k, load(dbias + k) + value);
            for (int64_t i = 0; i < 4; i++)
              store(scratch.conv + (first + window[i]) * K_columns + k, select(chosen == float(i), value));
          });
          gemm<float>(scratch.conv, 1, K_columns, scratch.x, dweight, K, pixels, C, true);
          gemm<float>(scratch.conv, K_columns, 1, p.weight, scratch.dx, pixels, K, C);
          T* dx = (T*)p.dx + strip * pixels * C;
          for (int64_t i = 0; i < pixels * C; i += LANES) store(dx + i, load(scratch.dx + i));
        }
      });
    });
    for (int64_t k = 0; k < K; k++) {
      p.dbias[k] = 0;
      std::fill_n(p.dweight + k * C, C, 0);
      for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const float *dweight = grads + chunk * grad_size, *dbias = dweight + K_rows * C;
        p.dbias[k] += dbias[k];
        for (int64_t c = 0; c < C; c++) p.dweight[k * C + c] += dweight[k * C + c];
      }
    }
  }
};

}  // namespace
