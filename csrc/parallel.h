// parallel_for for ops that run thousands of times a second: as at::parallel_for, but quick to give way.
//
// OpenMP's threads wait for each other at the end of a loop. Where another process holds the core of one of them, the
// others spin for milliseconds until they sleep, in a loop of microseconds, and keep the late thread from their own
// cores. So a loop that waited long tells libgomp that there are more threads than cores, for which it has a shorter
// patience: all waits, torch's too, then yield at once. That costs a little where no neighbour is, so it holds for a
// while only, which doubles as long as threads come late again. No result depends on it.
#pragma once

#include <ATen/Parallel.h>

#include <chrono>
#include <cstdint>

namespace stars {

inline int64_t nanoseconds_now() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

// Called before a loop that begins, and after a loop whose calling thread had done its own piece at `done`.
void may_spin_again(int64_t began);
void note_wait(int64_t began, int64_t done, int64_t ended);

// Runs work(from, to) on pieces of [begin, end) of at least `grain`.
template <typename Work>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Work& work) {
  if (end - begin <= grain || at::get_num_threads() == 1 || at::in_parallel_region()) {
    if (begin < end) work(begin, end);
    return;
  }
  const int64_t began = nanoseconds_now();
  may_spin_again(began);
  int64_t done = began;
  at::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) {
    work(from, to);
    if (from == begin) done = nanoseconds_now();  // the first piece is the calling thread's own
  });
  note_wait(began, done, nanoseconds_now());
}

}  // namespace stars
