// From the rows of a checkpoint to panels, for the loader: called from its threads, without XLA. Values keep their integers and
// scales their bits; only their places change.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "blocks/blocks.h"
#include "host_casts.h"

namespace jaxserve::blocks {
namespace {

// GGUF's block types, by gguf's numbers; kPlain is what other checkpoints are brought to.
enum class Source : int64_t {
  kPlain = -1, kQ4_0 = 2, kQ4_1 = 3, kQ5_0 = 6, kQ5_1 = 7, kQ8_0 = 8, kQ4_K = 12, kQ5_K = 13, kQ6_K = 14, kIq4Nl = 20,
  kIq4Xs = 23, kMxfp4 = 39,
};

// One row of a tensor, taken apart: a byte a value, and scales in the form's types.
struct Apart {
  std::vector<uint8_t> value, scale, offset, nested_scale, nested_offset;
  bool finite = true;

  void half(std::vector<uint8_t>& to, const uint8_t* from) {
    finite = finite && (from[1] & 0x7c) != 0x7c;
    to.push_back(from[0]);
    to.push_back(from[1]);
  }
  // 32 values, the low halves of 16 bytes first, with a fifth bit each from `high` where there is one.
  void nibbles(const uint8_t* from, uint32_t high, bool fifth) {
    for (int i = 0; i < 32; ++i) {
      const uint8_t low = i < 16 ? from[i] & 15 : from[i - 16] >> 4;
      value.push_back(low | (fifth ? (high >> i & 1) << 4 : 0));
    }
  }
  // K-quants' eight pairs of six bits in twelve bytes.
  void six_bits(const uint8_t* packed) {
    for (int i = 0; i < 8; ++i) {
      if (i < 4) {
        scale.push_back(packed[i] & 63);
        offset.push_back(packed[i + 4] & 63);
      } else {
        scale.push_back((packed[i + 4] & 15) | (packed[i - 4] >> 6) << 4);
        offset.push_back((packed[i + 4] >> 4) | (packed[i] >> 6) << 4);
      }
    }
  }
};

uint32_t word(const uint8_t* from) {
  uint32_t bits;
  std::memcpy(&bits, from, 4);
  return bits;
}

// One block; returns where the next begins.
const uint8_t* take_apart(Source source, const uint8_t* b, Apart& to) {
  switch (source) {
    case Source::kQ4_0:
    case Source::kIq4Nl:
      to.half(to.scale, b);
      to.nibbles(b + 2, 0, false);
      return b + 18;
    case Source::kQ4_1:
      to.half(to.scale, b);
      to.half(to.offset, b + 2);
      to.nibbles(b + 4, 0, false);
      return b + 20;
    case Source::kQ5_0:
      to.half(to.scale, b);
      to.nibbles(b + 6, word(b + 2), true);
      return b + 22;
    case Source::kQ5_1:
      to.half(to.scale, b);
      to.half(to.offset, b + 2);
      to.nibbles(b + 8, word(b + 4), true);
      return b + 24;
    case Source::kQ8_0:
      to.half(to.scale, b);
      for (int i = 0; i < 32; ++i) to.value.push_back(b[2 + i] ^ 0x80);
      return b + 34;
    case Source::kMxfp4:
      to.finite = to.finite && b[0] != 255;
      to.scale.push_back(b[0]);
      to.nibbles(b + 1, 0, false);
      return b + 17;
    case Source::kQ4_K:
    case Source::kQ5_K: {
      to.half(to.nested_scale, b);
      to.half(to.nested_offset, b + 2);
      to.six_bits(b + 4);
      const bool five = source == Source::kQ5_K;
      const uint8_t* high = b + 16;
      const uint8_t* low = b + (five ? 48 : 16);
      for (int block = 0; block < 8; ++block) {
        for (int i = 0; i < 32; ++i) {
          const uint8_t four = block % 2 == 0 ? low[block / 2 * 32 + i] & 15 : low[block / 2 * 32 + i] >> 4;
          to.value.push_back(four | (five ? (high[i] >> block & 1) << 4 : 0));
        }
      }
      return low + 128;
    }
    case Source::kQ6_K: {
      const uint8_t* low = b;
      const uint8_t* high = b + 128;
      uint8_t value[256];
      for (int half = 0; half < 2; ++half, low += 64, high += 32) {
        for (int i = 0; i < 32; ++i) {
          uint8_t* out = value + 128 * half + i;
          out[0] = (low[i] & 15) | (high[i] & 3) << 4;
          out[32] = (low[i + 32] & 15) | (high[i] >> 2 & 3) << 4;
          out[64] = (low[i] >> 4) | (high[i] >> 4 & 3) << 4;
          out[96] = (low[i + 32] >> 4) | (high[i] >> 6 & 3) << 4;
        }
      }
      to.value.insert(to.value.end(), value, value + 256);
      to.scale.insert(to.scale.end(), b + 192, b + 208);
      to.half(to.nested_scale, b + 208);
      return b + 210;
    }
    case Source::kIq4Xs: {
      to.half(to.nested_scale, b);
      const int high = b[2] | b[3] << 8;
      for (int block = 0; block < 8; ++block) {
        const int low = b[4 + block / 2] >> 4 * (block % 2) & 15;
        to.scale.push_back(static_cast<uint8_t>((low | (high >> 2 * block & 3) << 4) - 32));
        to.nibbles(b + 8 + 16 * block, 0, false);
      }
      return b + 136;
    }
    case Source::kPlain:
      break;
  }
  return b;
}

int64_t block_inputs(Source source) {
  switch (source) {
    case Source::kQ4_K:
    case Source::kQ5_K:
    case Source::kQ6_K:
    case Source::kIq4Xs:
      return 256;
    default:
      return 32;
  }
}

// One channel's values of a chunk into its panel's lines, `line` bytes from one to the next, whose bytes are zero.
void put_values(const Form& form, const uint8_t* value, int64_t inputs, int channel, uint8_t* lines, int64_t line) {
  for (int64_t i = 0; i < inputs; ++i) {
    const int64_t quad = i / 4, place = channel * 4 + i % 4;
    if (form.bits == 8) {
      lines[quad * line + place] = value[i];
    } else if (form.bits == 4) {
      lines[quad / 2 * line + place] |= value[i] << (quad % 2 == 0 ? 0 : 4);
    } else if (quad % 4 < 3) {
      lines[(quad / 4 * 3 + quad % 4) * line + place] |= value[i];
    } else {
      for (int j = 0; j < 3; ++j) lines[(quad / 4 * 3 + j) * line + place] |= (value[i] >> 2 * j & 3) << 6;
    }
  }
}

// A channel's entries of one part of a chunk, `size` bytes each, 16 channels side by side.
void put_scales(const uint8_t* from, int64_t available, int64_t first, int64_t count, int64_t size, int channel,
                uint8_t* part) {
  for (int64_t i = 0; i < count && first + i < available; ++i) {
    std::memcpy(part + (i * kPanel + channel) * size, from + (first + i) * size, size);
  }
}

}  // namespace
}  // namespace jaxserve::blocks

// Bytes of a panel.
JAXSERVE_EXPORT int64_t jaxserve_blocks_panel(const int32_t* form, int64_t inputs) {
  jaxserve::blocks::Form f;
  std::memcpy(&f, form, sizeof f);
  return jaxserve::blocks::panel_bytes(f, inputs);
}

// Packs `outputs` rows of `inputs` values. `source`: a GGUF block type, then `rows` points at each row's blocks; or -1, then it
// points at a byte a value, and `scales` and `offsets` at a row's scales in the form's types (null: the form has none).
// `to` holds whole panels, the first four a group and so on, and is overwritten. Returns 0, or 1 where a scale is not finite.
JAXSERVE_EXPORT int64_t jaxserve_blocks_pack(int64_t source, const int32_t* form, const uint8_t* const* rows,
                                             const uint8_t* const* scales, const uint8_t* const* offsets, int64_t outputs,
                                             int64_t inputs, uint8_t* to) {
  using namespace jaxserve::blocks;
  Form f;
  std::memcpy(&f, form, sizeof f);
  const Source kind = static_cast<Source>(source);
  const int64_t bytes = panel_bytes(f, inputs), all = padded(inputs), blocks = jaxserve::ceil_div(inputs, f.block);
  const int64_t scale_size = scale_bytes(f.scale), offset_size = scale_bytes(f.offset);
  Apart apart;
  std::vector<uint8_t> value(all);
  for (int64_t row = 0; row < outputs; ++row) {
    const int64_t panel = row / kPanel, begin = panel / kPanels * kPanels;
    const int64_t of = std::min<int64_t>(kPanels, jaxserve::ceil_div(outputs, kPanel) - begin);
    uint8_t* group = to + begin * bytes;
    const int channel = static_cast<int>(row % kPanel);
    if (row == begin * kPanel) std::memset(group, 0, of * bytes);
    const uint8_t *scale, *offset = nullptr, *nested_scale = nullptr, *nested_offset = nullptr;
    if (kind == Source::kPlain) {
      std::copy(rows[row], rows[row] + inputs, value.begin());
      scale = scales[row];
      offset = offsets == nullptr ? nullptr : offsets[row];
    } else {
      apart.value.clear(), apart.scale.clear(), apart.offset.clear();
      apart.nested_scale.clear(), apart.nested_offset.clear();
      const uint8_t* at = rows[row];
      for (int64_t i = 0; i < inputs; i += block_inputs(kind)) at = take_apart(kind, at, apart);
      std::copy(apart.value.begin(), apart.value.begin() + inputs, value.begin());
      scale = apart.scale.data();
      offset = apart.offset.data();
      nested_scale = apart.nested_scale.data();
      nested_offset = apart.nested_offset.data();
    }
    if (!apart.finite) return 1;
    const int64_t nests = jaxserve::ceil_div(inputs, kNest);
    for (int64_t first = 0; first < all; first += kChunk) {
      const int64_t count = std::min(kChunk, all - first), own = jaxserve::ceil_div(count, f.block);
      uint8_t* chunk = group + of * chunk_at(f, first);
      const Parts parts(f, count);
      uint8_t* head = chunk + (panel - begin) * parts.head;
      put_values(f, value.data() + first, count, channel, chunk + of * parts.head + (panel - begin) * kLine, of * kLine);
      put_scales(scale, blocks, first / f.block, own, scale_size, channel, head);
      if (f.offset != Scale::kNone) {
        put_scales(offset, blocks, first / f.block, own, offset_size, channel, head + parts.offsets);
      }
      const int64_t own_nests = jaxserve::ceil_div(count, kNest);
      if (nested(f.scale)) put_scales(nested_scale, nests, first / kNest, own_nests, 2, channel, head + parts.nested_scales);
      if (nested(f.offset)) put_scales(nested_offset, nests, first / kNest, own_nests, 2, channel, head + parts.nested_offsets);
    }
  }
  return 0;
}
