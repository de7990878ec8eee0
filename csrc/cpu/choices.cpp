#include "cpu/choices.h"

#include <map>
#include <mutex>
#include <shared_mutex>

namespace fastp2p {
namespace {

using Table = std::map<Problem::Key, Algorithm>;

std::shared_mutex mutex;
std::map<int64_t, Table> tables;  // by the number of threads

std::optional<Algorithm> find(int64_t threads, const Problem& problem) {
  const std::shared_lock lock(mutex);
  const auto table = tables.find(threads);
  if (table == tables.end()) return std::nullopt;
  const auto choice = table->second.find(problem.key());
  return choice == table->second.end() ? std::nullopt : std::optional(choice->second);
}

}  // namespace

Algorithm& forced_algorithm() {
  static Algorithm algorithm = Algorithm::AUTO;
  return algorithm;
}

Algorithm algorithm_by_rule(const Problem& problem) {
  // Measured for every layer of unet_256 and the PatchGAN at batch 1 and 4, with weights that are not in the cache:
  // benchmarks/cpu_convolution.py, figures in NOTES.md. The sum over the layers is within 5 % of the better of the two.
  // float16 and float64, which nobody trains with on a CPU, go by float's figures.
  const bool bfloat16 = problem.type == ScalarType::BFloat16;
  const auto by_gemm = [&] {
    switch (problem.operation) {
      case Operation::CONV: return problem.pixels <= (bfloat16 ? 256 : 64);
      case Operation::CONV_TRANSPOSE: return problem.pixels <= (bfloat16 ? 256 : 64) || problem.inner <= 3;
      default: return problem.pixels <= (bfloat16 ? 1024 : 512);
    }
  };
  return by_gemm() ? Algorithm::GEMM : Algorithm::DIRECT;
}

bool prefers_gemm(const Problem& problem) {
  if (forced_algorithm() != Algorithm::AUTO) return forced_algorithm() == Algorithm::GEMM;
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  return find(threads, problem).value_or(algorithm_by_rule(problem)) == Algorithm::GEMM;
}

void install_choices(int64_t threads, const Choices& choices) {
  Table table;
  for (const auto& [problem, algorithm] : choices) table[problem.key()] = algorithm;
  const std::unique_lock lock(mutex);
  tables[threads] = std::move(table);
}

void forget_choices() {
  const std::unique_lock lock(mutex);
  tables.clear();
}

}  // namespace fastp2p
