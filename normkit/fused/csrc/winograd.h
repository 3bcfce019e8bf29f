// 3×3 convolution, padding 1, by Winograd's minimal filtering F(4×4, 3×3) (Lavin and Gray 2016, arXiv 1509.09308).
//
// The padded image is cut into tiles of 6×6 pixels, four apart. Tiles and weights are transformed into the Winograd
// domain of 36 points; there the convolution is 36 products of matrices, tiles × C by C × K; and each result is
// transformed back to 4×4 pixels. 36 multiplications an output tile and channel pair in place of 144.
//
// Images are read, and their gradients written, by strips: the six rows of pixels that one row of tiles covers.
//
// Letters as in that paper: d a tile of the input, g a weight's nine taps; U = transform of g, V = transform of d,
// M = V · U, y = transform of M. In memory:
//   U (36, C, K), for the backward pass (36, K, C_padded)
//   V (tiles, 36, C_padded)        M (tiles, 36, K)        where factors are pairs, V and dM have two tiles in a row
//   dM as M, and dM_by_k the same with pairs of neighbouring k        dU (36, C_padded, K)
#pragma once

#include <array>

#include "arena.h"
#include "gemm.h"
#include "norm_relu.h"
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
// Calls in(i) for the values and out(i, value) with the results as they are needed, as registers hold few of them.
template <int64_t from, int64_t to, typename Transform, typename In, typename Out>
inline void transform_2d(Transform transform, In in, Out out) {
  vec_f32 columns[to * from];
  UNROLL(6)
  for (int64_t x = 0; x < from; x++) {
    vec_f32 column[from];
    UNROLL(6)
    for (int64_t y = 0; y < from; y++) column[y] = in(y * from + x);
    transform(column, 1, columns + x, from);
  }
  UNROLL(6)
  for (int64_t y = 0; y < to; y++) {
    vec_f32 row[to];
    transform(columns + y * from, 1, row, 1);
    UNROLL(6)
    for (int64_t x = 0; x < to; x++) out(y * to + x, row[x]);
  }
}

// Rows of a matrix that is later summed over its rows: pairs hold two rows each. The even one is to be written first,
// and lies in the first half of each vector of pairs until the odd one comes.
template <typename Factor> inline Factor* row_of(Factor* matrix, int64_t row, int64_t columns) {
  return matrix + row / (is_pair<Factor> ? 2 : 1) * columns;
}
template <typename Factor> inline void store_in_row(Factor* to, int64_t row, vec_f32 values) {
  if constexpr (is_pair<Factor>) {
    const vec_bf16 rounded = f32_to_bf16(values);
    if (row % 2) {
      const vec_u32 pairs = interleave(read<vec_bf16>(to), rounded);
      memcpy(to, &pairs, sizeof pairs);
    } else {
      memcpy(to, &rounded, sizeof rounded);
    }
  } else {
    store(to, values);
  }
}
// Pairs the last row with zeros where the number of rows is odd.
template <typename Factor> inline void complete_pairs(Factor* matrix, int64_t rows, int64_t columns) {
  if (!is_pair<Factor> || rows % 2 == 0) return;
  Factor* last = row_of(matrix, rows - 1, columns);
  for (int64_t i = 0; i < columns; i += LANES) store_in_row(last + i, rows, vec_f32{});
}

// Factor is bf16x2 in backward passes alone. There, rounding the points hardly adds to what rounded activations do (to
// a batch of CIFAR-10: 6.9 % of the gradient with batch norm, 1.4 % with group norm, before and after). In the forward
// pass it would put each convolution off by 1 %, four times as much as bfloat16 does otherwise.
template <typename T, typename Factor> struct Winograd {
  static constexpr int64_t PER_FACTOR = is_pair<Factor> ? 2 : 1;

  const LayerParams& p;
  const int64_t C = p.C, K = p.K, H = p.H, W = p.W;
  const int64_t C_padded = round_up(C, std::max(LANES, MR));
  // So many that V, M, U, dM and dU fit into an L2 cache of 512 KiB: they have 16 tiles of 32 channels, or twice as
  // many of 16. Backward with pairs twice that: they take half the memory, and processors that have them 1 MiB of L2.
  // The more tiles, the less often dU is loaded and stored.
  const int64_t tiles_per_block = (is_pair<Factor> ? 32 : 16) * (std::max(C_padded, K) <= 16 ? 2 : 1);
  // From one point's matrix of U or dU to the next: a cache line more than it has, or all 36 would lie in one cache
  // set.
  const int64_t point_stride = C_padded * K + 16;
  const int64_t tile_rows = (H + 3) / 4, tile_columns = (W + 3) / 4, tiles = tile_rows * tile_columns;
  const int64_t images_per_block = std::clamp(tiles_per_block / tiles, int64_t(1), p.N);
  // Six rows of pixels with a border of zeros, as wide as the tiles need: what one row of tiles reads. They are a ring:
  // the two that the next row of tiles reads again stay where they are.
  const int64_t strip_row = (tile_columns * 4 + 2) * C_padded, strip_size = 6 * strip_row;

  struct Scratch {
    float *strip, *dstrip;
    Factor* V;
    float* M;
    Factor *dM, *dM_by_k;
    float* dU;
  };
  Scratch take_scratch(Arena& arena, bool backward) const {
    return {arena.take<float>(strip_size),
            arena.take<float>(backward * strip_size),
            arena.take<Factor>(tiles_per_block / PER_FACTOR * 36 * C_padded),
            arena.take<float>(tiles_per_block * 36 * std::max(C_padded, K)),
            arena.take<Factor>(backward * tiles_per_block / PER_FACTOR * 36 * K),
            arena.take<Factor>(backward * is_pair<Factor> * tiles_per_block / PER_FACTOR * 36 * K),
            arena.take<float>(backward * 36 * point_stride)};
  }
  void clear(const Scratch& scratch) const { std::fill_n(scratch.strip, strip_size, 0); }

  // The weight in the Winograd domain, U, in the arena's memory. Compiled once: inlined in several places, its
  // roundings might differ.
  [[gnu::noinline]] Factor* pack(Arena& arena, bool backward) const {
    Factor* U = arena.take<Factor>(36 * point_stride);
    if (!U) return U;
    const int64_t rows = backward ? K : C, columns = backward ? C_padded : K, valid = backward ? C : K;
    const int64_t column_stride = backward ? p.weight_c_stride : 9 * C,
                  row_stride = backward ? 9 * C : p.weight_c_stride;
    constexpr int64_t AT_ONCE = 4;  // rows: a vector of values that were stored one by one just now would have to wait
    const auto fetch = [&](int64_t row, int64_t column, float (*to)[LANES], auto tap_stride) {
      const float* from = p.weight + row * row_stride + column * column_stride;
      for (int64_t l = 0; l < std::min(LANES, valid - column); l++, from += column_stride) {
        UNROLL(9)
        for (int64_t tap = 0; tap < 9; tap++) to[tap][l] = from[tap * tap_stride];
      }
    };
    for_each_vector(columns, [&](int64_t column) {
      float taps[AT_ONCE][9][LANES] = {};
      for (int64_t first = 0; first < rows; first += AT_ONCE) {
        const int64_t end = std::min(first + AT_ONCE, rows);
        for (int64_t row = first; row < end; row++)
          if (p.weight_tap_stride == 1)  // as PyTorch lays weights out; as a constant it takes a quarter off the time
            fetch(row, column, taps[row - first], std::integral_constant<int64_t, 1>{});
          else
            fetch(row, column, taps[row - first], p.weight_tap_stride);
        for (int64_t row = first; row < end; row++)
          transform_2d<3, 6>(
              filter_transform, [&](int64_t i) { return load(taps[row - first][i]); },
              [&](int64_t i, vec_f32 u) { store_in_row(row_of(U, row, columns) + i * point_stride + column, row, u); });
      }
    });
    return U;
  }

  struct Tile {
    int64_t index, image, y, x;  // index and image within the block; y, x: its first output pixel
  };
  // Calls body(tile) for `count` tiles.
  template <typename Body> void for_each_tile(int64_t start, int64_t count, Body body) const {
    Tile tile = {0, start / tiles, start % tiles / tile_columns * 4, start % tile_columns * 4};
    for (; tile.index < count; tile.index++) {
      body(tile);
      if ((tile.x += 4) < W) continue;
      tile.x = 0;
      if ((tile.y += 4) < H) continue;
      tile.y = 0, tile.image++;
    }
  }
  template <typename Body> static void for_each_vector(int64_t channels, Body body) {
    for (int64_t c = 0; c < channels; c += LANES) body(c);
  }
  // Calls body(i, offset in an image of K channels) for those of a tile's 16 output pixels that lie in the image.
  template <typename Body> void for_each_output_pixel(const Tile& tile, Body body) const {
    const int64_t first = ((tile.image * H + tile.y) * W + tile.x) * K;
    if (tile.y + 4 <= H && tile.x + 4 <= W) {
      UNROLL(16)
      for (int64_t i = 0; i < 16; i++) body(i, first + (i / 4 * W + i % 4) * K);
    } else {
      for (int64_t i = 0; i < 16; i++)
        if (tile.y + i / 4 < H && tile.x + i % 4 < W) body(i, first + (i / 4 * W + i % 4) * K);
    }
  }
  // Where a row of the image with its border, the border being row 0, lies in a strip.
  int64_t strip_offset(int64_t row) const { return row % 6 * strip_row; }
  // The rows of a tile in a strip, from the tile's first pixel on.
  std::array<float*, 6> strip_rows(float* strip, const Tile& tile, int64_t c) const {
    std::array<float*, 6> rows;
    for (int64_t i = 0; i < 6; i++) rows[i] = strip + strip_offset(tile.y + i) + tile.x * C_padded + c;
    return rows;
  }

  // Fills the strip for the row of tiles that begins with this one; rows of tiles are taken in order.
  void read_strip(int64_t n, const Tile& tile, float* strip) const {
    for (int64_t row = tile.y ? 2 : 0; row < 6; row++) {  // the row of tiles above had the first two
      const int64_t y = tile.y + row - 1;
      float* to = strip + strip_offset(tile.y + row);
      y >= 0 && y < H ? read_pixels<T>(p, n, y * W, W, to + C_padded, C_padded) : (void)std::fill_n(to, strip_row, 0);
    }
  }

  // gnu::flatten inlines all calls: with calls left in, each pixel's address would be computed anew.
  [[gnu::flatten]] void compute_V(int64_t begin, int64_t start, int64_t count, const Scratch& scratch) const {
    for_each_tile(start, count, [&](const Tile& tile) {
      if (!tile.x) read_strip(begin + tile.image, tile, scratch.strip);
      for_each_vector(C_padded, [&](int64_t c) {
        const auto d = strip_rows(scratch.strip, tile, c);
        Factor* V = row_of(scratch.V, tile.index, 36 * C_padded) + c;
        transform_2d<6, 6>(
            input_transform, [&](int64_t i) { return load(d[i / 6] + i % 6 * C_padded); },
            [&](int64_t i, vec_f32 v) { store_in_row(V + i * C_padded, tile.index, v); });
      });
    });
    complete_pairs(scratch.V, count, 36 * C_padded);
  }
  void compute_M(int64_t count, const Scratch& scratch) const {  // V · U
    const Factor* U = (const Factor*)p.packed;
    for (int64_t i = 0; i < 36; i++)
      with_constant(C_padded, [&](auto channels) {
        gemm<Factor, float, 36 * channels.value>({scratch.V + i * C_padded, 36 * C_padded}, {U + i * point_stride, K},
                                                 {scratch.M + i * K, 36 * K}, round_up(count, MR / 2), C, K);
      });
  }
  // Writes pre_activation of the block that begins with image `begin`: the convolution with its bias, and the skip.
  [[gnu::flatten]] void compute_output(int64_t begin, int64_t start, int64_t count, const Scratch& scratch) const {
    const int64_t first = begin * H * W * K;
    for_each_tile(start, count, [&](const Tile& tile) {
      for_each_vector(K, [&](int64_t k) {
        vec_f32 y[16];
        const float* M = scratch.M + tile.index * 36 * K + k;
        transform_2d<6, 4>(
            output_transform, [&](int64_t i) { return load(M + i * K); },
            [&](int64_t i, vec_f32 value) { y[i] = value; });
        const vec_f32 bias = load(p.bias + k);
        for_each_output_pixel(tile, [&](int64_t i, int64_t) { y[i] += bias; });
        if (p.skip) {
          const T* skip = (const T*)p.skip->pre_activation + first + k;
          const NormReLU norm_relu(*p.skip, begin + tile.image, k);
          for_each_output_pixel(tile, [&](int64_t i, int64_t pixel) { y[i] += norm_relu.out(load(skip + pixel)); });
        }
        T* pre_activation = (T*)p.pre_activation + first + k;
        for_each_output_pixel(tile, [&](int64_t i, int64_t pixel) { store(pre_activation + pixel, y[i]); });
      });
    });
  }
  void forward(int64_t begin, int64_t end, const Scratch& scratch) const {
    const int64_t total = (end - begin) * tiles;
    for (int64_t start = 0; start < total; start += tiles_per_block) {
      const int64_t count = std::min(tiles_per_block, total - start);
      compute_V(begin, start, count, scratch);
      compute_M(count, scratch);
      compute_output(begin, start, count, scratch);
    }
  }

  // dpre_activation: of the block. channels: K, where it is known when this is compiled, or 0; else GCC computes the
  // addresses of all 36 points again and again.
  template <int64_t channels>
  [[gnu::flatten]] void compute_dM(int64_t start, int64_t count, const T* dpre_activation,
                                   const Scratch& scratch) const {
    const int64_t K = channels ? channels : this->K;
    for_each_tile(start, count, [&](const Tile& tile) {
      for_each_vector(K, [&](int64_t k) {
        Factor* dM = row_of(scratch.dM, tile.index, 36 * K) + k;
        bf16* dM_by_k = (bf16*)scratch.dM_by_k + tile.index * 36 * K + k;
        const auto transform = [&](auto dy) __attribute__((always_inline)) {
          transform_2d<4, 6>(output_transform_backward, dy, [&](int64_t i, vec_f32 dm) {
            store_in_row(dM + i * K, tile.index, dm);
            if (is_pair<Factor>) store(dM_by_k + i * K, dm);
          });
        };
        const T* first = dpre_activation + ((tile.image * H + tile.y) * W + tile.x) * K + k;
        const auto pixel = [&](int64_t i) { return load(first + (i / 4 * W + i % 4) * K); };
        if (tile.y + 4 <= H && tile.x + 4 <= W)
          transform(pixel);
        else
          transform([&](int64_t i) { return tile.y + i / 4 < H && tile.x + i % 4 < W ? pixel(i) : vec_f32{}; });
      });
    });
    complete_pairs(scratch.dM, count, 36 * K);
  }
  void add_dU(int64_t count, const Scratch& scratch, bool first) const {  // V^T · dM
    for (int64_t i = 0; i < 36; i++) {
      float* dU = scratch.dU + i * point_stride;
      gemm<Factor, float, 1>({scratch.V + i * C_padded, 1, 36 * C_padded}, {scratch.dM + i * K, 36 * K}, {dU, K},
                             round_up(C, MR / 2), (count + PER_FACTOR - 1) / PER_FACTOR, K, {first ? nullptr : dU, K});
    }
  }
  void compute_dV(int64_t count, const Scratch& scratch) const {  // dM · U^T, in place of M
    const Factor *U = (const Factor*)p.packed_backward, *dM = is_pair<Factor> ? scratch.dM_by_k : scratch.dM;
    for (int64_t i = 0; i < 36; i++)
      with_constant(K, [&](auto channels) {
        gemm<Factor, float, 36 * channels.value / PER_FACTOR>(
            {dM + i * K / PER_FACTOR, 36 * K / PER_FACTOR}, {U + i * point_stride, C_padded},
            {scratch.M + i * C_padded, 36 * C_padded}, round_up(count, MR / 2), K / PER_FACTOR, C_padded);
      });
  }
  // Writes dx, or adds to it. A pixel's gradient is whole with the last of the tiles that read it.
  // channels: as in compute_dM, but of C_padded.
  template <int64_t channels>
  [[gnu::flatten]] void compute_dx(int64_t begin, int64_t start, int64_t count, const Scratch& scratch) const {
    const int64_t C_padded = channels ? channels : this->C_padded;
    for_each_tile(start, count, [&](const Tile& tile) {
      float* dstrip = scratch.dstrip;
      if (!tile.x) {
        if (!tile.y) std::fill_n(dstrip, 2 * strip_row, 0);
        for (int64_t row = 2; row < 6; row++) std::fill_n(dstrip + strip_offset(tile.y + row), 2 * C_padded, 0);
      }
      for_each_vector(C_padded, [&](int64_t c) {
        const float* M = scratch.M + tile.index * 36 * C_padded + c;
        const auto dd = strip_rows(dstrip, tile, c);
        transform_2d<6, 6>(
            input_transform_backward, [&](int64_t i) { return load(M + i * C_padded); },
            [&](int64_t i, vec_f32 values) {
              float* to = dd[i / 6] + i % 6 * C_padded;
              i / 6 < 2 || i % 6 < 2 ? add(to, values) : store(to, values);  // of a pixel's tiles this is the first
            });
      });
      if (tile.x + 4 >= W) store_strip(begin + tile.image, tile, dstrip);
    });
  }
  void store_strip(int64_t n, const Tile& tile, const float* dstrip) const {
    const int64_t rows = tile.y + 4 < H ? 4 : 5;
    const int64_t runs = C == C_padded ? 1 : W, run_size = W * C / runs;  // in a row; one where pixels have no gaps
    const T* end = (const T*)p.dx + p.N * H * W * C;
    const bool accumulate = p.accumulate_dx;
    for (int64_t row = tile.y ? 0 : 1; row < rows && tile.y + row <= H; row++) {
      const float* from = dstrip + strip_offset(tile.y + row) + C_padded;
      T* to = (T*)p.dx + (n * H + tile.y + row - 1) * W * C;
      for (int64_t i = 0; i < runs; i++, from += C_padded, to += run_size)
        for (int64_t c = 0; c < run_size; c += LANES) {
          vec_f32 values = load(from + c);
          if (accumulate) values += load(to + c, run_size - c, end);
          store(to + c, values, std::min(LANES, run_size - c));
        }
    }
  }
  // From dpre_activation of images begin ... end-1: writes their dx, if it is wanted, and writes (first) or adds to dU.
  void backward(int64_t begin, int64_t end, const T* dpre_activation, const Scratch& scratch, bool first) const {
    const int64_t total = (end - begin) * tiles;
    for (int64_t start = 0; start < total; start += tiles_per_block) {
      const int64_t count = std::min(tiles_per_block, total - start);
      compute_V(begin, start, count, scratch);
      with_constant(K, [&](auto channels) { compute_dM<channels.value>(start, count, dpre_activation, scratch); });
      add_dU(count, scratch, first && !start);
      if (!p.dx) continue;
      compute_dV(count, scratch);
      with_constant(C_padded, [&](auto channels) { compute_dx<channels.value>(begin, start, count, scratch); });
    }
  }

  // Transforms the dU that a thread has summed up, and writes (first) or adds it to dweight as (9, C, K).
  void store_weight_grad(const Scratch& scratch, float* dweight, bool first) const {
    for (int64_t c = 0; c < C; c++)
      for (int64_t k = 0; k < K; k += LANES) {
        const float* dU = scratch.dU + c * K + k;
        transform_2d<6, 3>(
            filter_transform_backward, [&](int64_t i) { return load(dU + i * point_stride); },
            [&](int64_t tap, vec_f32 dg) {
              float* to = dweight + (tap * C + c) * K + k;
              store(to, first ? dg : load(to) + dg);
            });
      }
  }
};

}  // namespace
