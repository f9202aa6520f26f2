#include "cpu/gram.h"

#include "cpu/fetch.h"
#include "cpu/parallel.h"

// The order of additions is part of the contract, so that bits depend on the operands only:
//   16 lanes; lane l of a block of 256 elements takes elements l, l + 16, ... in four chains, joined pairwise, in the
//   operands' precision; lanes are added up over the blocks of a chunk in float64, then joined pairwise; chunks follow
//   one another. Threads own whole chunks.
namespace fastdiff {
namespace FASTDIFF_ISA {

constexpr int kLanes = 16, kBlock = 256, kChains = 4;
// elements below which a second thread saves microseconds when idle and costs milliseconds on a busy machine
constexpr int64_t kSerial = 1 << 17;

template <class T>
struct Block {
  const T* v[kMaxOperands];
  alignas(64) T staged[kMaxOperands][kBlock];
};

// the 16 lane sums of a * b over a block, or of a where b is null
template <class T>
FASTDIFF_ALWAYS void add_block(double (&lanes)[kLanes], const T* a, const T* b) {
  using V = typename VectorOf<T>::V;
  constexpr int width = kBytes / sizeof(T);
  for (int part = 0; part < kLanes; part += width) {
    V chain[kChains] = {};
    for (int i = part; i < kBlock; i += kLanes * kChains)
      for (int c = 0; c < kChains; ++c) {
        const V value = load<V>(a + i + c * kLanes);
        chain[c] = chain[c] + (b ? value * load<V>(b + i + c * kLanes) : value);
      }
    const V sum = (chain[0] + chain[1]) + (chain[2] + chain[3]);
    T each[width];
    store(each, sum);
    for (int l = 0; l < width; ++l) lanes[part + l] = lanes[part + l] + double(each[l]);
  }
}

FASTDIFF_ALWAYS double join(double (&lanes)[kLanes]) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] = lanes[l] + lanes[l + half];
  return lanes[0];
}

template <class T>
FASTDIFF_ALWAYS void bring(Block<T>& block, const Gram& g, const Plane* planes, int64_t first, int64_t n) {
  for (int k = 0; k < g.count; ++k) {
    const Plane& p = planes[k];
    if (n == kBlock && p.type == kTypeOf<T> && is_flat(p, g.channels, g.elements)) {
      block.v[k] = (const T*)p.data + first;
      continue;
    }
    fetch(block.staged[k], p, first, n, g.elements);
    for (int64_t i = n; i < kBlock; ++i) block.staged[k][i] = T(0);
    block.v[k] = block.staged[k];
  }
}

template <class T>
static void run_chunk(const Gram& g, int64_t b, int64_t first, int64_t n, double* partial) {
  Plane planes[kMaxOperands];
  for (int k = 0; k < g.count; ++k) {
    const Gram::Operand& v = g.operand[k];
    planes[k] = {at(v.data, b * v.stride[0], v.type), v.stride[1], v.stride[2], v.type};
  }
  double lanes[kMaxProducts][kLanes] = {};
  Block<T> block;
  for (int64_t i = 0; i < n; i += kBlock) {
    bring(block, g, planes, first + i, n - i < kBlock ? n - i : kBlock);
    int product = 0;
    for (int k = 0; k < g.count; ++k) {
      for (int l = 0; l <= k; ++l) add_block(lanes[product++], block.v[k], block.v[l]);
      add_block<T>(lanes[product++], block.v[k], nullptr);
    }
  }
  for (int product = 0; product < g.count * (g.count + 3) / 2; ++product) partial[product] = join(lanes[product]);
}

static void join_chunks(const Gram& g, int64_t b, int64_t chunks) {
  const int n = g.count;
  double* out = g.out + b * n * (n + 1);
  int product = 0;
  for (int k = 0; k < n; ++k)
    for (int l = 0; l <= k + 1; ++l, ++product) {
      double total = 0;
      for (int64_t c = 0; c < chunks; ++c) total = total + g.partial[(b * chunks + c) * kMaxProducts + product];
      if (l > k) {
        out[k * (n + 1) + n] = total;
      } else {
        out[k * (n + 1) + l] = out[l * (n + 1) + k] = total;
      }
    }
}

void gram(const Gram& g) {
  const int64_t size = g.channels * g.elements, chunks = (size + kGramChunk - 1) / kGramChunk;
  bool wide = false;
  for (int k = 0; k < g.count; ++k) wide = wide || g.operand[k].type == kFloat64;
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / chunks, first = task % chunks * kGramChunk;
      const int64_t n = size - first < kGramChunk ? size - first : kGramChunk;
      double* partial = g.partial + task * kMaxProducts;
      if (wide) {
        run_chunk<double>(g, b, first, n, partial);
      } else {
        run_chunk<float>(g, b, first, n, partial);
      }
    }
  };
  parallel_for(g.batch * chunks, g.batch * size * g.count < kSerial, body);
  for (int64_t b = 0; b < g.batch; ++b) join_chunks(g, b, chunks);
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
