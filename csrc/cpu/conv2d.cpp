#include "cpu/conv2d.h"

#include "cpu/conv2d_fill.h"
#include "cpu/conv2d_tile.h"
#include "cpu/epilogue_tile.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

// An implicit matrix product: rows are output pixels, whose k are the runs of the padded input that lie under the rows of
// the kernel. Threads own ranges of (group of panels, tile of pixels), so that one thread adds up a number, in the order
// of k. Where the panels of a group are too many for the cache, their k are taken in chunks, and the sums of a block of
// tiles wait in between.
namespace fastdiff {
namespace FASTDIFF_ISA {

constexpr int64_t kChunkBytes = 320 << 10;  // of panels that pass over a block of tiles, in 1 MB of L2
constexpr int kBlockTiles = 40;
constexpr int64_t kSerialSteps = 1 << 15;  // 4 bytes of a pixel times 16 columns: fewer are done sooner by one thread

template <class Kind>
struct Job {
  const Conv2d& c;
  Epilogue epilogue;
  Plane2d plane[2];
  const RowScale* scale[2];  // per sample, for codes
  int64_t panels, panel_bytes, pixels;
  int group_panels;
};

// Up to kGroupColumns columns: their scales, and what the sums of each segment start from.
struct Columns {
  alignas(64) float scale[kGroupColumns];
  alignas(64) int32_t start[2][kGroupColumns];
};

static void read_columns(Columns& g, const Conv2d& c, int64_t first) {
  memset(&g, 0, sizeof g);
  const int64_t count = at_most_i(kGroupColumns, c.outputs - first);
  if (c.weight_type != kInt8) return;
  memcpy(g.scale, c.weight_scale + first, size_t(count) * sizeof(float));
  for (int s = 0; s < c.segments; ++s)
    for (int64_t n = 0; n < count; ++n) g.start[s][n] = -kCodeOffset * c.weight_sum[s * c.outputs + first + n];
}

// The addresses of a tile's pixels; rows that the last tile lacks repeat its last pixel.
static void place(const Conv2d& c, const Plane2d& p, Tile& t, int rows) {
  int64_t x = t.first % c.out_width, y = t.first / c.out_width % c.out_height, sample = t.first / c.out_width / c.out_height;
  const char* from = nullptr;
  for (int i = 0; i < rows; ++i) {
    if (i < t.count) {
      from = p.base + (sample * p.height + y * c.stride) * p.line + x * c.stride * p.pitch;
      if (++x == c.out_width) {
        x = 0;
        sample += ++y == c.out_height;
        y = y == c.out_height ? 0 : y;
      }
    }
    t.row[i] = from;
  }
}

// Integer sums of a segment as its part of the result; `before` keeps that of the first of two segments.
template <class Kind>
static void scale_sums(const Job<Kind>& job, const Columns& g, const Tile& t, int segment, int ld, float* sums,
                       float* before) {
  const int64_t image = job.c.out_height * job.c.out_width;
  for (int i = 0; i < t.count; ++i) {
    const float scale = job.scale[segment][(t.first + i) / image].scale;
    for (int n = 0; n < ld; n += kFloats) {
      const int at = i * ld + n;
      const F32 y = load<F32>(sums + at) * scale * load<F32>(g.scale + n);
      if (job.c.segments == 1) {
        store(sums + at, y);
      } else if (segment == 0) {
        store(before + at, y);
      } else {
        store(sums + at, load<F32>(before + at) + y);
      }
    }
  }
}

// One chunk of k for the tiles of a block.
template <class Kind>
static void run_chunk(const Job<Kind>& job, const Columns& g, const Chunk& k, const char* panel, int64_t first_panel,
                      int panels, int64_t first_tile, int64_t tiles, int32_t (*sums)[kTileNumbers],
                      float (*before)[kTileNumbers]) {
  constexpr bool codes = Stored<Kind>::kType == kInt8;
  const int rows = rows_for<Kind>(job.group_panels), ld = panels * kPanel;
  const Plane2d& p = job.plane[k.segment];
  for (int64_t i = 0; i < tiles; ++i) {
    Tile t;
    t.first = (first_tile + i) * rows;
    t.count = int(at_most_i(rows, job.pixels - t.first));
    place(job.c, p, t, rows);
    multiply_tile<Kind>(job.group_panels, panels, t, p, k, panel, job.panel_bytes, g.start[k.segment], sums[i]);
    if (!k.ends) continue;
    if (codes) scale_sums(job, g, t, k.segment, ld, (float*)sums[i], before[i]);
    if (k.segment == job.c.segments - 1)
      write_tile(job.epilogue, (const float*)sums[i], ld, t.first, t.count, first_panel, panels);
  }
}

// Tiles [begin, end) of one group of panels.
template <class Kind>
static __attribute__((noinline)) void run_group(const Job<Kind>& job, int64_t group, int64_t begin, int64_t end) {
  constexpr bool codes = Stored<Kind>::kType == kInt8;
  const int64_t first_panel = group * job.group_panels;
  const int panels = int(at_most_i(job.group_panels, job.panels - first_panel));
  const char* weight = (const char*)job.c.weight + first_panel * job.panel_bytes;
  Columns g;
  read_columns(g, job.c, first_panel * kPanel);
  alignas(64) int32_t sums[kBlockTiles][kTileNumbers];
  alignas(64) float before[codes ? kBlockTiles : 1][kTileNumbers];
  for (int64_t block = begin; block < end; block += kBlockTiles) {
    int64_t done = 0;  // steps of the segments before
    for (int s = 0; s < job.c.segments; ++s) {
      const int64_t steps = job.plane[s].steps, chunks = (steps * kStep * panels + kChunkBytes - 1) / kChunkBytes;
      for (int64_t n = 0; n < chunks; ++n) {
        Chunk k{s, steps * n / chunks, steps * (n + 1) / chunks, n == 0, n == chunks - 1};
        if (!codes && s > 0) k.begins = false;  // floats of both segments are one sum
        if (!codes && s < job.c.segments - 1) k.ends = false;
        run_chunk(job, g, k, weight + (done + k.first) * kStep, first_panel, panels, block,
                  at_most_i(kBlockTiles, end - block), sums, before);
      }
      done += steps;
    }
  }
}

// Whether the tiles can read a segment as it is.
template <class Kind>
static bool is_ready(const Conv2d& c, const Conv2d::Segment& s) {
  const bool inside = c.left == 0 && c.top == 0 && (c.out_height - 1) * c.stride + c.kernel <= c.height &&
                      (c.out_width - 1) * c.stride + c.kernel <= c.width;
  return s.type == Stored<Kind>::kType && Stored<Kind>::kZero == 0 && c.upsample == 1 && inside &&
         s.channels * size_of(s.type) % 4 == 0;
}

template <class Kind>
static Plane2d describe(const Conv2d& c, const Conv2d::Segment& s) {
  Plane2d p;
  const bool ready = is_ready<Kind>(c, s);
  p.base = ready ? (const char*)s.data : nullptr;
  p.pitch = (s.channels * size_of(Stored<Kind>::kType) + 3) / 4 * 4;
  p.height = ready ? c.height : (c.out_height - 1) * c.stride + c.kernel;
  p.width = ready ? c.width : (c.out_width - 1) * c.stride + c.kernel;
  p.line = p.width * p.pitch;
  p.line_steps = c.kernel * p.pitch / 4;
  p.steps = c.kernel * p.line_steps;
  return p;
}

// Brings the input into scratch memory where the tiles cannot read it as it is.
template <class Kind>
static void prepare(Job<Kind>& job) {
  constexpr bool codes = Stored<Kind>::kType == kInt8;
  const Conv2d& c = job.c;
  int64_t bytes[2] = {}, total = 64;
  for (int s = 0; s < c.segments; ++s) {
    const Plane2d& p = job.plane[s] = describe<Kind>(c, c.segment[s]);
    job.panel_bytes += p.steps * kStep;
    bytes[s] = p.base ? 0 : (c.batch * p.height * p.line + 63) / 64 * 64;
    total += bytes[s];
  }
  char* scratch = (char*)workspace(2, size_t(total));
  RowScale* scale = (RowScale*)workspace(3, size_t(c.batch) * (2 * sizeof(RowScale) + kSpread * sizeof(float)));
  for (int s = 0; s < c.segments; ++s) {
    if (codes) find_scales(c, c.segment[s], scale + s * c.batch, (float*)(scale + 2 * c.batch));
    job.scale[s] = codes ? scale + s * c.batch : nullptr;
    if (job.plane[s].base) continue;
    job.plane[s].base = scratch;
    scratch += bytes[s];
    fill<Kind>(c, c.segment[s], job.plane[s], job.scale[s]);
  }
}

static Epilogue epilogue_of(const Conv2d& c) {
  Epilogue e{};
  e.columns = e.out_stride = e.residual_stride = c.outputs;
  e.bias = c.bias;
  e.shift = c.emb;
  e.shift_stride = c.emb_stride;
  e.rows_per_shift = c.out_height * c.out_width;
  e.residual = c.residual;
  e.residual_type = c.residual_type;
  e.out = c.out;
  e.out_type = c.out_type;
  e.out_scale = c.out_scale;
  return e;
}

template <class Kind>
static void run(const Conv2d& c) {
  Job<Kind> job{c, epilogue_of(c), {}, {}, (c.outputs + kPanel - 1) / kPanel, 0, c.batch * c.out_height * c.out_width, 0};
  if (job.pixels == 0) return;
  prepare(job);
  const int64_t groups = (job.panels + kMostPanels - 1) / kMostPanels;
  job.group_panels = int((job.panels + groups - 1) / groups);
  const int rows = rows_for<Kind>(job.group_panels);
  const int64_t tiles = (job.pixels + rows - 1) / rows;
  auto body = [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t first = begin % tiles, last = at_most_i(tiles, first + end - begin);
      run_group(job, begin / tiles, first, last);
      begin += last - first;
    }
  };
  parallel_for(groups * tiles, job.pixels * job.panels * (job.panel_bytes / kStep) < kSerialSteps, body);
}

void conv2d(const Conv2d& task) {
  if (task.weight_type == kInt8) return run<Codes>(task);
  if (task.weight_type == kBFloat16) return run<Brains>(task);
  run<Floats>(task);
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
