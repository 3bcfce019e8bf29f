// Products of small matrices: out (rows, columns) = a (rows, depth) · b (depth, columns), optionally added to out.
// Factors are float, or bf16x2 where the processor has instructions for it: two bfloat16 of neighbouring k in a word.
#pragma once

#include "vec.h"

namespace {

// The micro-kernel computes MR rows by NR vectors: its sums fill half of the registers.
constexpr int64_t MR = REGISTERS / 4, NR = 2;

inline vec_f32 multiply_add(vec_f32 sum, float a, vec_f32 b) { return sum + a * b; }
#ifdef __AVX512BF16__
typedef uint32_t bf16x2;
inline vec_f32 multiply_add(vec_f32 sum, bf16x2 a, vec_u32 b) {
  return (vec_f32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(vec_u32{} + a), (__m512bh)b);
}
#else
typedef float bf16x2;
#endif
template <typename Factor> constexpr bool is_pair = !std::is_same_v<Factor, float>;

// a's element (r, k) is at r * a_row + k * a_col; b and out are contiguous. Rows are read and written in whole
// multiples of mr. Strides and depth count Factors.
template <int64_t mr, int64_t nr, typename Factor>
void gemm_microkernel(const Factor* a, int64_t a_row, int64_t a_col, const Factor* b, float* out, int64_t rows,
                      int64_t depth, int64_t columns, bool accumulate) {
  typedef std::conditional_t<is_pair<Factor>, vec_u32, vec_f32> Vector;
  for (int64_t r = 0; r < rows; r += mr)
    for (int64_t c = 0; c < columns; c += nr * LANES) {
      float* block = out + r * columns + c;
      vec_f32 sums[mr][nr];
      UNROLL(8)
      for (int64_t i = 0; i < mr; i++) {
        UNROLL(2)
        for (int64_t j = 0; j < nr; j++) sums[i][j] = accumulate ? load(block + i * columns + j * LANES) : vec_f32{};
      }
      for (int64_t k = 0; k < depth; k++) {
        Vector values[nr];
        UNROLL(2)
        for (int64_t j = 0; j < nr; j++) values[j] = read<Vector>(b + k * columns + c + j * LANES);
        UNROLL(8)
        for (int64_t i = 0; i < mr; i++) {
          UNROLL(2)
          for (int64_t j = 0; j < nr; j++)
            sums[i][j] = multiply_add(sums[i][j], a[(r + i) * a_row + k * a_col], values[j]);
        }
      }
      UNROLL(8)
      for (int64_t i = 0; i < mr; i++) {
        UNROLL(2)
        for (int64_t j = 0; j < nr; j++) store(block + i * columns + j * LANES, sums[i][j]);
      }
    }
}

template <typename Factor>
inline void gemm(const Factor* a, int64_t a_row, int64_t a_col, const Factor* b, float* out, int64_t rows,
                 int64_t depth, int64_t columns, bool accumulate = false) {
  const auto microkernel = columns % (NR * LANES) ? gemm_microkernel<MR, 1, Factor>
                           : rows <= MR / 2       ? gemm_microkernel<MR / 2, NR, Factor>
                                                  : gemm_microkernel<MR, NR, Factor>;
  microkernel(a, a_row, a_col, b, out, rows, depth, columns, accumulate);
}

}  // namespace
