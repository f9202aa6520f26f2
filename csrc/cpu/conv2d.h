#pragma once
#include <cstdint>

#include "cpu/dispatch.h"

namespace fastdiff {

// The arguments of fastdiff/ops/conv2d.py and conv2d_w8a8.py; images are [batch, height, width, channels].
struct Conv2d {
  struct Segment {
    const void* data;
    int type;
    int64_t channels;
    const float* scale;  // int8 weights only: [scales], or null for one per sample from its largest magnitude
    int64_t scales;      // 1 or batch
  };
  Segment segment[2];
  int segments;
  const void* weight;  // packed; each segment's k are [kernel row][kernel column][channel, padded to 4 bytes]
  int weight_type;
  const float* weight_scale;  // [outputs], int8 only
  const int32_t* weight_sum;  // [segments, kernel * kernel, outputs], int8 only
  int64_t batch, height, width, out_height, out_width, outputs;
  int64_t kernel, stride, left, top, upsample;
  void* out;  // [batch, out_height, out_width, outputs]
  int out_type;
  const float* out_scale;  // [1], for int8 results
  const float* bias;       // [outputs] or null
  const float* emb;        // [batch, outputs] or null
  int64_t emb_stride;
  const void* residual;  // like out, or null
  int residual_type;
};

FASTDIFF_KERNEL(conv2d, (const Conv2d& task), task)

}  // namespace fastdiff
