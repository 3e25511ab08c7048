// fomoe_ext._C: what this build is and what it found. It needs neither torch nor a GPU.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

#include "build_facts.h"
#include "cpu/features.h"
#include "cuda/experts_choice.h"

namespace py = pybind11;

namespace fomoe {
namespace {

py::object text_or_none(const std::string& text) {
  return text.empty() ? py::object(py::none()) : py::object(py::str(text));
}

py::list split(const std::string& text, char separator) {
  py::list parts;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(separator, begin), text.size());
    parts.append(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

py::dict build_facts() {
  py::dict facts;
  facts["torch"] = facts::kTorchVersion;
  facts["compiler"] = facts::kCompiler;
  facts["build_type"] = facts::kBuildType;
  facts["cuda"] = text_or_none(facts::kCudaVersion);
  facts["cuda_archs"] = split(facts::kCudaArchs, ';');
  facts["commit"] = facts::kCommit;
  return facts;
}

py::dict cpu_features() {
  py::dict features;
  features["found"] = cpu::isa_name(cpu::detected_isa());
  features["chosen"] = cpu::isa_name(cpu::chosen_isa());
  py::list available;
  for (int i = 0; i <= static_cast<int>(cpu::detected_isa()); ++i) {
    available.append(cpu::isa_name(static_cast<cpu::Isa>(i)));
  }
  features["available"] = available;
  return features;
}

// "gemm_avx2" -> gemm: [..., avx2]; a name without an instruction set counts as scalar, and so does
// the file beside it that only picks one.
py::dict cpu_kernels() {
  py::dict kernels;
  for (const char* const* file = facts::kCpuFiles; *file != nullptr; ++file) {
    std::string verb = *file;
    std::string isa = "scalar";
    for (int i = 0; i < cpu::kIsaCount; ++i) {
      const std::string name = cpu::isa_name(static_cast<cpu::Isa>(i));
      const std::string suffix = "_" + name;
      if (verb.ends_with(suffix)) {
        verb.resize(verb.size() - suffix.size());
        isa = name;
        break;
      }
    }
    if (!kernels.contains(verb)) kernels[py::str(verb)] = py::list();
    auto isas = kernels[py::str(verb)].cast<py::list>();
    if (!isas.contains(isa)) isas.append(isa);
  }
  return kernels;
}

py::list cuda_kernels() {
  py::list kernels;
  for (const char* const* file = facts::kCudaFiles; *file != nullptr; ++file) kernels.append(*file);
  return kernels;
}

const char* kernel_name(cuda::Kernel kernel) {
  switch (kernel) {
    case cuda::Kernel::multistage: return "multistage";
    case cuda::Kernel::ping_pong: return "ping_pong";
    case cuda::Kernel::cooperative: return "cooperative";
  }
  return "";
}

py::list expert_tiles() {
  py::list tiles;
  for (const cuda::Tile& tile : cuda::kTiles) {
    py::dict entry;
    entry["name"] = tile.name;
    entry["kernel"] = kernel_name(tile.kernel);
    entry["rows"] = kTileRows;
    entry["columns"] = tile.columns;
    tiles.append(entry);
  }
  return tiles;
}

// The index of `got` among names; std::invalid_argument (ValueError) for one that is not there.
template <size_t N>
int index_of(const char* argument, const std::string& got, const char* const (&names)[N]) {
  std::string wanted;
  for (size_t i = 0; i < N; ++i) {
    if (got == names[i]) return static_cast<int>(i);
    wanted += (i == 0 ? "" : ", ") + std::string(names[i]);
  }
  throw std::invalid_argument(std::string(argument) + ": got '" + got + "', wanted one of " +
                              wanted);
}

std::string expert_tile(const std::string& verb, const std::string& dtype, int64_t columns,
                        int64_t terms, bool hopper) {
  const char* const dtypes[] = {"float32", "bfloat16", "float16"};
  const auto which = static_cast<cuda::Verb>(index_of("verb", verb, cuda::kVerbNames));
  const auto type = static_cast<DType>(index_of("dtype", dtype, dtypes));
  return cuda::choose_tile(which, type, columns, terms, hopper).name;
}

}  // namespace
}  // namespace fomoe

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts and CPU features of fomoe_ext.";
  m.def("build_facts", &fomoe::build_facts,
        "dict: torch (version built against), compiler, build_type, cuda (version or None), "
        "cuda_archs (list), commit.");
  m.def("cpu_features", &fomoe::cpu_features,
        "dict: found and chosen (instruction set names), available (list, ascending). Raises "
        "RuntimeError when FOMOE_CPU_ISA asks for what is unknown or not there.");
  m.def("cpu_kernels", &fomoe::cpu_kernels,
        "dict: kernel file compiled into libfomoe_cpu.so -> list of its instruction sets.");
  m.def("cuda_kernels", &fomoe::cuda_kernels,
        "list: kernel files compiled into libfomoe_cuda.so, empty without CUDA.");
  m.def("expert_tiles", &fomoe::expert_tiles,
        "list of dict(name, kernel, rows, columns): the tiles that grouped GEMMs can run with.");
  m.def("expert_tile", &fomoe::expert_tile, py::arg("verb"), py::arg("dtype"), py::arg("columns"),
        py::arg("terms"), py::arg("hopper"),
        "str: the tile that a grouped GEMM runs with. verb: expand, contract, contract_backward, "
        "grouped_rows or weight_grad; dtype: float32, bfloat16 or float16; columns: of its sums "
        "(expand's gate and up columns both count); terms: of each sum, 0 where only the device "
        "knows "
        "(weight_grad); hopper: whether the device is one. "
        "FOMOE_EXPERTS_TILE overrides it where dtype and device allow. Raises ValueError for an "
        "unknown verb, dtype or tile.");
}
