#include "cpu/conv2d.h"

#include "cpu/conv2d_fill.h"
#include "cpu/conv2d_narrow.h"
#include "cpu/conv2d_tile.h"
#include "cpu/conv2d_write.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

// An implicit matrix product: rows are output pixels, whose k are the runs of the padded input that lie under the rows of
// the kernel. Threads own ranges of tiles of pixels, or of tiles and groups of panels, so that one thread adds up a
// number, in the order of k. Where the panels of a group are too many for the cache, their k are taken in chunks, and the
// sums of a block of tiles wait in between.
namespace fastdiff {
namespace FASTDIFF_ISA {
namespace convolution {

constexpr int64_t kChunkBytes = 320 << 10;  // of panels that pass over a block of tiles, in 1 MB of L2
constexpr int kBlockTiles = 40;
// Threads share the pixels, and write them whole, where they can all read light weights again for every block: 4 % less
// time than sharing groups for 320 to 320 channels at 2 x 64^2. Heavy weights are read once, by the thread of their group.
constexpr int64_t kLightWeights = 4 << 20, kManyPixels = 1536;
constexpr int64_t kSerialSteps = 1 << 15;  // 4 bytes of a pixel times 16 columns: fewer are done sooner by one thread

template <class Kind>
struct Job {
  const Conv2d& c;
  WritePixels* write;
  Areas areas;
  Plane2d plane[2];
  const RowScale* scale[2];  // per sample, for codes
  int64_t panels, panel_bytes;
  int group_panels;
};

// A group's panels, the scales of its columns, and what the sums of each segment and area begin with.
struct Group {
  const char* weight;
  int64_t first_panel;
  int panels;
  alignas(64) float scale[kGroupColumns];
  alignas(64) int32_t start[2][kMostBands * kMostBands][kGroupColumns];
};

// Unsigned codes are 128 too large, which is taken off the sums: 128 times the weights of the taps in an area.
static void read_starts(Group& g, const Conv2d& c, const Areas& areas) {
  const int64_t first = g.first_panel * kPanel, count = at_most_i(g.panels * kPanel, c.outputs - first);
  for (int s = 0; s < c.segments; ++s)
    for (int a = 0; a < areas.count; ++a) {
      const Band &y = areas.area[a].y, &x = areas.area[a].x;
      for (int64_t tap = y.tap * c.kernel; tap < (y.tap + y.taps) * c.kernel; ++tap) {
        if (tap % c.kernel < x.tap || tap % c.kernel >= x.tap + x.taps) continue;
        const int32_t* sum = c.weight_sum + (s * c.kernel * c.kernel + tap) * c.outputs + first;
        for (int64_t n = 0; n < count; ++n) g.start[s][a][n] -= kCodeOffset * sum[n];
      }
    }
}

template <class Kind>
static void read_group(Group& g, const Job<Kind>& job, int64_t group) {
  g.first_panel = group * job.group_panels;
  g.panels = int(at_most_i(job.group_panels, job.panels - g.first_panel));
  g.weight = (const char*)job.c.weight + g.first_panel * job.panel_bytes;
  memset(g.scale, 0, sizeof g.scale);
  for (int s = 0; s < job.c.segments; ++s)
    memset(g.start[s], 0, size_t(job.areas.count) * kGroupColumns * sizeof(int32_t));
  if (Stored<Kind>::kType != kInt8) return;
  const int64_t first = g.first_panel * kPanel;
  memcpy(g.scale, job.c.weight_scale + first, size_t(at_most_i(kGroupColumns, job.c.outputs - first)) * sizeof(float));
  if (kCodeOffset) read_starts(g, job.c, job.areas);
}

// Tile `index` of an area: its pixels are counted row by row, sample by sample.
static void set_tile(Tile& t, const Area& area, int64_t index, int rows) {
  const int64_t first = index * rows;
  int64_t x = first % area.x.count, y = first / area.x.count % area.y.count, sample = first / area.x.count / area.y.count;
  t.area = &area;
  t.count = int(at_most_i(rows, area.pixels - first));
  t.rows = last_rows(rows, t.count);
  for (int i = 0; i < t.count; ++i) {
    t.pixel[i] = {sample, area.y.first + y, area.x.first + x};
    if (++x < area.x.count) continue;
    x = 0;
    if (++y < area.y.count) continue;
    y = 0;
    ++sample;
  }
}

// A block of tiles times the panels of a group.
template <class Kind>
static void run_block(const Job<Kind>& job, const Group& g, const Tile* tile, int tiles) {
  constexpr bool codes = Stored<Kind>::kType == kInt8;
  alignas(64) int32_t sums[kBlockTiles][kTileNumbers];
  alignas(64) float before[codes ? kBlockTiles : 1][kTileNumbers];
  Right right{g.weight, job.panel_bytes, job.group_panels, g.panels, nullptr};
  for (int s = 0; s < job.c.segments; ++s) {
    const Plane2d& p = job.plane[s];
    const bool last = s == job.c.segments - 1;
    const int64_t chunks = (p.steps * kStep * g.panels + kChunkBytes - 1) / kChunkBytes;
    for (int64_t n = 0; n < chunks; ++n) {
      // floats of both segments are one sum
      const Chunk k{s, p.steps * n / chunks, p.steps * (n + 1) / chunks, n == 0 && (codes || s == 0),
                    n == chunks - 1 && (codes || last)};
      for (int i = 0; i < tiles; ++i) {
        right.start = g.start[s][tile[i].area - job.areas.area];
        if (last && n == chunks - 1) fetch_places(job.c, tile[i], g.first_panel, g.panels);
        multiply_tile<Kind>(tile[i], p, job.c.stride, k, right, sums[i]);
        if (!k.ends) continue;
        const Scales scales{codes ? job.scale[s] : nullptr, g.scale};
        if (last) {
          const float* first = codes && s ? before[i] : nullptr;
          job.write(job.c, scales, tile[i], (const float*)sums[i], first, g.first_panel, g.panels);
        } else {
          scale_sums(scales, tile[i], (const float*)sums[i], before[i], g.panels * kPanel);
        }
      }
    }
    right.panel += p.steps * kStep;
  }
}

// A block of tiles times the panels of some groups.
template <class Kind>
static __attribute__((noinline)) void run_groups(const Job<Kind>& job, int64_t first, int64_t last, const Tile* tile,
                                                 int tiles) {
  Group g;
  for (int64_t n = first; n < last; ++n) {
    read_group(g, job, n);
    run_block(job, g, tile, tiles);
  }
}

// The tiles whose costs begin in [begin, end), block by block, times the panels of groups [first, last).
template <class Kind>
static void run_tiles(const Job<Kind>& job, int64_t first, int64_t last, int64_t begin, int64_t end) {
  Tile tile[kBlockTiles];
  int tiles = 0;
  for (int a = 0; a < job.areas.count; ++a) {
    const Area& area = job.areas.area[a];
    int64_t i = begin > area.first_cost ? (begin - area.first_cost + area.cost - 1) / area.cost : 0;
    for (; i < area.tiles && area.first_cost + i * area.cost < end; ++i) {
      set_tile(tile[tiles++], area, i, rows_for<Kind>(job.group_panels));
      if (tiles < kBlockTiles) continue;
      run_groups(job, first, last, tile, tiles);
      tiles = 0;
    }
  }
  if (tiles) run_groups(job, first, last, tile, tiles);
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

template <class Kind>
static void run(const Conv2d& c) {
  if (c.batch == 0) return;
  Job<Kind> job{c, pixel_writer<Stored<Kind>::kType == kInt8>(c.out_type), {}, {}, {}, (c.outputs + kPanel - 1) / kPanel, 0, 0};
  prepare(job);
  const int64_t groups = (job.panels + kMostPanels - 1) / kMostPanels;
  job.group_panels = int((job.panels + groups - 1) / groups);
  find_areas(job.areas, c, rows_for<Kind>(job.group_panels));
  const int64_t cost = job.areas.cost, pixels = c.batch * c.out_height * c.out_width;
  const bool by_pixels = job.panels * job.panel_bytes <= kLightWeights && pixels >= kManyPixels;
  auto body = [&](int64_t begin, int64_t end) {
    if (by_pixels) return run_tiles(job, 0, groups, begin / groups, end / groups);
    while (begin < end) {
      const int64_t first = begin % cost, last = at_most_i(cost, first + end - begin);
      run_tiles(job, begin / cost, begin / cost + 1, first, last);
      begin += last - first;
    }
  };
  const int64_t steps = pixels * job.panels * (job.panel_bytes / kStep);
  parallel_for(groups * cost, steps < kSerialSteps, body);
}

}  // namespace convolution

void conv2d(const Conv2d& task) {
  if (convolution::is_narrow(task)) return convolution::run_narrow(task);
  if (task.weight_type == kInt8) return convolution::run<Codes>(task);
  if (task.weight_type == kBFloat16) return convolution::run<Brains>(task);
  convolution::run<Floats>(task);
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
