// Keys and values of one sequence, in pages of `PAGE` positions. A page holds all layers: for each layer and each head
// of the keys it has keys [PAGE / 16][head_dim][16], then values [PAGE][padded_dim], in fp32 or bf16.
#pragma once
#include <cstdlib>
#include <cstring>
#include <vector>

#include "vector.h"

namespace wf {

struct CacheShape {
    int layers, kv_heads, head_dim, bf16;

    int padded_dim() const { return (head_dim + SIDE - 1) / SIDE * SIDE; }
    size_t element() const { return bf16 ? 2 : 4; }
    size_t keys_bytes() const { return element() * PAGE * head_dim; }
    size_t head_bytes() const { return keys_bytes() + element() * PAGE * padded_dim(); }
    size_t page_bytes() const { return head_bytes() * kv_heads * layers; }
    size_t keys_at(int layer, int head) const { return head_bytes() * (static_cast<size_t>(layer) * kv_heads + head); }
    size_t values_at(int layer, int head) const { return keys_at(layer, head) + keys_bytes(); }
};

class Cache {
  public:
    explicit Cache(const CacheShape& shape) : shape_(shape) {}
    Cache(Cache&& other) noexcept : shape_(other.shape_) { pages_.swap(other.pages_); }
    Cache(const Cache&) = delete;
    ~Cache() { clear(); }

    // Makes room for `length` positions. Returns false if there is no memory.
    bool grow(int length) {
        size_t needed = (static_cast<size_t>(length) + PAGE - 1) / PAGE;
        pages_.reserve(needed);  // this may throw; once there is a new page, a throw would lose it
        while (pages_.size() < needed) {
            // Zeros: padded columns and positions not yet written are multiplied by weights of 0, and 0 * NaN is NaN.
            char* page = static_cast<char*>(std::calloc(shape_.page_bytes(), 1));
            if (!page) return false;
            pages_.push_back(page);
        }
        return true;
    }

    // Copies the pages of the first `length` positions of `other` to places that `grow` has made.
    void copy(const Cache& other, int length) {
        for (int page = 0; page * PAGE < length; page++)
            std::memcpy(pages_[page], other.pages_[page], shape_.page_bytes());
    }

    void clear() {
        for (char* page : pages_) std::free(page);
        pages_.clear();
    }

    char* const* pages() const { return pages_.data(); }
    size_t bytes() const { return pages_.size() * shape_.page_bytes(); }

  private:
    CacheShape shape_;
    std::vector<char*> pages_;
};

}  // namespace wf
