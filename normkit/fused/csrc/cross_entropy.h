// The cross-entropy of logits, and the gradient of its mean.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {

// Returns the sum of the losses of logits (N, K) and labels (N), each from 0 to K - 1. Writes dlogits (N, K), the
// gradient of a mean over `total` images, of which these are some.
inline double cross_entropy_sum(int64_t N, int64_t K, const float* logits, const int64_t* labels, float* dlogits,
                                int64_t total) {
  double losses = 0;
  for (int64_t n = 0; n < N; n++, logits += K, dlogits += K) {
    const float largest = *std::max_element(logits, logits + K);
    float sum = 0;
    for (int64_t k = 0; k < K; k++) sum += dlogits[k] = std::exp(logits[k] - largest);
    for (int64_t k = 0; k < K; k++) dlogits[k] /= sum * float(total);
    dlogits[labels[n]] -= 1 / float(total);
    losses += std::log(sum) - (logits[labels[n]] - largest);
  }
  return losses;
}

}  // namespace
