// ldmatrix, stmatrix and mma.sync: what a warp's lanes make of their registers together.
#include "../include/emulator_matrix.h"

#include <cstring>

#include "async.h"
#include "sanitizers.h"

namespace fomoe::emulator {

namespace {

struct Load {
  uint16_t row[8];  // read by the lane that names it, so that sanitizers see the access
  uint32_t* matrices;
  bool transposed;
  bool complete = false;  // the whole warp came
};

struct Store {
  const uint32_t* matrices;
  uint16_t row[8] = {};  // written by the lane that names it
  bool complete = false;
};

struct Multiply {
  float* c;
  const uint32_t* a;
  MatrixPair b;
  Unpack unpack;
  bool complete = false;
};

constexpr uint32_t kWholeWarp = ~0u;

void check_whole(bool complete, const char* name, Here here) {
  if (!complete) fail(here, "%s in divergent code: some lanes have left the kernel", name);
}

void exchange(void** payloads, uint32_t lanes) {
  if (lanes != kWholeWarp) return;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    auto* mine = static_cast<Load*>(payloads[lane]);
    mine->complete = true;
    const unsigned row = lane / 4, column = lane % 4 * 2;
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
      const auto element = [&](unsigned r, unsigned c) -> uint32_t {
        return static_cast<Load*>(payloads[matrix * 8 + r])->row[c];
      };
      mine->matrices[matrix] = mine->transposed
                                   ? element(column, row) | element(column + 1, row) << 16
                                   : element(row, column) | element(row, column + 1) << 16;
    }
  }
}

void gather_rows(void** payloads, uint32_t lanes) {
  if (lanes != kWholeWarp) return;
  const auto of = [&](unsigned lane) { return static_cast<Store*>(payloads[lane]); };
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    for (unsigned pair = 0; pair < 4; ++pair)
      std::memcpy(&of(lane)->row[2 * pair], &of(lane % 8 * 4 + pair)->matrices[lane / 8], 4);
    of(lane)->complete = true;
  }
}

void check_row(const char* name, const void* row, Here here) {
  if (uintptr_t(row) % 16 != 0) fail(here, "%s: row at %p is not aligned to 16", name, row);
  Unseen unseen;
  check_shared(name, row, 16, 16, here);
}

void multiply(void** payloads, uint32_t lanes) {
  if (lanes != kWholeWarp) return;
  float a[16][16], b[16][8], c[16][8];
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const auto* mine = static_cast<const Multiply*>(payloads[lane]);
    const unsigned row = lane / 4, column = lane % 4 * 2;
    for (unsigned i = 0; i < 4; ++i) {
      float pair[2];
      mine->unpack(mine->a[i], pair);
      std::memcpy(&a[row + 8 * (i & 1)][column + 8 * (i >> 1)], pair, sizeof pair);
    }
    for (unsigned i = 0; i < 2; ++i) {
      float pair[2];
      mine->unpack(i == 0 ? mine->b.left : mine->b.right, pair);
      b[8 * i + column][row] = pair[0];
      b[8 * i + column + 1][row] = pair[1];
    }
    std::memcpy(&c[row][column], mine->c, 8);
    std::memcpy(&c[row + 8][column], mine->c + 2, 8);
  }
  for (unsigned i = 0; i < 16; ++i)
    for (unsigned k = 0; k < 16; ++k)
      for (unsigned j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    auto* mine = static_cast<Multiply*>(payloads[lane]);
    mine->complete = true;
    const unsigned row = lane / 4, column = lane % 4 * 2;
    std::memcpy(mine->c, &c[row][column], 8);
    std::memcpy(mine->c + 2, &c[row + 8][column], 8);
  }
}

}  // namespace

void load_matrices(uint32_t (&matrices)[4], const void* row, bool transposed, Here here) {
  const char* name = transposed ? "ldmatrix.trans" : "ldmatrix";
  check_row("ldmatrix", row, here);
  Load mine{{}, matrices, transposed};
  if (__tsan_read_range) __tsan_read_range(const_cast<void*>(row), sizeof mine.row);
  {
    Unseen unseen;
    std::memcpy(mine.row, row, sizeof mine.row);
  }
  meet_warp(kWholeWarp, name, &mine, exchange, false, here);
  check_whole(mine.complete, name, here);
}

// Each lane writes its row when it goes on: others see it after a barrier.
void store_matrices(const uint32_t (&matrices)[4], void* row, Here here) {
  constexpr const char* kName = "stmatrix";
  check_row(kName, row, here);
  Store mine{matrices};
  meet_warp(kWholeWarp, kName, &mine, gather_rows, false, here);
  check_whole(mine.complete, kName, here);
  if (__tsan_write_range) __tsan_write_range(row, sizeof mine.row);
  Unseen unseen;
  std::memcpy(row, mine.row, sizeof mine.row);
}

void multiply_add(float (&c)[4], const uint32_t (&a)[4], MatrixPair b, Unpack unpack, Here here) {
  Multiply mine{c, a, b, unpack};
  meet_warp(kWholeWarp, "mma.sync", &mine, multiply, false, here);
  check_whole(mine.complete, "mma.sync", here);
}

}  // namespace fomoe::emulator
