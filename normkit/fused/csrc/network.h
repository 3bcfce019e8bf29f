// Runs a list of layers forward and backward, in a workspace of the caller's.
#pragma once

#include "avgpool_linear.h"
#include "conv1x1_maxpool.h"
#include "conv_norm_relu.h"

namespace {

// A layer has
//   take_packed(arena, p), pack(backward, thread)    its weights, rearranged for a pass
//   take_scratch(arena, backward)                    memory of one thread for a pass, from which arena counts it
//   forward(thread, arena)                           for the thread's images
//   backward(thread, arena, grads)                   for the thread's chunks of images; grads (chunks, grad_size)
//   reduce(thread, grads)                            the gradients of parameters, from those of all chunks
// A thread has the same images in every layer of a pass.
template <typename T> struct Network {
  LayerParams* const layers;
  const int64_t count, threads;

  static int64_t out_size(const LayerParams& p) {
    const int64_t area = p.kind == AVGPOOL_LINEAR ? 1 : p.kind == CONV1X1_MAXPOOL ? p.H / 2 * (p.W / 2) : p.H * p.W;
    return p.N * p.K * area;
  }

  // Takes memory for all that the backward pass and later layers read.
  void plan_activations(bool needs_grad, Arena& arena) const {
    for (int64_t i = 0; i < count; i++) {
      LayerParams& p = layers[i];
      const LayerParams* before = i ? &layers[i - 1] : nullptr;
      p.source = before && before->kind == CONV_NORM_RELU ? before : nullptr;
      if (before) p.x = p.source ? before->pre_activation : before->out;
      if (p.kind == AVGPOOL_LINEAR) {
        p.pooled = arena.take<float>(p.N * p.C);
      } else if (p.kind == CONV1X1_MAXPOOL) {
        p.argmax = needs_grad ? arena.take<T>(out_size(p)) : nullptr;
        if (i < count - 1) p.out = arena.take<T>(out_size(p));
      } else {
        p.skip = p.skip_source < 0 ? nullptr : &layers[p.skip_source];
        p.pre_activation = arena.take<T>(out_size(p));
        for (float** table : {&p.map_mean, &p.map_var, &p.mean, &p.rstd, &p.scale, &p.shift})
          *table = arena.take<float>(p.N * p.K);
      }
    }
  }

  // Takes memory for the gradients of the activations: two that take turns, and one more for each skip, to which the
  // layer that reads the skip's source adds its own.
  void plan_gradients(Arena& arena) const {
    int64_t largest = 0;
    for (int64_t i = 0; i < count - 1; i++) largest = std::max(largest, out_size(layers[i]));
    T* const alternating[] = {arena.take<T>(largest), arena.take<T>(largest)};
    for (int64_t i = 0; i < count; i++) {
      LayerParams& p = layers[i];
      p.accumulate_dx = false;
      if (i) p.dx = alternating[i % 2];
      if (p.kind == CONV_NORM_RELU)
        for (float** table : {&p.dscale, &p.dshift}) *table = arena.take<float>(p.N * p.K);
    }
    for (int64_t i = 0; i < count; i++) {
      LayerParams& p = layers[i];
      if (p.kind != CONV_NORM_RELU || !p.skip) continue;
      LayerParams& reader = layers[p.skip_source + 1];
      reader.dx = p.dpre_activation = arena.take<T>(out_size(p));
      reader.accumulate_dx = true;
    }
    for (int64_t i = 0; i < count - 1; i++) layers[i].dout = layers[i + 1].dx;
  }

  // Calls body(layer).
  template <typename Factor, typename Body> static void dispatch(LayerParams& p, Body body) {
    p.kind == AVGPOOL_LINEAR    ? body(AvgPoolLinear<T>{p})
    : p.kind == CONV1X1_MAXPOOL ? body(Conv1x1MaxPool<T>{p})
    : p.nchw                    ? body(ConvNormReLU<T, Im2col<T>>{p})
                                : body(ConvNormReLU<T, Winograd<T, Factor>>{p});
  }

  // Memory of a pass: packed weights, and the threads' scratch, which each layer begins anew.
  struct Plan {
    char* scratch;
    int64_t scratch_bytes, grad_size;
    Arena scratch_of(const Thread& thread) const { return {scratch + thread.index * scratch_bytes}; }
  };
  template <typename Factor> Plan plan_pass(bool backward, Arena& arena) const {
    Plan plan = {};
    for (int64_t i = 0; i < count; i++)
      dispatch<Factor>(layers[i], [&](const auto& layer) {
        Arena counting = {};
        layer.take_scratch(counting, backward);
        plan.scratch_bytes = std::max(plan.scratch_bytes, counting.used);
        plan.grad_size = std::max(plan.grad_size, layer.grad_size);
        layer.take_packed(arena, layers[i]);
      });
    plan.scratch = arena.take<char>(plan.scratch_bytes * threads);
    return plan;
  }
  template <typename Factor> void pack(bool backward, const Thread& thread) const {
    for (int64_t i = 0; i < count; i++)
      dispatch<Factor>(layers[i], [&](const auto& layer) { layer.pack(backward, thread); });
    thread.barrier();
  }

  // Both return the size of the workspace they need, and do no more where none is given.
  int64_t forward(bool needs_grad, char* workspace) const {
    Arena arena = {workspace};
    plan_activations(needs_grad, arena);
    const Plan plan = plan_pass<float>(false, arena);
    if (!workspace) return arena.used;
    LayerParams& last = layers[count - 1];
    parallel(threads, [&](const Thread& thread) {
      pack<float>(false, thread);
      for (int64_t i = 0; i < count; i++)
        dispatch<float>(layers[i], [&](const auto& layer) { layer.forward(thread, plan.scratch_of(thread)); });
      if (last.kind == CONV_NORM_RELU)
        for (int64_t n = thread.begin(last.N); n < thread.end(last.N); n++)
          ConvNormReLU<T, Winograd<T, float>>{last}.store_out(n);
    });
    return arena.used;
  }

  template <typename Factor> int64_t backward(char* activations, char* workspace) const {
    Arena kept = {activations}, arena = {workspace};
    plan_activations(true, kept);
    plan_gradients(arena);
    const Plan plan = plan_pass<Factor>(true, arena);
    LayerParams& last = layers[count - 1];
    const int64_t grads_size = reduction_chunks(last.N) * plan.grad_size;
    // In turn, so that one layer's are summed up while the next layer writes its own.
    float* const grads[] = {arena.take<float>(grads_size), arena.take<float>(grads_size)};
    if (!workspace) return arena.used;
    parallel(threads, [&](const Thread& thread) {
      if (last.kind == CONV_NORM_RELU)
        thread.for_each(last.N, [&](int64_t n) { sum_gradients(last, (const T*)last.dout, n); });
      pack<Factor>(true, thread);
      for (int64_t i = count; i--;)
        dispatch<Factor>(layers[i], [&](const auto& layer) {
          layer.backward(thread, plan.scratch_of(thread), grads[i % 2]);
          thread.barrier();
          layer.reduce(thread, grads[i % 2]);
        });
    });
    return arena.used;
  }
};

}  // namespace
