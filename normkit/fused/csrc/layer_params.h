// What Python passes to the kernel for each layer. normkit/fused/params.py declares the same fields in the same order,
// and the library is refused where the two structs differ in size.
//
// Sizes:  N images, C channels in, K channels out, H rows and W columns of the layer's input.
// Types:  T is what activations are stored in, float or bf16. Sums are in float32.
// Layout: activations are channels_last, (N, H, W, C), but for the network's first input if nchw is set.
// Names:  d + name is the gradient of the loss with respect to name.
#pragma once

#include <cstdint>

enum LayerKind : int64_t { CONV_NORM_RELU, CONV1X1_MAXPOOL, AVGPOOL_LINEAR };

struct LayerParams {
  int64_t kind;         // a LayerKind
  int64_t skip_source;  // index of the CONV_NORM_RELU layer whose output is added before the norm, or -1
  int64_t N, C, K, H, W;
  int64_t num_groups;                          // of group norm; 0 means batch norm
  int64_t nchw;                                // x is (N, C, H, W) in float32
  int64_t use_running_stats;                   // batch norm in evaluation mode
  int64_t accumulate_dx;                       // add to what dx holds already
  int64_t weight_c_stride, weight_tap_stride;  // of a 3×3 weight; the stride of K is 9 C in every layout
  double eps, momentum;                        // of the norm
  const void* x;                               // (N, H, W, C); of a layer with a source: its source's pre_activation
  const float* weight;                         // (K, C, 3, 3) by the strides above; (K, C) for the other kinds
  const float* bias;                           // (K)
  const float *norm_weight, *norm_bias;        // (K)
  const float* dropout_scale;                  // (N, K): 0 or 1 / (1 - p); null: 1
  float *running_mean, *running_var;           // (K), of batch norm
  void* out;                                   // CONV1X1_MAXPOOL: (N, H/2, W/2, K); AVGPOOL_LINEAR: (N, K) in float32;
                                               // of CONV_NORM_RELU only the last layer's is stored: (N, H, W, K)
  const void* dout;                            // as out
  void* dx;                                    // (N, H, W, C), or null
  float *dweight, *dbias;                      // as weight, bias
  float *dnorm_weight, *dnorm_bias;            // (K)

  // Planned in C++, see network.h.
  const LayerParams *source, *skip;  // CONV_NORM_RELU layers whose output this one reads, and adds; or null
  union {                            // kept for the backward pass:
    void* pre_activation;            //   CONV_NORM_RELU: (N, H, W, K), what the norm normalises
    void* argmax;                    //   CONV1X1_MAXPOOL: (N, H/2, W/2, K), 0 to 3, or null
    float* pooled;                   //   AVGPOOL_LINEAR: (N, C)
  };
  float *map_mean, *map_var;  // (N, K): of each map
  float *mean, *rstd;         // (N, K): each normalisation group's, repeated over its members
  float *scale, *shift;       // (N, K): the layer's output is relu(scale * pre_activation + shift)
  float *dscale, *dshift;     // (N, K): with respect to scale * (pre_activation - mean) + shift
  void* dpre_activation;      // as pre_activation, where a skip needs it
  void* packed;               // the weight, rearranged for the forward pass; of a thread's own, or null: not yet
  void* packed_backward;      // and for the backward pass
  float* grads;               // of the parameters, one set for each chunk of images

  int64_t weight_index(int64_t k, int64_t c, int64_t tap) const {  // of a 3×3 weight; tap = 3 * row + column
    return k * 9 * C + c * weight_c_stride + tap * weight_tap_stride;
  }
};
