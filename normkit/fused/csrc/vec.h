// Vectors of float32, one value a channel, and bfloat16 in memory. GCC's and clang's vector extensions, so that the
// same source serves AVX-512, AVX2, SSE and NEON; intrinsics only where compilers miss the one instruction.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#ifdef __clang__
#define UNROLL(count) _Pragma("clang loop unroll(full)")
#else
#define UNROLL_PRAGMA(text) _Pragma(#text)
#define UNROLL(count) UNROLL_PRAGMA(GCC unroll count)
#endif

namespace {

// Values in a vector, and vector registers of the processor.
#if defined __AVX512F__
constexpr int64_t LANES = 16, REGISTERS = 32;
#elif defined __AVX2__
constexpr int64_t LANES = 8, REGISTERS = 16;
#elif defined __x86_64__
constexpr int64_t LANES = 4, REGISTERS = 16;
#else
constexpr int64_t LANES = 4, REGISTERS = 32;
#endif

typedef float vec_f32 __attribute__((vector_size(4 * LANES)));
typedef int32_t vec_i32 __attribute__((vector_size(4 * LANES)));
typedef uint32_t vec_u32 __attribute__((vector_size(4 * LANES)));
typedef uint16_t vec_bf16 __attribute__((vector_size(2 * LANES)));
struct bf16 {
  uint16_t bits;
};

constexpr int64_t round_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

template <typename Value> inline Value read(const void* from) {
  Value value;
  memcpy(&value, from, sizeof value);
  return value;
}

// Keeps a vector that is used several times in a register: GCC else reads it from memory each time anew.
template <typename Vector> inline void keep_in_register(Vector& vector) {
#if defined __x86_64__
  __asm__("" : "+v"(vector));
#elif defined __aarch64__
  __asm__("" : "+w"(vector));
#endif
}

// Keeps a pointer that goes from row to row as the one address: GCC else computes those of all rows ahead, more than
// there are registers.
template <typename Value> inline void keep_in_register(Value*& pointer) {
#if defined __x86_64__ || defined __aarch64__
  __asm__("" : "+r"(pointer));
#endif
}

inline vec_u32 zero_extend(vec_bf16 values) {
#ifdef __AVX512BF16__
  return (vec_u32)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)values);  // one instruction; compilers take four
#else
  return __builtin_convertvector(values, vec_u32);
#endif
}
#ifdef __AVX512BF16__
// Pairs of a value of `even` and, behind it, one of `odd`: of the two operands' 64 values numbers i and 32 + i.
inline vec_u32 interleave(vec_bf16 even, vec_bf16 odd) {
  const __m512i order = (__m512i)(vec_u32{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} * 0x10001 + 0x200000);
  return (vec_u32)_mm512_permutex2var_epi16(_mm512_castsi256_si512((__m256i)even), order,
                                            _mm512_castsi256_si512((__m256i)odd));
}
#endif
inline vec_f32 bf16_to_f32(vec_bf16 values) { return (vec_f32)(zero_extend(values) << 16); }
inline vec_bf16 f32_to_bf16(vec_f32 values) {  // to the nearest, ties to even
#ifdef __AVX512BF16__
  return (vec_bf16)_mm512_cvtneps_pbh((__m512)values);
#else
  const vec_u32 bits = (vec_u32)values;
  return __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, vec_bf16);
#endif
}

inline vec_f32 load(const float* from) { return read<vec_f32>(from); }
inline vec_f32 load(const bf16* from) { return bf16_to_f32(read<vec_bf16>(from)); }

// Loads a vector of which only the first `count` values matter, without reading at or behind `end`.
template <typename T> inline vec_f32 load(const T* from, int64_t count, const T* end) {
  if (from + LANES <= end) return load(from);
  T last[LANES] = {};
  memcpy(last, from, std::min(count, LANES) * sizeof(T));
  return load(last);
}

// Stores the first `count` values. Whole vectors, and halves, as C3 reads 8 channels and AVX-512 has 16 lanes, take one
// instruction; other counts a call.
template <typename Vector, typename Value> inline void store_first(Value* to, const Vector& values, int64_t count) {
  if (count == LANES)
    memcpy(to, &values, LANES * sizeof *to);
  else if (count == LANES / 2)
    memcpy(to, &values, LANES / 2 * sizeof *to);
  else
    memcpy(to, &values, count * sizeof *to);
}
inline void store(float* to, vec_f32 values, int64_t count = LANES) { store_first(to, values, count); }
inline void store(bf16* to, vec_f32 values, int64_t count = LANES) { store_first(to, f32_to_bf16(values), count); }

inline void add(float* to, vec_f32 values) { store(to, load(to) + values); }

// Calls add_to(i, sums) for i in 0 ... count-1, with vectors of sums that start at 0; returns them. Four sets of sums
// take turns, as an addition takes four cycles.
template <int64_t size> struct Sums {
  vec_f32 values[size];
};
template <int64_t size, typename Body> inline Sums<size> sum_up(int64_t count, Body add_to) {
  Sums<size> sums[4] = {};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    UNROLL(4)
    for (int64_t j = 0; j < 4; j++) add_to(i + j, sums[j].values);
  }
  for (; i < count; i++) add_to(i, sums[0].values);
  for (int64_t s = 0; s < size; s++)
    sums[0].values[s] = (sums[0].values[s] + sums[1].values[s]) + (sums[2].values[s] + sums[3].values[s]);
  return sums[0];
}

// The values where the condition holds, else 0.
inline vec_f32 select(vec_i32 condition, vec_f32 values) { return (vec_f32)(condition & (vec_i32)values); }

}  // namespace
