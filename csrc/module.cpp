// fomoe_ext._C: what this build is and what it found. It needs neither torch nor a GPU.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

#include "build_facts.h"
#include "cpu/features.h"

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
}
