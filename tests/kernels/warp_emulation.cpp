// The CUDA kernel on the emulated warp, with the signature of the CPU library's function.

#include "warp_emulation.h"

#include "upsample_argmax.cu"

extern "C" int32_t emulated_upsample_argmax(const float* logits, int32_t classes, int32_t height,
                                            int32_t width, uint8_t* class_map, uint8_t* confidence,
                                            int32_t target_height, int32_t target_width,
                                            int32_t flags, int32_t blocks) {
  using namespace edgeseg;
  if (!is_side(height) || !is_side(width)) return 1;
  const bool align_corners = (flags & kAlignCorners) != 0;
  const UpsampleArgmax job = {logits,
                              classes,
                              class_map,
                              confidence,
                              {height, target_height, align_corners},
                              {width, target_width, align_corners},
                              (flags & kNoShortCut) == 0};
  warp_emulation::launch(static_cast<unsigned>(blocks), [&] { upsample_argmax_kernel(job); });
  return 0;
}
