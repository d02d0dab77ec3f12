// Worker threads. Work is a number of equal tasks. Each thread first takes a long run of them, most of its share,
// because memory is read fastest in one piece. The rest is taken in short runs: a thread that lost its core for a
// moment, or has not woken yet, then does not hold up the others for long. Workers spin for some microseconds before
// they sleep, because a model is many short products, one after the other.
//
// Torch has idle threads that spin as well. Where there are no more cores than threads, they keep ours from running. A
// pool can so work on the threads of another owner, its *team*.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#include "common.h"
#include "wf.h"

struct wf_pool {
    // Called with the thread's number and tasks [begin, end). Must not throw.
    using Body = void (*)(void* context, int thread, int begin, int end);

    explicit wf_pool(int threads, wf_team team = nullptr);
    ~wf_pool();

    int threads() const { return threads_; }

    // Does all tasks and returns when they are done. Short runs are of `run` tasks. There is one call at a time: the
    // caller holds `turn`.
    void run(int tasks, int run, Body body, void* context);

    // The same for any function body(thread, begin, end).
    template <class Function>
    void each(int tasks, int run_length, Function&& body) {
        using F = std::remove_reference_t<Function>;
        run(
            tasks, run_length,
            [](void* context, int thread, int begin, int end) { (*static_cast<F*>(context))(thread, begin, end); },
            const_cast<void*>(static_cast<const void*>(&body)));
    }

    std::mutex turn;
    wf::Buffer<uint8_t> shared;                // memory for the call that holds `turn`
    std::vector<wf::Buffer<uint8_t>> scratch;  // memory for each thread

  private:
    void work(int thread);
    void work_as_team();
    void take(int thread);
    bool enter(uint32_t& seen);

    int threads_ = 1;                  // workers and the caller
    wf_team team_ = nullptr;           // if given, there are no workers
    std::atomic<int> team_joined_{0};  // how many of the team have begun with the call
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<uint64_t> state_{0};          // the call's number, and who has joined it (pool.cpp)
    std::atomic<int> next_{0}, sleeping_{0};  // the first run that no thread has taken; how many workers sleep
    std::atomic<bool> stop_{false};
    int tasks_ = 0, long_run_ = 1, run_ = 1;
    Body body_ = nullptr;
    void* context_ = nullptr;
};
