// The mean cross-entropy of logits, and its gradient.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {

// Writes the loss and dlogits (N, K) of logits (N, K) and labels (N), each from 0 to K - 1.
inline void mean_cross_entropy(int64_t N, int64_t K, const float* logits, const int64_t* labels, float* dlogits,
                               float* loss) {
  double total = 0;
  for (int64_t n = 0; n < N; n++, logits += K, dlogits += K) {
    const float largest = *std::max_element(logits, logits + K);
    float sum = 0;
    for (int64_t k = 0; k < K; k++) sum += dlogits[k] = std::exp(logits[k] - largest);
    for (int64_t k = 0; k < K; k++) dlogits[k] /= sum * float(N);
    dlogits[labels[n]] -= 1 / float(N);
    total += std::log(sum) - (logits[labels[n]] - largest);
  }
  *loss = float(total / double(N));
}

}  // namespace
