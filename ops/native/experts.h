// Which rows go through which expert: what the kernels for mixtures of experts share, however weights are stored.

#pragma once

#include <algorithm>
#include <vector>

#include "common.h"

namespace jaxserve {

// The assignments (token, expert) sorted by expert, so that each chosen expert's weights are read once.
struct Routing {
  // Rows of one expert, at most `block` of them.
  struct Task {
    int64_t expert, first, rows;
  };

  int64_t tokens, k, rows = 0;  // rows: assignments to experts that there are
  std::vector<Task> tasks;
  std::vector<int64_t> token;  // of each row
  std::vector<int64_t> place;  // [tokens * k], an assignment's row; -1 for ids that are nobody's

  Routing(const int32_t* id, int64_t T, int64_t per_token, int64_t E, int64_t block)
      : tokens(T), k(per_token), token(T * per_token, 0), place(T * per_token, -1) {
    std::vector<int64_t> end(E, 0);
    for (int64_t m = 0; m < T * k; ++m) {
      if (id[m] >= 0 && id[m] < E) ++end[id[m]];
    }
    for (int64_t e = 0; e < E; ++e) {
      const int64_t count = end[e];
      for (int64_t row = 0; row < count; row += block) tasks.push_back({e, rows + row, std::min(block, count - row)});
      end[e] = rows;
      rows += count;
    }
    for (int64_t m = 0; m < T * k; ++m) {
      if (id[m] < 0 || id[m] >= E) continue;
      place[m] = end[id[m]]++;
      token[place[m]] = m / k;
    }
  }

  // out[tokens, D]: each token's rows of y [rows, D], times their shares [tokens, k].
  void add_sums(Phases& phases, const float* y, int64_t D, const float* share, float* out) const {
    phases.add(tokens, [=](int64_t t, int) {
      float* to = out + t * D;
      std::fill(to, to + D, 0.0f);
      for (int64_t m = t * k; m < (t + 1) * k; ++m) {
        if (place[m] < 0) continue;
        const float w = share[m];
        const float* from = y + place[m] * D;
        for (int64_t d = 0; d < D; ++d) to[d] += w * from[d];
      }
    });
  }
};

}  // namespace jaxserve
