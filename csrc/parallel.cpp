#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace stars {
namespace {

constexpr int64_t kMillisecond = 1'000'000;
constexpr int64_t kLate = kMillisecond;  // less than a time slice of the scheduler
constexpr int64_t kOften = 32 * kMillisecond;  // two late threads so close are a neighbour, not a core's own noise
constexpr int64_t kShortestHold = 16 * kMillisecond, kLongestHold = 1024 * kMillisecond;
constexpr int64_t kCalm = 256 * kMillisecond;  // so long without a hold, and the neighbour is gone

// Idle OpenMP threads, as many as it takes that there are more than cores (GOMP_SPINCOUNT in libgomp's manual).
class Crowd {
 public:
  void gather() {
#ifdef _OPENMP
    const std::lock_guard<std::mutex> lock(mutex_);
    if (there_) return;
    there_ = true;
    const int size = std::max(2, omp_get_num_procs() - at::get_num_threads() + 2);
    std::thread([this, size, visit = visit_] {
#pragma omp parallel num_threads(size)
      { asm volatile(""); }  // they stay until this thread ends
      std::unique_lock<std::mutex> lock(mutex_);
      gone_.wait(lock, [&] { return visit_ != visit; });
    }).detach();
#endif
  }

  void disperse() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!there_) return;
    there_ = false;
    ++visit_;
    gone_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable gone_;
  bool there_ = false;
  int64_t visit_ = 0;
};

Crowd& crowd() {
  static Crowd* const crowd = new Crowd;  // never destroyed: its thread may outlive main()
  return *crowd;
}

std::atomic<int64_t> held_until{0};  // 0 = not held
std::atomic<int64_t> last_late{0}, last_hold{0}, hold{kShortestHold};

}  // namespace

void may_spin_again(int64_t began) {
  int64_t until = held_until.load(std::memory_order_relaxed);
  if (until != 0 && began > until && held_until.compare_exchange_strong(until, 0)) crowd().disperse();
}

void note_wait(int64_t began, int64_t done, int64_t ended) {
  const int64_t waited = ended - done;
  if (waited < kLate || 2 * waited < ended - began || held_until != 0) return;
  if (ended - last_late.exchange(ended) > kOften) return;
  hold = ended - last_hold < kCalm ? std::min(2 * hold, kLongestHold) : kShortestHold;
  held_until = last_hold = ended + hold;
  crowd().gather();
}

}  // namespace stars
