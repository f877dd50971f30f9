// Recurrent layers on the CPU: a step's decode rows and chunk tokens over states that lie in slots and are changed in place.

#include "recurrent.h"

#include <algorithm>
#include <cstring>

namespace jaxserve::recurrent {
namespace {

enum { kTile = 0, kCopy = 1 };  // slots of scratch memory

Kernels best_kernels() {
#if JAXSERVE_X86
  if (isa() >= Isa::kAvx512) return avx512_kernels();
  if (isa() >= Isa::kAvx2) return avx2_kernels();
#endif
  return generic_kernels();
}

struct Integers {  // the batch
  ffi::Buffer<ffi::S32> decode_slot, decode_start, decode_count, accepted, chunk_slot, chunk_first, chunk_start, chunk_qlen;
  int64_t queries, replayed;
};

// The real sequences, or an error where one leaves the step or the states.
ffi::ErrorOr<std::vector<Sequence>> sequences(const Integers& in, int64_t tokens, int64_t slots) {
  std::vector<Sequence> found;
  const int64_t B = in.decode_slot.dimensions()[0], R = in.chunk_slot.dimensions()[0];
  const int64_t Q = in.queries, P = in.replayed;
  const bool verifies = in.accepted.element_count() > 0;
  for (int64_t b = 0; b < B; ++b) {
    const int64_t count = in.decode_count.typed_data()[b];
    if (count == 0) continue;
    Sequence s{in.decode_slot.typed_data()[b], in.decode_start.typed_data()[b] == 0, b * Q, count, 0, 0};
    if (verifies) {
      s.kept = in.accepted.typed_data()[b];
      s.gap = P - s.kept;
      s.shown = count;
      if (s.kept < 0 || s.gap < 0) return ffi::Unexpected(ffi::Error::InvalidArgument("more accepted than repeated"));
    }
    if (count < 0 || count > Q - P) return ffi::Unexpected(ffi::Error::InvalidArgument("a decode row of too many tokens"));
    found.push_back(s);
  }
  for (int64_t r = 0; r < R; ++r) {
    const int64_t count = in.chunk_qlen.typed_data()[r], first = B * Q + in.chunk_first.typed_data()[r];
    if (count == 0) continue;
    if (count < 0 || first < B * Q || first + count > tokens)
      return ffi::Unexpected(ffi::Error::InvalidArgument("a piece that leaves the step"));
    found.push_back({in.chunk_slot.typed_data()[r], in.chunk_start.typed_data()[r] == 0, first, count, 0, 0});
  }
  for (const Sequence& s : found)
    if (s.slot < 0 || s.slot >= slots) return ffi::Unexpected(ffi::Error::InvalidArgument("a slot that is not there"));
  return found;
}

// Whether a single token changes each state where it lies: then reading states from memory and writing them is all that they cost.
bool single(const std::vector<Sequence>& found) {
  return std::all_of(found.begin(), found.end(), [](const Sequence& s) { return s.kept + s.shown == 1; });
}

// Runs `fn(sequence, part)` for all parts of all sequences: where they are single, as streams through memory, else the longest first.
template <typename F>
void for_each(ffi::ThreadPool& threads, std::vector<Sequence>& found, int64_t parts, F fn) {
  if (single(found)) {
    Phases phases;
    phases.add_apart(static_cast<int64_t>(found.size()) * parts, Phases::max_workers(threads),
                     [&](int64_t item, int) { fn(found[item / parts], item % parts); });
    return phases.run(threads);
  }
  std::stable_sort(found.begin(), found.end(),
                   [](const Sequence& a, const Sequence& b) { return a.kept + a.shown > b.kept + b.shown; });
  parallel_for(threads, static_cast<int64_t>(found.size()) * parts,
               [&](int64_t item, int) { fn(found[item / parts], item % parts); });
}

// Copies columns of a state [rows, pitch] to or from a tile [rows, width].
void copy(const float* from, int64_t from_pitch, float* to, int64_t to_pitch, int rows, int width) {
  for (int i = 0; i < rows; ++i) std::memcpy(to + i * to_pitch, from + i * from_pitch, sizeof(float) * width);
}

// Takes a sequence through a kernel: `run(state, pitch, first, tokens)` on the state itself where a single token changes it, else
// on a tile that is written back behind the tokens whose effect stays.
template <typename F>
void walk(const Sequence& s, float* state, int64_t pitch, int rows, int width, F run) {
  if (s.kept == 1 && s.shown == 0 && !s.begins) return run(state, pitch, s.first, 1);
  float* const tile = static_cast<float*>(scratch(kTile, sizeof(float) * rows * width));
  if (s.begins)
    std::memset(tile, 0, sizeof(float) * rows * width);
  else
    copy(state, pitch, tile, width, rows, width);
  run(tile, width, s.first, s.kept);
  copy(tile, width, state, pitch, rows, width);
  if (s.shown > 0) run(tile, width, s.first + s.kept + s.gap, s.shown);
}

// Operands: q, k [T, K, n], v [T, H, p], log_decay [T, H] or [T, H, n], beta [T, H] or empty, the batch, then the states
// [S, H, n, p]. Results: out [T, H, p] and the states, aliased.
ffi::Error matrix(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> k, ffi::Buffer<ffi::F32> v,
                  ffi::AnyBuffer log_decay, ffi::Buffer<ffi::F32> beta, ffi::Buffer<ffi::S32> decode_slot,
                  ffi::Buffer<ffi::S32> decode_start, ffi::Buffer<ffi::S32> decode_count, ffi::Buffer<ffi::S32> accepted,
                  ffi::Buffer<ffi::S32> chunk_slot, ffi::Buffer<ffi::S32> chunk_first, ffi::Buffer<ffi::S32> chunk_start,
                  ffi::Buffer<ffi::S32> chunk_qlen, ffi::Buffer<ffi::F32> old, ffi::Result<ffi::Buffer<ffi::F32>> out,
                  ffi::Result<ffi::Buffer<ffi::F32>> state, int32_t queries, int32_t replayed) {
  if (old.typed_data() != state->typed_data()) return ffi::Error::Internal("states are not updated in place");
  const auto dims = state->dimensions();
  const int64_t H = dims[1], n = dims[2], p = dims[3], K = q.dimensions()[1], T = v.dimensions()[0];
  if (n > MAX_CHANNELS || p % LANES != 0) return ffi::Error::InvalidArgument("a head of a size that is not taken");
  const Integers in{decode_slot, decode_start, decode_count, accepted, chunk_slot, chunk_first, chunk_start, chunk_qlen,
                    queries, replayed};
  auto found = sequences(in, T, dims[0]);
  if (!found) return found.error();
  const Kernels use = best_kernels();
  const bool by_channel = log_decay.dimensions().size() == 3;
  const int64_t a_decay = by_channel ? n : 1;
  const float* const decay = static_cast<const float*>(log_decay.untyped_data());
  auto of = [&](int64_t first, int64_t head, int64_t column) {  // a piece's operands
    const int64_t key = head / (H / K);
    Matrix m{};
    m.q = q.typed_data() + (first * K + key) * n;
    m.k = k.typed_data() + (first * K + key) * n;
    m.v = v.typed_data() + (first * H + head) * p + column;
    m.log_decay = decay + (first * H + head) * a_decay;
    m.beta = beta.element_count() > 0 ? beta.typed_data() + first * H + head : nullptr;
    m.qk_token = K * n;
    m.v_token = H * p;
    m.decay_token = H * a_decay;
    m.beta_token = H;
    m.out_token = H * p;
    m.out = out->typed_data() + (first * H + head) * p + column;
    m.n = static_cast<int>(n);
    m.by_channel = by_channel;
    return m;
  };
  auto state_of = [&](const Sequence& s, int64_t head) { return state->typed_data() + (s.slot * H + head) * n * p; };
  if (single(*found)) {  // whole heads where they lie, each one fetched while the one before is changed
    for_each(threads, *found, H, [&](const Sequence& s, int64_t head) {
      Matrix m = of(s.first + (s.kept == 1 ? 0 : s.gap), head, 0);
      m.state = state_of(s, head), m.pitch = p;
      const Sequence* const then = head + 1 < H ? &s : &s + 1;
      if (then < found->data() + found->size()) m.next = state_of(*then, head + 1 < H ? head + 1 : 0);
      if (s.kept == 1) {
        if (s.begins) std::memset(m.state, 0, sizeof(float) * n * p);
      } else {  // its effect goes with the step
        float* const tile = static_cast<float*>(scratch(kTile, sizeof(float) * n * p));
        s.begins ? std::memset(tile, 0, sizeof(float) * n * p) : std::memcpy(tile, m.state, sizeof(float) * n * p);
        m.state = tile;
      }
      use.matrix_whole(m, static_cast<int>(p));
    });
    return ffi::Error::Success();
  }
  const int64_t tiles = ceil_div(p, use.columns);
  for_each(threads, *found, H * tiles, [&](const Sequence& s, int64_t part) {
    const int64_t head = part / tiles, column = part % tiles * use.columns;
    const int width = static_cast<int>(std::min<int64_t>(use.columns, p - column));
    walk(s, state_of(s, head) + column, p, static_cast<int>(n), width,
         [&](float* tile, int64_t pitch, int64_t first, int64_t tokens) {
           Matrix m = of(first, head, column);
           m.state = tile;
           m.pitch = pitch;
           m.width = width;
           use.matrix(m, tokens);
         });
  });
  return ffi::Error::Success();
}

// Operands: x [T, D], kernel [W, D], bias [D] or empty, the batch, then the states [S, W - 1, D]. Results: out [T, D] and
// the states, aliased.
ffi::Error conv(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> kernel, ffi::Buffer<ffi::F32> bias,
                ffi::Buffer<ffi::S32> decode_slot, ffi::Buffer<ffi::S32> decode_start, ffi::Buffer<ffi::S32> decode_count,
                ffi::Buffer<ffi::S32> accepted, ffi::Buffer<ffi::S32> chunk_slot, ffi::Buffer<ffi::S32> chunk_first,
                ffi::Buffer<ffi::S32> chunk_start, ffi::Buffer<ffi::S32> chunk_qlen, ffi::Buffer<ffi::F32> old,
                ffi::Result<ffi::Buffer<ffi::F32>> out, ffi::Result<ffi::Buffer<ffi::F32>> state, int32_t queries,
                int32_t replayed, bool silu) {
  if (old.typed_data() != state->typed_data()) return ffi::Error::Internal("states are not updated in place");
  const int64_t T = x.dimensions()[0], D = x.dimensions()[1], taps = kernel.dimensions()[0];
  if (D % LANES != 0) return ffi::Error::InvalidArgument("channels come in multiples of 16");
  const Integers in{decode_slot, decode_start, decode_count, accepted, chunk_slot, chunk_first, chunk_start, chunk_qlen,
                    queries, replayed};
  auto found = sequences(in, T, state->dimensions()[0]);
  if (!found) return found.error();
  const Kernels use = best_kernels();
  constexpr int64_t kWidth = 256;
  const int64_t tiles = ceil_div(D, kWidth);
  const int rows = static_cast<int>(taps - 1);
  for_each(threads, *found, tiles, [&](const Sequence& s, int64_t part) {
    const int64_t column = part * kWidth;
    const int width = static_cast<int>(std::min(kWidth, D - column));
    float* const at = state->typed_data() + s.slot * rows * D + column;
    auto run = [&](float* past, int64_t first, int64_t tokens) {
      Conv c{past, x.typed_data() + first * D + column, kernel.typed_data() + column,
             bias.element_count() > 0 ? bias.typed_data() + column : nullptr, out->typed_data() + first * D + column, D, D, D, D,
             static_cast<int>(taps), width, silu};
      use.conv(c, tokens);
    };
    if (s.begins)
      for (int i = 0; i < rows; ++i) std::memset(at + i * D, 0, sizeof(float) * width);
    run(at, s.first, s.kept);
    if (s.shown == 0) return;
    float* const tile = static_cast<float*>(scratch(kTile, sizeof(float) * rows * D));
    copy(at, D, tile, D, rows, width);
    run(tile, s.first + s.kept + s.gap, s.shown);
  });
  return ffi::Error::Success();
}

// Operands: x, dt [T, D], rate [N, D], write, read [T, N], the batch, then the states [S, N, D]. Results: out [T, D] and
// the states, aliased.
ffi::Error scan(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> dt, ffi::Buffer<ffi::F32> rate,
                ffi::Buffer<ffi::F32> write, ffi::Buffer<ffi::F32> read, ffi::Buffer<ffi::S32> decode_slot,
                ffi::Buffer<ffi::S32> decode_start, ffi::Buffer<ffi::S32> decode_count, ffi::Buffer<ffi::S32> accepted,
                ffi::Buffer<ffi::S32> chunk_slot, ffi::Buffer<ffi::S32> chunk_first, ffi::Buffer<ffi::S32> chunk_start,
                ffi::Buffer<ffi::S32> chunk_qlen, ffi::Buffer<ffi::F32> old, ffi::Result<ffi::Buffer<ffi::F32>> out,
                ffi::Result<ffi::Buffer<ffi::F32>> state, int32_t queries, int32_t replayed) {
  if (old.typed_data() != state->typed_data()) return ffi::Error::Internal("states are not updated in place");
  const int64_t T = x.dimensions()[0], D = x.dimensions()[1], N = rate.dimensions()[0];
  if (D % LANES != 0) return ffi::Error::InvalidArgument("channels come in multiples of 16");
  const Integers in{decode_slot, decode_start, decode_count, accepted, chunk_slot, chunk_first, chunk_start, chunk_qlen,
                    queries, replayed};
  auto found = sequences(in, T, state->dimensions()[0]);
  if (!found) return found.error();
  const Kernels use = best_kernels();
  constexpr int64_t kWidth = 64;
  const int64_t tiles = ceil_div(D, kWidth);
  for_each(threads, *found, tiles, [&](const Sequence& s, int64_t part) {
    const int64_t column = part * kWidth;
    const int width = static_cast<int>(std::min(kWidth, D - column));
    float* const at = state->typed_data() + s.slot * N * D + column;
    auto run = [&](float* tile, int64_t first, int64_t tokens) {
      Scan c{tile, x.typed_data() + first * D + column, dt.typed_data() + first * D + column, rate.typed_data() + column,
             write.typed_data() + first * N, read.typed_data() + first * N, out->typed_data() + first * D + column, D,
             static_cast<int>(N), width};
      use.scan(c, tokens);
    };
    if (s.begins)
      for (int64_t i = 0; i < N; ++i) std::memset(at + i * D, 0, sizeof(float) * width);
    run(at, s.first, s.kept);
    if (s.shown == 0) return;
    float* const tile = static_cast<float*>(scratch(kTile, sizeof(float) * N * D));
    copy(at, D, tile, D, static_cast<int>(N), width);
    run(tile, s.first + s.kept + s.gap, s.shown);
  });
  return ffi::Error::Success();
}

// Operands: x [T, K (2 n + 2 G p)], gates [T, K 2 G], kernel [W, K (2 n + G p)], rate, dt_bias [H], gain [p], the batch, then the
// states [S, W - 1, K (2 n + G p)] and [S, H, n, p]. Results: out [T, H p] and the states, aliased.
ffi::Error delta(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> gates, ffi::Buffer<ffi::F32> kernel,
                 ffi::Buffer<ffi::F32> rate, ffi::Buffer<ffi::F32> dt_bias, ffi::Buffer<ffi::F32> gain,
                 ffi::Buffer<ffi::S32> decode_slot, ffi::Buffer<ffi::S32> decode_start, ffi::Buffer<ffi::S32> decode_count,
                 ffi::Buffer<ffi::S32> accepted, ffi::Buffer<ffi::S32> chunk_slot, ffi::Buffer<ffi::S32> chunk_first,
                 ffi::Buffer<ffi::S32> chunk_start, ffi::Buffer<ffi::S32> chunk_qlen, ffi::Buffer<ffi::F32> old_past,
                 ffi::Buffer<ffi::F32> old_state, ffi::Result<ffi::Buffer<ffi::F32>> out,
                 ffi::Result<ffi::Buffer<ffi::F32>> past, ffi::Result<ffi::Buffer<ffi::F32>> state, int32_t queries,
                 int32_t replayed, int64_t key_heads, float eps, float reach) {
  if (old_past.typed_data() != past->typed_data() || old_state.typed_data() != state->typed_data())
    return ffi::Error::Internal("states are not updated in place");
  const auto dims = state->dimensions();
  const int64_t T = x.dimensions()[0], K = key_heads, H = dims[1], n = dims[2], p = dims[3], G = H / K;
  const int64_t rows = kernel.dimensions()[0] - 1, channels = 2 * n + G * p;
  if (n > MAX_CHANNELS || n % LANES != 0 || p % LANES != 0 || H != G * K)
    return ffi::Error::InvalidArgument("a head of a size that is not taken");
  if (x.dimensions()[1] != K * (channels + G * p) || gates.dimensions()[1] != 2 * H || out->dimensions()[1] != H * p ||
      kernel.dimensions()[1] != K * channels || past->dimensions()[2] != K * channels || past->dimensions()[1] != rows)
    return ffi::Error::InvalidArgument("projections, taps and states do not fit each other");
  const Integers in{decode_slot, decode_start, decode_count, accepted, chunk_slot, chunk_first, chunk_start, chunk_qlen,
                    queries, replayed};
  auto found = sequences(in, T, dims[0]);
  if (!found) return found.error();
  const Kernels use = best_kernels();
  // Heads that a thread takes together: of single tokens a few, as long as every thread has some of them.
  const int64_t share = static_cast<int64_t>(found->size()) * K / (4 * Phases::max_workers(threads));
  const int64_t together = single(*found) ? std::clamp<int64_t>(share, 1, 4) : 1, parts = ceil_div(K, together);
  for_each(threads, *found, parts, [&](const Sequence& s, int64_t part) {
    const int64_t end = std::min(K, (part + 1) * together);
    for (int64_t head = part * together; head < end; ++head) {
      float* const at = state->typed_data() + (s.slot * K + head) * G * n * p;
      Delta d{};
      const Sequence* const then = head + 1 < K ? &s : &s + 1;  // whose state the thread changes next
      if (then < found->data() + found->size()) {
        const int64_t next = head + 1 < K ? head + 1 : 0;
        d.next = state->typed_data() + (then->slot * K + next) * G * n * p;
        d.next_past = past->typed_data() + (then->slot * rows * K + next) * channels;
      }
      d.kernel = kernel.typed_data() + head * channels;
      d.rate = rate.typed_data() + head * G;
      d.dt_bias = dt_bias.typed_data() + head * G;
      d.gain = gain.typed_data();
      d.past = past->typed_data() + s.slot * rows * K * channels + head * channels;
      d.state = at;
      d.x_token = K * (channels + G * p);
      d.gates_token = 2 * H;
      d.out_token = H * p;
      d.pitch = d.past_pitch = K * channels;
      d.n = static_cast<int>(n), d.p = static_cast<int>(p), d.heads = static_cast<int>(G), d.taps = static_cast<int>(rows + 1);
      d.eps = eps, d.reach = reach;
      d.room = static_cast<float*>(scratch(kTile, sizeof(float) * delta_room(d.n, d.p, d.heads)));
      auto run = [&](int64_t first, int64_t tokens) {
        d.x = x.typed_data() + first * d.x_token + head * (channels + G * p);
        d.gates = gates.typed_data() + first * d.gates_token + head * 2 * G;
        d.out = out->typed_data() + first * d.out_token + head * G * p;
        use.delta(d, tokens);
      };
      if (s.begins) {
        for (int64_t i = 0; i < rows; ++i) std::memset(d.past + i * d.pitch, 0, sizeof(float) * channels);
        std::memset(d.state, 0, sizeof(float) * G * n * p);
      }
      run(s.first, s.kept);
      if (s.shown == 0) continue;
      float* const tile = static_cast<float*>(scratch(kCopy, sizeof(float) * (rows * channels + G * n * p)));
      copy(d.past, d.pitch, tile, channels, static_cast<int>(rows), static_cast<int>(channels));
      std::memcpy(tile + rows * channels, d.state, sizeof(float) * G * n * p);
      d.past = tile, d.past_pitch = channels, d.state = tile + rows * channels;
      run(s.first + s.kept + s.gap, s.shown);
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve::recurrent

#define JAXSERVE_SEQUENCES                        \
  Arg<xla::ffi::Buffer<xla::ffi::S32>>()          \
      .Arg<xla::ffi::Buffer<xla::ffi::S32>>()     \
      .Arg<xla::ffi::Buffer<xla::ffi::S32>>()     \
      .Arg<xla::ffi::Buffer<xla::ffi::S32>>()     \
      .Arg<xla::ffi::Buffer<xla::ffi::S32>>()     \
      .Arg<xla::ffi::Buffer<xla::ffi::S32>>()     \
      .Arg<xla::ffi::Buffer<xla::ffi::S32>>()     \
      .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
#define JAXSERVE_BATCH                            \
  JAXSERVE_SEQUENCES                              \
      .Arg<xla::ffi::Buffer<xla::ffi::F32>>()     \
      .Ret<xla::ffi::Buffer<xla::ffi::F32>>()     \
      .Ret<xla::ffi::Buffer<xla::ffi::F32>>()     \
      .Attr<int32_t>("queries")                   \
      .Attr<int32_t>("replayed")

JAXSERVE_HANDLER(jaxserve_matrix_recurrence, jaxserve::recurrent::matrix,
                 xla::ffi::Ffi::Bind()
                     .Ctx<xla::ffi::ThreadPool>()
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // q
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // k
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // v
                     .Arg<xla::ffi::AnyBuffer>()              // log_decay
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // beta
                     .JAXSERVE_BATCH);
JAXSERVE_HANDLER(jaxserve_gated_delta, jaxserve::recurrent::delta,
                 xla::ffi::Ffi::Bind()
                     .Ctx<xla::ffi::ThreadPool>()
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // x
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // gates
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // kernel
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // rate
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // dt_bias
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // gain
                     .JAXSERVE_SEQUENCES
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                     .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                     .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                     .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                     .Attr<int32_t>("queries")
                     .Attr<int32_t>("replayed")
                     .Attr<int64_t>("key_heads")
                     .Attr<float>("eps")
                     .Attr<float>("reach"));
JAXSERVE_HANDLER(jaxserve_short_conv, jaxserve::recurrent::conv,
                 xla::ffi::Ffi::Bind()
                     .Ctx<xla::ffi::ThreadPool>()
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // x
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // kernel
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // bias
                     .JAXSERVE_BATCH.Attr<bool>("silu"));
JAXSERVE_HANDLER(jaxserve_selective_scan, jaxserve::recurrent::scan,
                 xla::ffi::Ffi::Bind()
                     .Ctx<xla::ffi::ThreadPool>()
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // x
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // dt
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // rate
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // write
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // read
                     .JAXSERVE_BATCH);
