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

// Idle OpenMP threads, as many as it takes that there are more threads than cores. libgomp then waits for a shorter time
// before it sleeps (GOMP_SPINCOUNT in its manual); other OpenMP libraries have no such rule, and nothing changes there.
class Oversubscription {
 public:
  void begin() {
#ifdef _OPENMP
    const std::lock_guard<std::mutex> lock(mutex_);
    if (begun_) return;
    begun_ = true;
    const int size = std::max(2, omp_get_num_procs() - at::get_num_threads() + 2);
    std::thread([this, size, number = number_] {
#pragma omp parallel num_threads(size)
      { asm volatile(""); }  // they stay until this thread ends
      std::unique_lock<std::mutex> lock(mutex_);
      ended_.wait(lock, [&] { return number_ != number; });
    }).detach();
#endif
  }

  void end() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!begun_) return;
    begun_ = false;
    ++number_;
    ended_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable ended_;
  bool begun_ = false;
  int64_t number_ = 0;
};

Oversubscription& oversubscription() {
  static auto* const one = new Oversubscription;  // never destroyed: its thread may outlive main()
  return *one;
}

std::atomic<int64_t> held_until{0};  // 0 = not held
std::atomic<int64_t> last_late{0}, last_hold{0}, hold{kShortestHold};

}  // namespace

void may_spin_again(int64_t began) {
  int64_t until = held_until.load(std::memory_order_relaxed);
  if (until != 0 && began > until && held_until.compare_exchange_strong(until, 0)) oversubscription().end();
}

void note_wait(int64_t began, int64_t done, int64_t ended) {
  const int64_t waited = ended - done;
  if (waited < kLate || 2 * waited < ended - began || held_until != 0) return;
  if (ended - last_late.exchange(ended) > kOften) return;
  hold = ended - last_hold < kCalm ? std::min(2 * hold, kLongestHold) : kShortestHold;
  held_until = last_hold = ended + hold;
  oversubscription().begin();
}

}  // namespace stars
