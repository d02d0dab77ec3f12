// See pool.h.
#include "pool.h"

#include <algorithm>
#include <system_error>

#include "wf.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
static inline void relax() { _mm_pause(); }
#elif defined(__aarch64__) && !defined(_MSC_VER)
static inline void relax() { asm volatile("yield"); }
#else
static inline void relax() { std::this_thread::yield(); }
#endif

namespace {
constexpr int SPINS = 4000;        // some 50 microseconds: about as long as a model takes from one product to the next
constexpr int YIELD_EVERY = 1024;  // with fewer cores than threads, the thread that has the work may wait for this core
constexpr int MAX_THREADS = 1024;
constexpr double LONG_SHARE = 0.75;  // of the tasks are in long runs

// state_ has the call's number in its upper half, then the bit OPEN, which says that workers can join, and in the bits
// of JOINED how many have.
constexpr uint64_t OPEN = uint64_t{1} << 31, JOINED = OPEN - 1;
uint32_t number(uint64_t state) { return static_cast<uint32_t>(state >> 32); }
}  // namespace

wf_pool::wf_pool(int threads, wf_team team) : team_(team) {
    scratch.resize(threads);
    if (team_) {
        threads_ = threads;
        return;
    }
    workers_.reserve(threads - 1);
    try {
        for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
    } catch (const std::system_error&) {
        // The system gives no more threads. The pool works with those that it has.
    }
    threads_ = static_cast<int>(workers_.size()) + 1;
}

wf_pool::~wf_pool() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
}

void wf_pool::run(int tasks, int run, Body body, void* context) {
    if (threads_ == 1 || tasks <= run) {
        if (tasks > 0) body(context, 0, 0, tasks);
        return;
    }
    tasks_ = tasks;
    run_ = run;
    long_run_ = std::max(run, static_cast<int>(tasks * LONG_SHARE / threads()));
    body_ = body;
    context_ = context;
    next_.store(0, std::memory_order_relaxed);
    if (team_) return work_as_team();
    const uint64_t call = (number(state_.load(std::memory_order_relaxed)) + uint64_t{1}) & 0xffffffffu;
    state_.store(call << 32 | OPEN, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst)) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
        }
        wake_.notify_all();
    }
    take(0);
    state_.fetch_and(~OPEN, std::memory_order_acq_rel);  // no tasks are left, so no worker needs to join
    for (int i = 1; state_.load(std::memory_order_acquire) & JOINED; ++i) {
        relax();
        if (i % YIELD_EVERY == 0) std::this_thread::yield();
    }
}

// A team calls the function once on each of its threads and returns when all have. It may have fewer threads than asked.
void wf_pool::work_as_team() {
    team_joined_.store(0, std::memory_order_relaxed);
    team_(
        [](void* pool) {
            wf_pool* self = static_cast<wf_pool*>(pool);
            self->take(self->team_joined_.fetch_add(1, std::memory_order_relaxed));
        },
        this, static_cast<unsigned>(threads_), 0);
}

void wf_pool::take(int thread) {
    for (;;) {
        const int64_t taken = next_.fetch_add(1, std::memory_order_relaxed),
                      longs = std::min<int64_t>(taken, threads());
        const int64_t begin = longs * long_run_ + (taken - longs) * run_;
        if (begin >= tasks_) return;
        const int64_t end = std::min<int64_t>(begin + (taken < threads() ? long_run_ : run_), tasks_);
        body_(context_, thread, static_cast<int>(begin), static_cast<int>(end));
    }
}

// Joins the call in progress unless its number is `seen`.
bool wf_pool::enter(uint32_t& seen) {
    uint64_t state = state_.load(std::memory_order_acquire);
    while ((state & OPEN) && number(state) != seen) {
        if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) {
            seen = number(state);
            return true;
        }
    }
    return false;
}

void wf_pool::work(int thread) {
    uint32_t seen = 0;
    for (int spins = 1; !stop_.load(std::memory_order_acquire); ++spins) {
        if (enter(seen)) {
            take(thread);
            state_.fetch_sub(1, std::memory_order_release);
            spins = 0;
        } else if (spins < SPINS) {
            relax();
            if (spins % YIELD_EVERY == 0) std::this_thread::yield();
        } else {
            std::unique_lock<std::mutex> lock(mutex_);
            sleeping_.fetch_add(1, std::memory_order_seq_cst);
            wake_.wait(lock, [&] {
                const uint64_t state = state_.load(std::memory_order_seq_cst);
                return stop_.load() || ((state & OPEN) && number(state) != seen);
            });
            sleeping_.fetch_sub(1, std::memory_order_seq_cst);
            spins = 0;
        }
    }
}

extern "C" wf_pool* wf_pool_new(int threads) {
    return wf::guarded<wf_pool*>(nullptr, [&] {
        wf::check(threads >= 1 && threads <= MAX_THREADS, "threads: must be 1 to 1024");
        return new wf_pool(threads);
    });
}

extern "C" wf_pool* wf_pool_on_team(int threads, wf_team team) {
    return wf::guarded<wf_pool*>(nullptr, [&] {
        wf::check(threads >= 1 && threads <= MAX_THREADS, "threads: must be 1 to 1024");
        wf::check(team != nullptr, "team: must be given");
        return new wf_pool(threads, team);
    });
}

extern "C" void wf_pool_free(wf_pool* pool) { delete pool; }
