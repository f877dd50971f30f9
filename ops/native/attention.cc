// Paged attention on the CPU: writes a step's K and V into their pages and attends, reading pages where they lie. One
// handler does a layer's whole step.

#include "attention.h"

namespace jaxserve::attention {
namespace {

// Operands: q [T, K, G, h], k [T, K, h], v [T, K, hv] (or q [T, K, G + 2, h], with k and v empty: a KV head's queries,
// then its k, then its v), cos and sin [T, r / 2] (empty: already rotated), sinks [K, G] (empty: none), the batch's
// integers, then pages k and v and, for int8, their scales. Results: out [T, K, G, hv] and the pages, aliased. Where pages are
// only read they are one array and no result: a page's V lies behind its K, so both are found by the number of K's.
ffi::Error attention(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> k, ffi::Buffer<ffi::F32> v,
                     ffi::Buffer<ffi::F32> cos, ffi::Buffer<ffi::F32> sin, ffi::Buffer<ffi::F32> sinks,
                     ffi::Buffer<ffi::S32> index, ffi::Buffer<ffi::S32> decode_pages, ffi::Buffer<ffi::S32> decode_len,
                     ffi::Buffer<ffi::S32> decode_qlen, ffi::Buffer<ffi::S32> chunk_pages,
                     ffi::Buffer<ffi::S32> chunk_start, ffi::Buffer<ffi::S32> chunk_qlen,
                     ffi::Buffer<ffi::S32> chunk_len, ffi::RemainingArgs pages, ffi::Result<ffi::Buffer<ffi::F32>> out, ffi::RemainingRets new_pages, float scale, float softcap,
                     int32_t window, int32_t places, int32_t whole, int32_t mixed) {
  const bool reads = pages.size() == 1 && new_pages.size() == 0;
  if (!reads && new_pages.size() != 2 && new_pages.size() != 4)
    return ffi::Error::InvalidArgument("pages are 2 or 4 arrays, or one that is only read");
  if (pages.size() < 1 || (!reads && pages.size() != new_pages.size()))
    return ffi::Error::InvalidArgument("pages are missing");
  for (size_t i = 0; i < new_pages.size(); ++i) {
    if (pages.get<ffi::AnyBuffer>(i)->untyped_data() != new_pages.get<ffi::AnyBuffer>(i).value()->untyped_data())
      return ffi::Error::Internal("pages are not updated in place");
  }
  const ffi::AnyBuffer k_pages = *pages.get<ffi::AnyBuffer>(0);

  const auto dims = out->dimensions();
  const int64_t T = dims[0], K = dims[1], G = dims[2], hv = dims[3];
  const int64_t h = q.dimensions()[3];
  const bool fused = q.dimensions()[2] == G + 2;
  Pool pool{};
  pool.k = k_pages.untyped_data();
  switch (k_pages.element_type()) {
    case ffi::F32:
      pool.kind = Kind::kFloat32;
      break;
    case ffi::BF16:
    case ffi::U16:  // their bits: XLA's updates in place turn a whole array of bfloat16 into float32 and back
      pool.kind = Kind::kBfloat16;
      break;
    case ffi::S8:
      pool.kind = Kind::kInt8;
      if (reads) return ffi::Error::InvalidArgument("pages that are only read are float32 or bfloat16");
      pool.k_scale = static_cast<float*>(new_pages.get<ffi::AnyBuffer>(2).value()->untyped_data());
      pool.v_scale = static_cast<float*>(new_pages.get<ffi::AnyBuffer>(3).value()->untyped_data());
      break;
    default:
      return ffi::Error::InvalidArgument("pages are float32, bfloat16 or int8");
  }
  pool.pages = k_pages.dimensions()[0];
  pool.heads = static_cast<int>(K);
  pool.h = static_cast<int>(h);
  pool.hv = static_cast<int>(hv);
  pool.page_size = static_cast<int>(k_pages.dimensions()[3]);
  pool.v = reads ? static_cast<char*>(pool.k) + K * h * pool.page_size * (pool.kind == Kind::kFloat32 ? 4 : 2)
                 : pages.get<ffi::AnyBuffer>(1)->untyped_data();
  pool.window = window > 0 ? window : INT_MAX / 2;
  pool.softcap = softcap * kBitsANat;
  if (mixed != 0 && pool.kind == Kind::kInt8) {  // the largest powers of two that divide the heads
    pool.k_mixed = pool.h & -pool.h;
    pool.v_mixed = pool.hv & -pool.hv;
  }
  if (reads && (h != hv || fused || k.element_count() > 0))
    return ffi::Error::InvalidArgument("pages that are only read are given queries alone, K and V of one size");
  if (pool.page_size % PANEL != 0 || hv % PANEL != 0 || h % (pool.kind == Kind::kInt8 ? 4 : 2) != 0)
    return ffi::Error::InvalidArgument("pages hold a multiple of 16 tokens, heads of v of 16 channels");

  Step step{};
  step.q = q.typed_data();
  if (fused) {
    step.k = step.q + G * h;
    step.v = step.q + (G + 1) * h;
    step.q_head = step.k_head = step.v_head = (G + 2) * h;
  } else {
    step.k = reads ? nullptr : k.typed_data();
    step.v = reads ? nullptr : v.typed_data();
    step.q_head = G * h;
    step.k_head = h;
    step.v_head = hv;
  }
  step.q_token = K * step.q_head;
  step.k_token = K * step.k_head;
  step.v_token = K * step.v_head;
  if (cos.element_count() > 0) {
    step.cos = cos.typed_data();
    step.sin = sin.typed_data();
    step.half = static_cast<int>(cos.dimensions()[1]);
  }
  step.sinks = sinks.element_count() > 0 ? sinks.typed_data() : nullptr;
  step.index = index.typed_data();
  step.group = static_cast<int>(G);
  step.whole = whole != 0;
  step.scale = scale * kBitsANat;
  step.out = out->typed_data();
  const int64_t B = decode_len.dimensions()[0];
  if (places < 1 || B * places > T) return ffi::Error::InvalidArgument("more places in decode rows than tokens");
  const int32_t* const decode_qlens = decode_qlen.element_count() > 0 ? decode_qlen.typed_data() : nullptr;
  const Rows decode{decode_pages.typed_data(), nullptr, decode_qlens, decode_len.typed_data(), B,
                    decode_pages.dimensions()[1], places};
  const Rows chunk{chunk_pages.typed_data(), chunk_start.typed_data(), chunk_qlen.typed_data(), chunk_len.typed_data(),
                   chunk_len.dimensions()[0], chunk_pages.dimensions()[1], 0};
  return run_step(threads, step, pool, decode, chunk, T);
}

}  // namespace
}  // namespace jaxserve::attention

JAXSERVE_HANDLER(jaxserve_attention, jaxserve::attention::attention,
                 xla::ffi::Ffi::Bind()
                     .Ctx<xla::ffi::ThreadPool>()
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // q
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // k
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // v
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // cos
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // sin
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // sinks
                     .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // kv_index_T
                     .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // decode_pages_BP
                     .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // decode_len_B
                     .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // decode_qlen_B (empty: one token a row)
                     .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // chunk_pages_RP
                     .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // chunk_start_R
                     .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // chunk_qlen_R
                     .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // chunk_len_R
                     .RemainingArgs()                         // pages
                     .Ret<xla::ffi::Buffer<xla::ffi::F32>>()  // out
                     .RemainingRets()                         // pages
                     .Attr<float>("scale")
                     .Attr<float>("softcap")
                     .Attr<int32_t>("window")
                     .Attr<int32_t>("places")
                     .Attr<int32_t>("whole")
                     .Attr<int32_t>("mixed"));
