// The extension's module. Importing it loads the library, and with it each file's STABLE_TORCH_LIBRARY_IMPL registers
// its operator; the schemas are in fastp2p/ops/, once. The functions here are for fastp2p/ops/kernel_choices.py and the
// tuner.
#include <Python.h>

#include "cpu/choices.h"

namespace {

using fastp2p::Algorithm;
using fastp2p::Operation;
using fastp2p::Problem;
using torch::headeronly::ScalarType;

template <typename T>
struct Name {
  const char* name;
  T value;
};

constexpr Name<Algorithm> ALGORITHMS[] = {
    {"auto", Algorithm::AUTO}, {"gemm", Algorithm::GEMM}, {"direct", Algorithm::DIRECT}};
constexpr Name<Operation> OPERATIONS[] = {{"conv", Operation::CONV},
                                          {"conv_transpose", Operation::CONV_TRANSPOSE},
                                          {"conv_wgrad", Operation::CONV_WGRAD},
                                          {"conv_wgrad_adam", Operation::CONV_WGRAD_ADAM}};
constexpr Name<ScalarType> TYPES[] = {{"float32", ScalarType::Float},
                                      {"bfloat16", ScalarType::BFloat16},
                                      {"float16", ScalarType::Half},
                                      {"float64", ScalarType::Double}};

// The value of a name. Returns false, with a ValueError set, where there is none of that name.
template <typename T, size_t n>
bool look_up(const Name<T> (&names)[n], const char* name, T& value) {
  std::string expected;
  for (const Name<T>& known : names) {
    if (std::string(name) == known.name) {
      value = known.value;
      return true;
    }
    expected += (expected.empty() ? "'" : ", '") + std::string(known.name) + "'";
  }
  PyErr_Format(PyExc_ValueError, "got '%s', expected one of %s", name, expected.c_str());
  return false;
}

// Reads (operator, dtype, pixels, outer, outer2, inner, kernel_height, kernel_width, stride), and then an algorithm
// where one is wanted. Returns false, with an error set, where that is not so.
bool read_problem(PyObject* tuple, Problem& problem, Algorithm* algorithm) {
  const char *operation, *type, *choice = nullptr;
  long long sizes[7];
  if (!PyTuple_Check(tuple)) {
    PyErr_SetString(PyExc_TypeError, "expected a tuple");
    return false;
  }
  if (!PyArg_ParseTuple(tuple, algorithm ? "ssLLLLLLLs" : "ssLLLLLLL", &operation, &type, &sizes[0], &sizes[1],
                        &sizes[2], &sizes[3], &sizes[4], &sizes[5], &sizes[6], &choice)) {
    return false;
  }
  problem.pixels = sizes[0];
  problem.outer = sizes[1];
  problem.outer2 = sizes[2];
  problem.inner = sizes[3];
  problem.height = sizes[4];
  problem.width = sizes[5];
  problem.stride = sizes[6];
  return look_up(OPERATIONS, operation, problem.operation) && look_up(TYPES, type, problem.type) &&
         (algorithm == nullptr || look_up(ALGORITHMS, choice, *algorithm));
}

// The instruction set that the CPU kernels run with here.
const char* cpu_level() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  if (__builtin_cpu_supports("x86-64-v4")) return "CPU (x86-64-v4: AVX-512)";
  if (__builtin_cpu_supports("x86-64-v3")) return "CPU (x86-64-v3: AVX2)";
#endif
  return "CPU (the compiler's default instructions)";
}

PyObject* force_convolution(PyObject*, PyObject* args) {
  const char* name;
  if (!PyArg_ParseTuple(args, "s", &name)) return nullptr;
  if (!look_up(ALGORITHMS, name, fastp2p::forced_algorithm())) return nullptr;
  Py_RETURN_NONE;
}

PyObject* choose_convolutions(PyObject*, PyObject* args) {
  long long threads;
  PyObject* rows;
  if (!PyArg_ParseTuple(args, "LO", &threads, &rows)) return nullptr;
  PyObject* iterator = PyObject_GetIter(rows);
  if (iterator == nullptr) return nullptr;
  fastp2p::Choices choices;
  while (PyObject* row = PyIter_Next(iterator)) {
    auto& [problem, algorithm] = choices.emplace_back();
    const bool good = read_problem(row, problem, &algorithm);
    Py_DECREF(row);
    if (!good) break;
  }
  Py_DECREF(iterator);
  if (PyErr_Occurred() != nullptr) return nullptr;
  fastp2p::install_choices(threads, choices);
  Py_RETURN_NONE;
}

PyObject* forget_convolutions(PyObject*, PyObject*) {
  fastp2p::forget_choices();
  Py_RETURN_NONE;
}

PyObject* convolution_by_rule(PyObject*, PyObject* args) {
  Problem problem;
  if (!read_problem(args, problem, nullptr)) return nullptr;
  return PyUnicode_FromString(fastp2p::algorithm_by_rule(problem) == Algorithm::GEMM ? "gemm" : "direct");
}

PyMethodDef METHODS[] = {
    {"force_convolution", force_convolution, METH_VARARGS,
     "force_convolution(name): how conv, conv_transpose and conv_wgrad compute on the CPU, 'auto', 'gemm' or 'direct'; "
     "for tests and "
     "measurements"},
    {"choose_convolutions", choose_convolutions, METH_VARARGS,
     "choose_convolutions(threads, rows): with so many threads, each row's problem is computed by its last item, "
     "'gemm' "
     "or 'direct', and others by rule. A row is (operator, dtype, pixels, outer, outer2, inner, kernel_height, "
     "kernel_width, stride, algorithm)"},
    {"forget_convolutions", forget_convolutions, METH_NOARGS, "forget_convolutions(): undo choose_convolutions"},
    {"convolution_by_rule", convolution_by_rule, METH_VARARGS,
     "convolution_by_rule(operator, dtype, ..., stride): 'gemm' or 'direct', what serves where nothing was chosen"},
    {}};

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef definition = {.m_base = PyModuleDef_HEAD_INIT,
                                   .m_name = "_C",
                                   .m_doc = "fastp2p's C++ and CUDA kernels",
                                   .m_size = -1,
                                   .m_methods = METHODS};
  PyObject* module = PyModule_Create(&definition);
  std::string built_for = cpu_level();
#ifdef USE_CUDA
  built_for += " and CUDA";
#endif
  if (module != nullptr) PyModule_AddStringConstant(module, "BUILT_FOR", built_for.c_str());
  return module;
}
