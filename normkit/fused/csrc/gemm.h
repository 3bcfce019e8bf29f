// Products of small matrices: out (rows, columns) = a (rows, depth) · b (depth, columns), added to initial values.
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

// Columns of b, out and initial values are contiguous; rows are a multiple of mr, and the depth is 1 or more. A row of
// a is a_row values behind the one before, known when this is compiled, or a_stride where a_row is 0.
template <int64_t a_row, int64_t mr, int64_t nr, typename Factor, typename Out>
[[gnu::noinline]] void gemm_microkernel(const Factor* a, int64_t a_stride, int64_t a_column, const Factor* b,
                                        int64_t b_row, Out* out, int64_t out_row, int64_t rows, int64_t depth,
                                        int64_t columns, const float* initial, int64_t initial_row) {
  typedef std::conditional_t<is_pair<Factor>, vec_u32, vec_f32> Vector;
  if (a_row) a_stride = a_row;
  for (int64_t r = 0; r < rows; r += mr)
    for (int64_t c = 0; c < columns; c += nr * LANES) {
      vec_f32 sums[mr][nr] = {};
      if (initial) {
        const float* from = initial + r * initial_row + c;
        UNROLL(16)
        for (int64_t i = 0; i < mr; i++, from += initial_row) {
          keep_in_register(from);
          UNROLL(2)
          for (int64_t j = 0; j < nr; j++) sums[i][j] = load(from + j * LANES);
        }
      }
      const Factor *a_k = a + r * a_stride, *b_k = b + c;
      int64_t k = 0;
      do {  // runs at least once, else GCC copies all sums before and after
        Vector values[nr];
        UNROLL(2)
        for (int64_t j = 0; j < nr; j++) {
          values[j] = read<Vector>(b_k + j * LANES);
          keep_in_register(values[j]);  // two loads a cycle and two products: each load has to serve several
        }
        UNROLL(16)
        for (int64_t i = 0; i < mr; i++) {
          UNROLL(2)
          for (int64_t j = 0; j < nr; j++) sums[i][j] = multiply_add(sums[i][j], a_k[i * a_stride], values[j]);
        }
        a_k += a_column, b_k += b_row;
      } while (++k < depth);
      Out* to = out + r * out_row + c;
      UNROLL(16)
      for (int64_t i = 0; i < mr; i++, to += out_row) {
        keep_in_register(to);
        UNROLL(2)
        for (int64_t j = 0; j < nr; j++) store(to + j * LANES, sums[i][j]);
      }
    }
}

// Values at first[r * row + c * column].
template <typename T> struct Matrix {
  T* first;
  int64_t row, column = 1;
};

// out (rows, columns) = a (rows, depth) · b (depth, columns) + initial (rows, columns), if there are initial values.
// Columns of all but a are contiguous. Rows that are no multiple of MR / 2 take long: where memory is there, more may
// be asked for.
template <typename Factor, typename Out, int64_t a_row = 0>
[[gnu::always_inline]] inline void gemm(Matrix<const Factor> a, Matrix<const Factor> b, Matrix<Out> out, int64_t rows,
                                        int64_t depth, int64_t columns, Matrix<const float> initial = {nullptr, 0}) {
  const auto multiply = [&](auto microkernel, int64_t count) __attribute__((always_inline)) {
    if (!count) return;
    microkernel(a.first, a.row, a.column, b.first, b.row, out.first, out.row, count, depth, columns, initial.first,
                initial.row);
    a.first += count * a.row, out.first += count * out.row, rows -= count;
    if (initial.first) initial.first += count * initial.row;
  };
  if (columns % (NR * LANES) == 0) {
    multiply(gemm_microkernel<a_row, MR, NR, Factor, Out>, rows / MR * MR);
    multiply(gemm_microkernel<a_row, MR / 2, NR, Factor, Out>, rows / (MR / 2) * (MR / 2));
    multiply(gemm_microkernel<a_row, 1, NR, Factor, Out>, rows);
  } else {
    multiply(gemm_microkernel<a_row, NR * MR, 1, Factor, Out>, rows / (NR * MR) * (NR * MR));
    multiply(gemm_microkernel<a_row, MR, 1, Factor, Out>, rows / MR * MR);
    multiply(gemm_microkernel<a_row, MR / 2, 1, Factor, Out>, rows / (MR / 2) * (MR / 2));
    multiply(gemm_microkernel<a_row, 1, 1, Factor, Out>, rows);
  }
}

// Calls body with the number of channels as a constant, or as 0 where it is not one of the network's widths.
template <typename Body> inline void with_constant(int64_t channels, Body body) {
  channels == 16   ? body(std::integral_constant<int64_t, 16>())
  : channels == 32 ? body(std::integral_constant<int64_t, 32>())
                   : body(std::integral_constant<int64_t, 0>());
}

}  // namespace
