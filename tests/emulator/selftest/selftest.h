// How selftest.cu reaches the tests that stand in files of their own.
#pragma once

namespace fomoe::cuda {

constexpr int kUnknownTest = -1;
// Results come first, operands that a test makes for itself behind them.
constexpr int kOutBytes = 192 << 10;

// warpgroup.cu, arrivals.cu, clusters.cu: a cudaError_t, or kUnknownTest.
int warpgroup_selftest(const char* name, int defect, const void* in, void* out);
int arrivals_selftest(const char* name, int defect, const void* in, void* out);
int clusters_selftest(const char* name, int defect, const void* in, void* out);

}  // namespace fomoe::cuda
