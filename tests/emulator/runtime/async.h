// What the twins of asynchronous instructions share: loads that report to an mbarrier, the async
// proxy's view of shared memory, checks of addresses. Internal to the runtime.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "scheduler.h"

namespace fomoe::emulator {

// Whether what was issued happens now, under the schedule of this launch.
bool lands_now();

bool is_shared(const void* p, size_t bytes);  // within one array
// The array of a block's shared memory that holds [p, p + bytes), or null.
const SharedArray* array_of(Block& block, const void* p, size_t bytes);
void check_shared(const char* name, const void* p, size_t bytes, size_t alignment, Here here);
void check_global(const char* name, const void* p, size_t bytes, size_t alignment, Here here);

// A load into a block's shared memory by the async proxy: `fill` writes it when it lands, and `barrier`,
// of the same block, then expects so many bytes fewer. access: its number, of other blocks' loads.
struct ProxyLoad {
  Block& block;
  void* shared;
  size_t bytes;
  std::function<void(unsigned char*)> fill;
  std::function<void()> announce_reads;  // of global memory, to TSan
  uint64_t access = 0;
};
void load_by_proxy(const char* name, ProxyLoad load, uint64_t* barrier, Here here);

// A block's shared memory as the async proxy sees it (proxy.cpp); arrays by their start.
struct ProxyView {
  std::map<const unsigned char*, std::vector<unsigned char>> shadows;
  std::map<const unsigned char*, std::vector<uint64_t>> landings;  // of each 16 bytes
  uint64_t fenced = 0;                 // landings that fences have shown it
  std::map<unsigned, uint32_t> lanes;  // by warp: who has fenced, but not yet all
  bool stale = false;                  // a fence has not reached the shadows yet
};
ProxyView& proxy_view(Block& block);

// What the async proxy sees at a place of shared memory: null where nothing is.
const unsigned char* proxy_sees(const void* p, size_t bytes);
// Bytes that it has written itself.
void write_by_proxy(Block& block, const unsigned char* shared, size_t bytes);
// 16 bytes that cp.async will write or has written: seen after a fence by who knows of the landing.
void hide_from_proxy(const unsigned char* chunk);
void number_landing(Block& block, const unsigned char* chunk, uint64_t number);

// The block of the running fiber's cluster that holds shared memory, for an instruction that reaches it.
Block& owner_of(const char* name, const void* p, size_t bytes, Here here);
// The number of an access to this block by the running fiber, 0 if it is its own. Fails if it has ended.
uint64_t reach(const char* name, Block& block, Here here);

// What instructions of warpgroups keep for a block (warpgroup.cpp).
struct Warpgroups;
std::shared_ptr<Warpgroups>& warpgroups_of(const Block& block);
std::string unfinished(const Warpgroups& warpgroups);

}  // namespace fomoe::emulator
