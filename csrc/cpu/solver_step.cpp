#include "cpu/solver_step.h"

#include "cpu/noise.h"
#include "cpu/parallel.h"
#include "cpu/solver_step_tile.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

// columns of `coef`, as COEF in the contract
enum : int { kPredX, kPredM, kPredU = 5, kLow, kHigh, kNextX, kNextH, kNextRaw, kNextSlot, kNextNoise = 16,
             kNextU = 18, kNextOne, kScale };
enum : int { kSlotH, kSlotX, kStep0 };  // columns of `meta`

constexpr int64_t kChunk = 8192;               // elements of a task
constexpr int64_t kSegment = 512;              // elements staged at once
constexpr int64_t kSerial = 1 << 17;           // smaller problems stay on one thread: waking another can take milliseconds
constexpr int64_t kPastCaches = 16ll << 20;    // bytes of state from which stores bypass the caches

// One sample of the step: everything a segment needs, before it is known which elements.
template <class T>
class Sample {
 public:
  Sample(const SolverStep& step, int64_t b) : step_(step), b_(b), size_(step.channels * step.elements) {
    const int32_t row = step.rows[*step.tick * step.batch + b];
    coef_ = (const T*)step.coef + row * step.coef_stride[0];
    meta_ = step.meta + row * kMetaColumns;
    active_ = step.active[b];
    for (int j = 0; j < step.outputs; ++j) {
      const SolverStep::Output& m = step.output[j];
      const int64_t from = step.source ? step.source[j * step.batch + b] : b;
      outputs_[j] = {at(m.data, from * m.stride[0], m.type), m.stride[1], m.stride[2], m.type};
    }
  }

  // Elements [first, first + n). A whole number of tiles, or less than one: then nothing is touched past the end.
  void run(int64_t first, int64_t n) {
    constexpr int64_t tile = kVectors * kBytes / sizeof(T);
    const int64_t whole = n / tile * tile;
    for (int64_t done = 0; done < whole;) {
      const int64_t count = is_staged() && whole - done > kSegment ? kSegment : whole - done;
      Segment<T> s;
      fill(s, first + done, count, false);
      for (int64_t i = 0; i < count; i += tile) run_tile(s, i);
      done += count;
    }
    if (whole < n) run_rest(first + whole, n - whole);
  }

 private:
  static constexpr int kBuffers = 34;

  bool on(int column) const { return active_ >> column & 1; }

  bool is_staged() const {
    if (on(kNextNoise) || on(kNextNoise + 1)) return true;
    if (step_.coef_stride[2] || step_.coef_stride[3]) return true;
    for (int j = 0; j < step_.outputs; ++j)
      if (on(kPredM + j) && !is_direct(outputs_[j])) return true;
    return false;
  }

  bool is_direct(const Plane& p) const {
    const bool loadable = p.type == kTypeOf<T> || (sizeof(T) == 4 && p.type != kFloat64);
    return loadable && is_flat(p, step_.channels, step_.elements);
  }

  T* buffer(int64_t n) {
    T* start = scratch_ + used_;
    used_ += (n + 15) / 16 * 16;
    return start;
  }

  const void* bring(const Plane& p, int64_t first, int64_t n, bool force, int& type) {
    type = p.type;
    if (!force && is_direct(p)) return at(p.data, first, p.type);
    T* to = buffer(force ? kVectors * kBytes / int64_t(sizeof(T)) : n);
    fetch(to, p, first, n, step_.elements);
    type = kTypeOf<T>;
    return to;
  }

  Field<T> field(int column, int64_t first, int64_t n, bool force) {
    const T* k = coef_ + column * step_.coef_stride[1];
    const Plane plane{k, step_.coef_stride[2], step_.coef_stride[3], kTypeOf<T>};
    if (plane.stride_c == 0 && plane.stride_e == 0) return {k, 0};
    int type;
    return {(const T*)bring(plane, first, n, force, type), 1};
  }

  Field<T> used_field(int column, int64_t first, int64_t n, bool force) {
    return on(column) ? field(column, first, n, force) : Field<T>{nullptr, 0};
  }

  Term<T> term(int column, const Plane& p, int64_t first, int64_t n, bool force) {
    const Field<T> k = field(column, first, n, force);
    Term<T> t{k.k, k.k_step, nullptr, 0};
    t.v = bring(p, first, n, force, t.type);
    return t;
  }

  Term<T> noise(int which, int64_t first, int64_t n, bool force) {
    const int column = kNextNoise + which;
    const Field<T> k = field(column, first, n, force);
    float* z = (float*)buffer(n < 64 ? 64 : n);
    fill_noise(z, uint64_t(step_.seed[b_]), uint32_t(meta_[kStep0 + 2 * which]), uint32_t(meta_[kStep0 + 2 * which + 1]),
               first, n);
    // from the last element on, a double overwrites only floats that are already read
    if (sizeof(T) == 8)
      for (int64_t i = n - 1; i >= 0; --i) ((T*)z)[i] = T(z[i]);
    return {k.k, k.k_step, z, kTypeOf<T>};
  }

  Plane state(const void* base, int64_t slot) const {
    return {(const T*)base + (slot * step_.batch + b_) * size_, step_.elements, 1, kTypeOf<T>};
  }

  void fill(Segment<T>& s, int64_t first, int64_t n, bool force) {
    used_ = 0;
    fill_predict(s, first, n, force);
    fill_next(s, first, n, force);
    const bool large = size_ * step_.batch * int64_t(sizeof(T)) >= kPastCaches && !force;
    const int slot_h = meta_[kSlotH], slot_x = meta_[kSlotX];
    s.out = (T*)step_.x + b_ * size_ + first;
    s.out_x = slot_x >= 0 ? (T*)state(step_.history, slot_x).data + first : nullptr;
    s.out_h = slot_h >= 0 ? (T*)state(step_.history, slot_h).data + first : nullptr;
    s.out_input = (char*)step_.model_input + (b_ * size_ + first) * size_of(step_.input_type);
    s.input_type = step_.input_type;
    s.copies = step_.copies;
    s.copy_stride = step_.batch * size_ * size_of(step_.input_type);
    s.past_x = large && slot_x != slot_h && !is_read(slot_x) && is_aligned(s.out_x, 0);
    s.past_h = large && slot_x != slot_h && !is_read(slot_h) && is_aligned(s.out_h, 0);
    s.past_input = large && s.input_type == kTypeOf<T> && is_aligned(s.out_input, s.copies > 1 ? s.copy_stride : 0);
  }

  bool is_read(int slot) const { return slot >= 0 && on(kNextSlot + slot); }
  static bool is_aligned(const void* p, int64_t stride) { return ((uintptr_t)p | uintptr_t(stride)) % kBytes == 0; }

  void fill_predict(Segment<T>& s, int64_t first, int64_t n, bool force) {
    const Plane x = state(step_.x, 0);
    int type;
    s.x = (const T*)bring(x, first, n, force, type);
    s.predicts = 0;
    if (on(kPredX)) s.predict[s.predicts++] = {field(kPredX, first, n, force).k, k_step(), s.x, type};
    for (int j = 0; j < step_.outputs; ++j)
      if (on(kPredM + j)) s.predict[s.predicts++] = term(kPredM + j, outputs_[j], first, n, force);
    if (on(kPredU)) s.predict[s.predicts++] = term(kPredU, state(step_.aux, 0), first, n, force);
    const bool clamps = on(kLow) || on(kHigh);
    s.low = clamps ? field(kLow, first, n, force) : Field<T>{nullptr, 0};
    s.high = clamps ? field(kHigh, first, n, force) : Field<T>{nullptr, 0};
  }

  void fill_next(Segment<T>& s, int64_t first, int64_t n, bool force) {
    s.has_first = on(kNextX);
    if (s.has_first) s.first = {field(kNextX, first, n, force).k, k_step(), s.x, kTypeOf<T>};
    s.next_h = used_field(kNextH, first, n, force);
    s.next_raw = used_field(kNextRaw, first, n, force);
    s.rests = 0;
    for (int k = 0; k < step_.slots; ++k)
      if (on(kNextSlot + k)) s.rest[s.rests++] = term(kNextSlot + k, state(step_.history, k), first, n, force);
    for (int which = 0; which < 2; ++which)
      if (on(kNextNoise + which)) s.rest[s.rests++] = noise(which, first, n, force);
    if (on(kNextU)) s.rest[s.rests++] = term(kNextU, state(step_.aux, 0), first, n, force);
    s.next_one = used_field(kNextOne, first, n, force);
    s.scale = step_.copies ? used_field(kScale, first, n, force) : Field<T>{nullptr, 0};
  }

  int64_t k_step() const { return step_.coef_stride[2] || step_.coef_stride[3] ? 1 : 0; }

  // Less than a tile: through buffers, in and out.
  void run_rest(int64_t first, int64_t n) {
    constexpr int tile = kVectors * kBytes / sizeof(T);
    Segment<T> s;
    fill(s, first, n, true);
    alignas(64) T next[tile], saved[tile], h[tile];
    alignas(64) double input[tile];
    T *const out = s.out, *const out_x = s.out_x, *const out_h = s.out_h;
    char* const out_input = (char*)s.out_input;
    const int64_t copies = s.copies;
    s.out = next;
    s.out_x = out_x ? saved : nullptr;
    s.out_h = out_h ? h : nullptr;
    s.out_input = input;
    s.copies = 1;
    run_tile(s, 0);
    const size_t bytes = size_t(n) * sizeof(T);
    if (out_x) memcpy(out_x, saved, bytes);
    if (out_h) memcpy(out_h, h, bytes);
    memcpy(out, next, bytes);
    for (int64_t g = 0; s.scale.k && g < copies; ++g)
      memcpy(out_input + g * s.copy_stride, input, size_t(n * size_of(s.input_type)));
  }

  const SolverStep& step_;
  const int64_t b_, size_;
  const T* coef_;
  const int32_t* meta_;
  uint32_t active_;
  int64_t used_ = 0;
  Plane outputs_[kMaxOutputs];
  alignas(64) T scratch_[kBuffers * kSegment];
};

// Whether a column matters: some coefficient is not `neutral`.
template <class T>
static bool is_active(const SolverStep& step, const T* k, T neutral) {
  const int64_t *stride = step.coef_stride, channels = stride[2] ? step.channels : 1;
  const int64_t elements = stride[3] ? step.elements : 1;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t e = 0; e < elements; ++e)
      if (!(k[c * stride[2] + e * stride[3]] == neutral)) return true;
  return false;
}

template <class T>
static uint32_t active_columns(const SolverStep& step, int64_t b) {
  const int32_t row = step.rows[*step.tick * step.batch + b];
  if (row < 0) return 0;
  const T* coef = (const T*)step.coef + row * step.coef_stride[0];
  uint32_t active = 0;
  for (int column = 0; column < kCoefColumns; ++column) {
    const bool absent = (column >= kPredM + step.outputs && column < kPredU) ||
                        (column >= kNextSlot + step.slots && column < kNextNoise) ||
                        ((column == kPredU || column == kNextU) && !step.aux);
    const T neutral = column == kLow ? -T(__builtin_inf()) : column == kHigh ? T(__builtin_inf()) : T(0);
    if (!absent && is_active(step, coef + column * step.coef_stride[1], neutral)) active |= 1u << column;
  }
  return active;
}

// Whether some output lies element by element (channels_last): then all channels of a few elements go together.
static bool is_interleaved(const SolverStep& step) {
  for (int j = 0; j < step.outputs; ++j) {
    const int64_t* stride = step.output[j].stride;
    if (step.channels > 1 && step.elements > 1 && stride[2] > stride[1]) return true;
  }
  return false;
}

template <class T>
static void run_step(const SolverStep& step) {
  const bool interleaved = is_interleaved(step);
  const int64_t length = interleaved ? step.elements : step.channels * step.elements;
  int64_t chunk = interleaved ? kChunk / step.channels / 64 * 64 : kChunk;
  chunk = chunk < 64 ? 64 : chunk;
  const int64_t chunks = (length + chunk - 1) / chunk;
  auto find = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) step.active[b] = active_columns<T>(step, b);
  };
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / chunks, first = task % chunks * chunk;
      if (step.rows[*step.tick * step.batch + b] < 0) continue;
      const int64_t n = length - first < chunk ? length - first : chunk;
      Sample<T> sample(step, b);
      if (!interleaved) {
        sample.run(first, n);
      } else {
        for (int64_t c = 0; c < step.channels; ++c) sample.run(c * step.elements + first, n);
      }
    }
    _mm_sfence();
  };
  parallel_for(step.batch, step.coef_stride[3] == 0, find);
  parallel_for(step.batch * chunks, step.batch * step.channels * step.elements < kSerial, body);
}

void solver_step(const SolverStep& step) {
  if (step.state_type == kFloat64) {
    run_step<double>(step);
  } else {
    run_step<float>(step);
  }
  ++*step.tick;
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
