// conv_wgrad_adam on the CPU. Where the gradient is a matrix product, it is made some rows at a time, in the dtype of
// the activations, and Adam reads them while they are in the cache: 24 bytes a weight and 2 for the low-precision copy,
// and nothing for a gradient. Where ATen's convolution makes it, whole, Adam reads it as it is, without a widened copy.
#include "checks.h"
#include "cpu/adam.h"
#include "cpu/conv_wgrad.h"
#include "cpu/operators.h"
#include "cpu/vector.h"

namespace fastp2p {
namespace {

// How many rows of the gradient to make at once: about 1 MB, which stays in a core's cache, but no fewer than there are
// pixels, since for each chunk the product reads all pixels and lays them out anew. Measured: benchmarks/NOTES.md.
int64_t rows_at_once(const WeightGradient& gradient) {
  constexpr int64_t CHUNK_BYTES = 1 << 20;
  const int64_t row_bytes = gradient.columns * static_cast<int64_t>(gradient.fields.element_size());
  return std::min(gradient.rows, std::max(CHUNK_BYTES / row_bytes, gradient.fields.size(0)));
}

// Where the rows of a weight lie: each in `parts` dense runs, of the kernel's rows where it is a slice of the taps.
struct WeightRows {
  int64_t row_stride, parts, part_stride, run;
};

// Nothing where a weight (O, C, KH, KW) is neither channels_last nor a slice [:, :, a:b, c:d] of one that is.
std::optional<WeightRows> weight_rows(const Tensor& weight) {
  const int64_t rows = weight.size(0), channels = weight.size(1), height = weight.size(2), width = weight.size(3);
  const int64_t run = width * channels;
  const int64_t part_stride = height > 1 ? weight.stride(2) : run;  // a stride over one element means nothing
  const int64_t row_stride = rows > 1 ? weight.stride(0) : height * part_stride;
  const bool dense = (channels == 1 || weight.stride(1) == 1) && (width == 1 || weight.stride(3) == channels);
  if (!dense || part_stride < run || row_stride < (height - 1) * part_stride + run) return std::nullopt;
  if (part_stride == run) return WeightRows{row_stride, 1, 0, height * run};
  return WeightRows{row_stride, height, part_stride, run};
}

bool operator==(const WeightRows& a, const WeightRows& b) {
  return std::tie(a.row_stride, a.part_stride, a.run) == std::tie(b.row_stride, b.part_stride, b.run);
}

// Updates rows of the weight from `first` on by as many of the gradient, (n, columns).
void update_rows(const AdamStep& step, const WeightRows& weight, int64_t first, const Tensor& grad) {
  const char* data = static_cast<const char*>(grad.data_ptr());
  const int64_t run_bytes = weight.run * static_cast<int64_t>(grad.element_size());
  const int64_t begin = first * weight.parts, end = begin + grad.size(0) * weight.parts;
  torch::stable::parallel_for(begin, end, std::max<int64_t>(1, GRAIN / weight.run), [&](int64_t from, int64_t to) {
    for (int64_t part = from; part < to; ++part) {
      const int64_t element = part / weight.parts * weight.row_stride + part % weight.parts * weight.part_stride;
      step.update(data + (part - begin) * run_bytes, grad.scalar_type(), weight.run, element, part * weight.run);
    }
  });
}

}  // namespace

void conv_wgrad_adam_cpu(Tensor outer, std::optional<Tensor> outer2, Tensor inner, Tensor param, Tensor exp_avg,
                         Tensor exp_avg_sq, Tensor lr, Tensor powers, double beta1, double beta2, double eps,
                         int64_t stride, int64_t padding, std::optional<Tensor> low_precision) {
  const char* operation = "conv_wgrad_adam";
  FASTP2P_CHECK(operation, param.dim() == 4, "got param ", describe(param), ", expected (O, C, KH, KW)");
  const Window window{param.size(2), param.size(3), stride, padding};
  check_outer_inner(operation, outer, outer2, inner, window);
  check_adam_types(operation, param, lr, powers, std::nullopt);
  const int64_t n_rows = outer.size(1) + (outer2 ? outer2->size(1) : 0);
  const auto check = [&](const char* name, const Tensor& t, ScalarType type) {
    check_tensor(operation, name, t, inner, {n_rows, inner.size(1), window.height, window.width}, type);
    const auto lies = weight_rows(t);
    FASTP2P_CHECK(operation, lies, "got ", name, " ", describe(t),
                  ", expected channels_last, or a slice of the taps of what is");
    return *lies;
  };
  const WeightRows rows = check("param", param, param.scalar_type());
  FASTP2P_CHECK(operation,
                check("exp_avg", exp_avg, param.scalar_type()) == rows &&
                    check("exp_avg_sq", exp_avg_sq, param.scalar_type()) == rows,
                "got param ", describe(param), ", exp_avg ", describe(exp_avg), ", exp_avg_sq ", describe(exp_avg_sq),
                ", expected all three of the same strides");
  if (low_precision) {
    check("low_precision", *low_precision, low_type(*low_precision));
    FASTP2P_CHECK(operation, weight_matrix(*low_precision), "got low_precision ", describe(*low_precision),
                  ", expected channels_last, without gaps");
  }

  const AdamStep step(param, exp_avg, exp_avg_sq, lr, powers, beta1, beta2, eps, low_precision, std::nullopt);
  const WeightGradient gradient = weight_gradient(Operation::CONV_WGRAD_ADAM, outer, outer2, inner, window);
  const auto update = [&](int64_t first, const Tensor& grad) {
    const bool fits = grad_type_fits(gradient.type, param.scalar_type());
    update_rows(step, rows, first, fits ? grad : torch::stable::to(grad, param.scalar_type()));
  };
  if (gradient.whole) return update(0, *weight_matrix(*gradient.whole));
  const int64_t n = rows_at_once(gradient), chunks = (gradient.rows + n - 1) / n;
  const auto work = [&](int64_t begin, int64_t end) {
    Tensor buffer = empty(inner, {n, gradient.columns}, gradient.type);
    for (int64_t first = begin * n; first < std::min(end * n, gradient.rows); first += n) {
      const Tensor grad = torch::stable::narrow(buffer, 0, 0, std::min(n, gradient.rows - first));
      gradient.multiply_rows(first, grad);
      update(first, grad);
    }
  };
  // A thread's chunks stay in its own cache, and nobody waits at their ends; threads without one would be idle.
  if (chunks < torch::stable::get_num_threads()) return work(0, chunks);
  torch::stable::parallel_for(0, chunks, 1, work);
}

}  // namespace fastp2p

STABLE_TORCH_LIBRARY_IMPL(fastp2p, CPU, m) { m.impl("conv_wgrad_adam", TORCH_BOX(&fastp2p::conv_wgrad_adam_cpu)); }
