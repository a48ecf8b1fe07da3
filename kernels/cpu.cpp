// EdgeSeg's CPU library: plain extern "C" functions over raw pointers, loaded with ctypes.
//
// Loops only; the arithmetic is in include/edgeseg/. Nothing here throws across the boundary:
// each function returns one of the codes below. The loops, in cpu_loops.h, are compiled once per
// instruction set, so one portable binary uses AVX2 or AVX-512 where they are.

#include <pthread.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "edgeseg/upsample_argmax.h"

#if !defined(__GNUC__)
#error "EdgeSeg's CPU library needs GCC or Clang"
#endif

#define EDGESEG_EXPORT extern "C" __attribute__((visibility("default")))
#define EDGESEG_INLINE inline __attribute__((always_inline))

namespace {

constexpr int32_t kAbiVersion = 1;  // kernels/build.py has the same number

constexpr int32_t kOk = 0;
constexpr int32_t kBadArgument = 1;
constexpr int32_t kOutOfMemory = 2;

// The widest vector in floats: tables are padded to a multiple of this.
constexpr int32_t kMaxLanes = 16;

// A cell is computed in tiles of at most this many columns and rows, so that tables fit in L1.
constexpr int32_t kTileSide = 32;
constexpr int32_t kTilePixels = kTileSide * kTileSide;

constexpr int32_t kPaddedClasses = 256;
static_assert(kPaddedClasses >= edgeseg::kMaxClasses && kPaddedClasses % kMaxLanes == 0,
              "room for every class in whole vectors");

constexpr int32_t kKnownFlags =
    edgeseg::kAlignCorners | edgeseg::kNoShortCut | edgeseg::kPortableCode | edgeseg::kAvx2Code;

constexpr int32_t kMaxThreads = 256;

constexpr uint8_t kClear = 1;      // no lower class can tie with the winner after rounding
constexpr uint8_t kSaturated = 2;  // confidence is 255 with room to spare

int32_t round_up(int32_t value, int32_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// One axis of the upsampling as tables, kept between calls.
struct Axis {
  edgeseg::Grid grid = {0, 0, false};
  std::vector<int32_t> begin;  // Grid::begin of each cell, and the end
  std::vector<float> near_weight;
  std::vector<float> far_weight;

  void fit(const edgeseg::Grid& wanted) {
    if (grid.source == wanted.source && grid.target == wanted.target &&
        grid.align_corners == wanted.align_corners) {
      return;
    }
    grid.source = 0;  // a failed allocation below must not leave tables that look right
    begin.resize(static_cast<size_t>(wanted.source) + 1);
    near_weight.resize(wanted.target);
    far_weight.resize(wanted.target);
    begin[0] = 0;
    for (int32_t cell = 0; cell < wanted.source; ++cell) {
      begin[cell + 1] = wanted.begin(cell + 1);
      for (int32_t position = begin[cell]; position < begin[cell + 1]; ++position) {
        near_weight[position] = wanted.near_weight(position, cell);
        far_weight[position] = wanted.far_weight(position, cell);
      }
    }
    grid = wanted;
  }

  int32_t far(int32_t cell) const { return grid.far(cell); }
};

// The winner at each sample of one low-resolution row.
struct SampleRow {
  int32_t y = -1;
  std::vector<uint8_t> winner;
  std::vector<uint8_t> state;  // kClear, kSaturated

  void fit(int32_t width) {
    y = -1;
    winner.resize(round_up(width, kMaxLanes));
    state.resize(round_up(width, kMaxLanes));
  }
};

// The logits at the four corners of one cell, class after class.
struct Corners {
  alignas(64) float top_left[kPaddedClasses];
  alignas(64) float top_right[kPaddedClasses];
  alignas(64) float bottom_left[kPaddedClasses];
  alignas(64) float bottom_right[kPaddedClasses];
};

// Weights of each pixel of a tile, rows one after the other without gaps.
struct Tile {
  int32_t row = 0, rows = 0;
  int32_t column = 0, columns = 0;
  alignas(64) float x_near[kTilePixels];
  alignas(64) float x_far[kTilePixels];
  alignas(64) float y_near[kTilePixels];
  alignas(64) float y_far[kTilePixels];
};

// What one thread needs; kept between calls, so that a stream of frames allocates once.
struct Workspace {
  SampleRow rows[2];
  Corners corners[2];  // the logits of this cell, and of its candidates in short
  Tile tile;
  alignas(64) int32_t candidate[kPaddedClasses];
  alignas(64) int32_t beaten[kPaddedClasses];
  alignas(64) int32_t winner[kTilePixels];
  alignas(64) int32_t level[kTilePixels];
};

struct Job {
  const float* logits;  // (classes, height, width)
  int32_t classes, height, width;
  uint8_t* class_map;   // (target height, target width)
  uint8_t* confidence;  // the same, or null
  const Axis* x_axis;
  const Axis* y_axis;
  bool short_cut;
};

using ComputeStrips = void (*)(const Job&, int32_t, int32_t, Workspace*);

}  // namespace

// Each inclusion makes namespace EDGESEG_ISA with the arithmetic and the loops in it. The header is
// included again each time, because GCC takes vectors apart in functions that were defined outside
// the target region, even when they are inlined into it.
#define EDGESEG_ISA portable
#define EDGESEG_LANES 4
#include "cpu_loops.h"
#undef EDGESEG_ISA
#undef EDGESEG_LANES

#if defined(__x86_64__)
#if defined(__clang__)
#define EDGESEG_PRAGMA(text) _Pragma(#text)
#define EDGESEG_TARGET(isa) \
  EDGESEG_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define EDGESEG_TARGET_END EDGESEG_PRAGMA(clang attribute pop)
#else
#define EDGESEG_PRAGMA(text) _Pragma(#text)
#define EDGESEG_TARGET(isa) EDGESEG_PRAGMA(GCC push_options) EDGESEG_PRAGMA(GCC target(isa))
#define EDGESEG_TARGET_END EDGESEG_PRAGMA(GCC pop_options)
#endif

EDGESEG_TARGET("avx2")
#define EDGESEG_ISA avx2
#define EDGESEG_LANES 8
#include "cpu_loops.h"
#undef EDGESEG_ISA
#undef EDGESEG_LANES
EDGESEG_TARGET_END

EDGESEG_TARGET("avx512f,avx512bw,avx512dq,avx512vl")
#define EDGESEG_ISA avx512
#define EDGESEG_LANES 16
#include "cpu_loops.h"
#undef EDGESEG_ISA
#undef EDGESEG_LANES
EDGESEG_TARGET_END
#endif

namespace {

// The fastest code that this processor runs, within what the flags allow.
ComputeStrips choose_compute_strips(int32_t flags) {
#if defined(__x86_64__)
  static const bool has_avx2 = (__builtin_cpu_init(), __builtin_cpu_supports("avx2"));
  static const bool has_avx512 =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if ((flags & edgeseg::kPortableCode) == 0) {
    if (has_avx512 && (flags & edgeseg::kAvx2Code) == 0) return avx512::compute_strips;
    if (has_avx2) return avx2::compute_strips;
  }
#else
  (void)flags;
#endif
  return portable::compute_strips;
}

bool is_side(int32_t side) { return side >= 1 && side <= edgeseg::kMaxSide; }

// One chunk of strips on the calling thread, with that thread's workspace.
int32_t run_chunk(ComputeStrips compute, const Job& job, int32_t begin, int32_t end) noexcept {
  try {
    thread_local std::vector<Workspace> workspace;
    if (workspace.empty()) workspace.resize(1);
    Workspace* work = &workspace[0];
    for (SampleRow& row : work->rows) row.fit(job.width);
    work->tile.rows = 0;  // its weights may be of another call
    compute(job, begin, end, work);
    return kOk;
  } catch (const std::bad_alloc&) {
    return kOutOfMemory;
  }
}

// A job cut into chunks that any thread may take. Lives on the stack of the thread that asked.
struct Task {
  const Job& job;
  ComputeStrips compute;
  int32_t chunks;
  int32_t helpers_wanted;
  int32_t helpers_inside = 0;
  std::atomic<int32_t> next_chunk{0};
  std::atomic<int32_t> status{kOk};
  Task* next = nullptr;

  Task(const Job& its_job, ComputeStrips its_compute, int32_t its_chunks, int32_t helpers)
      : job(its_job), compute(its_compute), chunks(its_chunks), helpers_wanted(helpers) {}

  void work() noexcept {
    for (int64_t chunk; (chunk = next_chunk.fetch_add(1)) < chunks;) {
      const int64_t height = job.y_axis->grid.source;
      const int32_t result = run_chunk(compute, job, static_cast<int32_t>(height * chunk / chunks),
                                       static_cast<int32_t>(height * (chunk + 1) / chunks));
      if (result != kOk) status.store(result);
    }
  }
};

// Threads that help with chunks. OpenMP would do, but its teams wait for every member, and on a
// device whose cores are busy with capture and inference a member that only has to wake up to find
// nothing left can cost a scheduler's slice, 8 ms for a job of 0.4. Here the asking thread works
// too, and waits only for helpers that have a chunk in hand.
class Helpers {
 public:
  void run(Task* task) {
    grow(task->helpers_wanted);
    const int32_t wanted = task->helpers_wanted;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      task->next = waiting_;
      waiting_ = task;
    }
    for (int32_t i = 0; i < wanted; ++i) task_came_.notify_one();
    task->work();
    std::unique_lock<std::mutex> lock(mutex_);
    remove(task);
    helper_left_.wait(lock, [&] { return task->helpers_inside == 0; });
  }

 private:
  void grow(int32_t count) {
    const std::lock_guard<std::mutex> lock(mutex_);
    try {
      for (; count_ < count; ++count_) std::thread([this] { serve(); }).detach();
    } catch (const std::exception&) {
      // No more threads to be had: those that there are do the work.
    }
  }

  void remove(Task* task) {
    for (Task** link = &waiting_; *link != nullptr; link = &(*link)->next) {
      if (*link == task) {
        *link = task->next;
        return;
      }
    }
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      task_came_.wait(lock, [this] { return waiting_ != nullptr; });
      Task* task = waiting_;
      ++task->helpers_inside;
      if (--task->helpers_wanted == 0) remove(task);
      lock.unlock();
      task->work();
      lock.lock();
      if (--task->helpers_inside == 0) helper_left_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable task_came_;
  std::condition_variable helper_left_;
  Task* waiting_ = nullptr;
  int32_t count_ = 0;
};

// Never destroyed: helpers sleep in it until the process ends.
std::atomic<Helpers*> helpers{nullptr};

Helpers* shared_helpers() {
  static const bool made = [] {
    helpers.store(new Helpers);
    // A forked child has none of its parent's threads, and maybe a locked mutex: it starts anew.
    pthread_atfork(nullptr, nullptr, [] { helpers.store(new (std::nothrow) Helpers); });
    return true;
  }();
  (void)made;
  return helpers.load();
}

}  // namespace

// The number that a caller compares with its own before anything else.
EDGESEG_EXPORT int32_t edgeseg_abi_version(void) { return kAbiVersion; }

// EdgeSegUpsampleArgmax; the definition is in edgeseg/upsample_argmax.h.
//   logits      (classes, height, width) float32, contiguous, 1 <= classes <= 255
//   class_map   (target_height, target_width) uint8, written
//   confidence  the same shape, written, or null
//   flags       kAlignCorners | kNoShortCut | kPortableCode | kAvx2Code
//   threads     at least 1
// Returns 0, or 1 for an argument outside these bounds, or 2 without memory.
EDGESEG_EXPORT int32_t edgeseg_upsample_argmax(const float* logits, int32_t classes, int32_t height,
                                               int32_t width, uint8_t* class_map,
                                               uint8_t* confidence, int32_t target_height,
                                               int32_t target_width, int32_t flags,
                                               int32_t threads) {
  if (logits == nullptr || class_map == nullptr || classes < 1 || classes > edgeseg::kMaxClasses ||
      !is_side(height) || !is_side(width) || !is_side(target_height) || !is_side(target_width) ||
      threads < 1 || (flags & ~kKnownFlags) != 0) {
    return kBadArgument;
  }
  const ComputeStrips compute = choose_compute_strips(flags);
  thread_local Axis x_axis;
  thread_local Axis y_axis;
  const bool align_corners = (flags & edgeseg::kAlignCorners) != 0;
  try {
    x_axis.fit({width, target_width, align_corners});
    y_axis.fit({height, target_height, align_corners});
  } catch (const std::bad_alloc&) {
    return kOutOfMemory;
  }
  const Job job = {logits,  classes,   height,
                   width,   class_map, confidence,
                   &x_axis, &y_axis,   (flags & edgeseg::kNoShortCut) == 0};

  const int32_t team = std::min(threads, kMaxThreads);
  if (team == 1) return run_chunk(compute, job, 0, height);
  // More chunks than threads, because busy regions of an image cost more than empty ones.
  Task task(job, compute, std::min(height, 4 * team), team - 1);
  try {
    Helpers* pool = shared_helpers();
    if (pool == nullptr) return kOutOfMemory;
    pool->run(&task);
  } catch (const std::bad_alloc&) {
    return kOutOfMemory;
  }
  return task.status.load();
}
