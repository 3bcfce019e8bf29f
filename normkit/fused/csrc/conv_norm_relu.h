// 3×3 convolution, skip, and the statistics of batch or group norm as one layer, each block of images while it is in
// cache. What follows them, normalisation, ReLU and dropout, is left to the layer's readers, see norm_relu.h.
//
// A normalisation group is all images of one channel (batch norm), or one image and a range of channels (group norm, of
// which layer norm is the case of one group). Only for batch norm do the threads wait for each other; then each of them
// computes the statistics of all groups.
#pragma once

#include <cmath>

#include "im2col.h"
#include "winograd.h"

namespace {

template <typename T, typename Convolution> struct ConvNormReLU {
  const LayerParams& p;
  const Convolution convolution = {p};
  const int64_t N = p.N, K = p.K, area = p.H * p.W, image_size = area * K;
  const int64_t dweight_size = 9 * p.C * K, grad_size = dweight_size + 3 * K;
  const bool batch_norm = !p.num_groups && !p.use_running_stats;

  struct Scratch {
    typename Convolution::Scratch convolution;
    float *mean, *var;        // (K), of the normalisation groups
    float *mean_u, *mean_uv;  // (K), see backward
    T* dpre_activation;       // (images_per_block, H, W, K)
  };
  Scratch take_scratch(Arena& arena, bool backward) const {
    return {convolution.take_scratch(arena, backward),
            arena.take<float>(K),
            arena.take<float>(K),
            arena.take<float>(K),
            arena.take<float>(K),
            arena.take<T>(backward * convolution.images_per_block * image_size)};
  }
  auto pack(Arena& arena, bool backward) const { return convolution.pack(arena, backward); }

  // Calls body(first image, end) for the blocks of images begin ... end-1.
  template <typename Body> void for_each_block(int64_t begin, int64_t end, Body body) const {
    for (int64_t n = begin; n < end; n += convolution.images_per_block)
      body(n, std::min(n + convolution.images_per_block, end));
  }
  template <typename Body> void for_each_channel_vector(Body body) const {
    for (int64_t k = 0; k < K; k += LANES) body(k);
  }
  vec_f32 dropout_scale(int64_t n, int64_t k) const {
    return p.dropout_scale ? load(p.dropout_scale + n * K + k) : vec_f32{} + 1;
  }

  void forward(const Thread& thread, int64_t first, int64_t last, Arena arena) const {
    const Scratch scratch = take_scratch(arena, false);
    convolution.clear(scratch.convolution);
    for_each_block(first, last, [&](int64_t begin, int64_t end) {
      convolution.forward(begin, end, scratch.convolution);
      for (int64_t n = begin; n < end; n++) {
        if (!p.use_running_stats) measure(n);
        if (batch_norm) continue;
        p.num_groups ? average_over_groups(n, scratch) : copy_running_stats(scratch);
        set_tables(n, scratch);
      }
    });
    if (!batch_norm) return;
    thread.barrier();
    average_over_batch(scratch);
    for (int64_t n = first; n < last; n++) set_tables(n, scratch);
    if (!thread.index) update_running_stats(scratch);
  }

  // Computes the mean and variance of each map of image n.
  void measure(int64_t n) const {
    for_each_channel_vector([&](int64_t k) {
      const T* first = (const T*)p.pre_activation + n * image_size + k;
      const vec_f32 pivot = load(first);  // near the mean, so that the squares do not swallow the variance
      const auto [sum, squares] = sum_up<2>(area, [&](int64_t i, vec_f32* sums) {
                                    const vec_f32 distance = load(first + i * K) - pivot;
                                    sums[0] += distance;
                                    sums[1] += distance * distance;
                                  }).values;
      const vec_f32 mean = sum / float(area), var = squares / float(area) - mean * mean;
      store(p.map_mean + n * K + k, pivot + mean);
      store(p.map_var + n * K + k, select(!(var < 0), var));  // rounding may leave it below 0; NaN stays
    });
  }

  // From the mean and variance of maps to those of normalisation groups.
  void average_over_batch(const Scratch& scratch) const {
    for_each_channel_vector([&](int64_t k) {
      vec_f32 mean = {}, var = {};
      for (int64_t n = 0; n < N; n++) mean += load(p.map_mean + n * K + k) / float(N);
      for (int64_t n = 0; n < N; n++) {
        const vec_f32 distance = load(p.map_mean + n * K + k) - mean;
        var += (load(p.map_var + n * K + k) + distance * distance) / float(N);
      }
      store(scratch.mean + k, mean);
      store(scratch.var + k, var);
    });
  }
  void average_over_groups(int64_t n, const Scratch& scratch) const {
    const float *map_mean = p.map_mean + n * K, *map_var = p.map_var + n * K;
    const int64_t members = K / p.num_groups;
    for (int64_t first = 0; first < K; first += members) {
      float mean = 0, var = 0;
      for (int64_t k = first; k < first + members; k++) mean += map_mean[k] / members;
      for (int64_t k = first; k < first + members; k++) {
        const float distance = map_mean[k] - mean;
        var += (map_var[k] + distance * distance) / members;
      }
      std::fill_n(scratch.mean + first, members, mean);
      std::fill_n(scratch.var + first, members, var);
    }
  }
  void copy_running_stats(const Scratch& scratch) const {
    std::copy_n(p.running_mean, K, scratch.mean);
    std::copy_n(p.running_var, K, scratch.var);
  }
  void update_running_stats(const Scratch& scratch) const {
    const float count = N * area, momentum = p.momentum;
    for (int64_t k = 0; k < K; k++) {
      p.running_mean[k] += momentum * (scratch.mean[k] - p.running_mean[k]);
      p.running_var[k] += momentum * (scratch.var[k] * (count / (count - 1)) - p.running_var[k]);
    }
  }

  // Sets the tables that readers and the backward pass use of image n.
  void set_tables(int64_t n, const Scratch& scratch) const {
    for_each_channel_vector([&](int64_t k) {
      const vec_f32 mean = load(scratch.mean + k), var = load(scratch.var + k);
      vec_f32 rstd = {};
      for (int64_t l = 0; l < LANES; l++) rstd[l] = 1 / std::sqrt(var[l] + float(p.eps));
      const vec_f32 scale = load(p.norm_weight + k) * rstd * dropout_scale(n, k);
      store(p.mean + n * K + k, mean);
      store(p.rstd + n * K + k, rstd);
      store(p.scale + n * K + k, scale);
      store(p.shift + n * K + k, load(p.norm_bias + k) * dropout_scale(n, k) - mean * scale);
    });
  }

  // Stores the output of image n, which only the last layer's caller reads.
  void store_out(int64_t n) const {
    for_each_channel_vector([&](int64_t k) {
      const NormReLU norm_relu(p, n, k);
      for (int64_t i = n * image_size + k; i < (n + 1) * image_size; i += K)
        store((T*)p.out + i, norm_relu.out(load((const T*)p.pre_activation + i)));
    });
  }

  // With h the gradient behind ReLU and dropout, u = norm_weight * h, and v the normalised pre_activation:
  // dpre_activation = (u - mean(u) - v * mean(u * v)) / deviation, the means over the normalisation group. The sums
  // that they are made of, dshift and dscale, come from the layer's reader. dx may lie where dout does: of each block,
  // dout is read before dx is written.
  void backward(int64_t first_image, int64_t last_image, Arena arena, float* grads, bool first) const {
    const Scratch scratch = take_scratch(arena, true);
    convolution.clear(scratch.convolution);
    if (batch_norm) average_gradients_over_batch(scratch);
    float *dweight = grads, *others = dweight + dweight_size;
    if (first) std::fill_n(others, 3 * K, 0);
    for_each_block(first_image, last_image, [&](int64_t begin, int64_t end) {
      T* block = p.skip ? (T*)p.dpre_activation + begin * image_size : scratch.dpre_activation;
      for (int64_t n = begin; n < end; n++) {
        if (p.num_groups) average_gradients_over_groups(n, scratch);
        compute_dpre_activation(n, scratch, block + (n - begin) * image_size, others);
      }
      convolution.backward(begin, end, block, scratch.convolution, begin == first_image);
      for (int64_t n = begin; p.source && n < end; n++) sum_gradients(*p.source, (const T*)p.dx, n);
    });
    convolution.store_weight_grad(scratch.convolution, dweight, first);
  }

  void average_gradients_over_batch(const Scratch& scratch) const {
    for_each_channel_vector([&](int64_t k) {
      vec_f32 u = {}, uv = {};
      for (int64_t n = 0; n < N; n++) {
        const vec_f32 weight = load(p.norm_weight + k) * dropout_scale(n, k) / float(N * area);
        u += weight * load(p.dshift + n * K + k);
        uv += weight * load(p.dscale + n * K + k) * load(p.rstd + n * K + k);
      }
      store(scratch.mean_u + k, u);
      store(scratch.mean_uv + k, uv);
    });
  }
  void average_gradients_over_groups(int64_t n, const Scratch& scratch) const {
    for_each_channel_vector([&](int64_t k) {
      const vec_f32 weight = load(p.norm_weight + k) * dropout_scale(n, k);
      store(scratch.mean_u + k, weight * load(p.dshift + n * K + k));
      store(scratch.mean_uv + k, weight * load(p.dscale + n * K + k) * load(p.rstd + n * K + k));
    });
    const int64_t members = K / p.num_groups;
    for (int64_t first = 0; first < K; first += members)
      for (float* values : {scratch.mean_u + first, scratch.mean_uv + first}) {
        float sum = 0;
        for (int64_t k = 0; k < members; k++) sum += values[k];
        std::fill_n(values, members, sum / (members * area));
      }
  }

  // Writes dpre_activation of image n, and adds to dbias, dnorm_weight and dnorm_bias.
  void compute_dpre_activation(int64_t n, const Scratch& scratch, T* to, float* others) const {
    constexpr int64_t PIXELS = 64;  // of all channels at a time, which share cache lines
    for (int64_t begin = 0; begin < area; begin += PIXELS)
      for_each_channel_vector([&](int64_t k) {
        const NormReLU norm_relu(p, n, k);
        const vec_f32 mean = load(p.mean + n * K + k), rstd = load(p.rstd + n * K + k);
        const vec_f32 slope = -rstd * rstd * load(scratch.mean_uv + k);
        const vec_f32 constant = -rstd * load(scratch.mean_u + k) - mean * slope;
        const int64_t first = begin * K + k;
        const T* pre_activation = (const T*)p.pre_activation + n * image_size + first;
        const T* dout = (const T*)p.dout + n * image_size + first;
        const auto [sum] = sum_up<1>(std::min(PIXELS, area - begin), [&](int64_t i, vec_f32* sums) {
                             const vec_f32 value = load(pre_activation + i * K);
                             const vec_f32 h = select(norm_relu.passes(value), load(dout + i * K));
                             const vec_f32 dvalue = h * norm_relu.scale + (value * slope + constant);
                             store(to + first + i * K, dvalue);
                             sums[0] += dvalue;
                           }).values;
        add(others + k, sum);
      });
    for_each_channel_vector([&](int64_t k) {
      add(others + K + k, load(p.dscale + n * K + k) * dropout_scale(n, k) * load(p.rstd + n * K + k));
      add(others + 2 * K + k, load(p.dshift + n * K + k) * dropout_scale(n, k));
    });
  }

  // Sums up the parameters' gradients over the chunks.
  void reduce(const Thread& thread, int64_t chunks) const {
    const auto sum_over_chunks = [&](int64_t i) { return sum_of_chunks(p.grads + i, chunks, grad_size); };
    thread.for_each(p.C, [&](int64_t c) {  // by c: in PyTorch's ordinary layout its 9 taps share a cache line
      for (int64_t tap = 0; tap < 9; tap++)
        for_each_channel_vector([&](int64_t k) {
          const vec_f32 sum = sum_over_chunks((tap * p.C + c) * K + k);
          for (int64_t l = 0; l < LANES; l++) p.dweight[p.weight_index(k + l, c, tap)] = sum[l];
        });
    });
    if (thread.index != thread.count - 1) return;
    for_each_channel_vector([&](int64_t k) {
      store(p.dbias + k, sum_over_chunks(dweight_size + k));
      store(p.dnorm_weight + k, sum_over_chunks(dweight_size + K + k));
      store(p.dnorm_bias + k, sum_over_chunks(dweight_size + 2 * K + k));
    });
  }
};

}  // namespace
