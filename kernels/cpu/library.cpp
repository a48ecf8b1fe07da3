// EdgeSeg's CPU library: plain extern "C" functions over raw pointers, loaded with ctypes.
//
// The other sources hold loops only; the arithmetic is in include/edgeseg/. Nothing here throws
// across the boundary: each function returns one of the codes in exports.h.

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <thread>

#include "exports.h"
#include "threads.h"

namespace {

constexpr int32_t kAbiVersion = 2;  // kernels/build.py has the same number

constexpr int32_t kMaxThreads = 256;

// A job cut into chunks that any thread may take. Lives on the stack of the thread that asked.
struct Task {
  edgeseg::DoChunk do_chunk;
  const void* job;
  int32_t chunks;
  int32_t helpers_wanted;
  int32_t helpers_inside = 0;
  std::atomic<int32_t> next_chunk{0};
  std::atomic<int32_t> status{edgeseg::kOk};
  Task* next = nullptr;

  Task(edgeseg::DoChunk its_work, const void* its_job, int32_t its_chunks, int32_t helpers)
      : do_chunk(its_work), job(its_job), chunks(its_chunks), helpers_wanted(helpers) {}

  int32_t run_chunk(int32_t chunk) const noexcept {
    try {
      return do_chunk(job, chunk);
    } catch (const std::bad_alloc&) {
      return edgeseg::kOutOfMemory;
    }
  }

  void work() noexcept {
    for (int32_t chunk; (chunk = next_chunk.fetch_add(1)) < chunks;) {
      const int32_t result = run_chunk(chunk);
      if (result != edgeseg::kOk) status.store(result);
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

namespace edgeseg {

int32_t run_chunks(DoChunk work, const void* job, int32_t chunks, int32_t threads) noexcept {
  Task task(work, job, chunks, std::min({threads, chunks, kMaxThreads}) - 1);
  if (task.helpers_wanted < 1) {
    task.work();
    return task.status.load();
  }
  try {
    Helpers* pool = shared_helpers();
    if (pool == nullptr) return kOutOfMemory;
    pool->run(&task);
  } catch (const std::bad_alloc&) {
    return kOutOfMemory;
  }
  return task.status.load();
}

Isa chosen_isa(int32_t flags) {
#if defined(__x86_64__)
  static const bool has_avx2 = (__builtin_cpu_init(), __builtin_cpu_supports("avx2"));
  static const bool has_avx512 =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if ((flags & kPortableCode) == 0) {
    if (has_avx512 && (flags & kAvx2Code) == 0) return Isa::kAvx512;
    if (has_avx2) return Isa::kAvx2;
  }
#else
  (void)flags;
#endif
  return Isa::kPortable;
}

}  // namespace edgeseg

// The number that a caller compares with its own before anything else.
EDGESEG_EXPORT int32_t edgeseg_abi_version(void) { return kAbiVersion; }
