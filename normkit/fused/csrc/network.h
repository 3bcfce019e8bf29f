// Runs a list of layers forward and backward, in a workspace of the caller's.
#pragma once

#include <atomic>

#include "avgpool_linear.h"
#include "conv1x1_maxpool.h"
#include "conv_norm_relu.h"
#include "cross_entropy.h"

namespace {

// What products of the backward pass are computed from.
template <typename T> using GradientFactor = std::conditional_t<std::is_same_v<T, bf16>, bf16x2, float>;

// A layer has
//   pack(arena, backward)                         its weights, rearranged for a pass
//   take_scratch(arena, backward)                 memory of one thread for a pass
//   forward(thread, begin, end, arena)            for images begin ... end-1; for batch norm all threads together
//   backward(begin, end, arena, grads, first)     for images of a chunk, whose first write grads (grad_size), while
//                                                 others add to it: gradients of its parameters
//   reduce(thread, chunks)                        the gradients of parameters, from those of all chunks
template <typename T> struct Network {
  LayerParams* const layers;
  const int64_t count, threads;
  const Chunks chunks = {layers->N};

  // So many images of a chunk go through a layer backward at a time, and through all layers of a step where no batch
  // statistics are wanted: four, whose 16 tiles in the smallest maps are enough for a block.
  const int64_t images_at_once = std::any_of(layers, layers + count, has_batch_statistics)
                                     ? chunks.largest()
                                     : std::min<int64_t>(4, chunks.largest());

  static bool has_batch_statistics(const LayerParams& p) {
    return p.kind == CONV_NORM_RELU && !p.num_groups && !p.use_running_stats;
  }
  // Calls body(begin, end, whether these are its first) for the images of a chunk.
  template <typename Body> void for_each_part(int64_t chunk, Body body) const {
    const int64_t first = chunks.begin(chunk), last = chunks.end(chunk);
    for (int64_t begin = first; begin < last; begin += images_at_once)
      body(begin, std::min(begin + images_at_once, last), begin == first);
  }

  // Values of one image's output.
  static int64_t out_size(const LayerParams& p) {
    const int64_t area = p.kind == AVGPOOL_LINEAR ? 1 : p.kind == CONV1X1_MAXPOOL ? p.H / 2 * (p.W / 2) : p.H * p.W;
    return p.K * area;
  }

  // Takes memory for all that the backward pass and later layers read.
  void plan_activations(bool needs_grad, Arena& arena) const {
    const int64_t N = chunks.N;
    for (int64_t i = 0; i < count; i++) {
      LayerParams& p = layers[i];
      const LayerParams* before = i ? &layers[i - 1] : nullptr;
      p.source = before && before->kind == CONV_NORM_RELU ? before : nullptr;
      if (before) p.x = p.source ? before->pre_activation : before->out;
      if (p.kind == AVGPOOL_LINEAR) {
        p.pooled = arena.take<float>(N * p.C);
      } else if (p.kind == CONV1X1_MAXPOOL) {
        p.argmax = needs_grad ? arena.take<T>(N * out_size(p)) : nullptr;
        if (i < count - 1) p.out = arena.take<T>(N * out_size(p));
      } else {
        p.skip = p.skip_source < 0 ? nullptr : &layers[p.skip_source];
        p.pre_activation = arena.take<T>(N * out_size(p));
        for (float** table : {&p.map_mean, &p.map_var, &p.mean, &p.rstd, &p.scale, &p.shift})
          *table = arena.take<float>(N * p.K);
      }
    }
  }

  // Takes memory for the gradients of the activations. A layer writes its dx in the place of its dout, which is in
  // cache, where both have one size; else into the other of two pieces. Each skip has one more piece, and the layer
  // that reads the skip's source adds its dx to it.
  void plan_gradients(Arena& arena) const {
    int64_t N = chunks.N, largest = 0;
    for (int64_t i = 0; i < count - 1; i++) largest = std::max(largest, N * out_size(layers[i]));
    T *dx = arena.take<T>(largest), *other = arena.take<T>(largest);
    for (int64_t i = count; i--;) {
      LayerParams& p = layers[i];
      p.accumulate_dx = false;
      const bool in_place = p.kind == CONV_NORM_RELU && p.C == p.K && i < count - 1;  // the last dout is the caller's
      if (!in_place) std::swap(dx, other);
      if (i) p.dx = dx;
      if (p.kind == CONV_NORM_RELU)
        for (float** table : {&p.dscale, &p.dshift}) *table = arena.take<float>(N * p.K);
    }
    for (int64_t i = 0; i < count; i++) {
      LayerParams& p = layers[i];
      if (p.kind != CONV_NORM_RELU || !p.skip) continue;
      LayerParams& reader = layers[p.skip_source + 1];
      reader.dx = p.dpre_activation = arena.take<T>(N * out_size(p));
      reader.accumulate_dx = true;
    }
    for (int64_t i = 0; i < count - 1; i++) layers[i].dout = layers[i + 1].dx;
  }

  // Calls body(layer).
  template <typename Factor, typename Body> static void dispatch(LayerParams& p, Body body) {
    p.kind == AVGPOOL_LINEAR    ? body(AvgPoolLinear<T>{p})
    : p.kind == CONV1X1_MAXPOOL ? body(Conv1x1MaxPool<T>{p})
    : p.nchw                    ? body(ConvNormReLU<T, Im2col<T, Factor>>{p})
                                : body(ConvNormReLU<T, Winograd<T, Factor>>{p});
  }

  // Takes memory for a pass: the gradients of each chunk. Returns the bytes of a thread's own memory: its copies of the
  // layers, and what each layer begins anew, packed weights and scratch.
  template <typename Factor> int64_t plan_pass(bool backward, Arena& arena) const {
    Arena own = {};
    own.take<LayerParams>(count);
    int64_t bytes = 0;
    for (int64_t i = 0; i < count; i++)
      dispatch<Factor>(layers[i], [&](const auto& layer) {
        Arena each = own;
        layer.pack(each, backward);
        layer.take_scratch(each, backward);
        bytes = std::max(bytes, each.used);
        if (backward) layers[i].grads = arena.take<float>(chunks.count * layer.grad_size);
      });
    return bytes;
  }
  // The layers as a thread's own, with its own packed weights: fetched from the cache of another core they take longer.
  Network copy_layers(Arena& arena) const {
    LayerParams* const own = arena.take<LayerParams>(count);
    std::copy_n(layers, count, own);
    return {own, count, threads, chunks};
  }
  // Packs all weights at once, for several runs.
  template <typename Factor> void pack(Arena& arena) const {
    for (int64_t i = 0; i < count; i++) {
      dispatch<float>(layers[i], [&](const auto& layer) { layers[i].packed = layer.pack(arena, false); });
      dispatch<Factor>(layers[i], [&](const auto& layer) { layers[i].packed_backward = layer.pack(arena, true); });
    }
  }

  // Takes a thread's images through layer i; with batch statistics, together with the threads that have the others.
  void forward_layer(int64_t i, const Thread& thread, int64_t begin, int64_t end, Arena scratch) const {
    LayerParams& p = layers[i];
    dispatch<float>(p, [&](const auto& layer) {
      if (!p.packed) p.packed = layer.pack(scratch, false);
      layer.forward(thread, begin, end, scratch);
    });
  }
  template <typename Factor>
  void backward_layer(int64_t i, int64_t first_chunk, int64_t last_chunk, Arena scratch, bool first) const {
    LayerParams& p = layers[i];
    dispatch<Factor>(p, [&](const auto& layer) {
      if (!p.packed_backward) p.packed_backward = layer.pack(scratch, true);
      for (int64_t chunk = first_chunk; chunk < last_chunk; chunk++)
        for_each_part(chunk, [&](int64_t begin, int64_t end, bool is_first) {
          layer.backward(begin, end, scratch, p.grads + chunk * layer.grad_size, first && is_first);
        });
    });
  }
  void run_forward(const Thread& thread, int64_t begin, int64_t end, Arena scratch) const {
    for (int64_t i = 0; i < count; i++) forward_layer(i, thread, begin, end, scratch);
  }
  template <typename Factor>
  void run_backward(const Thread& thread, int64_t first_chunk, int64_t last_chunk, Arena scratch,
                    bool first = true) const {  // of their chunk
    for (int64_t i = count; i--;) {
      // A dx of another size takes memory that images of other threads had, and batch norm sums up what all have found.
      if (threads > 1) thread.barrier();
      backward_layer<Factor>(i, first_chunk, last_chunk, scratch, first);
    }
  }
  template <typename Factor> void reduce(const Thread& thread) const {
    for (int64_t i = 0; i < count; i++)
      dispatch<Factor>(layers[i], [&](const auto& layer) { layer.reduce(thread, chunks.count); });
  }

  // The passes return the size of the workspace they need, and do no more where none is given.
  int64_t forward(bool needs_grad, char* workspace) const {
    Arena arena = {workspace};
    plan_activations(needs_grad, arena);
    const int64_t own_bytes = plan_pass<float>(false, arena);
    char* const memory = arena.take<char>(threads * own_bytes);
    if (!workspace) return arena.used;
    const LayerParams& last = layers[count - 1];
    parallel(threads, [&](const Thread& thread) {
      Arena scratch = {memory + thread.index * own_bytes};
      copy_layers(scratch).run_forward(thread, thread.begin(last.N), thread.end(last.N), scratch);
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
    const int64_t own_bytes = plan_pass<Factor>(true, arena);
    char* const memory = arena.take<char>(threads * own_bytes);
    if (!workspace) return arena.used;
    const LayerParams& last = layers[count - 1];
    parallel(threads, [&](const Thread& thread) {
      if (last.kind == CONV_NORM_RELU)
        thread.for_each(last.N, [&](int64_t n) { sum_gradients(last, (const T*)last.dout, n); });
      Arena scratch = {memory + thread.index * own_bytes};
      copy_layers(scratch).template run_backward<Factor>(thread, thread.begin(chunks.count), thread.end(chunks.count),
                                                         scratch);
      thread.barrier();
      reduce<Factor>(thread);
    });
    return arena.used;
  }

  // Forward pass, cross-entropy and backward pass of a network that reads nchw and ends in logits; scores (2): the mean
  // loss, and how many images are right. Without batch statistics a thread takes a few images after others through all
  // three, while they are in cache.
  template <typename Factor> int64_t step(const int64_t* labels, float* scores, char* workspace) const {
    Arena arena = {workspace};
    LayerParams& last = layers[count - 1];
    const bool by_chunk = std::none_of(layers, layers + count, has_batch_statistics) &&
                          (chunks.count % threads == 0 || chunks.count >= 2 * threads);  // else threads would idle
    last.dout = arena.take<float>(last.N * last.K);
    Scores* const parts = arena.take<Scores>(chunks.count);
    // Whether a thread goes through the layers several times, for which it packs all weights first.
    const bool several_runs = by_chunk && (chunks.count > threads || chunks.largest() > images_at_once);
    const int64_t own_bytes = std::max(plan_pass<float>(false, arena), plan_pass<Factor>(true, arena));
    Arena each = {};  // what a thread needs
    each.take<char>(own_bytes);
    if (several_runs) pack<Factor>(each);
    if (by_chunk) {
      each.take<LayerParams>(count);
      Network{layers, count, 1, {images_at_once, 1}}.plan_images(each);
    } else {
      plan_images(arena);
    }
    char* const memory = arena.take<char>(threads * each.used);
    if (!workspace) return arena.used;

    std::fill_n(parts, chunks.count, Scores());
    std::atomic<int64_t> next = {0};
    parallel(threads, [&](const Thread& thread) {
      Arena rest = {memory + thread.index * each.used};
      Arena scratch = {rest.take<char>(own_bytes)};
      const Network own = copy_layers(scratch);
      if (several_runs) own.template pack<Factor>(rest);
      if (by_chunk) {
        LayerParams* const copies = rest.take<LayerParams>(count);
        for (int64_t chunk; (chunk = next++) < chunks.count;) {
          for_each_part(chunk, [&](int64_t begin, int64_t end, bool first) {
            const Network part = own.take_images(begin, end, chunk, copies);
            Arena images = rest;
            part.plan_images(images);
            part.run_forward(thread, 0, end - begin, scratch);
            parts[chunk] += compute_loss(begin, end, labels);
            part.template run_backward<Factor>(thread, 0, 1, scratch, first);
          });
        }
      } else {
        const int64_t first_chunk = thread.begin(chunks.count), last_chunk = thread.end(chunks.count);
        own.run_forward(thread, thread.begin(last.N), thread.end(last.N), scratch);
        thread.barrier();
        for (int64_t chunk = first_chunk; chunk < last_chunk; chunk++)
          for_each_part(chunk,
                        [&](int64_t begin, int64_t end, bool) { parts[chunk] += compute_loss(begin, end, labels); });
        own.template run_backward<Factor>(thread, first_chunk, last_chunk, scratch);
      }
      thread.barrier();
      reduce<Factor>(thread);
      if (!thread.index) {
        Scores sum;
        for (int64_t chunk = 0; chunk < chunks.count; chunk++) sum += parts[chunk];
        sum.store(last.N, scores);
      }
    });
    return arena.used;
  }
  void plan_images(Arena& arena) const {
    plan_activations(true, arena);
    plan_gradients(arena);
  }
  // Images of a chunk as a network of their own, whose layers are written to `to`.
  Network take_images(int64_t begin, int64_t end, int64_t chunk, LayerParams* to) const {
    for (int64_t i = 0; i < count; i++) {
      LayerParams& p = to[i] = layers[i];
      p.N = end - begin;
      if (p.dropout_scale) p.dropout_scale += begin * p.K;
      dispatch<float>(p, [&](const auto& layer) { p.grads += chunk * layer.grad_size; });
    }
    LayerParams &first = to[0], &last = to[count - 1];
    first.x = (const float*)first.x + begin * first.C * first.H * first.W;
    last.out = (float*)last.out + begin * last.K;
    last.dout = (const float*)last.dout + begin * last.K;
    return {to, count, 1, {end - begin, 1}};
  }
  // Writes the gradient of the logits of images begin ... end-1, and returns their scores.
  Scores compute_loss(int64_t begin, int64_t end, const int64_t* labels) const {
    const LayerParams& last = layers[count - 1];
    const int64_t first = begin * last.K;
    return cross_entropy_sum(end - begin, last.K, (const float*)last.out + first, labels + begin,
                             (float*)last.dout + first, last.N);
  }
};

}  // namespace
