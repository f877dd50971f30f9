// What the instruction sets share, inside the namespace of a file that includes this once with AT, the function attribute that
// enables the set. Loops over 16 channels become vectors of whatever set the function is compiled for. The file gives before it:
//   gate(gates, ups, Activation, out)    out = act(gates) * ups, of 16 each; out may be gates
//   stored(rows)                         whether `multiply` takes values of so many rows as they are stored, or a byte each
//   passes(form, rows, stored)           how often it goes through the steps of two panels for so many rows
//   most(rows)                           panels that it takes at once: 4, or 1 and 2
//   Sixteen                              16 floats, and `same`, `times`, `put`, and what reads 16 scales of each type
//   look_up(table[16], values, count, out)  each value's entry; out may be values
//   widens(form, rows)                   whether `multiply` widens scales itself
//   crossed(form)                        whether it takes unpacked values crossed, which
//   unpack_crossed(from, line, inputs, values, out)  makes of stored ones
//   multiply(tile, chunk, panels, sums)  adds a chunk's products of some panels to sums [rows][tile.panels][16]

// The scales of a chunk of `inputs`, one for every `period` of them, as float32 [inputs / period][16], times `unit`.
template <Scale KIND>
AT static void widen_scales(const uint8_t* part, const uint8_t* nest, int shift, int64_t inputs, int64_t period,
                            float unit, float* out) {
  const Sixteen one = same(unit);
  Sixteen factor = one;
  for (int64_t input = 0; input < inputs; input += period, out += kPanel) {
    const int64_t index = (input >> shift) * kPanel;
    Sixteen value;
    if constexpr (KIND == Scale::kFloat32) value = floats(part + index * 4);
    else if constexpr (KIND == Scale::kFloat16) value = halves(part + index * 2);
    else if constexpr (KIND == Scale::kBfloat16) value = brains(part + index * 2);
    else if constexpr (KIND == Scale::kPower) value = powers(part + index);
    else if constexpr (KIND == Scale::kNestedS8) value = signed_bytes(part + index);
    else value = bytes(part + index);
    if constexpr (KIND == Scale::kNestedU8 || KIND == Scale::kNestedS8) {
      if (input % kNest == 0) factor = times(halves(nest + input / kNest * kPanel * 2), one);
    }
    put(out, times(value, factor));
  }
}

AT static void widen_scales(Scale kind, const uint8_t* part, const uint8_t* nest, int shift, int64_t inputs,
                            int64_t period, float unit, float* out) {
  switch (kind) {
    case Scale::kFloat32: return widen_scales<Scale::kFloat32>(part, nest, shift, inputs, period, unit, out);
    case Scale::kFloat16: return widen_scales<Scale::kFloat16>(part, nest, shift, inputs, period, unit, out);
    case Scale::kBfloat16: return widen_scales<Scale::kBfloat16>(part, nest, shift, inputs, period, unit, out);
    case Scale::kPower: return widen_scales<Scale::kPower>(part, nest, shift, inputs, period, unit, out);
    case Scale::kNestedU8: return widen_scales<Scale::kNestedU8>(part, nest, shift, inputs, period, unit, out);
    case Scale::kNestedS8: return widen_scales<Scale::kNestedS8>(part, nest, shift, inputs, period, unit, out);
    case Scale::kZeroPoint: return widen_scales<Scale::kZeroPoint>(part, nest, shift, inputs, period, unit, out);
    case Scale::kNone: return;
  }
}

// A chunk's scales and offsets: scale [inputs / period][16], where `period` is 16 or 32, offset [inputs / 32][16].
AT static void decode_scales(const uint8_t* head, const Form& form, const Parts& at, int64_t inputs, float* scale,
                             float* offset) {
  const int shift = block_shift(form);
  const int64_t period = form.block < kStep ? form.block : kStep;
  const float unit = form.power == 0 ? 1.0f : std::ldexp(1.0f, form.power);
  widen_scales(form.scale, head, head + at.nested_scales, shift, inputs, period, unit, scale);
  if (form.offset == Scale::kNone) return;
  const float sign = form.offset == Scale::kNestedU8 || form.offset == Scale::kZeroPoint ? -1.0f : 1.0f;
  widen_scales(form.offset, head + at.offsets, head + at.nested_offsets, shift, inputs, kStep, sign, offset);
  if (form.offset != Scale::kZeroPoint) return;
  for (int64_t i = 0; i < inputs / kStep; ++i) {
    for (int c = 0; c < kPanel; ++c) offset[i * kPanel + c] *= scale[i * (kStep / period) * kPanel + c];
  }
}

// A panel's values of a chunk, a byte each, through the table: [planes][inputs / 4][16][4]. `line` bytes lie between its lines.
AT static void unpack_values(const uint8_t* from, int64_t line, const Form& form, int64_t inputs, uint8_t* out) {
  if (form.bits == 8) {
    for (int64_t i = 0; i < inputs / 4; ++i, from += line) std::memcpy(out + i * kLine, from, kLine);
    return;
  }
  if (form.bits == 6) {
    for (int64_t i = 0; i < inputs / 16; ++i, from += 3 * line, out += 4 * kLine) {
      const uint8_t *a = from, *b = from + line, *c = from + 2 * line;
      for (int j = 0; j < kLine; ++j) out[j] = a[j] & 63;
      for (int j = 0; j < kLine; ++j) out[kLine + j] = b[j] & 63;
      for (int j = 0; j < kLine; ++j) out[2 * kLine + j] = c[j] & 63;
      for (int j = 0; j < kLine; ++j) out[3 * kLine + j] = a[j] >> 6 | (b[j] >> 6) << 2 | (c[j] >> 6) << 4;
    }
    return;
  }
  for (int64_t i = 0; i < inputs / 8; ++i, from += line) {
    for (int j = 0; j < kLine; ++j) out[2 * i * kLine + j] = from[j] & 15;
    for (int j = 0; j < kLine; ++j) out[(2 * i + 1) * kLine + j] = from[j] >> 4;
  }
  if (form.table == Table::kNone) return;
  alignas(16) uint8_t upper[16], lower[16];
  for (int i = 0; i < 16; ++i) {
    upper[i] = static_cast<uint8_t>(entry(form, i) >> 8);
    lower[i] = static_cast<uint8_t>(entry(form, i));
  }
  const int64_t count = inputs * kPanel;
  if (planes(form) == 1) return look_up(lower, out, count, out);
  look_up(lower, out, count, out + count);
  look_up(upper, out, count, out);
}

AT static void channel(const Run& run, int64_t inputs, int which, float* out) {
  uint8_t values[2 * kChunk * kPanel];
  float scale[kChunk], offset[kChunk / 2];
  const Form& form = *run.form;
  const bool two = planes(form) == 2;
  const int64_t all = padded(inputs), period = form.block < kStep ? form.block : kStep;
  for (int64_t first = 0; first < all; first += kChunk) {
    const int64_t count = std::min(kChunk, all - first);
    const Parts parts(form, count);
    const uint8_t* chunk = run.group + run.of * chunk_at(form, first);
    decode_scales(chunk + run.first * parts.head, form, parts, count, scale, offset);
    unpack_values(chunk + run.of * parts.head + run.first * kLine, run.of * kLine, form, count, values);
    for (int64_t i = 0; i < count; ++i) {
      const uint8_t* at = values + (i / 4 * kPanel + which) * 4 + i % 4;
      const int value = (two ? 256 * at[0] + at[count * kPanel] : at[0]) - form.zero;
      const float whole = static_cast<float>(value) * scale[i / period * kPanel + which];
      out[first + i] = form.offset == Scale::kNone ? whole : whole + offset[i / kStep * kPanel + which];
    }
  }
}

// The norm and the rotation's factor, one for the row: rounding does not see them, the scales take them. `squares`: sums of the row's.
AT static void finish_rounding(const Rounding& r, int64_t row, const float (&squares)[kPanel]) {
  float factor = r.rotated ? int8::kRotation : 1.0f;
  if (r.gain != nullptr) {
    float all = 0.0f;
    for (int j = 0; j < kPanel; ++j) all += squares[j];
    factor *= 1.0f / std::sqrt(all / static_cast<float>(r.width) + r.eps);
  }
  Step* const first = r.to.row(row);
  for (Step* step = first; step != first + r.to.steps; ++step) {
    step->scale *= factor;
    step->sum = step->scale * static_cast<float>(-step->minus_sum[0] - step->minus_sum[1]);
  }
}

AT [[maybe_unused]] static void round_row(const Rounding& r, int64_t row) {
  constexpr int kPiece = 2 * kStep;
  static_assert(kPiece == int8::kGroup);
  const float* x = r.x + row * r.width;
  Step* to = r.to.row(row);
  float squares[kPanel] = {};
  for (int64_t at = 0; at < r.width; at += kPiece) {
    alignas(64) float value[kPiece];
    const int64_t count = std::min<int64_t>(kPiece, r.width - at);
    for (int64_t i = 0; i < count; ++i) value[i] = x[at + i];
    for (int64_t i = count; i < kPiece; ++i) value[i] = 0.0f;
    if (r.gain != nullptr) {
      for (int i = 0; i < kPiece; i += kPanel) {
        for (int j = 0; j < kPanel; ++j) squares[j] += value[i + j] * value[i + j];
      }
      for (int64_t i = 0; i < count; ++i) value[i] *= r.gain[at + i];
    }
    if (r.rotated) int8::rotate_group(value);
    for (int half = 0; half < 2; ++half, ++to) {
      const float* of = value + half * kStep;
      float most = 0.0f, least = 0.0f, sums[2] = {};
      for (int i = 0; i < kStep; ++i) {
        most = std::max(most, of[i]);
        least = std::max(least, -of[i]);
        sums[i / kPanel] += std::fabs(of[i]);
      }
      to->scale = scale_of(most, least, std::max(sums[0], sums[1]));
      const float inverse = to->scale == 0.0f ? 0.0f : 1.0f / to->scale;
      for (int part = 0; part < 2; ++part) {
        int32_t rounded[kPanel], sum = 0;
        // x + kMagic - kMagic rounds to the nearest integer for |x| < 2^22, in every instruction set alike.
        for (int j = 0; j < kPanel; ++j) rounded[j] = static_cast<int32_t>((of[part * kPanel + j] * inverse + kMagic) - kMagic);
        for (int j = 0; j < kPanel; ++j) sum += rounded[j];
        for (int j = 0; j < kPanel; ++j) to->value[part * kPanel + j] = static_cast<int8_t>(rounded[j]);
        to->minus_sum[part] = -sum;
      }
    }
  }
  finish_rounding(r, row, squares);
}

// to = a + b for the channels that exist: mostly all, in a loop whose length the compiler knows.
AT static FORCE_INLINE void add(const float* a, const float* b, int count, float* to) {
  if (count == kPanel) {
    float sum[kPanel];  // whatever `to` is: vectors need not be asked whether they overlap
    for (int c = 0; c < kPanel; ++c) sum[c] = a[c] + b[c];
    std::memcpy(to, sum, sizeof sum);
  } else {
    for (int c = 0; c < count; ++c) to[c] = a[c] + b[c];
  }
}

// Bias, activation and residual of a tile's sums [rows][panels][16]. What a few rows later are written to, and added from, is asked for
// early: rows lie far apart, so the hardware does not see what comes.
AT static FORCE_INLINE void finish_as(const Tile& t, float* sums, Activation activation) {
  constexpr int64_t kAhead = 12;
  const int outs = activation == Activation::kNone ? t.panels : t.panels / 2;
  for (int64_t row = 0; row < t.rows; ++row, sums += t.panels * kPanel) {
    const int64_t place = row * t.out_stride, later = row + kAhead < t.rows ? place + kAhead * t.out_stride : -1;
    for (int p = 0; p < t.panels; ++p) {
      if (t.bias[p] != nullptr) add(sums + p * kPanel, t.bias[p], t.valid[p], sums + p * kPanel);
    }
    for (int p = 0; p < outs; ++p) {
      float* value = sums + p * kPanel;
      float* out = t.out[p] + place;
      if (later >= 0) {
        will_write(t.out[p] + later);
        if (t.residual[p] != nullptr) __builtin_prefetch(t.residual[p] + later);
      }
      const bool whole = t.valid[p] == kPanel && t.residual[p] == nullptr;
      if (activation != Activation::kNone) gate(value, value + outs * kPanel, activation, whole ? out : value);
      if (t.residual[p] != nullptr) {
        add(value, t.residual[p] + place, t.valid[p], out);
      } else if (!whole) {
        std::memcpy(out, value, t.valid[p] * sizeof(float));
      } else if (activation == Activation::kNone) {
        std::memcpy(out, value, kPanel * sizeof(float));  // of a length that is known: no call
      }
    }
  }
}

AT static void finish(const Tile& t, float* sums) {
  switch (t.activation) {
    case Activation::kNone: return finish_as(t, sums, Activation::kNone);
    case Activation::kSilu: return finish_as(t, sums, Activation::kSilu);
    case Activation::kGeluTanh: return finish_as(t, sums, Activation::kGeluTanh);
    case Activation::kRelu: return finish_as(t, sums, Activation::kRelu);
  }
}

// Neighbouring rows of a tile that are not zeros.
struct Span {
  int64_t first, rows;
};

// The rows of a tile that are multiplied.
struct Spans {
  static constexpr int kMost = 8;
  Span list[kMost];
  int count = 0;
  int64_t rows = 0;  // of all
  explicit Spans(const Tile& t) {
    for (int64_t row = 0, end; row < t.rows; row = end) {
      end = row + 1;
      if (t.a.zero(t.first_row + row)) continue;
      // Until as many are zeros as kernels may take with the rest: what they add to these is zero.
      for (int64_t next = end; next < t.rows && next < end + kBehind; ++next) {
        if (!t.a.zero(t.first_row + next)) end = next + 1;
      }
      if (count < kMost) {
        list[count++] = {row, end - row};
      } else {  // rather some zeros than more spans
        list[kMost - 1].rows = t.rows - list[kMost - 1].first;
        break;
      }
    }
    for (int i = 0; i < count; ++i) rows += list[i].rows;
  }
};

// All panels of a run: chunk by chunk, so that memory is read from front to back, and of a chunk some panels after the others.
AT static void panels(const Tile& t, const Spans& spans, const Run& run, float* sums) {
  alignas(64) uint8_t values[2 * 2 * kChunk * kPanel];
  alignas(64) float scale[kPanels][kChunk], offset[kPanels][kChunk / 2];
  alignas(64) int32_t crosses[2][kChunk / 2];
  const Form& form = *run.form;
  const int64_t all = padded(t.inputs);
  const bool inside = widens(form, spans.rows), as_stored = stored(spans.rows) && planes(form) == 1;
  const int most_panels = as_stored ? most(spans.rows) : 2;
  const int64_t panel_values = planes(form) * kChunk * kPanel;
  Tile part[Spans::kMost];
  int64_t all_passes = 0, own_passes[Spans::kMost];
  for (int i = 0; i < spans.count; ++i) {
    all_passes += own_passes[i] = passes(form, spans.list[i].rows, as_stored);
    part[i] = t;
    part[i].first_row += spans.list[i].first;
    part[i].rows = spans.list[i].rows;
  }
  Chunk c{};
  c.form = &form;
  c.stored = as_stored;
  c.widened = inside;
  c.line = as_stored ? run.of * kLine : kLine;
  for (int64_t input = 0; input < all; input += kChunk) {
    const int64_t count = std::min(kChunk, all - input);
    const Parts parts(form, count);
    const uint8_t* chunk = run.group + run.of * chunk_at(form, input);
    const uint8_t* heads = chunk + run.first * parts.head;
    // All of the heads at once: a miss at a time would stop the products, and jumps back upset the hardware's own fetching.
    for (int64_t at = 0; at < run.panels * parts.head; at += kLine) __builtin_prefetch(heads + at);
    c.first_step = input / kStep;
    c.steps = count / kStep;
    c.plane = count * kPanel;
    if (most_panels < kPanels) {
      // The group's next chunk, or behind its last one the next group's first: mostly this thread's too.
      const int64_t next = run.of * parts.bytes(), steps = c.steps * all_passes * ceil_div(run.panels, 2);
      c.ahead = chunk + next;
      c.end = c.ahead + next;
      c.each = ceil_div(next / kLine, steps) * kLine;
    }
    for (int p = 0, together; p < run.panels; p += together) {
      const int left = run.panels - p;
      together = left >= kPanels && most_panels == kPanels ? kPanels : std::min(left, 2);
      for (int j = 0; j < together; ++j) {
        const uint8_t* lines = chunk + run.of * parts.head + (run.first + p + j) * kLine;
        c.head[j] = heads + (p + j) * parts.head;
        if (!inside) decode_scales(c.head[j], form, parts, count, scale[j], offset[j]);
        c.scale[j] = scale[j];
        c.offset[j] = form.offset == Scale::kNone ? nullptr : offset[j];
        c.values[j] = as_stored ? lines : values + j * panel_values;
        if (as_stored) continue;
        c.cross[j] = crosses[j];
        if (crossed(form)) {
          unpack_crossed(lines, run.of * kLine, count, values + j * panel_values, crosses[j]);
        } else {
          unpack_values(lines, run.of * kLine, form, count, values + j * panel_values);
        }
      }
      for (int i = 0; i < spans.count; ++i) {
        multiply(part[i], c, together, sums + (spans.list[i].first * t.panels + p) * kPanel);
        c.ahead += c.each * c.steps * own_passes[i];
      }
    }
  }
}

AT static void tile(const Tile& t) {
  float* sums = static_cast<float*>(scratch(6, (t.rows + kBehind) * t.panels * kPanel * sizeof(float)));
  std::memset(sums, 0, t.rows * t.panels * kPanel * sizeof(float));
  const Spans spans(t);  // what is zero stays so: bias and residual are all of it
  for (int r = 0, at = 0; spans.count > 0 && r < t.runs; at += t.run[r++].panels) panels(t, spans, t.run[r], sums + at * kPanel);
  finish(t, sums);
}
