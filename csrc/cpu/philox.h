// The dropout masks of fastp2p/ops/philox.py: Philox4x32-10, keyed by the seed, counting elements.
#pragma once

#include "cpu/vector.h"

namespace fastp2p {

// The first of Philox4x32-10's four words for a counter (Salmon et al. 2011, table 2).
FASTP2P_INLINE uint32_t philox(uint32_t k0, uint32_t k1, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
#pragma GCC unroll 10  // or the loop over elements does not vectorise
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * c0, product1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return c0;
}

struct Dropout {
  double probability = 0;
  uint64_t seed = 0;
  uint32_t step = 0, layer = 0;

  // factors[i] = 0 where element + i is dropped, else 1 / (1 - probability); elements counted in NHWC order.
  template <typename A>
  FASTP2P_INLINE void factors(int64_t element, int64_t n, A* out) const {
    if (probability == 0) {
      std::fill(out, out + n, A{1});
      return;
    }
    const auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    const auto drop_below = static_cast<uint64_t>(std::nearbyint(probability * 4294967296.0));
    const A kept = static_cast<A>(1 / (1 - probability));
    for (int64_t i = 0; i < n; ++i) {
      const auto counter = static_cast<uint64_t>(element + i);
      const uint32_t word =
          philox(k0, k1, static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), step, layer);
      out[i] = word >= drop_below ? kept : A{0};
    }
  }
};

}  // namespace fastp2p
