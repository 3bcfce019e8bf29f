// 1×1 convolution in float32, then 2×2 max pooling. Images are taken by strips of two rows of pixels.
#pragma once

#include "arena.h"
#include "gemm.h"
#include "norm_relu.h"
#include "parallel.h"

namespace {

template <typename T> struct Conv1x1MaxPool {
  const LayerParams& p;
  const int64_t N = p.N, C = p.C, K = p.K, W = p.W, pixels = 2 * W, strips = p.H / 2;  // of a strip, of an image
  const int64_t pixels_padded = round_up(pixels, MR / 2);
  const int64_t K_rows = round_up(K, MR), K_columns = round_up(K, std::max(LANES, MR));  // dweight reads K_rows columns
  const int64_t dweight_size = K_rows * C, grad_size = dweight_size + K_columns;
  const int64_t out_size = N * strips * (W / 2) * K;
  const int64_t window[4] = {0, 1, W, W + 1};  // the pixels that one maximum is taken of

  struct Scratch {  // of a strip
    float* x;       // (pixels_padded, C)
    float* conv;    // (pixels_padded, K_columns), or its gradient
  };
  Scratch take_scratch(Arena& arena, bool) const {
    return {arena.take<float>(pixels_padded * C), arena.take<float>(pixels_padded * K_columns)};
  }

  // The weight as (C, K_columns), and the bias as one more row, for the forward pass.
  float* pack(Arena& arena, bool backward) const {
    float* packed = backward ? nullptr : arena.take<float>((C + 1) * K_columns);
    if (!packed) return packed;
    std::fill_n(packed, (C + 1) * K_columns, 0);
    for (int64_t k = 0; k < K; k++) {
      for (int64_t c = 0; c < C; c++) packed[c * K_columns + k] = p.weight[k * C + c];
      packed[C * K_columns + k] = p.bias[k];
    }
    return packed;
  }

  // Calls body(first pixel, index in out, first channel, how many channels) for each window of a strip of image n.
  template <typename Body> void for_each_window(int64_t n, int64_t strip, Body body) const {
    const int64_t first = (n * strips + strip) * (W / 2);
    for (int64_t x = 0; x < W / 2; x++)
      for (int64_t k = 0; k < K; k += LANES) body(2 * x, (first + x) * K + k, k, std::min(LANES, K - k));
  }

  void forward(const Thread&, int64_t begin, int64_t end, Arena arena) const {
    const Scratch scratch = take_scratch(arena, false);
    const float *packed = (const float*)p.packed, *bias = packed + C * K_columns;
    for (int64_t n = begin; n < end; n++)
      for (int64_t strip = 0; strip < strips; strip++) {
        read_pixels<T>(p, n, strip * pixels, pixels, scratch.x, C);
        with_constant(C, [&](auto row) {
          gemm<float, float, row.value>({scratch.x, C}, {packed, K_columns}, {scratch.conv, K_columns}, pixels_padded,
                                        C, K_columns);
        });
        for_each_window(n, strip, [&](int64_t first, int64_t index, int64_t k, int64_t count) {
          vec_f32 largest = {}, argmax = {};
          UNROLL(4)
          for (int64_t i = 0; i < 4; i++) {
            const vec_f32 value = load(scratch.conv + (first + window[i]) * K_columns + k);
            const vec_i32 larger = i ? (value > largest) | (value != value) : ~vec_i32{};  // NaN counts as largest
            largest = larger ? value : largest;
            argmax = larger ? vec_f32{} + float(i) : argmax;
          }
          store((T*)p.out + index, largest + load(bias + k), count);
          if (p.argmax) store((T*)p.argmax + index, argmax, count);
        });
      }
  }

  void backward(int64_t begin, int64_t end, Arena arena, float* grads, bool first) const {
    const Scratch scratch = take_scratch(arena, true);
    const T *dout = (const T*)p.dout, *argmax = (const T*)p.argmax;
    float *dweight = grads, *dbias = dweight + dweight_size;
    if (first) std::fill_n(grads, grad_size, 0);
    for (int64_t n = begin; n < end; n++) {
      for (int64_t strip = 0; strip < strips; strip++) {
        read_pixels<T>(p, n, strip * pixels, pixels, scratch.x, C);
        for_each_window(n, strip, [&](int64_t pixel, int64_t index, int64_t k, int64_t count) {
          const vec_f32 value = load(dout + index, count, dout + out_size);
          const vec_f32 chosen = load(argmax + index, count, argmax + out_size);
          add(dbias + k, value);
          for (int64_t i = 0; i < 4; i++)
            store(scratch.conv + (pixel + window[i]) * K_columns + k, select(chosen == float(i), value));
        });
        gemm<float, float, 1>({scratch.conv, 1, K_columns}, {scratch.x, C}, {dweight, C}, K_rows, pixels, C,
                              {dweight, C});
        T* dx = (T*)p.dx + (n * strips + strip) * pixels * C;
        with_constant(K_columns, [&](auto row) {
          gemm<float, T, row.value>({scratch.conv, K_columns}, {p.weight, C}, {dx, C}, pixels, K, C);
        });
      }
      if (p.source) sum_gradients(*p.source, (const T*)p.dx, n);
    }
  }

  void reduce(const Thread& thread, int64_t chunks) const { reduce_linear(p, thread, chunks, grad_size, dweight_size); }
};

}  // namespace
