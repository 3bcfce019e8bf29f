// Parallel loops on PyTorch's own OpenMP threads, and sums that do not depend on their number.
//
// GOMP_parallel and GOMP_barrier are what `#pragma omp parallel` compiles to with GCC. Called by name they need no
// -fopenmp, and the library brings no OpenMP runtime of its own: it binds to the one that PyTorch has loaded, be it
// GCC's libgomp or LLVM's and Intel's, which export the same names. With `#pragma omp`, clang's code would only run on
// LLVM's runtime.
#pragma once

#include "layer_params.h"
#include "vec.h"

extern "C" {
void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);
void GOMP_barrier();
int omp_get_num_threads();
int omp_get_thread_num();
}

namespace {

struct Thread {
  const int64_t index, count;

  void barrier() const { GOMP_barrier(); }
  // This thread's share of 0 ... n-1, a contiguous one.
  int64_t begin(int64_t n) const { return n * index / count; }
  int64_t end(int64_t n) const { return n * (index + 1) / count; }
  template <typename Body> void for_each(int64_t n, Body body) const {
    for (int64_t i = begin(n); i < end(n); i++) body(i);
  }
};

// Calls body(thread) in so many threads, or fewer where the runtime has no more.
template <typename Body> void parallel(int64_t threads, Body body) {
  GOMP_parallel([](void* data) { (*static_cast<Body*>(data))(Thread{omp_get_thread_num(), omp_get_num_threads()}); },
                &body, threads, 0);
}

// A sum over images is computed in at most 16 chunks, each in order, and the chunks' sums are added in order: the same
// result for any number of threads.
struct Chunks {
  const int64_t N, count = N < 16 ? N : 16;

  int64_t begin(int64_t chunk) const { return N * chunk / count; }
  int64_t end(int64_t chunk) const { return N * (chunk + 1) / count; }
  int64_t largest() const { return (N + count - 1) / count; }  // images of a chunk
};

// The sum of values that each of the chunks has `chunk_size` behind the one before.
inline vec_f32 sum_of_chunks(const float* first, int64_t chunks, int64_t chunk_size) {
  vec_f32 sum = {};
  for (int64_t chunk = 0; chunk < chunks; chunk++) sum += load(first + chunk * chunk_size);
  return sum;
}

// Sums up the gradients of a weight (K, C) and, bias_offset behind it, of a bias (K) over the chunks.
inline void reduce_linear(const LayerParams& p, const Thread& thread, int64_t chunks, int64_t chunk_size,
                          int64_t bias_offset) {
  thread.for_each(p.K, [&](int64_t k) {
    float dbias = 0;
    for (int64_t chunk = 0; chunk < chunks; chunk++) dbias += p.grads[chunk * chunk_size + bias_offset + k];
    p.dbias[k] = dbias;
    for (int64_t c = 0; c < p.C; c += LANES)
      store(p.dweight + k * p.C + c, sum_of_chunks(p.grads + k * p.C + c, chunks, chunk_size));
  });
}

}  // namespace
