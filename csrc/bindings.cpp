// The extension's module. Importing it loads the library, and with it each file's STABLE_TORCH_LIBRARY_IMPL registers
// its operator; the schemas are in fastp2p/ops/, once.
#include <Python.h>

#include "cpu/convolution.h"

namespace {

// The instruction set that the CPU kernels run with here.
const char* cpu_level() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  if (__builtin_cpu_supports("x86-64-v4")) return "CPU (x86-64-v4: AVX-512)";
  if (__builtin_cpu_supports("x86-64-v3")) return "CPU (x86-64-v3: AVX2)";
#endif
  return "CPU (the compiler's default instructions)";
}

PyObject* force_convolution(PyObject*, PyObject* name) {
  using fastp2p::Algorithm;
  const std::pair<const char*, Algorithm> algorithms[] = {
      {"auto", Algorithm::AUTO}, {"gemm", Algorithm::GEMM}, {"direct", Algorithm::DIRECT}};
  for (const auto& [known, algorithm] : algorithms) {
    if (!PyUnicode_Check(name) || PyUnicode_CompareWithASCIIString(name, known) != 0) continue;
    fastp2p::forced_algorithm() = algorithm;
    Py_RETURN_NONE;
  }
  PyErr_Format(PyExc_ValueError, "force_convolution: got %R, expected 'auto', 'gemm' or 'direct'", name);
  return nullptr;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyMethodDef methods[] = {
      {"force_convolution", force_convolution, METH_O,
       "force_convolution(name): how down, up and wgrad compute on the CPU, 'auto', 'gemm' or 'direct'; for tests and "
       "measurements"},
      {}};
  static PyModuleDef definition = {.m_base = PyModuleDef_HEAD_INIT,
                                   .m_name = "_C",
                                   .m_doc = "fastp2p's C++ and CUDA kernels",
                                   .m_size = -1,
                                   .m_methods = methods};
  PyObject* module = PyModule_Create(&definition);
  std::string built_for = cpu_level();
#ifdef USE_CUDA
  built_for += " and CUDA";
#endif
  if (module != nullptr) PyModule_AddStringConstant(module, "BUILT_FOR", built_for.c_str());
  return module;
}
