// The cross-entropy of logits, and the gradient of its mean.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {

struct Scores {
  double losses = 0;    // their sum
  int64_t correct = 0;  // images whose largest logit, the first of equal ones, is their label's

  Scores& operator+=(const Scores& other) {
    losses += other.losses, correct += other.correct;
    return *this;
  }
  // Writes the mean loss of N images, and how many of them are right.
  void store(int64_t N, float* to) const { to[0] = float(losses / double(N)), to[1] = float(correct); }
};

// Returns the scores of logits (N, K) and labels (N), each from 0 to K - 1. Writes dlogits (N, K), the gradient of a
// mean over `total` images, of which these are some.
inline Scores cross_entropy_sum(int64_t N, int64_t K, const float* logits, const int64_t* labels, float* dlogits,
                                int64_t total) {
  Scores scores;
  for (int64_t n = 0; n < N; n++, logits += K, dlogits += K) {
    const int64_t predicted = std::max_element(logits, logits + K) - logits;
    const float largest = logits[predicted];
    float sum = 0;
    for (int64_t k = 0; k < K; k++) sum += dlogits[k] = std::exp(logits[k] - largest);
    for (int64_t k = 0; k < K; k++) dlogits[k] /= sum * float(total);
    dlogits[labels[n]] -= 1 / float(total);
    scores += {std::log(sum) - (logits[labels[n]] - largest), predicted == labels[n]};
  }
  return scores;
}

}  // namespace
