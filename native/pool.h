// Worker threads. Work is a number of equal tasks. Whoever is free takes one long run of them, most of a thread's share,
// for memory is read fastest in one piece; the rest goes in short runs, so that a thread that lost its core for a moment,
// or has not woken yet, does not hold up the others for long. Workers spin for some microseconds before they sleep: a
// model is a row of short products.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#include "common.h"

struct wf_pool {
    // Called with the thread's number and tasks [begin, end). Must not throw.
    using Body = void (*)(void* context, int thread, int begin, int end);

    explicit wf_pool(int threads);
    ~wf_pool();

    int threads() const { return static_cast<int>(workers_.size()) + 1; }

    // Do all tasks, the short runs of `run` tasks, and return when they are done. One call at a time: hold `turn`.
    void run(int tasks, int run, Body body, void* context);

    // body(thread, begin, end)
    template <class Function>
    void each(int tasks, int run_length, Function&& body) {
        using F = std::remove_reference_t<Function>;
        run(
            tasks, run_length,
            [](void* context, int thread, int begin, int end) { (*static_cast<F*>(context))(thread, begin, end); },
            const_cast<void*>(static_cast<const void*>(&body)));
    }

    std::mutex turn;
    wf::Buffer<uint8_t> shared;                // scratch of the call whose turn it is
    std::vector<wf::Buffer<uint8_t>> scratch;  // of each thread

  private:
    void work(int thread);
    void take(int thread);
    bool enter(uint32_t& seen);

    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<uint64_t> state_{0};          // number of the call, whether it can be joined, how many workers have
    std::atomic<int> next_{0}, sleeping_{0};  // the run that nobody has taken yet; workers that sleep
    std::atomic<bool> stop_{false};
    int tasks_ = 0, long_run_ = 1, run_ = 1;
    Body body_ = nullptr;
    void* context_ = nullptr;
};
