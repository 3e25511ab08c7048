// The grouped expert GEMMs: expand, contract and their gradients, all by the driver in grouped.h.
#include <atomic>

#include "../huge_pages.h"
#include "grouped.h"

namespace fomoe::cpu {

namespace {

std::atomic<int64_t> rows_computed{0};

int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

char* at(void* base, DType dtype, int64_t element) {
  return static_cast<char*>(base) + element * size_of(dtype);
}
const char* at(const void* base, DType dtype, int64_t element) {
  return static_cast<const char*>(base) + element * size_of(dtype);
}
// Of a bias that may be null.
const char* bias_at(const void* bias, DType dtype, int64_t element) {
  return bias ? at(bias, dtype, element) : nullptr;
}

void expect_rows(void* out, DType dtype, int64_t rows, int64_t width) {
  prefer_huge_pages(out, rows * width * size_of(dtype));
}

template <class Epilogue>
void run_all(const GroupedProduct& p, const std::vector<Item>& items, Epilogue epilogue) {
  const GemmKernels& g = gemm_kernels();
  parallel_items(int64_t(items.size()), [&](int64_t i, int) {
    const Item& item = items[size_t(i)];
    run_item(g, p, item, [&](Block block, int64_t row, int64_t up_column) {
      epilogue(g, item, block, row, up_column);
    });
  });
}

}  // namespace

int64_t expand_rows_computed() { return rows_computed.load(); }

void expand(const ExpandArgs& args) {
  const int64_t n = args.expert_size;
  const int32_t halves = is_gated(args.activation) ? 2 : 1;
  const GroupedProduct p{.dtype = args.dtype,
                         .a = {args.x, args.hidden, args.token_of_row},
                         .a_by_rows = true,
                         .b = {args.weight, args.hidden, nullptr},
                         .b_by_columns = true,
                         .b_expert_bytes = halves * n * args.hidden * size_of(args.dtype),
                         .columns = n,
                         .halves = halves};
  const auto items =
      items_by_rows(gemm_kernels(), args.offsets, args.residents, n, halves, args.hidden);
  const int64_t rows = args.offsets[args.residents];
  expect_rows(args.act, args.dtype, rows, n);
  expect_rows(args.preact, args.dtype, rows, halves * n);
  run_all(p, items,
          [&](const GemmKernels& g, const Item& item, Block block, int64_t row, int64_t up_column) {
            const int64_t column = item.columns.begin;
            void* preact =
                args.preact ? at(args.preact, args.dtype, row * halves * n + column) : nullptr;
            g.activate(args.dtype, args.activation, block, up_column,
                       bias_at(args.bias, args.dtype, item.expert * halves * n + column),
                       at(args.act, args.dtype, row * n + column), n, preact);
            if (column == 0) rows_computed += block.rows;
          });
}

void contract(const ContractArgs& args) {
  const GroupedProduct p{.dtype = args.dtype,
                         .a = {args.act, args.expert_size, nullptr},
                         .a_by_rows = true,
                         .b = {args.weight, args.expert_size, nullptr},
                         .b_by_columns = true,
                         .b_expert_bytes = args.hidden * args.expert_size * size_of(args.dtype),
                         .columns = args.hidden,
                         .halves = 1};
  const auto items =
      items_by_rows(gemm_kernels(), args.offsets, args.residents, args.hidden, 1, args.expert_size);
  expect_rows(args.rows, args.dtype, args.offsets[args.residents], args.hidden);
  run_all(p, items, [&](const GemmKernels& g, const Item& item, Block block, int64_t row, int64_t) {
    const int64_t column = item.columns.begin;
    g.store(args.dtype, block, bias_at(args.bias, args.dtype, item.expert * args.hidden + column),
            at(args.rows, args.dtype, row * args.hidden + column), args.hidden);
  });
}

void grouped_rows(const GroupedRowsArgs& args) {
  const GroupedProduct p{.dtype = args.dtype,
                         .a = {args.rows_in, args.in, nullptr},
                         .a_by_rows = true,
                         .b = {args.weight, args.out, nullptr},
                         .b_by_columns = false,
                         .b_expert_bytes = args.in * args.out * size_of(args.dtype),
                         .columns = args.out,
                         .halves = 1};
  const auto items =
      items_by_rows(gemm_kernels(), args.offsets, args.residents, args.out, 1, args.in);
  expect_rows(args.rows_out, args.dtype, args.offsets[args.residents], args.out);
  run_all(p, items, [&](const GemmKernels& g, const Item& item, Block block, int64_t row, int64_t) {
    g.store(args.dtype, block, nullptr,
            at(args.rows_out, args.dtype, row * args.out + item.columns.begin), args.out);
  });
}

void contract_backward(const ContractBackwardArgs& args) {
  const int64_t n = args.expert_size;
  const int64_t preact_width = is_gated(args.activation) ? 2 * n : n;
  const GroupedProduct p{.dtype = args.dtype,
                         .a = {args.grad_y, args.hidden, args.token_of_row},
                         .a_by_rows = true,
                         .b = {args.weight, n, nullptr},
                         .b_by_columns = false,
                         .b_expert_bytes = args.hidden * n * size_of(args.dtype),
                         .columns = n,
                         .halves = 1};
  const auto items = items_by_rows(gemm_kernels(), args.offsets, args.residents, n, 1, args.hidden);
  // A weight's gradient is a sum over all columns of its row; column ranges of different items
  // leave partial sums, added in order below.
  const int64_t width = item_columns(gemm_kernels(), n, 1, args.hidden);
  const int64_t rows = args.offsets[args.residents], parts = ceil_div(n, width);
  expect_rows(args.grad_preact, args.dtype, rows, preact_width);
  expect_rows(args.scaled_act, args.dtype, rows, n);
  std::unique_ptr<float[]> partial(new float[size_t(std::max<int64_t>(rows * parts, 1))]);
  run_all(p, items, [&](const GemmKernels& g, const Item& item, Block block, int64_t row, int64_t) {
    thread_local Scratch scratch;
    float* weights = scratch.get(block.rows);
    for (int64_t i = 0; i < block.rows; ++i) weights[i] = args.weights[args.slot_of_row[row + i]];
    const int64_t column = item.columns.begin;
    const int64_t wide = row * preact_width + column, narrow = row * n + column;
    g.activate_backward(args.dtype, args.activation, block, at(args.preact, args.dtype, wide), n,
                        weights, at(args.grad_preact, args.dtype, wide),
                        at(args.scaled_act, args.dtype, narrow),
                        partial.get() + column / width * rows + row);
  });
  std::fill_n(args.grad_weights, args.slots, 0.0f);
  parallel_for(0, rows, args.bias ? 64 : 4096, [&](int64_t begin, int64_t end) {
    const GemmKernels& g = gemm_kernels();
    int32_t expert = 0;
    for (int64_t row = begin; row < end; ++row) {
      float total = 0;
      for (int64_t part = 0; part < parts; ++part) total += partial[size_t(part * rows + row)];
      if (args.bias) {
        while (args.offsets[expert + 1] <= row) ++expert;
        total +=
            g.dot(args.dtype, at(args.bias, args.dtype, expert * args.hidden),
                  at(args.grad_y, args.dtype, args.token_of_row[row] * args.hidden), args.hidden);
      }
      args.grad_weights[args.slot_of_row[row]] = total;
    }
  });
}

void weight_grad(const WeightGradArgs& args) {
  const GemmKernels& g = gemm_kernels();
  const GroupedProduct p{.dtype = args.dtype,
                         .a = {args.left, args.left_size, args.left_index},
                         .a_by_rows = false,
                         .b = {args.right, args.right_size, args.right_index},
                         .b_by_columns = false,
                         .b_expert_bytes = 0,
                         .columns = args.right_size,
                         .halves = 1};
  // A total has its pages already, and keeps what it has where an expert has no rows.
  if (!args.add)
    expect_rows(args.grad_weight, args.dtype, args.residents * args.left_size, args.right_size);
  const int64_t width = item_columns(g, args.right_size, 1, 0);
  std::vector<Item> items;
  for (int32_t e = 0; e < args.residents; ++e) {
    if (args.add && args.offsets[e] == args.offsets[e + 1]) continue;
    for (int64_t row = 0; row < args.left_size; row += kItemRows)
      for (int64_t column = 0; column < args.right_size; column += width)
        items.push_back({e,
                         {row, std::min(row + kItemRows, args.left_size)},
                         {column, std::min(column + width, args.right_size)},
                         {args.offsets[e], args.offsets[e + 1]}});
  }
  order_items(items);
  run_all(p, items,
          [&](const GemmKernels& kernels, const Item& item, Block block, int64_t row, int64_t) {
            const int64_t first =
                (item.expert * args.left_size + row) * args.right_size + item.columns.begin;
            if (args.add)
              kernels.add(block, static_cast<float*>(args.grad_weight) + first, args.right_size);
            else
              kernels.store(args.dtype, block, nullptr, at(args.grad_weight, args.dtype, first),
                            args.right_size);
          });
}

void bias_grad(const BiasGradArgs& args) {
  const GemmKernels& g = gemm_kernels();
  // Ranges of columns, narrow enough for every worker to have some.
  const int64_t share = args.residents * args.width / (kItemsPerWorker * num_workers());
  const int64_t width = std::clamp<int64_t>(round_up(share, 64), 64, 1024);
  const int64_t ranges = ceil_div(args.width, width);
  parallel_items(args.residents * ranges, [&](int64_t i, int) {
    thread_local Scratch scratch;
    const int64_t expert = i / ranges, column = i % ranges * width;
    const int64_t count = std::min(width, args.width - column);
    float* sum = scratch.get(width);
    std::fill_n(sum, width, 0.0f);
    for (int64_t row = args.offsets[expert]; row < args.offsets[expert + 1]; ++row) {
      const int64_t line = args.index ? args.index[row] : row;
      const float factor = args.weights ? args.weights[args.slot_of_row[row]] : 1.0f;
      g.add_scaled(args.dtype, at(args.in, args.dtype, line * args.width + column), factor, count,
                   sum);
    }
    g.store(args.dtype, Block{sum, width, 1, count}, nullptr,
            at(args.grad_bias, args.dtype, expert * args.width + column), args.width);
  });
}

void activation_backward(const ActivationBackwardArgs& args) {
  const GemmKernels& g = gemm_kernels();
  const int64_t n = args.expert_size, width = is_gated(args.activation) ? 2 * n : n;
  const int64_t padded = round_up(n, 16);
  parallel_for(0, args.offsets[args.residents], 64, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    float* gradient = scratch.get(padded);
    for (int64_t row = begin; row < end; ++row) {
      std::fill(gradient + n, gradient + padded, 0.0f);
      g.load(args.dtype, at(args.grad_act, args.dtype, row * n), n, gradient);
      g.activate_backward(args.dtype, args.activation, Block{gradient, padded, 1, n},
                          at(args.preact, args.dtype, row * width), n, nullptr,
                          at(args.grad_preact, args.dtype, row * width), nullptr, nullptr);
    }
  });
}

}  // namespace fomoe::cpu
