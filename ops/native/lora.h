// Low-rank adapters on the CPU: every row's product with the two matrices of its own adapter.

#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "common.h"

namespace jaxserve::lora {

using Bits = uint16_t;  // a bfloat16

constexpr int kPanel = 32;            // columns of a B of bfloat16 that lie together
constexpr int kBlock = 16;            // rows of one adapter that share what is fetched of its A
constexpr int64_t kRows = 48;         // rows that are added to together: a block of the base's products
constexpr int64_t kSpan = 4 * kRows;  // rows that go through a fused block of layers together

// A is [ranks, inputs]; B is float [ranks, outputs] or Bits [ceil(outputs / 32)][ceil(ranks / 2)][32][2]: the numbers of two
// ranks beside each other, zeros beyond the last rank and column.
struct Kernels {
  int64_t hidden_bytes;  // of a number between A and B
  // h[t][r] = norm(x[t]) . a[r] for up to kBlock rows x. With `gain` the norm is x / rms(x) * gain, without it x.
  void (*shrink)(const float* const* x, int count, const float* gain, float eps, const void* a, int ranks,
                 int64_t inputs, void* h, int64_t stride);
  // y[t][c] += sum_r h[t][r] * b[r][begin + c] for c below end - begin. A row of h has `stride` numbers, an even number.
  void (*expand)(const void* h, int64_t stride, int count, const void* b, int ranks, int64_t outputs, int64_t begin,
                 int64_t end, float* const* y);
};

template <typename E>
Kernels generic_kernels();
#if JAXSERVE_X86
template <typename E>
Kernels avx2_kernels();
template <typename E>
Kernels avx512_kernels();
Kernels bf16_kernels();  // of Bits: products of pairs of bfloat16, added up in float32: x and h are rounded to it
#endif

// The adapters of a product's rows, for whoever computes it: `shrink` for all blocks of some rows, then `expand` for their
// columns, each call from any thread.
class Beside {
 public:
  // Operands: slot [T] (0: none), a [N, P R, I], b [N, ...] of R ranks and O columns. `ends` are pairs of the column where a stretch of B ends
  // and the number of the matrix that it is of, below P; none where P is 1. Null, or what is wrong with them.
  const char* read(const ffi::Buffer<ffi::S32>& slot, const ffi::AnyBuffer& a, const ffi::AnyBuffer& b,
                   ffi::Span<const int64_t> ends, int64_t rows, int64_t inputs, int64_t outputs);

  bool idle() const { return order_.empty(); }  // nobody has an adapter
  int64_t multiplications() const { return static_cast<int64_t>(order_.size()) * (all_ * inputs_ + ranks_ * outputs_); }

  // [first, last) of the blocks of rows [begin, begin + rows), which are whole spans or the rest.
  std::pair<int64_t, int64_t> blocks(int64_t begin, int64_t rows) const;
  // The first product of a block. Row `origin` of the batch is the first of x [.., inputs].
  void shrink(int64_t block, const float* x, int64_t origin, const float* gain, float eps);
  // Adds to columns [begin, end) of rows [row, row + kRows), `row` a multiple of kRows. Row i of y is y + (i - row) * stride.
  void expand(int64_t row, int64_t begin, int64_t end, float* y, int64_t stride) const;
  // What that will read of B.
  void ahead(int64_t row, int64_t begin, int64_t end, Fetch& fetch) const;

 private:
  struct Rows {  // of one adapter, neighbours in `order_`
    int32_t slot, first, count;
  };
  struct Columns {  // that take the products with A's rows from `rank` on
    int64_t begin, end, rank;
  };
  void deal(const int32_t* slot, int64_t begin, int64_t end);

  Kernels kernels_;
  const char* a_;
  const char* b_;
  bool half_;
  int64_t inputs_, outputs_, all_, ranks_;
  int64_t stride_;                         // numbers of a row of `hidden_`: all ranks, or one more
  int64_t bytes_of_a_, bytes_of_b_;        // a slot's
  std::vector<int32_t> order_;             // rows that have one: by span, by slot
  std::vector<Rows> blocks_;               // at most kBlock rows each
  std::vector<int64_t> spans_;             // where each span's blocks begin, and the end
  std::vector<std::vector<Rows>> groups_;  // by kRows rows
  std::vector<Columns> columns_;
  std::unique_ptr<char[]> hidden_;         // [rows in order][stride_]
};

}  // namespace jaxserve::lora
