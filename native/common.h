// What every file here needs: errors, aligned memory, a division.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <string>
#include <utility>

namespace wf {

constexpr size_t LINE = 64;  // bytes of a cache line; all weights begin on one

// A mistake of the caller, in one line. It is thrown inside and becomes a return value at the C interface.
struct Error {
    std::string text;
};

void set_error(const std::string& text);  // what wf_error() returns on this thread

[[noreturn]] inline void fail(std::string text) { throw Error{std::move(text)}; }

inline void check(bool holds, const char* text) {
    if (!holds) fail(text);
}

// Runs `body`. On an error, keeps its text and returns `otherwise`: nothing may be thrown through the C interface.
template <class Result, class Body>
Result guarded(Result otherwise, Body body) {
    try {
        return body();
    } catch (const Error& error) {
        set_error(error.text);
    } catch (const std::bad_alloc&) {
        set_error("out of memory");
    }
    return otherwise;
}

inline int ceil_div(int a, int b) { return a / b + (a % b != 0); }

// Zeroed memory that begins on a cache line and knows its length. Sizes are in elements.
template <class T>
class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(size_t size) { reset(size); }
    Buffer(Buffer&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        return *this;
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { release(); }

    void reset(size_t size) {
        release();
        if (size > SIZE_MAX / sizeof(T)) throw std::bad_alloc();
        data_ = static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t(LINE)));
        size_ = size;
        std::memset(static_cast<void*>(data_), 0, size * sizeof(T));
    }
    // Makes room for at least `size` elements; what they were is lost if it grows.
    void grow(size_t size) {
        if (size > size_) reset(size);
    }

    T* data() { return data_; }
    const T* data() const { return data_; }
    size_t size() const { return size_; }
    size_t bytes() const { return size_ * sizeof(T); }
    T& operator[](size_t i) { return data_[i]; }
    const T& operator[](size_t i) const { return data_[i]; }

  private:
    void release() {
        ::operator delete(data_, std::align_val_t(LINE));
        data_ = nullptr;
        size_ = 0;
    }
    T* data_ = nullptr;
    size_t size_ = 0;
};

}  // namespace wf
