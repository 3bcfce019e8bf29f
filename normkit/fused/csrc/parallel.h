// Parallel loops on PyTorch's own OpenMP threads.
//
// These are the functions that `#pragma omp parallel` compiles to with GCC. Called by name they need no -fopenmp, and
// the library brings no OpenMP runtime of its own: it binds to the one that PyTorch has loaded, be it GCC's libgomp or
// LLVM's and Intel's, which export the same names. With `#pragma omp`, clang's code would only run on LLVM's runtime.
#pragma once

#include <cstdint>
#include <vector>

extern "C" {
void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);
void GOMP_barrier();
int omp_get_max_threads();
int omp_get_num_threads();
int omp_get_thread_num();
}

namespace {

struct Thread {
  const int64_t index = omp_get_thread_num(), count = omp_get_num_threads();

  void barrier() const { GOMP_barrier(); }
  // Calls body(i) for this thread's share of 0 ... n-1, a contiguous one.
  template <typename Body> void for_each(int64_t n, Body body) const {
    for (int64_t i = n * index / count; i < n * (index + 1) / count; i++) body(i);
  }
};

// Calls body(thread) in every thread. An exception must not leave it: memory is allocated before, see PerThread.
template <typename Body> void parallel(Body body) {
  GOMP_parallel([](void* data) { (*static_cast<Body*>(data))(Thread()); }, &body, 0, 0);
}
template <typename Body> void parallel_for(int64_t n, Body body) {
  parallel([&](const Thread& thread) { thread.for_each(n, body); });
}

// A Scratch for each thread, made by make() before the threads start, so that a lack of memory is an exception here.
template <typename Scratch> struct PerThread {
  std::vector<Scratch> all;
  template <typename Make> explicit PerThread(Make make) {
    const int64_t threads = omp_get_max_threads();
    all.reserve(threads);
    for (int64_t i = 0; i < threads; i++) all.push_back(make());
  }
  const Scratch& operator[](const Thread& thread) const { return all[thread.index]; }
};

// A sum over images is computed in at most so many chunks, each in order, and the chunks' sums are added in order:
// the same result for any number of threads.
constexpr int64_t REDUCTION_CHUNKS = 16;

}  // namespace
