// What the twins of asynchronous instructions share: loads that report to an mbarrier, the async
// proxy's view of shared memory, checks of addresses. Internal to the runtime.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "scheduler.h"

namespace fomoe::emulator {

// Whether what was issued happens now, under the schedule of this launch.
bool lands_now();

void check_shared(const char* name, const void* p, size_t bytes, size_t alignment, Here here);
void check_global(const char* name, const void* p, size_t bytes, size_t alignment, Here here);

// A load into shared memory by the async proxy: `fill` writes it when it lands, and `barrier` then
// expects so many bytes fewer.
struct ProxyLoad {
  void* shared;
  size_t bytes;
  std::function<void(unsigned char*)> fill;
  std::function<void()> announce_reads;  // of global memory, to TSan
};
void load_by_proxy(const char* name, ProxyLoad load, uint64_t* barrier, Here here);

// What the async proxy sees at a place of shared memory: null where nothing is.
const unsigned char* proxy_sees(const void* p, size_t bytes);

// What instructions of warpgroups keep for a block (warpgroup.cpp).
struct Warpgroups;
std::shared_ptr<Warpgroups>& warpgroups_of(const Block& block);
std::string unfinished(const Warpgroups& warpgroups);

}  // namespace fomoe::emulator
