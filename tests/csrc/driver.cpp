// Runs the kernel over odd sizes with every buffer allocated to its exact size, for sanitizers to watch, and prints how
// many configurations it went through. With "float32" or "bfloat16", writes what some configurations in it compute, to
// be compared with other builds.
#include <cstdio>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#define ACTIVATION float
#include "../../normkit/fused/csrc/kernel.cpp"
#undef ACTIVATION
#define ACTIVATION bf16
#include "../../normkit/fused/csrc/kernel.cpp"

extern "C" int omp_get_max_threads();

// Values between -1 and 1 in a buffer of exactly that size.
struct Values {
  std::unique_ptr<char[]> bytes;
  Values(int64_t count, bool is_bf16 = false, float scale = 1, float shift = 0)
      : bytes(new char[count * (is_bf16 ? 2 : 4)]) {
    static uint32_t state = 1;
    for (int64_t i = 0; i < count; i++) {
      state = state * 1664525u + 1013904223u;
      const float value = (float(state >> 8) / (1 << 23) - 1) * scale + shift;
      uint32_t bits;
      memcpy(&bits, &value, 4);
      if (is_bf16) {
        const uint16_t half = bits >> 16;
        memcpy(bytes.get() + 2 * i, &half, 2);
      } else {
        memcpy(bytes.get() + 4 * i, &value, 4);
      }
    }
  }
  operator float*() const { return (float*)bytes.get(); }
};

enum Mode { TRAIN, TRAIN_WITH_IMAGE_GRADIENT, EVALUATE };

struct Run {
  std::vector<Values> kept;
  std::vector<LayerParams> layers;
  bool use_bf16, channels_last_weights;

  float* keep(Values values) {
    kept.push_back(std::move(values));
    return kept.back();
  }
  void add(LayerKind kind, int64_t N, int64_t C, int64_t K, int64_t H, int64_t W, int64_t groups, int64_t skip,
           Mode mode) {
    LayerParams p = {};
    p.kind = kind, p.skip_source = skip, p.N = N, p.C = C, p.K = K, p.H = H, p.W = W;
    p.eps = 1e-5, p.momentum = 0.1;
    p.weight_c_stride = channels_last_weights ? 1 : 9, p.weight_tap_stride = channels_last_weights ? C : 1;
    const int64_t size = kind == CONV_NORM_RELU ? 9 * C * K : C * K;
    p.weight = keep(Values(size)), p.bias = keep(Values(K));
    p.dweight = keep(Values(size)), p.dbias = keep(Values(K));
    if (kind == CONV_NORM_RELU) {
      p.num_groups = groups;
      p.norm_weight = keep(Values(K)), p.norm_bias = keep(Values(K));
      p.dnorm_weight = keep(Values(K)), p.dnorm_bias = keep(Values(K));
      p.dropout_scale = keep(Values(N * K, false, 0, 1));
      if (!groups) {
        p.running_mean = keep(Values(K)), p.running_var = keep(Values(K, false, 0.5, 1));
        p.use_running_stats = mode == EVALUATE;
      }
    }
    layers.push_back(p);
  }
  Run(int64_t N, int64_t H, int64_t W, int64_t groups, bool bf16, bool channels_last, Mode mode, bool whole = true,
      int64_t squeezed = 8)
      : use_bf16(bf16), channels_last_weights(channels_last) {
    kept.reserve(200);
    const auto conv = [&](int64_t C, int64_t K, int64_t scale, int64_t skip = -1) {
      add(CONV_NORM_RELU, N, C, K, H / scale, W / scale, groups, skip, mode);
    };
    if (whole) {
      conv(3, 16, 1), conv(16, 16, 1), add(CONV1X1_MAXPOOL, N, 16, squeezed, H, W, 0, -1, mode);
      conv(squeezed, 32, 2), conv(32, 32, 2), conv(32, 32, 2, 3),
          add(CONV1X1_MAXPOOL, N, 32, 16, H / 2, W / 2, 0, -1, mode);
      conv(16, 32, 4), conv(32, 32, 4), conv(32, 32, 4, 7);
      add(AVGPOOL_LINEAR, N, 32, 10, H / 4, W / 4, 0, -1, mode);
    } else {
      conv(3, 16, 1), conv(16, 32, 1), add(CONV1X1_MAXPOOL, N, 32, 16, H, W, 0, -1, mode);
      add(AVGPOOL_LINEAR, N, 16, 10, H / 2, W / 2, 0, -1, mode);
    }
    layers[0].nchw = mode != TRAIN_WITH_IMAGE_GRADIENT;
    const bool narrow = bf16 && mode == TRAIN_WITH_IMAGE_GRADIENT;
    layers[0].x = keep(Values(N * 3 * H * W, narrow));
    if (mode == TRAIN_WITH_IMAGE_GRADIENT) layers[0].dx = keep(Values(N * 3 * H * W, narrow));
    layers.back().out = keep(Values(N * 10)), layers.back().dout = keep(Values(N * 10));
  }
  void run(Mode mode) {
    const auto forward = use_bf16 ? forward_bf16 : forward_float;
    const auto backward = use_bf16 ? backward_bf16 : backward_float;
    const auto step = use_bf16 ? step_bf16 : step_float;
    const int64_t count = layers.size(), threads = omp_get_max_threads();
    const bool needs_grad = mode != EVALUATE;
    const std::unique_ptr<char[]> activations(new char[forward(layers.data(), count, needs_grad, threads, nullptr)]);
    forward(layers.data(), count, needs_grad, threads, activations.get());
    if (!needs_grad) return;
    const LayerParams& last = layers.back();
    std::vector<int64_t> labels(last.N, last.K - 1);
    const int64_t size = backward(layers.data(), count, threads, activations.get(), nullptr);
    const std::unique_ptr<char[]> gradients(new char[size]);
    backward(layers.data(), count, threads, activations.get(), gradients.get());
    if (mode != TRAIN) return;
    float scores[2];
    const std::unique_ptr<char[]> both(new char[step(layers.data(), count, threads, labels.data(), scores, nullptr)]);
    step(layers.data(), count, threads, labels.data(), scores, both.get());
  }
  typedef std::pair<const float*, int64_t> Part;  // values, how many
  static void write(std::initializer_list<Part> parts) {
    int64_t count = 0;
    for (const Part& part : parts) count += part.second;
    fwrite(&count, sizeof count, 1, stdout);
    for (const Part& part : parts) fwrite(part.first, sizeof(float), part.second, stdout);
  }
  // Writes the results in groups, each as the count of its values and the values. Gradients of a layer's parameters are
  // one group: that of a bias before batch norm is nothing but rounding errors, small beside the others.
  void write(Mode mode) const {
    const LayerParams &first = layers[0], &last = layers.back();
    write({{(const float*)last.out, last.N * last.K}});
    for (const LayerParams& p : layers)
      if (p.running_mean) write({{p.running_mean, p.K}, {p.running_var, p.K}});
    if (mode == EVALUATE) return;
    for (const LayerParams& p : layers)
      if (p.kind == CONV_NORM_RELU)
        write({{p.dweight, 9 * p.C * p.K}, {p.dbias, p.K}, {p.dnorm_weight, p.K}, {p.dnorm_bias, p.K}});
      else
        write({{p.dweight, p.C * p.K}, {p.dbias, p.K}});
    if (mode == TRAIN) return;
    const int64_t size = first.N * first.C * first.H * first.W;
    std::vector<float> dx(size);
    for (int64_t i = 0; i < size; i += LANES)
      store(&dx[i], use_bf16 ? load((const bf16*)first.dx + i) : load((const float*)first.dx + i));
    write({{dx.data(), size}});
  }
};

int main(int argc, char** argv) {
  if (argc > 1) {
    const bool bf16 = !strcmp(argv[1], "bfloat16");
    const bool whole = !bf16;  // in all its layers, roundings to bf16 grow too large
    for (int64_t groups : {0, 1, 4, 16})
      for (Mode mode : {TRAIN, TRAIN_WITH_IMAGE_GRADIENT, EVALUATE}) {
        Run run(17, 8, 20, groups, bf16, mode == TRAIN, mode, whole);
        run.run(mode);
        run.write(mode);
      }
    return 0;
  }
  int64_t configurations = 0;
  const int64_t sizes[][2] = {{8, 8}, {8, 20}, {20, 12}, {36, 28}};
  for (int64_t N : {1, 3, 17, 69})
    for (const auto& size : sizes)
      for (int64_t groups : {0, 1, 4, 16})
        for (bool bf16 : {false, true})
          for (Mode mode : {TRAIN, TRAIN_WITH_IMAGE_GRADIENT, EVALUATE}) {
            if ((N > 3 && size[0] > 20 && groups > 1) || (N > 17 && size[0] > 8)) continue;  // to save time
            const int64_t squeezed = configurations % 4 < 2 ? 8 : 4;
            Run(N, size[0], size[1], groups, bf16, configurations % 2, mode, true, squeezed).run(mode);
            configurations++;
          }
  printf("%ld configurations\n", long(configurations));
}
