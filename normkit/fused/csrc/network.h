// Runs a list of layers forward and backward, and plans where their activations and gradients lie in a workspace.
#pragma once

#include "avgpool_linear.h"
#include "conv1x1_maxpool.h"
#include "conv_norm_relu.h"

namespace {

// Hands out addresses in a workspace, one behind the other.
struct Arena {
  static constexpr int64_t ALIGNMENT = 64;  // bytes of a cache line
  int64_t next;
  template <typename Value> void take(Value*& pointer, int64_t bytes) {
    pointer = (Value*)next;
    next += round_up(bytes, ALIGNMENT);
  }
};

template <typename T> struct Network {
  LayerParams* const layers;
  const int64_t count;

  static int64_t out_bytes(const LayerParams& p) {
    return p.kind == AVGPOOL_LINEAR    ? p.N * p.K * sizeof(float)
           : p.kind == CONV1X1_MAXPOOL ? p.N * p.K * (p.H / 2 * p.W / 2) * sizeof(T)
                                       : p.N * p.K * p.H * p.W * sizeof(T);
  }

  // Places every activation but the last output in a workspace, and returns its size in bytes.
  int64_t plan_activations(bool needs_grad, int64_t workspace) const {
    Arena arena = {workspace};
    for (int64_t i = 0; i < count; i++) {
      LayerParams& p = layers[i];
      if (i) p.x = layers[i - 1].out;
      if (i < count - 1) arena.take(p.out, out_bytes(p));
      if (p.kind == AVGPOOL_LINEAR) {
        arena.take(p.pooled, p.N * p.C * sizeof(float));
      } else if (needs_grad) {
        arena.take(p.pre_activation, out_bytes(p));
      } else if (p.kind == CONV_NORM_RELU) {
        p.pre_activation = p.out;  // in place
      }
      if (p.kind == CONV_NORM_RELU) {
        p.skip = p.skip_source < 0 ? nullptr : layers[p.skip_source].out;
        for (float** table : {&p.mean, &p.var}) arena.take(*table, p.N * p.K * sizeof(float));
      }
    }
    return arena.next - workspace;
  }

  // Places the gradients of the activations: two that take turns from layer to layer, and one more for each skip.
  int64_t plan_gradients(int64_t workspace) const {
    Arena arena = {workspace};
    int64_t largest = 0;
    for (int64_t i = 0; i < count - 1; i++) {
      layers[i].dout = nullptr;
      largest = std::max(largest, out_bytes(layers[i]));
    }
    const void* alternating[2];
    for (const void*& gradient : alternating) arena.take(gradient, largest);
    for (int64_t i = count; i--;) {
      LayerParams& p = layers[i];
      if (p.kind == CONV_NORM_RELU && p.skip) {
        arena.take(p.dpre_activation, out_bytes(p));
        layers[p.skip_source].dout = p.dpre_activation;
      }
      if (!i) continue;
      p.accumulate_dx = layers[i - 1].dout != nullptr;
      if (!p.accumulate_dx) layers[i - 1].dout = alternating[i % 2];
      p.dx = (void*)layers[i - 1].dout;
    }
    return arena.next - workspace;
  }

  // Calls body(the layer).
  template <typename Factor, typename Body> static void dispatch(const LayerParams& p, Body body) {
    p.kind == AVGPOOL_LINEAR    ? body(AvgPoolLinear<T>{p})
    : p.kind == CONV1X1_MAXPOOL ? body(Conv1x1MaxPool<T>{p})
    : p.nchw                    ? body(ConvNormReLU<T, Im2col<T>>{p})
                                : body(ConvNormReLU<T, Winograd<T, Factor>>{p});
  }

  // Both return the size of the workspace they need, and do no more where none is given.
  int64_t forward(bool needs_grad, int64_t workspace) const {
    const int64_t size = plan_activations(needs_grad, workspace);
    for (int64_t i = 0; workspace && i < count; i++)
      dispatch<float>(layers[i], [](const auto& layer) { layer.forward(); });
    return size;
  }
  template <typename Factor> int64_t backward(int64_t activations, int64_t workspace) const {
    plan_activations(true, activations);
    const int64_t size = plan_gradients(workspace);
    for (int64_t i = count; workspace && i--;) dispatch<Factor>(layers[i], [](const auto& layer) { layer.backward(); });
    return size;
  }
};

}  // namespace
