// Random numbers that are the same on every machine, and random matrices of every kind made of them, for the test
// programs.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <random>
#include <vector>

#include "../wf.h"

inline std::mt19937 generator(1);

inline int below(int limit) { return static_cast<int>(generator() % static_cast<unsigned>(limit)); }
inline int pick(std::initializer_list<int> of) { return of.begin()[below(static_cast<int>(of.size()))]; }

// Close to a normal distribution: a sum of twelve uniform numbers.
inline float normal() {
    float sum = -6;
    for (int i = 0; i < 12; ++i) sum += static_cast<float>(generator() >> 8) / (1 << 24);
    return sum;
}

inline std::vector<float> normals(size_t size) {
    std::vector<float> values(size);
    for (float& value : values) value = normal();
    return values;
}

inline std::vector<uint8_t> codes(size_t size, int limit) {
    std::vector<uint8_t> values(size);
    for (uint8_t& value : values) value = static_cast<uint8_t>(below(limit));
    return values;
}

// A number of groups that divides `of`. Large numbers are left out, because each group is padded to 64 columns.
inline int divisor(int of) {
    int groups = pick({1, 1, 2, 3, 5, of < 32 ? of : 32});
    return of % groups ? 1 : groups;
}

struct Factors {
    std::vector<float> row, col, bias;
    Factors(int n, int k, int rank = 1) {
        if (rank > 1 || below(2)) row = normals(static_cast<size_t>(rank) * n);
        if (rank > 1 || below(2)) col = normals(static_cast<size_t>(rank) * k);
        if (below(2)) bias = normals(n);
    }
    static const float* at(const std::vector<float>& values) { return values.empty() ? nullptr : values.data(); }
};

inline wf_matrix* table(int n, int k) {
    const int bits = 1 + below(4), rows = pick({1, n}), groups = divisor(k);
    const int rank = pick({1, 1, 2, 3, 5, 8});
    const Factors f(n, k, rank);
    auto entries = normals(16);
    if (below(2))
        for (int i = 0; i < 16; ++i) entries[i] = static_cast<float>(i % pick({2, 3, 16}) - 1);
    const auto index = codes(static_cast<size_t>(n) * k, 1 << bits);
    const auto scales = normals(static_cast<size_t>(rows) * groups);
    return wf_matrix_table(n, k, bits, index.data(), entries.data(), scales.data(), rows, groups, rank, f.at(f.row),
                           f.at(f.col), f.at(f.bias));
}

// n and k have to be even.
inline wf_matrix* complex(int n, int k) {
    const int stages = 1 + below(4), rows = pick({1, n / 2}), groups = divisor(k / 2);
    const Factors f(n, k);
    auto scales = normals(size_t{4} * stages * rows * groups);
    if (below(2))
        for (float& scale : scales) scale = static_cast<float>(below(25));
    const auto index = codes(size_t{2} * stages * (n / 2) * (k / 2), 4);
    return wf_matrix_complex(n, k, stages, index.data(), scales.data(), rows, groups, f.at(f.row), f.at(f.col),
                             f.at(f.bias));
}

inline wf_matrix* bytes(int n, int k) {
    const auto weight = codes(static_cast<size_t>(n) * k, 256);
    const auto row = normals(n);
    return wf_matrix_int8(n, k, reinterpret_cast<const int8_t*>(weight.data()), row.data(), nullptr);
}

inline wf_matrix* dense(int n, int k) {
    const auto weight = normals(static_cast<size_t>(n) * k);
    return wf_matrix_dense(n, k, weight.data(), nullptr, below(2));
}

inline void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "failed: %s: %s\n", what, wf_error());
    std::exit(1);
}
