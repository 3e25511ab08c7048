#include "workspace.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <stdexcept>
#include <utility>

#include "huge_pages.h"

namespace fomoe::cpu {
namespace {

std::mutex g_mutex;
char* g_kept = nullptr;
int64_t g_kept_bytes = 0;

}  // namespace

Workspace::Workspace(int64_t bytes) : asked_(bytes) {
  {
    const std::lock_guard<std::mutex> lock(g_mutex);
    data_ = std::exchange(g_kept, nullptr);
    capacity_ = std::exchange(g_kept_bytes, 0);
  }
  if (capacity_ < bytes) {
    std::free(data_);
    constexpr int64_t kAlign = int64_t(2) << 20;
    capacity_ = (bytes + kAlign - 1) / kAlign * kAlign;
    data_ = static_cast<char*>(std::aligned_alloc(kAlign, size_t(capacity_)));
    if (!data_) throw std::bad_alloc();
    prefer_huge_pages(data_, capacity_);
  }
}

void* Workspace::take(int64_t bytes) {
  void* taken = data_ + taken_;
  taken_ += padded(bytes);
  if (taken_ > asked_) throw std::logic_error("a workspace is smaller than what is taken from it");
  return taken;
}

Workspace::~Workspace() {
  {
    const std::lock_guard<std::mutex> lock(g_mutex);
    if (g_kept_bytes < capacity_) {
      std::swap(g_kept, data_);
      std::swap(g_kept_bytes, capacity_);
    }
  }
  std::free(data_);
}

}  // namespace fomoe::cpu
