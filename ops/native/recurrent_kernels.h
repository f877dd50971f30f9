// Recurrent layers for one instruction set, included once per set with AT and W (see vectors.h).
//
// Columns of a head's matrix do not meet: what a token does to one depends on k, q and the column alone. So a few
// columns are taken through all tokens of a piece while they lie in the first cache.

#include <cstring>

#include "recurrent.h"

namespace jaxserve::recurrent {
namespace {

#include "vectors.h"

constexpr int VECTORS = 4;  // a row of a tile

// e[i] = exp(log_decay[i]), and ke[i] = k[i] * e[i], for n channels.
AT void decays(const Matrix& m, const float* k, const float* log_decay, float* e, float* ke) {
  int i = 0;
  if (m.by_channel) {
    for (; i + W <= m.n; i += W) {
      const vf x = vexp(load(log_decay + i));
      store(e + i, x);
      store(ke + i, x * load(k + i));
    }
    for (; i < m.n; ++i) {
      float one[W] = {};
      one[0] = log_decay[i];
      e[i] = vexp(load(one))[0];
      ke[i] = e[i] * k[i];
    }
    return;
  }
  const vf x = vexp(splat(log_decay[0]));
  for (; i + W <= m.n; i += W) {
    store(e + i, x);
    store(ke + i, x * load(k + i));
  }
  for (; i < m.n; ++i) {
    e[i] = x[0];
    ke[i] = x[0] * k[i];
  }
}

template <int NV>
AT void matrix_tokens(const Matrix& m, int64_t tokens) {
  alignas(64) float e[MAX_CHANNELS], ke[MAX_CHANNELS];
  for (int64_t t = 0; t < tokens; ++t) {
    const float* const q = m.q + t * m.qk_token;
    const float* const k = m.k + t * m.qk_token;
    const float* const v = m.v + t * m.v_token;
    decays(m, k, m.log_decay + t * m.decay_token, e, ke);
    vf write[NV], out[NV];
    UNROLL for (int j = 0; j < NV; ++j) {
      write[j] = load(v + j * W);
      out[j] = splat(0.0f);
    }
    if (m.beta != nullptr) {
      vf even[NV], odd[NV];
      UNROLL for (int j = 0; j < NV; ++j) even[j] = odd[j] = splat(0.0f);
      int i = 0;
      for (; i + 2 <= m.n; i += 2) {
        const float* const row = m.state + i * m.pitch;
        const vf a = splat(ke[i]), b = splat(ke[i + 1]);
        UNROLL for (int j = 0; j < NV; ++j) {
          even[j] = fma(a, load(row + j * W), even[j]);
          odd[j] = fma(b, load(row + m.pitch + j * W), odd[j]);
        }
      }
      if (i < m.n) {
        const vf a = splat(ke[i]);
        UNROLL for (int j = 0; j < NV; ++j) even[j] = fma(a, load(m.state + i * m.pitch + j * W), even[j]);
      }
      const vf beta = splat(m.beta[t * m.beta_token]);
      UNROLL for (int j = 0; j < NV; ++j) write[j] = beta * (write[j] - (even[j] + odd[j]));
    }
    for (int i = 0; i < m.n; ++i) {
      float* const row = m.state + i * m.pitch;
      const vf shrink = splat(e[i]), a = splat(k[i]), b = splat(q[i]);
      UNROLL for (int j = 0; j < NV; ++j) {
        const vf s = fma(a, write[j], shrink * load(row + j * W));
        store(row + j * W, s);
        out[j] = fma(b, s, out[j]);
      }
    }
    float* const to = m.out + t * m.v_token;
    UNROLL for (int j = 0; j < NV; ++j) store(to + j * W, out[j]);
  }
}

AT void matrix(const Matrix& m, int64_t tokens) {
  switch (m.width / W) {
    case 4:
      return matrix_tokens<4>(m, tokens);
    case 3:
      return matrix_tokens<3>(m, tokens);
    case 2:
      return matrix_tokens<2>(m, tokens);
    default:
      return matrix_tokens<1>(m, tokens);
  }
}

// x * sigmoid(x) from e^-|x|, which vexp takes.
INLINE vf silu(vf x) {
  const vf zero = splat(0.0f), one = splat(1.0f);
  const vf e = vexp(zero - vmax(x, zero - x));
  return x * pick(x < zero, e, one) / (one + e);
}

AT void conv(const Conv& c, int64_t tokens) {
  const int w = c.taps - 1;
  for (int at = 0; at < c.width; at += W) {
    const vf bias = c.bias == nullptr ? splat(0.0f) : load(c.bias + at);
    for (int64_t t = 0; t < tokens; ++t) {
      vf y = bias;
      for (int j = 0; j < c.taps; ++j) {
        const int64_t from = t - w + j;  // below 0: in the past
        const float* const x = from < 0 ? c.past + (from + w) * c.pitch : c.x + from * c.pitch;
        y = fma(load(c.kernel + j * c.pitch + at), load(x + at), y);
      }
      store(c.out + t * c.pitch + at, c.silu ? silu(y) : y);
    }
    for (int j = 0; j < w; ++j) {  // the last w inputs; ascending, so that none is overwritten before it is read
      const int64_t from = tokens - w + j;
      const float* const x = from < 0 ? c.past + (from + w) * c.pitch : c.x + from * c.pitch;
      store(c.past + j * c.pitch + at, load(x + at));
    }
  }
}

AT void scan(const Scan& s, int64_t tokens) {
  for (int at = 0; at < s.width; at += W) {
    for (int64_t t = 0; t < tokens; ++t) {
      const vf dt = load(s.dt + t * s.pitch + at);
      const vf write = dt * load(s.x + t * s.pitch + at);
      vf y = splat(0.0f);
      for (int i = 0; i < s.n; ++i) {
        float* const row = s.state + i * s.pitch + at;
        const vf h = fma(write, splat(s.write[t * s.n + i]), vexp(dt * load(s.rate + i * s.pitch + at)) * load(row));
        store(row, h);
        y = fma(h, splat(s.read[t * s.n + i]), y);
      }
      store(s.out + t * s.pitch + at, y);
    }
  }
}

Kernels kernels() { return {VECTORS * W, matrix, conv, scan}; }

#undef INLINE

}  // namespace
}  // namespace jaxserve::recurrent
