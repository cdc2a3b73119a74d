// The indexer's scores in plain loops: the CPU library's, and the emulation's, which has no tensor cores.
#pragma once

#include <cstring>
#include <vector>

#include "attention/index_scores.h"

namespace sgl_kernel {

inline float float_of(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// sum_h weights[h] * relu(q[h] . key); a product that is not a number counts as 0, as it does on a GPU.
inline float index_score(const std::vector<float>& q, const float* weights, const std::vector<float>& key) {
  float score = 0;
  for (size_t h = 0; h < q.size() / kIndexDim; ++h) {
    float product = 0;
    for (int d = 0; d < kIndexDim; ++d) product += q[h * kIndexDim + d] * key[d];
    score += product > 0 ? product * weights[h] : 0;
  }
  return score;
}

inline void write_index_scores(const IndexScoresParams& p, int32_t row) {
  const int32_t keys = scored_keys(p, row);
  if (keys == 0) return;
  std::vector<float> q(static_cast<size_t>(p.heads) * kIndexDim), key(kIndexDim);
  for (size_t k = 0; k < q.size(); ++k) {
    q[k] = float_of(p.q[row * p.q_stride + static_cast<int64_t>(k / kIndexDim) * p.q_head_stride + k % kIndexDim]);
  }
  const int32_t* const table = table_of(p, row);
  for (int32_t s = 0; s < keys; ++s) {
    const uint16_t* const from = p.keys + table[s] * p.keys_stride;
    for (int d = 0; d < kIndexDim; ++d) key[d] = float_of(from[d]);
    p.scores[row * p.scores_stride + s] = index_score(q, p.weights + row * p.weights_stride, key);
  }
}

}  // namespace sgl_kernel
