// Pieces of a workspace that the caller brings: the kernel itself allocates nothing.
#pragma once

#include "vec.h"

#ifdef __has_feature  // clang's way to say it
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace {

struct Arena {
  static constexpr int64_t ALIGNMENT = 64;  // bytes of a cache line
  char* memory;                             // or null: then pieces are only counted
  int64_t used = 0;

  // Returns uninitialised memory for so many values, or null where there is none.
  template <typename Value> Value* take(int64_t count) {
    char* taken = memory ? memory + used : nullptr;
    const int64_t bytes = count * sizeof(Value);
    used += round_up(bytes, ALIGNMENT);
#ifdef __SANITIZE_ADDRESS__  // a gap behind each piece, which nobody may touch
    used += ALIGNMENT;
    if (taken) {
      ASAN_UNPOISON_MEMORY_REGION(taken, bytes);
      ASAN_POISON_MEMORY_REGION(taken + bytes, memory + used - taken - bytes);
    }
#endif
    return (Value*)taken;
  }
};

}  // namespace
