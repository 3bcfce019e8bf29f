// The kernel's only translation unit: plain C++17 without PyTorch's headers, called through ctypes.
#include "network.h"

// forward, backward and step return the bytes of workspace they need for so many threads. Without a workspace they
// compute nothing else.
extern "C" {
int64_t layer_params_size() { return sizeof(LayerParams); }

int64_t forward(bool use_bf16, LayerParams* layers, int64_t count, bool needs_grad, int64_t threads, char* workspace) {
  return use_bf16 ? Network<bf16>{layers, count, threads}.forward(needs_grad, workspace)
                  : Network<float>{layers, count, threads}.forward(needs_grad, workspace);
}

int64_t backward(bool use_bf16, LayerParams* layers, int64_t count, int64_t threads, char* activations,
                 char* workspace) {
  return use_bf16 ? Network<bf16>{layers, count, threads}.backward<bf16x2>(activations, workspace)
                  : Network<float>{layers, count, threads}.backward<float>(activations, workspace);
}

// Forward pass, the mean cross-entropy of the logits and labels (N), and backward pass, in one call.
int64_t step(bool use_bf16, LayerParams* layers, int64_t count, int64_t threads, const int64_t* labels, float* loss,
             char* workspace) {
  return use_bf16 ? Network<bf16>{layers, count, threads}.step<bf16x2>(labels, loss, workspace)
                  : Network<float>{layers, count, threads}.step<float>(labels, loss, workspace);
}

void cross_entropy(int64_t N, int64_t K, const float* logits, const int64_t* labels, float* dlogits, float* loss) {
  *loss = float(cross_entropy_sum(N, K, logits, labels, dlogits, N) / double(N));
}
}
