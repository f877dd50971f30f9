// Recurrent layers for one instruction set, included once per set with AT and W (see vectors.h).
//
// Columns of a head's matrix do not meet: what a token does to one depends on k, q and the column alone. So a few
// columns are taken through all tokens of a piece while they lie in the first cache.

#include <cmath>
#include <cstring>

#include "recurrent.h"

namespace jaxserve::recurrent {
namespace {

#include "vectors.h"

constexpr int VECTORS = 4;  // a row of a tile
constexpr int AHEAD = 4;
constexpr int WIDE = W == 16 ? 8 : 4;  // a row where one token passes over a state in memory: as many as registers hold sums of

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
    float* const to = m.out + t * m.out_token;
    UNROLL for (int j = 0; j < NV; ++j) store(to + j * W, out[j]);
  }
}

constexpr int TOGETHER = 4;  // tokens that pass over a state at once
constexpr int NARROW = W == 16 ? 2 : 1;  // vectors of a row then: as many as registers hold sums of

// What TOGETHER tokens bring to every column: how much of the state before them is there at each, how much of each one's write each
// later one reads (by its k, and by its q), and how much of it is left behind the last.
struct Together {
  float left[TOGETHER], kept[TOGETHER], by_k[TOGETHER][TOGETHER], by_q[TOGETHER][TOGETHER];
};

AT float dot(const float* a, const float* b, int n) {
  vf sum = splat(0.0f);
  for (int i = 0; i < n; i += W) sum = fma(load(a + i), load(b + i), sum);
  return sum_lanes(sum);
}

AT void meet(const Matrix& m, Together& to) {
  alignas(64) float decay[W] = {};
  for (int t = 0; t < TOGETHER; ++t) decay[t] = m.log_decay[t * m.decay_token];
  store(decay, vexp(load(decay)));
  for (int t = 0; t < TOGETHER; ++t) to.left[t] = decay[t] * (t == 0 ? 1.0f : to.left[t - 1]);
  for (int s = 0; s < TOGETHER; ++s) {
    float share = 1.0f;
    for (int t = s; t < TOGETHER; ++t) {
      if (t > s) share *= decay[t];
      to.by_k[t][s] = t > s ? share * dot(m.k + s * m.qk_token, m.k + t * m.qk_token, m.n) : 0.0f;
      to.by_q[t][s] = share * dot(m.k + s * m.qk_token, m.q + t * m.qk_token, m.n);
    }
    to.kept[s] = share;
  }
}

// What `matrix_tokens` does with TOGETHER tokens, in two passes over the state for all of them: what k and q read of it as it was,
// then, from that, what the tokens write, all at once.
template <int NV, bool READS>
AT void matrix_together(const Matrix& m, const Together& to) {
  vf seen[TOGETHER][NV], out[TOGETHER][NV], write[TOGETHER][NV];
  UNROLL for (int t = 0; t < TOGETHER; ++t) UNROLL for (int j = 0; j < NV; ++j) seen[t][j] = out[t][j] = splat(0.0f);
  for (int i = 0; i < m.n; ++i) {
    vf row[NV];
    UNROLL for (int j = 0; j < NV; ++j) row[j] = load(m.state + i * m.pitch + j * W);
    UNROLL for (int t = 0; t < TOGETHER; ++t) {
      const vf a = splat(m.k[t * m.qk_token + i]), b = splat(m.q[t * m.qk_token + i]);
      UNROLL for (int j = 0; j < NV; ++j) {
        if constexpr (READS) seen[t][j] = fma(a, row[j], seen[t][j]);
        out[t][j] = fma(b, row[j], out[t][j]);
      }
    }
  }
  UNROLL for (int t = 0; t < TOGETHER; ++t) {
    const vf left = splat(to.left[t]), beta = splat(READS ? m.beta[t * m.beta_token] : 1.0f);
    UNROLL for (int j = 0; j < NV; ++j) {
      vf x = left * seen[t][j], y = left * out[t][j];
      UNROLL for (int s = 0; s < t; ++s) {
        if constexpr (READS) x = fma(splat(to.by_k[t][s]), write[s][j], x);
        y = fma(splat(to.by_q[t][s]), write[s][j], y);
      }
      write[t][j] = load(m.v + t * m.v_token + j * W);
      if constexpr (READS) write[t][j] = beta * (write[t][j] - x);
      store(m.out + t * m.out_token + j * W, fma(splat(to.by_q[t][t]), write[t][j], y));
    }
  }
  UNROLL for (int t = 0; t < TOGETHER; ++t) UNROLL for (int j = 0; j < NV; ++j) write[t][j] = splat(to.kept[t]) * write[t][j];
  const vf left = splat(to.left[TOGETHER - 1]);
  for (int i = 0; i < m.n; ++i) {
    vf row[NV];
    UNROLL for (int j = 0; j < NV; ++j) row[j] = left * load(m.state + i * m.pitch + j * W);
    UNROLL for (int t = 0; t < TOGETHER; ++t) {
      const vf a = splat(m.k[t * m.qk_token + i]);
      UNROLL for (int j = 0; j < NV; ++j) row[j] = fma(a, write[t][j], row[j]);
    }
    UNROLL for (int j = 0; j < NV; ++j) store(m.state + i * m.pitch + j * W, row[j]);
  }
}

// The same of tokens from `t` on.
INLINE Matrix from(Matrix m, int64_t t) {
  m.q += t * m.qk_token, m.k += t * m.qk_token, m.v += t * m.v_token, m.out += t * m.out_token;
  m.log_decay += t * m.decay_token;
  if (m.beta != nullptr) m.beta += t * m.beta_token;
  return m;
}

// Blocks of TOGETHER tokens and fewer behind them on NARROW vectors of columns, or on one.
AT void matrix_blocks(const Matrix& m, const Together* to, int blocks, int64_t rest) {
  const bool narrow = m.width == NARROW * W;
  for (int b = 0; b < blocks; ++b) {
    const Matrix own = from(m, b * TOGETHER);
    if (m.beta != nullptr)
      narrow ? matrix_together<NARROW, true>(own, to[b]) : matrix_together<1, true>(own, to[b]);
    else
      narrow ? matrix_together<NARROW, false>(own, to[b]) : matrix_together<1, false>(own, to[b]);
  }
  if (rest == 0) return;
  const Matrix own = from(m, static_cast<int64_t>(blocks) * TOGETHER);
  narrow ? matrix_tokens<NARROW>(own, rest) : matrix_tokens<1>(own, rest);
}

AT void matrix_in_turn(const Matrix& m, int64_t tokens) {
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

constexpr int BLOCKS = 8;  // of TOGETHER tokens, whose products stay in the first cache

AT void matrix(const Matrix& whole, int64_t tokens) {
  // A decay for every channel has no products that all columns share.
  if (whole.by_channel || whole.n % W != 0) return matrix_in_turn(whole, tokens);
  for (int64_t t = 0; t < tokens;) {
    const int blocks = tokens - t < BLOCKS * TOGETHER ? static_cast<int>((tokens - t) / TOGETHER) : BLOCKS;
    if (blocks == 0) return matrix_in_turn(from(whole, t), tokens - t);
    Together to[BLOCKS];
    Matrix m = from(whole, t);
    for (int b = 0; b < blocks; ++b) meet(from(m, b * TOGETHER), to[b]);
    for (int column = 0; column < whole.width; column += m.width) {
      m.width = whole.width - column < NARROW * W ? W : NARROW * W;
      matrix_blocks(m, to, blocks, 0);
      m.state += m.width, m.v += m.width, m.out += m.width;
    }
    t += static_cast<int64_t>(blocks) * TOGETHER;
  }
}

// x * sigmoid(x) from e^-|x|, which vexp takes.
INLINE vf silu(vf x) {
  const vf zero = splat(0.0f), one = splat(1.0f);
  const vf e = vexp(zero - vmax(x, zero - x));
  return x * pick(x < zero, e, one) / (one + e);
}

// What one token does to columns of a state that comes from memory. The first pass reads as fast as the hardware fetches ahead; in
// the last one, which finds its rows in the cache, memory would rest: there a line in AHEAD of the next state is asked for, and the
// hardware brings those between. Every line of it, or some in both passes, is slower than none.
template <int NV>
AT void matrix_token(const Matrix& m) {
  alignas(64) float e[MAX_CHANNELS], ke[MAX_CHANNELS];
  decays(m, m.k, m.log_decay, e, ke);
  const float* ahead = m.next;
  vf write[NV], out[NV];
  UNROLL for (int j = 0; j < NV; ++j) write[j] = load(m.v + j * W);
  if (m.beta != nullptr) {
    vf seen[NV];
    UNROLL for (int j = 0; j < NV; ++j) seen[j] = splat(0.0f);
    for (int i = 0; i < m.n; ++i) {
      const float* const row = m.state + i * m.pitch;
      const vf a = splat(ke[i]);
      UNROLL for (int j = 0; j < NV; ++j) seen[j] = fma(a, load(row + j * W), seen[j]);
    }
    const vf beta = splat(*m.beta);
    UNROLL for (int j = 0; j < NV; ++j) write[j] = beta * (write[j] - seen[j]);
  }
  UNROLL for (int j = 0; j < NV; ++j) out[j] = splat(0.0f);
  for (int i = 0; i < m.n; ++i) {
    float* const row = m.state + i * m.pitch;
    const vf shrink = splat(e[i]), a = splat(m.k[i]), b = splat(m.q[i]);
    UNROLL for (int j = 0; j < NV; ++j) {
      const vf s = fma(a, write[j], shrink * load(row + j * W));
      store(row + j * W, s);
      out[j] = fma(b, s, out[j]);
    }
    if (ahead == nullptr) continue;
    UNROLL for (int j = 0; j < NV * W; j += 16 * AHEAD) __builtin_prefetch(ahead + j, 0, 2);
    ahead += NV * W;
  }
  UNROLL for (int j = 0; j < NV; ++j) store(m.out + j * W, out[j]);
}

// One token on all columns of a head's state, where it lies.
AT void matrix_whole(Matrix m, int p) {
  const float* const next = m.next;
  for (int column = 0; column < p; column += m.width) {
    m.width = p - column < WIDE * W ? p - column : WIDE * W;
    m.next = next == nullptr ? nullptr : next + static_cast<int64_t>(m.n) * column;
    switch (m.width / W) {
      case 8:
        if constexpr (WIDE == 8) matrix_token<8>(m);
        break;
      case 4:
        matrix_token<4>(m);
        break;
      default:  // sizes that few models have
        m.width = W;
        matrix_token<1>(m);
    }
    m.state += m.width, m.v += m.width, m.out += m.width;
  }
}

// One token: its past is read once. Rows of it lie a multiple of 4 KB apart, and what is read of one right after the other was
// written waits for that.
template <int TAPS>
AT void conv_token(const Conv& c) {
  for (int at = 0; at < c.width; at += W) {
    vf x[TAPS], y = c.bias == nullptr ? splat(0.0f) : load(c.bias + at);
    UNROLL for (int j = 0; j + 1 < TAPS; ++j) x[j] = load(c.past + j * c.past_pitch + at);
    x[TAPS - 1] = load(c.x + at);
    UNROLL for (int j = 0; j < TAPS; ++j) y = fma(load(c.kernel + j * c.pitch + at), x[j], y);
    UNROLL for (int j = 0; j + 1 < TAPS; ++j) store(c.past + j * c.past_pitch + at, x[j + 1]);
    store(c.out + at, c.silu ? silu(y) : y);
  }
}

AT void conv(const Conv& c, int64_t tokens) {
  if (tokens == 1 && c.taps == 4) return conv_token<4>(c);  // what models have
  const int w = c.taps - 1;
  for (int at = 0; at < c.width; at += W) {
    const vf bias = c.bias == nullptr ? splat(0.0f) : load(c.bias + at);
    for (int64_t t = 0; t < tokens; ++t) {
      vf y = bias;
      for (int j = 0; j < c.taps; ++j) {
        const int64_t from = t - w + j;  // below 0: in the past
        const float* const x = from < 0 ? c.past + (from + w) * c.past_pitch : c.x + from * c.x_token;
        y = fma(load(c.kernel + j * c.pitch + at), load(x + at), y);
      }
      store(c.out + t * c.out_token + at, c.silu ? silu(y) : y);
    }
    for (int j = 0; j < w; ++j) {  // the last w inputs; ascending, so that none is overwritten before it is read
      const int64_t from = tokens - w + j;
      const float* const x = from < 0 ? c.past + (from + w) * c.past_pitch : c.x + from * c.x_token;
      store(c.past + j * c.past_pitch + at, load(x + at));
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

// x times `factor` over its length.
AT void unit(float* x, int n, float factor) {
  vf squares = splat(0.0f);
  for (int i = 0; i < n; i += W) squares = fma(load(x + i), load(x + i), squares);
  const vf scale = splat(factor / __builtin_sqrtf(sum_lanes(squares) + UNIT_EPS));
  for (int i = 0; i < n; i += W) store(x + i, scale * load(x + i));
}

// out = x / rms(x) * gain * silu(gate)
AT void norm_and_gate(const float* x, const float* gain, const float* gate, int p, float eps, float* out) {
  vf squares = splat(0.0f);
  for (int i = 0; i < p; i += W) squares = fma(load(x + i), load(x + i), squares);
  const vf scale = splat(1.0f / __builtin_sqrtf(sum_lanes(squares) / static_cast<float>(p) + eps));
  for (int i = 0; i < p; i += W) store(out + i, scale * load(x + i) * load(gain + i) * silu(load(gate + i)));
}

// Up to DELTA_BLOCK tokens.
AT void delta_block(const Delta& d, int tokens) {
  const int width = 2 * d.n + d.heads * d.p;
  float* const mixed = d.room;                                  // [tokens, width]
  float* const beta = mixed + DELTA_BLOCK * width;              // [heads, tokens]
  float* const decay = beta + DELTA_BLOCK * d.heads;            // [heads, tokens]
  float* const read = decay + DELTA_BLOCK * d.heads;            // [tokens, p]
  float* const tile = read + DELTA_BLOCK * d.p;                 // [n, width of a tile]
  conv({d.past, d.x, d.kernel, nullptr, mixed, d.pitch, d.past_pitch, d.x_token, width, d.taps, width, true}, tokens);
  if (tokens == 1) will_write(d.out, static_cast<int64_t>(sizeof(float)) * d.heads * d.p);
  if (tokens == 1 && d.next_past != nullptr) {
    for (int j = 0; j + 1 < d.taps; ++j)
      for (int c = 0; c < width; c += 16) __builtin_prefetch(d.next_past + j * d.pitch + c, 1, 2);
  }
  for (int t = 0; t < tokens; ++t) {
    unit(mixed + t * width, d.n, 1.0f / __builtin_sqrtf(static_cast<float>(d.n)));
    unit(mixed + t * width + d.n, d.n, 1.0f);
    const float* const gates = d.gates + t * d.gates_token;
    for (int h = 0; h < d.heads; ++h) {
      const float step = gates[d.heads + h] + d.dt_bias[h];
      beta[h * DELTA_BLOCK + t] = d.reach / (1.0f + std::exp(-gates[h]));
      decay[h * DELTA_BLOCK + t] = d.rate[h] * ((step > 0 ? step : 0.0f) + std::log1p(std::exp(step > 0 ? -step : step)));
    }
  }
  for (int h = 0; h < d.heads; ++h) {
    const int64_t floats = static_cast<int64_t>(d.n) * d.p;
    Matrix m{};
    m.state = d.state + h * floats;
    m.pitch = d.p;
    m.q = mixed, m.k = mixed + d.n, m.v = mixed + 2 * d.n + h * d.p;
    m.log_decay = decay + h * DELTA_BLOCK, m.beta = beta + h * DELTA_BLOCK;
    m.qk_token = m.v_token = width;
    m.decay_token = m.beta_token = 1;
    m.out = read, m.out_token = d.p;
    m.n = d.n, m.width = d.p;
    if (tokens == 1) {
      m.next = h + 1 < d.heads ? m.state + floats : d.next;
      matrix_whole(m, d.p);
    } else {
      Together to[DELTA_BLOCK / TOGETHER];
      const int blocks = tokens / TOGETHER;
      for (int b = 0; b < blocks; ++b) meet(from(m, b * TOGETHER), to[b]);
      Matrix part = m;
      for (int column = 0; column < d.p; column += part.width) {  // columns in the first cache
        part.width = part.pitch = d.p - column < NARROW * W ? W : NARROW * W;
        part.state = tile, part.v = m.v + column, part.out = m.out + column;
        const size_t bytes = sizeof(float) * part.width;
        for (int i = 0; i < d.n; ++i) std::memcpy(tile + i * part.width, m.state + i * d.p + column, bytes);
        matrix_blocks(part, to, blocks, tokens % TOGETHER);
        for (int i = 0; i < d.n; ++i) std::memcpy(m.state + i * d.p + column, tile + i * part.width, bytes);
      }
    }
    const float* const gate = d.x + width + h * d.p;
    for (int t = 0; t < tokens; ++t)
      norm_and_gate(read + t * d.p, d.gain, gate + t * d.x_token, d.p, d.eps, d.out + t * d.out_token + h * d.p);
  }
}

AT void delta(const Delta& whole, int64_t tokens) {
  Delta d = whole;
  for (int64_t t = 0; t < tokens; t += DELTA_BLOCK) {
    const int count = tokens - t < DELTA_BLOCK ? static_cast<int>(tokens - t) : DELTA_BLOCK;
    delta_block(d, count);
    d.x += count * d.x_token, d.gates += count * d.gates_token, d.out += count * d.out_token;
  }
}

Kernels kernels() { return {VECTORS * W, matrix, matrix_whole, conv, scan, delta}; }

#undef INLINE

}  // namespace
}  // namespace jaxserve::recurrent
