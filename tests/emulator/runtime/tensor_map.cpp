// Loads of boxes of a tensor by the async proxy (cp.async.bulk.tensor).
#include <cstring>

#include "../include/emulator_async.h"
#include "async.h"
#include "sanitizers.h"

namespace fomoe::emulator {
namespace {

constexpr int64_t kRowBytes = 128;  // the innermost dimension of a box
constexpr int64_t kChunkBytes = 16;
constexpr size_t kPatternBytes = 1024;

struct Box {
  TensorMap map;
  int64_t at[3];

  // Elements of a row that lie in the tensor: [first, first + count).
  int64_t first() const { return std::min(std::max<int64_t>(-at[0], 0), int64_t(map.box[0])); }
  int64_t count() const {
    const int64_t end = std::min<int64_t>(map.box[0], map.sizes[0] - at[0]);
    return std::max<int64_t>(end - first(), 0);
  }

  // Calls body(row of the box, its first element in the tensor), null for a row of zeros.
  template <class Body>
  void for_rows(const Body& body) const {
    for (int64_t plane = 0, row = 0; plane < map.box[2]; ++plane) {
      for (int64_t line = 0; line < map.box[1]; ++line, ++row) {
        const int64_t y = at[1] + line, z = at[2] + plane;
        const bool inside = y >= 0 && y < map.sizes[1] && z >= 0 && z < map.sizes[2] && count() > 0;
        body(row, inside ? map.base + z * map.strides[1] + y * map.strides[0] +
                               (at[0] + first()) * map.element_bytes
                         : nullptr);
      }
    }
  }

  size_t bytes() const { return size_t(kRowBytes * map.box[1] * map.box[2]); }
  size_t first_byte() const { return size_t(first() * map.element_bytes); }
  size_t row_bytes() const { return size_t(count() * map.element_bytes); }

  // Chunks of 16 bytes change places within a row: chunk c of row r stands at c ^ r % 8.
  void write(unsigned char* to) const {
    for_rows([&](int64_t row, const unsigned char* from) {
      unsigned char line[kRowBytes] = {};
      if (from != nullptr) std::memcpy(line + first_byte(), from, row_bytes());
      for (int64_t chunk = 0; chunk < kRowBytes / 16; ++chunk)
        std::memcpy(to + row * kRowBytes + (chunk ^ row % 8) * 16, line + chunk * 16, 16);
    });
  }
};

void check_map(const char* name, const TensorMap* map, Here here) {
  if (uintptr_t(map) % alignof(TensorMap) != 0 || map->magic != kTensorMapWord)
    fail(here, "%s: %p is not a tensor map", name, static_cast<const void*>(map));
}

// The box of a load, whose addresses are right.
Box box_of(const char* name, void* shared, const TensorMap* map, int c0, int c1, int c2,
           Here here) {
  Unseen unseen;
  check_map(name, map, here);
  const Box box{*map, {c0, c1, c2}};
  if (c0 * map->element_bytes % kChunkBytes != 0)
    fail(here, "%s: coordinate 0 must be a multiple of %d bytes, got %d elements of %d bytes", name,
         int(kChunkBytes), c0, int(map->element_bytes));
  check_shared(name, shared, box.bytes(), kPatternBytes, here);
  box.for_rows([&](int64_t, const unsigned char* from) {
    if (from != nullptr) check_global(name, from, box.row_bytes(), 1, here);
  });
  return box;
}

void load_box(const char* name, const Box& box, Block& block, void* shared, uint64_t* barrier,
              uint64_t access, Here here) {
  const auto announce_reads = [box] {
    box.for_rows([&](int64_t, const unsigned char* from) {
      if (from != nullptr) __tsan_read_range(const_cast<unsigned char*>(from), box.row_bytes());
    });
  };
  load_by_proxy(name,
                {block, shared, box.bytes(), [box](unsigned char* to) { box.write(to); },
                 announce_reads, access},
                barrier, here);
}

}  // namespace

void tensor_load(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2,
                 Here here) {
  constexpr const char* kName = "cp.async.bulk.tensor";
  const Box box = box_of(kName, shared, map, c0, c1, c2, here);
  load_box(kName, box, *self()->block, shared, barrier, 0, here);
}

void tensor_load_to_blocks(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1,
                           int c2, unsigned blocks, Here here) {
  constexpr const char* kName = "cp.async.bulk.tensor.multicast::cluster";
  const Box box = box_of(kName, shared, map, c0, c1, c2, here);
  const Cluster& cluster = *self()->block->cluster;
  if (blocks == 0) fail(here, "%s: to no block", kName);
  for (unsigned rank = 0; rank < 16; ++rank) {
    if ((blocks >> rank & 1) == 0) continue;
    auto* there = static_cast<uint64_t*>(remote_shared(barrier, rank, kName, here));
    void* to = remote_shared(shared, rank, kName, here);
    Block& block = *cluster.blocks[rank];
    uint64_t access;
    {
      Unseen unseen;
      access = reach(kName, block, here);
    }
    load_box(kName, box, block, to, there, access, here);
  }
}

void prefetch_tensor_map(const TensorMap* map, Here here) {
  check_map("prefetch.tensormap", map, here);
}

}  // namespace fomoe::emulator
