// Runs one self-test as a program, for sanitizers: main NAME DEFECT. Input numbers are 0, 1, 2 ...
// times an odd constant. Prints the output's words in hexadecimal; status 1 when the launch fails.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

extern "C" int fomoe_selftest(const char* name, int defect, const void* in, void* out);

int main(int count, char** arguments) {
  if (count != 3) return 2;
  constexpr size_t kWords = 1024;
  // Aligned as device memory is.
  auto* in = static_cast<uint32_t*>(std::aligned_alloc(256, 4 * kWords));
  auto* out = static_cast<uint32_t*>(std::aligned_alloc(256, 4 * kWords));
  for (size_t i = 0; i < kWords; ++i) {
    in[i] = uint32_t(i) * 2654435761u;
    out[i] = 0;
  }
  const int error = fomoe_selftest(arguments[1], std::atoi(arguments[2]), in, out);
  for (size_t i = 0; i < kWords; ++i) std::printf("%08x\n", out[i]);
  std::free(in);
  std::free(out);
  return error == 0 ? 0 : 1;
}
