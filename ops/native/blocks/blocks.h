// Products with weights in a few bits, as checkpoints store them: w = (value - zero) * scale + offset, where a block of
// neighbouring inputs shares scale and offset, and values are integers or entries of a table. Nothing is rounded a second time:
// values stay integers and scales keep the bits that the file gives them. Activations are rounded to int8 with one scale for
// every 32 inputs of a row.
//
// A weight is one array of bytes. 16 output channels make a panel, four panels (fewer at the end of a stretch of one form) a group,
// and groups lie one behind the other, as do the chunks of 512 inputs that a group is made of. A chunk has the heads of its panels
// and behind them their values, a line of 64 bytes of each panel in turn: few rows read memory from front to back in a single
// stream, which the hardware then fetches ahead by itself. A head has
//   scales   [inputs / block][16], in the form's type; one where blocks are longer than a chunk
//   offsets  the same
//   nested   float16 [inputs / 256][16], what nested scales are multiplied with; then the same of nested offsets
// Which form the panels of a stretch of channels have, a `Weight` says. Inputs are padded to whole steps of 32.
//
// For each row and channel all kernels add up in the same order, so a row's results do not depend on its neighbours.

#pragma once

#include <algorithm>
#include <cstring>

#include "common.h"

namespace jaxserve::blocks {

constexpr int kPanel = 16;     // output channels a panel
constexpr int kPanels = 4;     // panels of a group
constexpr int kLine = 64;      // bytes that a panel's values come in
constexpr int kStep = 32;      // inputs that share an activation scale
constexpr int kNest = 256;     // inputs that share what nested scales are multiplied with
constexpr int kSteps = kNest / kStep;
constexpr int kPair = 8;       // inputs that lie in one line of four bits: two quads, which products may cross
constexpr int64_t kChunk = 512;  // inputs that lie together and are unpacked at once: they stay in the first caches

enum class Table : int32_t { kNone = 0, kIq4 = 1, kE2m1 = 2, kNf4 = 3, kFp4 = 4 };
enum class Scale : int32_t { kNone = 0, kFloat32 = 1, kFloat16 = 2, kBfloat16 = 3, kPower = 4, kNestedU8 = 5, kNestedS8 = 6, kZeroPoint = 7 };
enum class Activation : int64_t { kNone = 0, kSilu = 1, kGeluTanh = 2, kRelu = 3 };

// As ops/linear/weights/blocks.py writes it: eight int32.
struct Form {
  int32_t bits;    // 4, 6 or 8: room of a value, which is unsigned
  Table table;     // what 4-bit values are entries of
  int32_t zero;    // taken off each value (after the table); 0 or a power of two
  int32_t block;   // inputs a scale: 16 to 512, a power of two, or a multiple of 512
  Scale scale;
  Scale offset;    // kNestedU8 is subtracted; kZeroPoint (a byte) means -scale * byte
  int32_t power;   // all scales times 2^power
  int32_t largest; // a value may be (after the table); whether AVX2's products of pairs stay within 16 bits
};

// Bytes that a value has once it is looked up. What entries of 16 bits stand for is multiplied in two parts, the upper one first.
inline int planes(const Form& form) { return form.table == Table::kNf4 || form.table == Table::kFp4 ? 2 : 1; }

inline int64_t padded(int64_t inputs) { return ceil_div(inputs, kStep) * kStep; }

// Lines of a panel's values. 4 bits: a line holds 8 inputs, byte 4 c + i inputs i (low) and 4 + i (high) of channel c. 6 bits: three
// lines hold 16 inputs, byte 4 c + i of line j input 4 j + i in its low six bits, and of input 12 + i two bits in its upper ones,
// the lowest in the first line. 8 bits: a line holds 4 inputs.
inline int64_t value_lines(const Form& form, int64_t inputs) { return inputs * form.bits / 32; }

inline int64_t scale_bytes(Scale kind) {
  switch (kind) {
    case Scale::kNone: return 0;
    case Scale::kFloat32: return 4;
    case Scale::kFloat16:
    case Scale::kBfloat16: return 2;
    default: return 1;
  }
}

inline bool nested(Scale kind) { return kind == Scale::kNestedU8 || kind == Scale::kNestedS8; }

// Which of a chunk's blocks an input is in, as a shift.
inline int block_shift(const Form& form) { return form.block >= kChunk ? 9 : __builtin_ctz(static_cast<uint32_t>(form.block)); }
static_assert(int64_t{1} << 9 == kChunk);

// Where the parts of a panel's head begin in a chunk of `inputs` (whole steps, at most kChunk), and how long head and values are.
struct Parts {
  int64_t offsets, nested_scales, nested_offsets, head, lines;
  Parts(const Form& form, int64_t inputs) {
    // A block is a power of two or holds the whole chunk: divisions would be asked for more often than they are fast.
    const int64_t blocks = ((inputs - 1) >> block_shift(form)) + 1, nests = ceil_div(inputs, kNest);
    offsets = blocks * kPanel * scale_bytes(form.scale);
    nested_scales = offsets + blocks * kPanel * scale_bytes(form.offset);
    nested_offsets = nested_scales + (nested(form.scale) ? nests * kPanel * 2 : 0);
    head = ceil_div(nested_offsets + (nested(form.offset) ? nests * kPanel * 2 : 0), kLine) * kLine;
    lines = value_lines(form, inputs);
  }
  int64_t bytes() const { return head + lines * kLine; }  // of one panel
};

// Bytes of a panel in front of the chunk that begins with an input, and of all of it. A group's are as many times that as it has panels.
inline int64_t chunk_at(const Form& form, int64_t input) { return input / kChunk * Parts(form, kChunk).bytes(); }
inline int64_t panel_bytes(const Form& form, int64_t inputs) {
  const int64_t all = padded(inputs), rest = all % kChunk;
  return chunk_at(form, all) + (rest == 0 ? 0 : Parts(form, rest).bytes());
}

// 32 inputs of a rounded row and all that is known of them, side by side: kernels then need one pointer a row.
struct Step {
  int8_t value[kStep];
  float scale;           // may be negative; 0 where all are zero
  float sum;             // scale * the sum of all values
  int32_t minus_sum[2];  // of 16 values each
  int32_t start;         // what crossed sums begin with, see blocks_crossed.h; written where there are such
  int32_t zero_sum[2];   // minus_sum times the zero of paired scales; the same
};
static_assert(sizeof(Step) == 60);

// Rounded rows, `stride` bytes each. Steps come in pairs, as many as a rotation takes. Kernels may read some more rows than they are
// asked for, so there is memory behind the last.
constexpr int64_t kBehind = 4;
struct Rows {
  uint8_t* data;
  int64_t steps, stride;
  Rows() : data(nullptr), steps(0), stride(0) {}
  Rows(uint8_t* to, int64_t inputs) : data(to), steps(2 * ceil_div(inputs, 2 * kStep)), stride(row_bytes(inputs)) {}
  static int64_t row_bytes(int64_t inputs) {
    return ceil_div(2 * ceil_div(inputs, 2 * kStep) * static_cast<int64_t>(sizeof(Step)), kLine) * kLine;
  }
  static int64_t bytes(int64_t rows, int64_t inputs) { return (rows + kBehind) * row_bytes(inputs); }
  Step* row(int64_t index) const { return reinterpret_cast<Step*>(data + index * stride); }
  const Step& step(int64_t index, int64_t at) const { return row(index)[at]; }
  // Whether a row is zeros, as padding of a step is from the embedding on.
  bool zero(int64_t index) const {
    const Step* step = row(index);
    return std::all_of(step, step + steps, [](const Step& s) { return s.scale == 0.0f; });
  }
};

// Rounded values are -127 to 112, so that one of them and a value of four bits, 128 more, are a byte. A step's largest number becomes
// -127, by a scale with the other sign where it is positive: mostly the largest on the other side is small enough then. Of 16 values
// the sum of absolutes is below 1,024, so that their products with values of six bits, less their zero, add up to 16 bits. Both
// together make rounding errors 1.5 % larger.
constexpr float kLargest = 1.0f / 127, kOther = 1.0f / 112, kTogether = 1.0f / 1008;
constexpr float kLeast = 1e-30f;  // a step without a larger scale is zero

// The scale of a step from its largest number, minus its smallest, and the larger sum of absolutes of its halves.
inline float scale_of(float most, float least, float sum) {
  const float size = std::max(std::max(most, least) * kLargest, std::max(std::min(most, least) * kOther, sum * kTogether));
  if (!(size > kLeast)) return 0.0f;
  return most > least ? -size : size;
}

// Rounds rows of x (float32, `width` wide): x, or x / rms(x) * gain where gain is given; times a Hadamard matrix of 64 first
// where they are rotated.
struct Rounding {
  const float* x;
  int64_t width;
  const float* gain;  // or null
  float eps;
  bool rotated;
  Rows to;
};

// Neighbouring panels of one group.
struct Run {
  const uint8_t* group;
  const Form* form;
  int of;             // panels that the group has
  int first, panels;  // the run's own
};

// `rows` x (up to two runs) of a product and what happens to it. With an activation the first run is gates and the second, of as
// many panels, the matching ups: out = act(gate) * up, for half the panels.
struct Tile {
  Rows a;
  int64_t first_row, rows, inputs;
  Run run[2];
  int runs, panels;                    // of all runs
  const float* bias[2 * kPanels];      // [valid] or null
  int valid[2 * kPanels];              // channels of the panel that exist
  float* out[2 * kPanels];             // first row's
  const float* residual[2 * kPanels];  // first row's, added to the result, or null
  int64_t out_stride;                  // floats; also the residual's
  Activation activation;
};

// A chunk of inputs of up to four neighbouring panels.
struct Chunk {
  int64_t first_step, steps;
  const Form* form;
  const uint8_t* values[kPanels];  // a panel's first line: as stored, or unpacked to a byte a value and plane
  int64_t plane;                   // bytes from the upper plane to the lower one, where there are two
  int64_t line;                    // bytes from a line of a panel to its next
  const float* scale[kPanels];
  const float* offset[kPanels];    // or null
  const uint8_t *ahead, *end;      // what memory is asked for between the products, as evenly as it is used:
  int64_t each;                    // so many bytes a step of each block of rows
  bool stored, widened;            // whether values are as stored, and whether kernels widen scales
  const uint8_t* head[kPanels];    // where scales are stored, and not widened: for kernels that do so themselves
  const int32_t* cross[kPanels];   // what `unpack_crossed` found, [steps][16]
};

constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it to a float rounds it to an integer

struct Kernels {
  void (*tile)(const Tile&);
  void (*round_row)(const Rounding&, int64_t row);
  // One channel of a run of one panel as float32 [padded inputs]: for embeddings.
  void (*channel)(const Run& run, int64_t inputs, int channel, float* out);
};

// The kernels of the instruction set in use.
const Kernels& kernels();

extern const Kernels kGenericKernels;
#if JAXSERVE_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kVnniKernels;
#endif

constexpr int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr int8_t kE2m1Values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};  // doubled

// bitsandbytes' tables, whose largest entry is 1: NF4 in 1 / 32767, FP4 in 1 / 30720, which is exact.
constexpr int32_t kNf4Values[16] = {-32767, -22812, -17205, -12940, -9320, -6054, -2983, 0,
                                    2608,   5273,   8064,   11072,  14441, 18435, 23689, 32767};
constexpr int32_t kFp4Values[16] = {0, 160,  20480,  30720,  10240,  15360,  5120,  7680,
                                    0, -160, -20480, -30720, -10240, -15360, -5120, -7680};

// Entry of a form's table, as an unsigned value: less the form's zero it is the number.
inline int32_t entry(const Form& form, int value) {
  switch (form.table) {
    case Table::kIq4: return kIq4Values[value & 15] + form.zero;
    case Table::kE2m1: return kE2m1Values[value & 15] + form.zero;
    case Table::kNf4: return kNf4Values[value & 15] + form.zero;
    case Table::kFp4: return kFp4Values[value & 15] + form.zero;
    case Table::kNone: break;
  }
  return value;
}

}  // namespace jaxserve::blocks
