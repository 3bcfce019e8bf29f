// 3×3 convolution, padding 1, of images with few channels, such as RGB: Winograd's vectors of channels would stay
// mostly empty. Images are (N, C, H, W) in float32. Each row of the output is a product: im2col (9 C, W) by weight
// (9 C, K), where row 9 C of im2col lists the input rows above, at and below, each shifted by -1, 0 and 1 pixel.
// No gradient of the images is computed.
#pragma once

#include "arena.h"
#include "gemm.h"
#include "layer_params.h"
#include "parallel.h"

namespace {

// Factor: as Winograd's. Pairs are of neighbouring pixels, over which the weight's gradient sums up.
template <typename T, typename Factor> struct Im2col {
  static constexpr int64_t PER_FACTOR = is_pair<Factor> ? 2 : 1;
  typedef std::conditional_t<is_pair<Factor>, bf16, float> Value;

  const LayerParams& p;
  const int64_t C = p.C, K = p.K, H = p.H, W = p.W;
  const int64_t W_padded = round_up(W, std::max(LANES, MR)), row_size = 3 * C * W_padded;
  const int64_t taps = 9 * C, weight_size = taps * K;  // a tap is (row, column, channel), in this order
  const int64_t depth = (W + PER_FACTOR - 1) / PER_FACTOR;
  const int64_t images_per_block = 1;

  struct Scratch {
    float* padded_row;
    Factor* rows;  // (H + 2, 3, C, W_padded): each input row, in three copies a pixel apart
    Factor* drow;  // (depth, K), of a row of pixels
    float* dweight;
  };
  Scratch take_scratch(Arena& arena, bool backward) const {
    return {arena.take<float>(W_padded + 2 * LANES), arena.take<Factor>(rows_size() / PER_FACTOR),
            arena.take<Factor>(backward * depth * K), arena.take<float>(backward * round_up(taps, MR) * K)};
  }
  int64_t rows_size() const { return (H + 2) * row_size + MR * W_padded; }
  void clear(const Scratch& scratch) const {
    std::fill_n(scratch.padded_row, W_padded + 2 * LANES, 0);
    std::fill_n(scratch.rows, rows_size() / PER_FACTOR, 0);
  }

  // The weight as (taps, K), for the forward pass.
  float* pack(Arena& arena, bool backward) const {
    float* packed = backward ? nullptr : arena.take<float>(weight_size);
    for (int64_t i = 0; packed && i < taps; i++)
      for (int64_t k = 0; k < K; k++) packed[i * K + k] = p.weight[p.weight_index(k, i % C, i / C)];
    return packed;
  }

  void fill_rows(int64_t n, const Scratch& scratch) const {
    const float* from = (const float*)p.x + n * C * H * W;
    float* padded = scratch.padded_row + LANES;
    Value* to = (Value*)scratch.rows + row_size;
    for (int64_t c = 0; c < C; c++)
      for (int64_t y = 0; y < H; y++, from += W) {
        std::copy_n(from, W, padded);
        for (int64_t shift = 0; shift < 3; shift++)
          for (int64_t x = 0; x < W_padded; x += LANES)
            store(to + y * row_size + (shift * C + c) * W_padded + x, load(padded + x + shift - 1));
      }
  }

  void forward(int64_t begin, int64_t end, const Scratch& scratch) const {
    for (int64_t n = begin; n < end; n++) {
      fill_rows(n, scratch);
      for (int64_t y = 0; y < H; y++)
        gemm<float, T, 1>({scratch.rows + y * row_size, 1, W_padded}, {(const float*)p.packed, K},
                          {(T*)p.pre_activation + (n * H + y) * W * K, K}, W, taps, K, {p.bias, 0});
    }
  }

  void fill_drow(const T* dpre_activation, Factor* drow) const {
    for (int64_t x = 0; x < W; x += PER_FACTOR, dpre_activation += PER_FACTOR * K)
      for (int64_t k = 0; k < K; k += LANES, drow += LANES)
        if constexpr (is_pair<Factor>) {
          const vec_bf16 left = read<vec_bf16>(dpre_activation + k);
          const vec_u32 pairs = interleave(left, x + 1 < W ? read<vec_bf16>(dpre_activation + K + k) : vec_bf16{});
          memcpy(drow, &pairs, sizeof pairs);
        } else {
          store(drow, load(dpre_activation + k));
        }
  }
  void backward(int64_t begin, int64_t end, const T* dpre_activation, const Scratch& scratch, bool first) const {
    for (int64_t n = begin; n < end; n++) {
      fill_rows(n, scratch);
      for (int64_t y = 0; y < H; y++, dpre_activation += W * K, first = false) {
        fill_drow(dpre_activation, scratch.drow);
        with_constant(W_padded, [&](auto row) {
          gemm<Factor, float, row.value / PER_FACTOR>({scratch.rows + y * row_size / PER_FACTOR, W_padded / PER_FACTOR},
                                                      {scratch.drow, K}, {scratch.dweight, K}, round_up(taps, MR),
                                                      depth, K, {first ? nullptr : scratch.dweight, K});
        });
      }
    }
  }

  void store_weight_grad(const Scratch& scratch, float* dweight, bool first) const {
    for (int64_t i = 0; i < weight_size; i += LANES)
      store(dweight + i, first ? load(scratch.dweight + i) : load(dweight + i) + load(scratch.dweight + i));
  }
};

}  // namespace
