// The CUDA library's interface: what a TensorRT plugin, the engine and the GPU tests call.
//
// Every function takes device pointers and a stream (a cudaStream_t), queues its work, and returns
// a cudaError_t: 0 once the work is queued, cudaErrorInvalidValue for an argument outside its
// bounds. None allocates, none waits. Structs are read before the function returns. Strides and
// pitches are in elements of the tensor they belong to; a pitch of bytes says so.

#ifndef EDGESEG_LAUNCHERS_H_
#define EDGESEG_LAUNCHERS_H_

#include <stdint.h>

#define EDGESEG_LAUNCHER extern "C" __attribute__((visibility("default"))) int32_t

namespace edgeseg {

// Element types.
constexpr int32_t kFloat32 = 0;
constexpr int32_t kFloat16 = 1;
constexpr int32_t kUint8 = 2;
constexpr int32_t kInt32 = 3;

// A feature map of one image: element (c, y, x) is at c * channel_stride + (y * width + x) *
// pixel_stride. Channels first: channel_stride = height * width, pixel_stride = 1. Channels last:
// channel_stride = 1, pixel_stride = channels, or more where rows of channels are padded.
struct Features {
  const void* data;
  int32_t type;  // kFloat32 or kFloat16
  int32_t channels, height, width;
  int64_t channel_stride, pixel_stride;
};

// The rectangle of the network input (height x width) that a frame (frame_height x frame_width)
// lands on, as in edgeseg/geometry.py.
struct FrameFit {
  int32_t frame_height, frame_width;
  int32_t height, width;
  int32_t top, left, inner_height, inner_width;
};

// --- upsample_argmax: class logits to a class map at full size (edgeseg/upsample_argmax.h)

// class_map and confidence (or null): (target_height, target_width) of output_type: kUint8, or
// kFloat16 or kInt32 for a TensorRT plugin, whose outputs cannot be bytes.
// flags: kAlignCorners | kNoShortCut.
EDGESEG_LAUNCHER edgeseg_cuda_upsample_argmax(const edgeseg::Features* logits, void* class_map,
                                              void* confidence, int32_t output_type,
                                              int32_t target_height, int32_t target_width,
                                              int32_t flags, void* stream);

// --- mask_assembly: prototypes x coefficients to one mask per instance (edgeseg/mask_assembly.h)

struct Instances {
  const void* coefficients;  // (capacity, channels), the type of the prototypes
  const float* boxes;        // (capacity, 4) xyxy in network pixels
  const int32_t* count;      // how many of them are there, on the device; null: all
  int32_t capacity;
  int32_t network_height, network_width;
};

// masks: (capacity, height, width) of the prototypes, of output_type kUint8 or kFloat16:
// round(255 * probability), 0 outside the box and for instances after count.
EDGESEG_LAUNCHER edgeseg_cuda_mask_assembly(const edgeseg::Features* prototypes,
                                            const edgeseg::Instances* instances, void* masks,
                                            int32_t output_type, void* stream);

// The same at frame size: bits (capacity, frame_height, ceil(frame_width / 8)) uint8, the first
// pixel in the highest bit (numpy.packbits), set where the bilinear probability is above threshold.
EDGESEG_LAUNCHER edgeseg_cuda_mask_bits(const edgeseg::Features* prototypes,
                                        const edgeseg::Instances* instances,
                                        const edgeseg::FrameFit* fit, float threshold,
                                        uint8_t* bits, void* stream);

// --- pyramid_roi_align: boxes pooled from the level that fits them (edgeseg/pyramid_roi_align.h)

constexpr int32_t kMaxLevels = 8;

struct Pyramid {
  Features levels[kMaxLevels];        // of one image or, with images > 1, the first of them
  int64_t image_strides[kMaxLevels];  // elements from one image of a level to the next
  float scales[kMaxLevels];           // box coordinates times this are feature coordinates
  int32_t level_count;                // 1 to kMaxLevels; all of one type and number of channels
  int32_t images;
  // A box of area canonical_size^2 goes to level index canonical_level - first_level; see the
  // header for the rule. Ignored for one level.
  float canonical_size;
  int32_t canonical_level, first_level;
};

struct RoiPooling {
  int32_t height, width;   // of the output
  int32_t sampling_ratio;  // samples per bin each way; 0: adaptive, ceil(box / bins)
  int32_t flags;           // kAligned
};

// boxes (rois, 4) xyxy float32; image_of (rois) int32, or null for image 0;
// output (rois, channels, height, width), the type of the features.
EDGESEG_LAUNCHER edgeseg_cuda_pyramid_roi_align(const edgeseg::Pyramid* pyramid, const float* boxes,
                                                const int32_t* image_of, int32_t rois,
                                                const edgeseg::RoiPooling* pooling, void* output,
                                                void* stream);

// --- fit_frame: a camera's frame to the network's input (edgeseg/fit_frame.h)

constexpr int32_t kBgr8 = 0;
constexpr int32_t kRgb8 = 1;
constexpr int32_t kNv12 = 2;
constexpr int32_t kYuyv = 3;

// The planes of a frame; pitches in bytes, no shorter than a row. Packed formats use the first
// plane only; NV12 has luma in the first and interleaved chroma in the second. NV12 needs even
// sides, YUYV an even width.
struct FramePlanes {
  const uint8_t* planes[2];
  int64_t pitches[2];
  int32_t format;
};

// image: (height, width, 3) uint8 BGR, contiguous, none of the frame's memory.
EDGESEG_LAUNCHER edgeseg_cuda_fit_frame(const edgeseg::FramePlanes* frame,
                                        const edgeseg::FrameFit* fit, uint8_t* image, void* stream);

// --- draw_overlay: class colours blended into the frame (edgeseg/draw_overlay.h)

// frame and drawn: (frame_height, frame_width, 3) uint8 BGR with pitches in bytes, the same memory
// and pitch or none in common; class_map: (height, width) uint8 at network size; colours: (classes,
// 3) uint8 BGR on the device, and what is not among the classes is black; opacity 0 to 256, of 256.
EDGESEG_LAUNCHER edgeseg_cuda_draw_overlay(const uint8_t* frame, int64_t frame_pitch,
                                           const uint8_t* class_map, const uint8_t* colours,
                                           int32_t classes, const edgeseg::FrameFit* fit,
                                           int32_t opacity, uint8_t* drawn, int64_t drawn_pitch,
                                           void* stream);

}  // namespace edgeseg

// The number that a caller compares with its own before anything else.
EDGESEG_LAUNCHER edgeseg_cuda_abi_version(void);

#endif  // EDGESEG_LAUNCHERS_H_
