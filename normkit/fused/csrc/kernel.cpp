// The kernel's functions, called through ctypes: plain C++17 without PyTorch's headers. Compiled once for each type of
// activations, ACTIVATION=float and ACTIVATION=bf16, with which their names end: both at a time take two thirds as
// long.
#include "network.h"

#define JOIN(name, type) name##_##type
#define JOIN_VALUES(name, type) JOIN(name, type)
#define FUNCTION(name) JOIN_VALUES(name, ACTIVATION)

// forward, backward and step return the bytes of workspace they need for so many threads. Without a workspace they
// compute nothing else.
extern "C" {
int64_t FUNCTION(layer_params_size)() { return sizeof(LayerParams); }

int64_t FUNCTION(forward)(LayerParams* layers, int64_t count, bool needs_grad, int64_t threads, char* workspace) {
  return Network<ACTIVATION>{layers, count, threads}.forward(needs_grad, workspace);
}

int64_t FUNCTION(backward)(LayerParams* layers, int64_t count, int64_t threads, char* activations, char* workspace) {
  return Network<ACTIVATION>{layers, count, threads}.backward<GradientFactor<ACTIVATION>>(activations, workspace);
}

// Forward pass, cross-entropy of the logits and labels (N), and backward pass, in one call. scores (2): the mean loss,
// and how many images are right.
int64_t FUNCTION(step)(LayerParams* layers, int64_t count, int64_t threads, const int64_t* labels, float* scores,
                       char* workspace) {
  return Network<ACTIVATION>{layers, count, threads}.step<GradientFactor<ACTIVATION>>(labels, scores, workspace);
}
}

#undef FUNCTION
#undef JOIN_VALUES
#undef JOIN
