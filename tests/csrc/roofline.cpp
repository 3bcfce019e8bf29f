// Measures the peak of this processor, and the kernel's layers and their parts, for
// tests/benchmarks/kernel_roofline.py.
//
//     roofline N num_groups threads float32|bfloat16
//
// Prints lines of tab-separated values: "peak", what, GFLOP/s or GB/s of all threads; "step", µs; "layer", name,
// forward and backward in µs; "part", layer, part, µs for the same images in one thread. Times are the least of
// several.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../../normkit/fused/csrc/network.h"

namespace {

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
template <typename Body> double least(int64_t repeats, Body body) {
  double shortest = 1e9;
  for (int64_t i = 0; i < repeats; i++) {
    const double start = seconds();
    body();
    shortest = std::min(shortest, seconds() - start);
  }
  return shortest;
}

// --------------------------------------------------------------------------------------------------------- the
// processor

// GFLOP/s of step(sum, factor), called for as many sums in registers as hide its latency.
template <typename Step> double peak(int64_t threads, int64_t operations, Step step) {
  constexpr int64_t SUMS = REGISTERS * 3 / 4, STEPS = 200000;
  volatile float unknown = 1, sink;
  const double time = least(100, [&] {
    parallel(threads, [&](const Thread& thread) {
      vec_f32 sums[SUMS], factor = vec_f32{} + unknown;
      UNROLL(24)
      for (int64_t i = 0; i < SUMS; i++) sums[i] = vec_f32{} + float(i + thread.index);
      for (int64_t i = 0; i < STEPS; i++) {
        UNROLL(24)
        for (int64_t j = 0; j < SUMS; j++) sums[j] = step(sums[j], factor);
      }
      UNROLL(24)
      for (int64_t i = 0; i < SUMS; i++) sink = sums[i][0];
    });
  });
  return 1e-9 * threads * SUMS * STEPS * LANES * operations / time;
}

// Bytes read a second, from a buffer of each thread's own.
double bandwidth(int64_t threads, int64_t bytes) {
  std::vector<float> buffer(threads * bytes / 4);
  const int64_t count = bytes / 4, passes = std::max<int64_t>(1, (64 << 20) / bytes);
  volatile float sink;
  const double time = least(20, [&] {
    parallel(threads, [&](const Thread& thread) {
      const float* from = buffer.data() + thread.index * count;
      vec_f32 sums[4] = {};
      for (int64_t pass = 0; pass < passes; pass++)
        for (int64_t i = 0; i < count; i += 4 * LANES) {
          UNROLL(4)
          for (int64_t j = 0; j < 4; j++) sums[j] += load(from + i + j * LANES);
        }
      for (vec_f32 sum : sums) sink = sum[0];
    });
  });
  return 1e-9 * threads * passes * bytes / time;
}

// ----------------------------------------------------------------------------------------------------------- the
// network

const char* const NAMES[] = {"C1", "C2", "c3", "C3", "C4", "C5", "c6", "C7", "C8", "C9", "C10"};

struct RandomNetwork {
  std::vector<std::vector<float>> kept;
  std::vector<LayerParams> layers;

  float* values(int64_t count, float scale = 1, float shift = 0) {
    kept.emplace_back(count);
    uint32_t state = kept.size();
    for (float& value : kept.back()) {
      state = state * 1664525u + 1013904223u;
      value = (float(state >> 8) / (1 << 23) - 1) * scale + shift;
    }
    return kept.back().data();
  }
  void add(LayerKind kind, int64_t N, int64_t C, int64_t K, int64_t size, int64_t num_groups,
           int64_t skip_source = -1) {
    LayerParams p = {};
    p.kind = kind, p.skip_source = skip_source, p.N = N, p.C = C, p.K = K, p.H = p.W = size;
    p.eps = 1e-5, p.momentum = 0.1, p.weight_c_stride = 9, p.weight_tap_stride = 1;
    const int64_t weights = (kind == CONV_NORM_RELU ? 9 : 1) * C * K;
    p.weight = values(weights, 0.1), p.bias = values(K), p.dweight = values(weights), p.dbias = values(K);
    if (kind == CONV_NORM_RELU) {
      p.num_groups = num_groups;
      p.norm_weight = values(K), p.norm_bias = values(K), p.dnorm_weight = values(K), p.dnorm_bias = values(K);
      if (!num_groups) p.running_mean = values(K), p.running_var = values(K, 0.5, 1);
    }
    layers.push_back(p);
  }
  RandomNetwork(int64_t N, int64_t groups) {
    add(CONV_NORM_RELU, N, 3, 16, 32, groups), add(CONV_NORM_RELU, N, 16, 16, 32, groups);
    add(CONV1X1_MAXPOOL, N, 16, 8, 32, 0);
    add(CONV_NORM_RELU, N, 8, 32, 16, groups), add(CONV_NORM_RELU, N, 32, 32, 16, groups);
    add(CONV_NORM_RELU, N, 32, 32, 16, groups, 3), add(CONV1X1_MAXPOOL, N, 32, 16, 16, 0);
    add(CONV_NORM_RELU, N, 16, 32, 8, groups), add(CONV_NORM_RELU, N, 32, 32, 8, groups);
    add(CONV_NORM_RELU, N, 32, 32, 8, groups, 7), add(AVGPOOL_LINEAR, N, 32, 10, 8, 0);
    layers[0].nchw = true, layers[0].x = values(N * 3 * 32 * 32);
    layers.back().out = values(N * 10), layers.back().dout = values(N * 10);
  }
};

struct Workspace {
  std::unique_ptr<vec_f32[]> vectors;  // aligned to cache lines, as PyTorch's memory is
  char* memory;
  Workspace(int64_t bytes) : vectors(new vec_f32[bytes / sizeof(vec_f32) + 4]) {
    memory = (char*)round_up((int64_t)vectors.get(), 64);
  }
};

template <typename T, typename Factor> void measure(int64_t N, int64_t groups, int64_t threads) {
  RandomNetwork random(N, groups);
  std::vector<LayerParams>& layers = random.layers;
  const int64_t count = layers.size(), repeats = std::max<int64_t>(20, 2000 / N);
  const Network<T> network = {layers.data(), count, threads};
  const std::vector<int64_t> labels(N);
  float scores[2];
  const Workspace both(network.template step<Factor>(nullptr, nullptr, nullptr));
  printf("step\t%.3f\n",
         1e6 * least(repeats, [&] { network.template step<Factor>(labels.data(), scores, both.memory); }));
  const Workspace activations(network.forward(true, nullptr));
  const Workspace gradients(network.template backward<Factor>(nullptr, nullptr));
  layers.back().dout = random.values(N * 10);
  network.forward(true, activations.memory);
  network.template backward<Factor>(activations.memory, gradients.memory);

  // Each layer alone, in one parallel region.
  Arena arena = {gradients.memory};
  network.plan_gradients(arena);
  for (int64_t i = 0; i < count; i++) {
    const auto alone = [&](bool is_backward) {
      return least(repeats, [&] {
        Arena rest = arena;
        const int64_t own_bytes = is_backward ? network.template plan_pass<Factor>(true, rest)
                                              : network.template plan_pass<float>(false, rest);
        char* const memory = rest.take<char>(threads * own_bytes);
        parallel(threads, [&](const Thread& thread) {
          Arena scratch = {memory + thread.index * own_bytes};
          const Network<T> own = network.copy_layers(scratch);
          const Chunks& chunks = network.chunks;
          if (is_backward) {
            own.template backward_layer<Factor>(i, thread.begin(chunks.count), thread.end(chunks.count), scratch, true);
            thread.barrier();
            network.template dispatch<Factor>(layers[i],
                                              [&](const auto& layer) { layer.reduce(thread, chunks.count); });
          } else {
            own.forward_layer(i, thread, thread.begin(N), thread.end(N), scratch);
          }
        });
      });
    };
    printf("layer\t%s\t%.3f\t%.3f\n", NAMES[i], 1e6 * alone(false), 1e6 * alone(true));
  }

  // What the Winograd convolutions consist of, image after image.
  for (int64_t i = 1; i < count; i++) {
    LayerParams& p = layers[i];
    if (p.kind != CONV_NORM_RELU) continue;
    Arena rest = arena;
    const auto part = [&](const char* name, const auto& convolution, auto body) {
      const int64_t block = std::min(convolution.images_per_block, network.images_at_once);
      const double time = least(repeats, [&] {
        for (int64_t begin = 0; begin < N; begin += block) {
          const int64_t total = std::min(block, N - begin) * convolution.tiles;
          for (int64_t start = 0; start < total; start += convolution.tiles_per_block)
            body(begin, start, std::min(convolution.tiles_per_block, total - start));
        }
      });
      printf("part\t%s\t%s\t%.3f\n", NAMES[i], name, 1e6 * time);
    };
    const Winograd<T, float> there = {p};
    const Winograd<T, Factor> back = {p};
    std::vector<T> dpre_activation(back.images_per_block * p.H * p.W * p.K);
    p.packed = there.pack(rest, false);
    const auto scratch = there.take_scratch(rest, true);
    there.clear(scratch);
    part("forward transforms", there, [&](int64_t begin, int64_t start, int64_t tiles) {
      there.compute_V(begin, start, tiles, scratch);
      there.compute_output(begin, start, tiles, scratch);
    });
    part("forward products", there, [&](int64_t, int64_t, int64_t tiles) { there.compute_M(tiles, scratch); });
    p.packed_backward = back.pack(rest, true);
    const auto scratch_back = back.take_scratch(rest, true);
    back.clear(scratch_back);
    part("backward transforms", back, [&](int64_t begin, int64_t start, int64_t tiles) {
      back.compute_V(begin, start, tiles, scratch_back);
      with_constant(back.K, [&](auto channels) {
        back.template compute_dM<channels.value>(start, tiles, dpre_activation.data(), scratch_back);
      });
      with_constant(back.C_padded, [&](auto channels) {
        back.template compute_dx<channels.value>(begin, start, tiles, scratch_back);
      });
    });
    part("backward products", back, [&](int64_t, int64_t start, int64_t tiles) {
      back.add_dU(tiles, scratch_back, !start);
      back.compute_dV(tiles, scratch_back);
    });
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) return fprintf(stderr, "usage: roofline N num_groups threads float32|bfloat16\n"), 2;
  const int64_t N = atoi(argv[1]), groups = atoi(argv[2]), threads = atoi(argv[3]);
  printf("lanes\t%ld\n", long(LANES));
  printf("peak\tfloat32\t%.1f\n", peak(threads, 2, [](vec_f32 sum, vec_f32 factor) { return sum * factor + factor; }));
#ifdef __AVX512BF16__
  printf("peak\tbfloat16\t%.1f\n", peak(threads, 4, [](vec_f32 sum, vec_f32 factor) {
           return (vec_f32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)factor, (__m512bh)factor);
         }));
#endif
  printf("bandwidth\tL2\t%.1f\n", bandwidth(threads, 256 << 10));
  printf("bandwidth\tmemory\t%.1f\n", bandwidth(threads, 256 << 20));
  if (strcmp(argv[4], "bfloat16"))
    measure<float, float>(N, groups, threads);
  else
    measure<bf16, bf16x2>(N, groups, threads);
}
