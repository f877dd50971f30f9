// A weight as handlers are given it: its bytes, and an int32 array that says what they are.

#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "blocks/blocks.h"
#include "int8.h"

namespace jaxserve::blocks {

struct Weight {
  // Neighbouring panels of one form, in groups one behind the other.
  struct Stretch {
    int32_t form, first, panels, at;  // `at`: where the first group begins, in 64 bytes
  };

  const uint8_t* bytes = nullptr;
  int64_t outputs = 0, inputs = 0;
  bool rotated = false;
  std::vector<Form> forms;
  std::vector<int64_t> size;  // of a panel in bytes, of each form
  std::vector<Stretch> stretches;
  std::vector<int32_t> groups;  // each one's first panel

  int64_t panels() const { return ceil_div(outputs, kPanel); }

  // Takes a description: rotated, number of forms, number of stretches, the forms, the stretches. Returns what is wrong with it,
  // or null.
  const char* read(const ffi::Buffer<ffi::U8>& data, const ffi::Buffer<ffi::S32>& description, int64_t O, int64_t I) {
    const int32_t* from = description.typed_data();
    const int64_t length = static_cast<int64_t>(description.element_count());
    bytes = data.typed_data();
    outputs = O;
    inputs = I;
    constexpr int64_t kForm = sizeof(Form) / 4, kStretch = sizeof(Stretch) / 4;
    if (length < 3 || length != 3 + from[1] * kForm + from[2] * kStretch) return "a weight's description has a wrong length";
    rotated = from[0] != 0;
    if (rotated && I % int8::kGroup != 0) return "a rotated weight's inputs are a multiple of 64";
    forms.resize(from[1]);
    std::memcpy(forms.data(), from + 3, forms.size() * sizeof(Form));
    stretches.resize(from[2]);
    std::memcpy(stretches.data(), from + 3 + from[1] * kForm, stretches.size() * sizeof(Stretch));
    for (const Form& form : forms) size.push_back(panel_bytes(form, I));
    int64_t next = 0;
    for (const Stretch& s : stretches) {
      if (s.form < 0 || s.form >= from[1] || s.first != next || s.panels <= 0) return "a weight's stretches do not follow";
      const int64_t end = int64_t{s.at} * 64 + s.panels * size[s.form];
      if (s.at < 0 || end > static_cast<int64_t>(data.element_count())) return "a weight's bytes are packed for another shape";
      for (int32_t first = 0; first < s.panels; first += kPanels) groups.push_back(s.first + first);
      next += s.panels;
    }
    return next == panels() ? nullptr : "a weight's bytes are packed for another shape";
  }

  // The panels from `index` on that lie in one group, at most `most` of them.
  Run run(int64_t index, int64_t most = kPanels) const {
    const auto after = [](int64_t i, const Stretch& s) { return i < s.first; };
    const Stretch& s = *(std::upper_bound(stretches.begin(), stretches.end(), index, after) - 1);
    const int64_t first = (index - s.first) / kPanels * kPanels, of = std::min<int64_t>(kPanels, s.panels - first);
    const int64_t begin = index - s.first - first;
    return {bytes + int64_t{s.at} * 64 + first * size[s.form], &forms[s.form], static_cast<int>(of),
            static_cast<int>(begin), static_cast<int>(std::min(of - begin, most))};
  }

  // Adds panels from `index` on to a tile, as many as `run` gives.
  void place(Tile& t, int64_t index, int64_t most, const float* bias) const {
    const Run own = t.run[t.runs++] = run(index, most);
    for (int p = 0; p < own.panels; ++p, ++index) {
      t.bias[t.panels] = bias == nullptr ? nullptr : bias + index * kPanel;
      t.valid[t.panels] = static_cast<int>(std::min<int64_t>(kPanel, outputs - index * kPanel));
      t.residual[t.panels++] = nullptr;
    }
  }
};

}  // namespace jaxserve::blocks
