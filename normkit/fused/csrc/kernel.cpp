// The kernel's only translation unit: plain C++17 without PyTorch's headers, called through ctypes.
#include "network.h"

#include <new>

namespace {
template <typename Body> int64_t catching(Body body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return -1;
  }
}
}  // namespace

// forward and backward return the bytes of workspace they need, or -1 if memory ran out. With a workspace of 0 they
// compute nothing else.
extern "C" {
int64_t layer_params_size() { return sizeof(LayerParams); }

int64_t forward(bool use_bf16, LayerParams* layers, int64_t count, bool needs_grad, int64_t workspace) {
  return catching([&] {
    return use_bf16 ? Network<bf16>{layers, count}.forward(needs_grad, workspace)
                    : Network<float>{layers, count}.forward(needs_grad, workspace);
  });
}

int64_t backward(bool use_bf16, LayerParams* layers, int64_t count, int64_t activations, int64_t workspace) {
  return catching([&] {
    return use_bf16 ? Network<bf16>{layers, count}.backward<bf16x2>(activations, workspace)
                    : Network<float>{layers, count}.backward<float>(activations, workspace);
  });
}
}
