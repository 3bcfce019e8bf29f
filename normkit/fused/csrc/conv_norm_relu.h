// 3×3 convolution, skip, batch or group norm, ReLU and dropout as one layer, each block of images while it is in cache.
//
// A normalisation group is a rectangle in the table (image, channel): all images of one channel (batch norm), or one
// image and a range of channels (group norm, of which layer norm is the case of one group).
#pragma once

#include <cmath>

#include "im2col.h"
#include "winograd.h"

namespace {

template <typename T, typename Convolution> struct ConvNormReLU {
  typedef typename Convolution::Scratch Scratch;
  const LayerParams& p;
  const Convolution convolution = {p};
  const int64_t N = p.N, K = p.K, area = p.H * p.W, image_size = area * K;
  const int64_t chunks = std::min(N, REDUCTION_CHUNKS);

  // out = relu(scale * pre_activation + shift) for one image and a vector of channels, dropout included.
  struct Affine {
    vec_f32 mean, rstd, dropout_scale, scale, shift;
  };
  Affine affine(int64_t n, int64_t k) const {
    const int64_t i = n * K + k;
    Affine affine = {load(p.mean + i), load(p.var + i), load(p.dropout_scale + i), {}, {}};
    for (int64_t l = 0; l < LANES; l++) affine.rstd[l] = 1 / std::sqrt(affine.rstd[l] + float(p.eps));
    affine.scale = load(p.norm_weight + k) * affine.rstd * affine.dropout_scale;
    affine.shift = load(p.norm_bias + k) * affine.dropout_scale - affine.mean * affine.scale;
    return affine;
  }

  // Calls body(n, first channel) for each vector of channels of images begin ... end-1.
  template <typename Body> void for_each_channel_vector(int64_t begin, int64_t end, Body body) const {
    for (int64_t n = begin; n < end; n++)
      for (int64_t k = 0; k < K; k += LANES) body(n, k);
  }
  // Calls body(index in the tables, channel) for each member of a normalisation group.
  template <typename Body>
  void for_each_in_group(int64_t n_begin, int64_t n_end, int64_t k_begin, int64_t k_end, Body body) const {
    for (int64_t n = n_begin; n < n_end; n++)
      for (int64_t k = k_begin; k < k_end; k++) body(n * K + k, k);
  }
  int64_t chunk_begin(int64_t chunk) const { return N * chunk / chunks; }
  // Calls body(first image, end) for each block of a chunk.
  template <typename Body> void for_each_block(int64_t chunk, Body body) const {
    const int64_t end = chunk_begin(chunk + 1);
    for (int64_t n = chunk_begin(chunk); n < end; n += convolution.images_per_block)
      body(n, std::min(n + convolution.images_per_block, end));
  }

  // Does `before` for every block of images, `group` for every normalisation group, and `after` for every block. Where
  // images do not depend on each other, all three for one block before the next, while it is in cache.
  template <typename Before, typename Group, typename After> void run(Before before, Group group, After after) const {
    const int64_t groups = p.num_groups ? p.num_groups : K;
    const bool independent = p.num_groups || p.use_running_stats;
    const PerThread<Scratch> scratches([&] { return convolution.make_scratch(); });
    parallel([&](const Thread& thread) {
      const Scratch& scratch = scratches[thread];
      convolution.clear(scratch);
      thread.for_each(chunks, [&](int64_t chunk) {
        for_each_block(chunk, [&](int64_t begin, int64_t end) {
          before(begin, end, scratch);
          if (!independent) return;
          for (int64_t n = begin; n < end; n++)
            for (int64_t g = 0; g < groups; g++) group(n, n + 1, g * K / groups, (g + 1) * K / groups);
          after(begin, end, scratch, chunk);
        });
      });
      if (independent) return;
      thread.barrier();
      thread.for_each(K, [&](int64_t k) { group(0, N, k, k + 1); });
      thread.barrier();
      thread.for_each(chunks, [&](int64_t chunk) {
        for_each_block(chunk, [&](int64_t begin, int64_t end) { after(begin, end, scratch, chunk); });
      });
    });
  }

  void forward() const {
    const T* pre_activation = (const T*)p.pre_activation;
    T* out = (T*)p.out;
    const auto packed = convolution.pack(false);
    run(
        [&](int64_t begin, int64_t end, const Scratch& scratch) {
          convolution.forward(begin, end, packed, scratch);
          if (p.use_running_stats) return;
          for_each_channel_vector(begin, end, [&](int64_t n, int64_t k) {
            const T* first = pre_activation + n * image_size + k;
            const vec_f32 pivot = load(first);  // near the mean, so that the squares do not swallow the variance
            vec_f32 sum = {}, squares = {};
            for (int64_t i = 0; i < image_size; i += K) {
              const vec_f32 distance = load(first + i) - pivot;
              sum += distance;
              squares += distance * distance;
            }
            sum /= float(area);
            store(p.mean + n * K + k, pivot + sum);
            const vec_f32 var = squares / float(area) - sum * sum;
            store(p.var + n * K + k, select(!(var < 0), var));  // rounding may leave it below 0; NaN stays
          });
        },
        [&](int64_t n_begin, int64_t n_end, int64_t k_begin, int64_t k_end) {
          if (p.use_running_stats) {
            p.mean[n_begin * K + k_begin] = p.running_mean[k_begin];
            p.var[n_begin * K + k_begin] = p.running_var[k_begin];
            return;
          }
          // From the mean and variance of each map to those of the group.
          const float members = (n_end - n_begin) * (k_end - k_begin);
          float mean = 0, var = 0;
          for_each_in_group(n_begin, n_end, k_begin, k_end, [&](int64_t i, int64_t) { mean += p.mean[i] / members; });
          for_each_in_group(n_begin, n_end, k_begin, k_end, [&](int64_t i, int64_t) {
            const float distance = p.mean[i] - mean;
            var += (p.var[i] + distance * distance) / members;
          });
          for_each_in_group(n_begin, n_end, k_begin, k_end, [&](int64_t i, int64_t) {
            p.mean[i] = mean;
            p.var[i] = var;
          });
          if (p.running_mean) {
            const float unbiased = var * (members * area / (members * area - 1));
            p.running_mean[k_begin] += float(p.momentum) * (mean - p.running_mean[k_begin]);
            p.running_var[k_begin] += float(p.momentum) * (unbiased - p.running_var[k_begin]);
          }
        },
        [&](int64_t begin, int64_t end, const Scratch&, int64_t) {
          for_each_channel_vector(begin, end, [&](int64_t n, int64_t k) {
            const Affine affine = this->affine(n, k);
            const int64_t first = n * image_size + k;
            for (int64_t i = first; i < first + image_size; i += K) {
              const vec_f32 value = load(pre_activation + i) * affine.scale + affine.shift;
              store(out + i, select(!(value < 0), value));  // so that NaN stays NaN
            }
          });
        });
  }

  // With h the gradient behind ReLU and dropout, u = norm_weight * h, and v the normalised pre_activation:
  // dpre_activation = (u - mean(u) - v * mean(u * v)) / deviation, the means over the normalisation group.
  void backward() const {
    const T *pre_activation = (const T*)p.pre_activation, *dout = (const T*)p.dout;
    const Buffer<> sum_h(N * K), sum_hv(N * K), mean_u(N * K), mean_uv(N * K), sum_dpre_activation(N * K);
    const Buffer<> dweights(chunks * convolution.weight_size);  // (chunks, 9, C, K)
    const auto packed = convolution.pack(true);
    run(
        [&](int64_t begin, int64_t end, const Scratch&) {
          for_each_channel_vector(begin, end, [&](int64_t n, int64_t k) {
            const Affine affine = this->affine(n, k);
            const int64_t first = n * image_size + k;
            vec_f32 sum = {}, product = {};
            for (int64_t i = first; i < first + image_size; i += K) {
              const vec_f32 value = load(pre_activation + i);
              const vec_f32 h = select(value * affine.scale + affine.shift > 0, load(dout + i));
              sum += h;
              product += h * (value - affine.mean);
            }
            store(sum_h + n * K + k, sum * affine.dropout_scale);
            store(sum_hv + n * K + k, product * affine.dropout_scale * affine.rstd);
          });
        },
        [&](int64_t n_begin, int64_t n_end, int64_t k_begin, int64_t k_end) {
          const float count = (n_end - n_begin) * (k_end - k_begin) * area;
          float u = 0, uv = 0;
          for_each_in_group(n_begin, n_end, k_begin, k_end, [&](int64_t i, int64_t k) {
            u += p.norm_weight[k] * sum_h[i];
            uv += p.norm_weight[k] * sum_hv[i];
          });
          for_each_in_group(n_begin, n_end, k_begin, k_end, [&](int64_t i, int64_t) {
            mean_u[i] = u / count;
            mean_uv[i] = uv / count;
          });
        },
        [&](int64_t begin, int64_t end, const Scratch& scratch, int64_t chunk) {
          T* block =
              p.dpre_activation ? (T*)p.dpre_activation + begin * image_size : (T*)(float*)scratch.dpre_activation;
          for_each_channel_vector(begin, end, [&](int64_t n, int64_t k) {
            const Affine affine = this->affine(n, k);
            const int64_t first = n * image_size + k;
            T* to = block + first - begin * image_size;
            const vec_f32 per_value = -affine.rstd * affine.rstd * load(mean_uv + n * K + k);
            const vec_f32 constant = -affine.rstd * load(mean_u + n * K + k) - affine.mean * per_value;
            vec_f32 sum = {};
            for (int64_t i = 0; i < image_size; i += K) {
              const vec_f32 value = load(pre_activation + first + i);
              const vec_f32 h = select(value * affine.scale + affine.shift > 0, load(dout + first + i));
              const vec_f32 dvalue = h * affine.scale + value * per_value + constant;
              store(to + i, dvalue);
              sum += dvalue;
            }
            store(sum_dpre_activation + n * K + k, sum);
          });
          convolution.backward(begin, end, packed, block, scratch, begin == chunk_begin(chunk));
          if (end == chunk_begin(chunk + 1))
            convolution.store_weight_grad(scratch, dweights + chunk * convolution.weight_size);
        });
    const auto sum_over_images = [&](const float* table, float* to) {
      for (int64_t k = 0; k < K; k += LANES) {
        vec_f32 sum = {};
        for (int64_t n = 0; n < N; n++) sum += load(table + n * K + k);
        store(to + k, sum);
      }
    };
    sum_over_images(sum_h, p.dnorm_bias);
    sum_over_images(sum_hv, p.dnorm_weight);
    sum_over_images(sum_dpre_activation, p.dbias);
    parallel_for(p.C, [&](int64_t c) {  // by c: in PyTorch's ordinary layout its 9 taps share a cache line
      for (int64_t tap = 0; tap < 9; tap++)
        for (int64_t k = 0; k < K; k += LANES) {
          vec_f32 sum = {};
          for (int64_t chunk = 0; chunk < chunks; chunk++)
            sum += load(dweights + chunk * convolution.weight_size + (tap * p.C + c) * K + k);
          for (int64_t l = 0; l < LANES; l++) p.dweight[p.weight_index(k + l, c, tap)] = sum[l];
        }
    });
  }
};

}  // namespace
