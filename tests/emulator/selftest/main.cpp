// Runs one self-test as a program, for sanitizers: main NAME DEFECT WORDS. Input numbers are 0, 1, 2 ...
// times an odd constant. Prints the first WORDS words of the output in hexadecimal; status 1 when the
// launch fails.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "selftest.h"

extern "C" int fomoe_selftest(const char* name, int defect, const void* in, void* out);

int main(int count, char** arguments) {
  if (count != 4) return 2;
  constexpr size_t kInWords = 1024, kOutBytes = fomoe::cuda::kOutBytes;
  // Aligned as device memory is.
  auto* in = static_cast<uint32_t*>(std::aligned_alloc(256, 4 * kInWords));
  auto* out = static_cast<uint32_t*>(std::aligned_alloc(256, kOutBytes));
  for (size_t i = 0; i < kInWords; ++i) in[i] = uint32_t(i) * 2654435761u;
  std::memset(out, 0, kOutBytes);
  const int error = fomoe_selftest(arguments[1], std::atoi(arguments[2]), in, out);
  const size_t words = size_t(std::atoi(arguments[3]));
  for (size_t i = 0; i < words && i < kOutBytes / 4; ++i) std::printf("%08x\n", out[i]);
  std::free(in);
  std::free(out);
  return error == 0 ? 0 : 1;
}
