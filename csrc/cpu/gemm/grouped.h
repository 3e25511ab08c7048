// The driver of a grouped GEMM on the CPU: which block of which expert is next.
//
// An item is one expert's rows (a chunk of at most kItemRows) times a range of its columns. A
// worker packs the item's part of B once, then walks the rows in blocks whose C stays in L2: pack
// A, multiply, and pass the finished block to the epilogue while it is in cache. One worker computes
// each element of C, in one fixed order of summation, so bits do not depend on the thread count.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "../parallel.h"
#include "gemm.h"

namespace fomoe::cpu {

constexpr int64_t kItemRows = 1024;     // rows of C an item walks with one packed B
constexpr int64_t kItemColumns = 512;   // columns of C at most
constexpr int64_t kItemsPerWorker = 8;  // at least, to balance uneven experts
constexpr int64_t kFewestItemRows = 192;
#ifndef FOMOE_PACKED_B  // small in tests, so that small products need several k-blocks
#define FOMOE_PACKED_B (1 << 20)
#endif
constexpr int64_t kPackedB = FOMOE_PACKED_B;  // units of B packed at a time: 4 MiB, stays in L3
constexpr int64_t kBlockBytesC = 192 << 10;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Scratch of one worker thread; grows, is kept, and is released with the thread.
class Scratch {
 public:
  float* get(int64_t floats) {
    if (floats > capacity_) {
      data_.reset(static_cast<float*>(std::aligned_alloc(64, size_t(round_up(floats * 4, 64)))));
      if (!data_) throw std::bad_alloc();
      capacity_ = floats;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t capacity_ = 0;
};

// A grouped product C_e [rows_e, columns] = A_e [rows_e, sum] . B_e [sum, columns].
// For weight gradients the "rows" are columns of the left operand and the sum runs over an
// expert's rows; Shape says per expert where each starts.
struct GroupedProduct {
  DType dtype;
  Source a;
  bool a_by_rows;  // lines of A are its rows (else steps of the sum)
  Source b;        // per expert: data advances by b_expert bytes
  bool b_by_columns;
  int64_t b_expert_bytes;
  int64_t columns;  // of C for the epilogue; with `halves` 2 the product has two such column sets,
  int32_t halves;   // `columns` lines apart in B (gate and up)
};

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

struct Item {
  int32_t expert;
  Range rows, columns, sum;
};

// Columns of an item, so that its packed B fits; a multiple of the register tile.
inline int64_t item_columns(const GemmKernels& g, int64_t columns, int32_t halves, int64_t sum) {
  int64_t most = std::clamp<int64_t>(kPackedB / std::max<int64_t>(sum, 1), 4 * g.nr, kItemColumns);
  most = std::max<int64_t>(most / halves / g.nr, 1) * g.nr;
  // Even shares: 768 columns become 2 x 384, not 512 + 256.
  return round_up(ceil_div(columns, ceil_div(columns, most)), g.nr);
}

// Runs one item; epilogue(block, first_row, up_column) sees every finished block of rows once.
template <class Epilogue>
void run_item(const GemmKernels& g, const GroupedProduct& p, const Item& item, Epilogue epilogue) {
  thread_local Scratch scratch_a, scratch_b, scratch_c;
  const Unit unit = g.bf16_pairs && p.dtype == DType::bf16 ? Unit::bf16_pair : Unit::f32;
  const int64_t depth = unit == Unit::bf16_pair ? 2 : 1;
  const int64_t step = kBlockK * depth;  // elements along the sum per multiply
  const int64_t half_width = round_up(item.columns.size(), g.nr);
  const int64_t width = half_width * p.halves;
  const int64_t stride = width + 16;
  const int64_t block_rows = std::max<int64_t>(kBlockBytesC / 4 / stride / g.mr, 4) * g.mr;

  // A sum too long for one packed B is done in k-blocks; all of C is then kept between them.
  const int64_t stretch = std::max(round_up(kPackedB / width, step), step);
  const bool one_stretch = item.sum.size() <= stretch;
  const int64_t kept_rows =
      std::min(one_stretch ? block_rows : round_up(item.rows.size(), block_rows),
               round_up(item.rows.size(), g.mr));
  float* c = scratch_c.get(kept_rows * stride);
  float* a = scratch_a.get(round_up(block_rows, g.mr) * kRowStrideA);
  float* b = scratch_b.get(
      width * std::min(ceil_div(std::max<int64_t>(item.sum.size(), 1), depth), stretch / depth));
  Source source_b = p.b;
  source_b.data = static_cast<const char*>(p.b.data) + item.expert * p.b_expert_bytes;

  for (int64_t s0 = item.sum.begin; s0 == item.sum.begin || s0 < item.sum.end; s0 += stretch) {
    const int64_t s1 = std::min(s0 + stretch, item.sum.end);
    float* packed = b;
    for (int64_t k = s0; k < s1; k += step) {
      const int64_t deep = std::min(step, s1 - k);
      for (int32_t half = 0; half < p.halves; ++half) {
        (p.b_by_columns ? g.pack_b_columns : g.pack_b_rows)(p.dtype, unit, source_b,
                                                            item.columns.begin + half * p.columns,
                                                            item.columns.size(), k, deep, packed);
        packed += half_width * ceil_div(deep, depth);
      }
    }
    for (int64_t row = item.rows.begin; row < item.rows.end; row += block_rows) {
      const int64_t rows = std::min(block_rows, item.rows.end - row);
      float* c_block = one_stretch ? c : c + (row - item.rows.begin) * stride;
      const float* b_block = b;
      for (int64_t k = s0; k < s1; k += step) {
        const int64_t deep = std::min(step, s1 - k), units = ceil_div(deep, depth);
        (p.a_by_rows ? g.pack_a_rows : g.pack_a_columns)(p.dtype, unit, p.a, row, rows, k, deep, a);
        g.multiply(unit, p.a_by_rows, a, b_block, c_block, stride, rows, width, units,
                   k != item.sum.begin);
        b_block += width * units;
      }
      if (item.sum.size() == 0)
        for (int64_t i = 0; i < rows; ++i) std::fill_n(c_block + i * stride, width, 0.0f);
      if (s1 == item.sum.end)
        epilogue(Block{c_block, stride, rows, item.columns.size()}, row, half_width);
    }
  }
}

// Largest first, so that workers that pull items finish at about the same time.
inline void order_items(std::vector<Item>& items) {
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) {
    return a.rows.size() * a.columns.size() * a.sum.size() >
           b.rows.size() * b.columns.size() * b.sum.size();
  });
}

// The items of a product whose rows are grouped by `offsets`. Items have fewer rows
// where not every worker would get one otherwise. The split of rows does not change a result, but each
// item packs its B again.
inline std::vector<Item> items_by_rows(const GemmKernels& g, const int32_t* offsets,
                                       int32_t residents, int64_t columns, int32_t halves,
                                       int64_t sum) {
  const int64_t width = item_columns(g, columns, halves, sum);
  const int64_t share =
      offsets[residents] * ceil_div(columns, width) / (kItemsPerWorker * num_workers());
  const int64_t most = std::clamp(share, kFewestItemRows, kItemRows);
  std::vector<Item> items;
  for (int32_t e = 0; e < residents; ++e) {
    const int64_t begin = offsets[e], rows = offsets[e + 1] - begin;
    const int64_t parts = ceil_div(rows, most);  // of equal size
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t column = 0; column < columns; column += width)
        items.push_back({e,
                         {begin + rows * part / parts, begin + rows * (part + 1) / parts},
                         {column, std::min(column + width, columns)},
                         {0, sum}});
  }
  order_items(items);
  return items;
}

}  // namespace fomoe::cpu
