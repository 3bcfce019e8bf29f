// 3×3 convolution, padding 1, by Winograd's minimal filtering F(4×4, 3×3) (Lavin and Gray 2016, arXiv 1509.09308).
//
// The padded image is cut into tiles of 6×6 pixels, four apart. Tiles and weights are transformed into the Winograd
// domain of 36 points; there the convolution is 36 products of matrices, tiles × C by C × K; and each result is
// transformed back to 4×4 pixels. 36 multiplications an output tile and channel pair in place of 144.
//
// Letters as in that paper: d a tile of the input, g a weight's nine taps; U = transform of g, V = transform of d,
// M = V · U, y = transform of M. In memory:
//   U (36, C, K), for the backward pass (36, K, C_padded)
//   V (36, tiles, C_padded)        M (36, tiles, K)
//   dM as M, and dM_by_k the same with pairs of neighbouring k        dU (36, C_padded, K)
#pragma once

#include "gemm.h"
#include "layer_params.h"
#include "parallel.h"

namespace {

// The one-dimensional transforms and their gradients, of values `s` apart into values `r` apart. Polynomials are
// evaluated at 0, ±A, ±B and infinity; with these A and B rounding errors stay small.
constexpr float A = 0.70710678f, B = 1.41421356f, AA = 0.5f, BB = 2, AA_BB = AA + BB;
constexpr float IN_A = -2 / 3.f, IN_B = 1 / 6.f;  // 1 / the product of the distances to the other points

inline void filter_transform(const vec_f32* g, int64_t s, vec_f32* u, int64_t r) {
  const vec_f32 a = IN_A * (g[0] + AA * g[2 * s]), da = IN_A * A * g[s];
  const vec_f32 b = IN_B * (g[0] + BB * g[2 * s]), db = IN_B * B * g[s];
  u[0] = g[0], u[r] = a + da, u[2 * r] = a - da, u[3 * r] = b + db, u[4 * r] = b - db, u[5 * r] = g[2 * s];
}
inline void filter_transform_backward(const vec_f32* u, int64_t s, vec_f32* g, int64_t r) {
  const vec_f32 a = IN_A * (u[s] + u[2 * s]), da = IN_A * A * (u[s] - u[2 * s]);
  const vec_f32 b = IN_B * (u[3 * s] + u[4 * s]), db = IN_B * B * (u[3 * s] - u[4 * s]);
  g[0] = u[0] + a + b, g[r] = da + db, g[2 * r] = AA * a + BB * b + u[5 * s];
}
inline void input_transform(const vec_f32* d, int64_t s, vec_f32* v, int64_t r) {
  const vec_f32 a = d[4 * s] - BB * d[2 * s], da = A * (d[3 * s] - BB * d[s]);
  const vec_f32 b = d[4 * s] - AA * d[2 * s], db = B * (d[3 * s] - AA * d[s]);
  v[0] = d[0] - AA_BB * d[2 * s] + d[4 * s], v[r] = a + da, v[2 * r] = a - da;
  v[3 * r] = b + db, v[4 * r] = b - db, v[5 * r] = d[s] - AA_BB * d[3 * s] + d[5 * s];
}
inline void input_transform_backward(const vec_f32* v, int64_t s, vec_f32* d, int64_t r) {
  const vec_f32 a = v[s] + v[2 * s], da = A * (v[s] - v[2 * s]);
  const vec_f32 b = v[3 * s] + v[4 * s], db = B * (v[3 * s] - v[4 * s]);
  d[0] = v[0], d[r] = v[5 * s] - BB * da - AA * db, d[2 * r] = -AA_BB * v[0] - BB * a - AA * b;
  d[3 * r] = da + db - AA_BB * v[5 * s], d[4 * r] = v[0] + a + b, d[5 * r] = v[5 * s];
}
inline void output_transform(const vec_f32* m, int64_t s, vec_f32* y, int64_t r) {
  const vec_f32 a = m[s] + m[2 * s], da = A * (m[s] - m[2 * s]);
  const vec_f32 b = m[3 * s] + m[4 * s], db = B * (m[3 * s] - m[4 * s]);
  y[0] = m[0] + a + b, y[r] = da + db, y[2 * r] = AA * a + BB * b, y[3 * r] = AA * da + BB * db + m[5 * s];
}
inline void output_transform_backward(const vec_f32* y, int64_t s, vec_f32* m, int64_t r) {
  const vec_f32 a = y[0] + AA * y[2 * s], da = A * (y[s] + AA * y[3 * s]);
  const vec_f32 b = y[0] + BB * y[2 * s], db = B * (y[s] + BB * y[3 * s]);
  m[0] = y[0], m[r] = a + da, m[2 * r] = a - da, m[3 * r] = b + db, m[4 * r] = b - db, m[5 * r] = y[3 * s];
}

// Applies a one-dimensional transform from `from` to `to` values down the columns of a square, then along its rows.
template <int64_t from, int64_t to, typename Transform>
inline void transform_2d(const vec_f32* in, vec_f32* out, Transform transform) {
  vec_f32 columns[to * from];
  UNROLL(6)
  for (int64_t x = 0; x < from; x++) transform(in + x, from, columns + x, from);
  UNROLL(6)
  for (int64_t y = 0; y < to; y++) transform(columns + y * from, 1, out + y * to, 1);
}

// Reads and writes the 36 points of a tile, which lie `stride` apart.
inline void gather(vec_f32* points, const float* from, int64_t stride) {
  UNROLL(36)
  for (int64_t i = 0; i < 36; i++) points[i] = load(from + i * stride);
}
template <typename T> inline void scatter(const vec_f32* points, T* to, int64_t stride) {
  UNROLL(36)
  for (int64_t i = 0; i < 36; i++) store(to + i * stride, points[i]);
}
// Writes into one row of a matrix (rows, columns) that is later summed over its rows. Pairs hold two rows each, of
// which the even one is to be written first.
template <typename Factor>
inline void scatter(const vec_f32* points, Factor* to, int64_t stride, int64_t row, int64_t columns) {
  if constexpr (is_pair<Factor>) {
    to += row / 2 * columns;
    UNROLL(36)
    for (int64_t i = 0; i < 36; i++) {
      const vec_u32 value = zero_extend(f32_to_bf16(points[i]));
      const vec_u32 pair = row % 2 ? read<vec_u32>(to + i * stride) | value << 16 : value;
      memcpy(to + i * stride, &pair, sizeof pair);
    }
  } else {
    scatter(points, to + row * columns, stride);
  }
}

// Factor is bf16x2 in backward passes alone. There, rounding the points hardly adds to what rounded activations do (to
// a batch of CIFAR-10: 6.9 % of the gradient with batch norm, 1.4 % with group norm, before and after). In the forward
// pass it would put each convolution off by 1 %, four times as much as bfloat16 does otherwise.
template <typename T, typename Factor> struct Winograd {
  static constexpr int64_t TILES_PER_BLOCK = 32;  // their points fit into the cache
  static constexpr int64_t PER_FACTOR = is_pair<Factor> ? 2 : 1;

  const LayerParams& p;
  const int64_t C = p.C, K = p.K, H = p.H, W = p.W;
  const int64_t C_padded = round_up(C, std::max(LANES, MR));
  const int64_t tile_rows = (H + 3) / 4, tile_columns = (W + 3) / 4, tiles = tile_rows * tile_columns;
  const int64_t images_per_block = std::clamp(TILES_PER_BLOCK / tiles, int64_t(1), p.N);
  const int64_t padded_W = tile_columns * 4 + 2, padded_image = (tile_rows * 4 + 2) * padded_W * C_padded;
  const int64_t weight_size = 9 * C * K;

  struct Scratch {
    Buffer<> padded;  // (images_per_block, padded H, padded W, C_padded)
    Buffer<Factor> V;
    Buffer<> M, dpadded;
    Buffer<Factor> dM, dM_by_k;
    Buffer<> dU;
    Buffer<> dpre_activation;  // (images_per_block, H, W, K)
  };
  Scratch make_scratch() const {
    const int64_t backward = p.dout != nullptr, widest = std::max(C_padded, K);
    return {images_per_block * padded_image, 36 * point_stride(C_padded),
            36 * point_stride(widest),       backward * images_per_block * padded_image,
            backward * 36 * point_stride(K), is_pair<Factor> * backward * 36 * point_stride(K),
            backward * 36 * C_padded * K,    backward * images_per_block * H * W * K};
  }
  void clear(const Scratch& scratch) const { std::fill_n((float*)scratch.padded, images_per_block * padded_image, 0); }

  // From one of the 36 points to the next. A vector more than the tiles need, or all points would begin in the same set
  // of the cache.
  static int64_t point_stride(int64_t channels) { return TILES_PER_BLOCK * channels + LANES; }

  // Returns U.
  Buffer<Factor> pack(bool backward) const {
    const int64_t rows = backward ? K : C, columns = backward ? C_padded : K, valid = backward ? C : K;
    Buffer<Factor> U(36 * rows * columns);
    parallel_for(columns / LANES, [&](int64_t vector) {
      const int64_t column = vector * LANES;
      for (int64_t row = 0; row < rows; row++) {
        vec_f32 taps[9] = {}, points[36];
        for (int64_t tap = 0; tap < 9; tap++)
          for (int64_t l = 0; l < LANES && column + l < valid; l++)
            taps[tap][l] =
                p.weight[backward ? p.weight_index(row, column + l, tap) : p.weight_index(column + l, row, tap)];
        transform_2d<3, 6>(taps, points, filter_transform);
        scatter(points, U + column, rows / PER_FACTOR * columns, row, columns);
      }
    });
    return U;
  }

  // Copies images begin ... end-1 into the middle of their zero-padded places.
  void pad(int64_t begin, int64_t end, float* to) const {
    const T* last = (const T*)p.x + end * H * W * C;
    for (int64_t n = begin; n < end; n++, to += padded_image)
      for (int64_t y = 0; y < H; y++) {
        const T* row = (const T*)p.x + (n * H + y) * W * C;
        float* padded_row = to + ((y + 1) * padded_W + 1) * C_padded;
        if (C == C_padded)
          for (int64_t i = 0; i < W * C_padded; i += LANES) store(padded_row + i, load(row + i));
        else
          for (int64_t x = 0; x < W; x++)
            for (int64_t c = 0; c < C; c += LANES)
              store(padded_row + x * C_padded + c, load(row + x * C + c, C - c, last));
      }
  }

  struct Tile {
    int64_t index, image, y, x;  // index and image within the block; y, x: its first output pixel
  };
  // Calls body(tile, first channel) for each of `count` tiles and each vector of channels.
  template <typename Body> void for_each_tile(int64_t start, int64_t count, int64_t channels, Body body) const {
    for (int64_t t = start; t < start + count; t++) {
      const Tile tile = {t - start, t / tiles, t % tiles / tile_columns * 4, t % tile_columns * 4};
      for (int64_t c = 0; c < channels; c += LANES) body(tile, c);
    }
  }
  // Calls body(i, offset in an image of K channels) for those of a tile's 16 output pixels that lie in the image.
  template <typename Body> void for_each_output_pixel(const Tile& tile, Body body) const {
    const int64_t first = ((tile.image * H + tile.y) * W + tile.x) * K;
    UNROLL(16)
    for (int64_t i = 0; i < 16; i++)
      if (tile.y + i / 4 < H && tile.x + i % 4 < W) body(i, first + (i / 4 * W + i % 4) * K);
  }
  // Calls body(i, offset in the padded image) for a tile's 36 input pixels.
  template <typename Body> void for_each_input_pixel(const Tile& tile, Body body) const {
    const int64_t first = tile.image * padded_image + (tile.y * padded_W + tile.x) * C_padded;
    UNROLL(36)
    for (int64_t i = 0; i < 36; i++) body(i, first + (i / 6 * padded_W + i % 6) * C_padded);
  }

  // gnu::flatten inlines all calls: with calls left in, each pixel's address would be computed anew.
  [[gnu::flatten]] void compute_V(int64_t start, int64_t count, const Scratch& scratch) const {
    for_each_tile(start, count, C_padded, [&](const Tile& tile, int64_t c) {
      vec_f32 d[36], v[36];
      for_each_input_pixel(tile, [&](int64_t i, int64_t pixel) { d[i] = load(scratch.padded + pixel + c); });
      transform_2d<6, 6>(d, v, input_transform);
      scatter(v, scratch.V + c, point_stride(C_padded), tile.index, C_padded);
    });
  }

  // Writes pre_activation of images begin ... end-1: the convolution with its bias, and the skip.
  [[gnu::flatten]] void forward(int64_t begin, int64_t end, const Factor* U, const Scratch& scratch) const {
    const int64_t first_pixel = begin * H * W, total = (end - begin) * tiles;
    pad(begin, end, scratch.padded);
    T* pre_activation = (T*)p.pre_activation + first_pixel * K;
    const T* skip = p.skip ? (const T*)p.skip + first_pixel * K : nullptr;
    for (int64_t start = 0; start < total; start += TILES_PER_BLOCK) {
      const int64_t count = std::min(TILES_PER_BLOCK, total - start);
      compute_V(start, count, scratch);
      for (int64_t i = 0; i < 36; i++)
        gemm<Factor>(scratch.V + i * point_stride(C_padded), C_padded, 1, U + i * C * K,
                     scratch.M + i * point_stride(K), count, C, K);
      for_each_tile(start, count, K, [&](const Tile& tile, int64_t k) {
        vec_f32 m[36], y[16];
        gather(m, scratch.M + tile.index * K + k, point_stride(K));
        transform_2d<6, 4>(m, y, output_transform);
        const vec_f32 bias = load(p.bias + k);
        for_each_output_pixel(tile, [&](int64_t i, int64_t pixel) {
          y[i] += bias;
          if (skip) y[i] += load(skip + pixel + k);
          store(pre_activation + pixel + k, y[i]);
        });
      });
    }
  }

  // From dpre_activation of images begin ... end-1: writes their dx, if it is wanted, and writes (first) or adds to dU.
  [[gnu::flatten]] void backward(int64_t begin, int64_t end, const Factor* U, const T* dpre_activation,
                                 const Scratch& scratch, bool first) const {
    const int64_t total = (end - begin) * tiles;
    pad(begin, end, scratch.padded);
    std::fill_n((float*)scratch.dpadded, images_per_block * padded_image, 0);
    for (int64_t start = 0; start < total; start += TILES_PER_BLOCK) {
      const int64_t count = std::min(TILES_PER_BLOCK, total - start);
      compute_V(start, count, scratch);
      for_each_tile(start, count, K, [&](const Tile& tile, int64_t k) {
        vec_f32 dy[16] = {}, dm[36];
        for_each_output_pixel(tile, [&](int64_t i, int64_t pixel) { dy[i] = load(dpre_activation + pixel + k); });
        transform_2d<4, 6>(dy, dm, output_transform_backward);
        scatter(dm, scratch.dM + k, point_stride(K), tile.index, K);
        if (is_pair<Factor>) scatter(dm, (bf16*)(Factor*)scratch.dM_by_k + tile.index * K + k, 2 * point_stride(K));
      });
      for (int64_t i = 0; i < 36; i++)  // dU = V^T · dM
        gemm<Factor>(scratch.V + i * point_stride(C_padded), 1, C_padded, scratch.dM + i * point_stride(K),
                     scratch.dU + i * C_padded * K, C, (count + PER_FACTOR - 1) / PER_FACTOR, K, !first || start);
      if (!p.dx) continue;
      for (int64_t i = 0; i < 36; i++)  // dV = dM · U^T
        gemm<Factor>((is_pair<Factor> ? scratch.dM_by_k : scratch.dM) + i * point_stride(K), K / PER_FACTOR, 1,
                     U + i * K / PER_FACTOR * C_padded, scratch.M + i * point_stride(C_padded), count, K / PER_FACTOR,
                     C_padded);
      for_each_tile(start, count, C_padded, [&](const Tile& tile, int64_t c) {
        vec_f32 dv[36], dd[36];
        gather(dv, scratch.M + tile.index * C_padded + c, point_stride(C_padded));
        transform_2d<6, 6>(dv, dd, input_transform_backward);
        for_each_input_pixel(tile, [&](int64_t i, int64_t pixel) {
          float* to = scratch.dpadded + pixel + c;
          store(to, load(to) + dd[i]);
        });
      });
    }
    if (!p.dx) return;
    T *dx = (T*)p.dx + begin * H * W * C, *last = (T*)p.dx + end * H * W * C;
    for (const float* image = scratch.dpadded; image < scratch.dpadded + (end - begin) * padded_image;
         image += padded_image)
      for (int64_t y = 1; y <= H; y++)
        for (int64_t x = 1; x <= W; x++, dx += C)
          for (int64_t c = 0; c < C; c += LANES) {
            vec_f32 values = load(image + (y * padded_W + x) * C_padded + c);
            if (p.accumulate_dx) values += load(dx + c, C - c, last);
            store(dx + c, values, std::min(LANES, C - c));
          }
  }

  // Transforms the dU that a thread has summed up to dweight as (9, C, K).
  void store_weight_grad(const Scratch& scratch, float* dweight) const {
    for (int64_t c = 0; c < C; c++)
      for (int64_t k = 0; k < K; k += LANES) {
        vec_f32 du[36], dg[9];
        gather(du, scratch.dU + c * K + k, C_padded * K);
        transform_2d<6, 3>(du, dg, filter_transform_backward);
        for (int64_t tap = 0; tap < 9; tap++) store(dweight + (tap * C + c) * K + k, dg[tap]);
      }
  }
};

}  // namespace
