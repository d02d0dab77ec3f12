// Runs random layers of every kind through every function, to be checked by sanitizers: sizes, codes and factors at
// their edges, wrong arguments, several threads. It compares one token with many; tests/product/test_kernels.py compares with
// float64. The checksum has to be the same on every instruction set.
#include <cmath>
#include <thread>

#include "random.h"

namespace {

uint64_t checksum = 14695981039346656037u;  // of all results
void count_in(const std::vector<float>& values) {
    for (const float value : values) {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        checksum = (checksum ^ bits) * 1099511628211u;
    }
}

// A team that has threads for one call, and fewer than asked.
void short_team(void (*body)(void*), void* context, unsigned threads, unsigned) {
    std::vector<std::thread> others;
    for (unsigned i = 2; i < threads; ++i) others.emplace_back(body, context);
    body(context);
    for (auto& other : others) other.join();
}

wf_matrix* any_layer() {
    const int kind = below(4);
    if (kind == 0) {
        const int n = 1 + below(40), k = 1 + below(150);
        return complex(2 * n, 2 * k);
    }
    const int n = 1 + below(70), k = 1 + below(300);
    return kind == 1 ? table(n, k) : kind == 2 ? bytes(n, k) : dense(n, k);
}

void multiply(wf_pool* one, wf_pool* many, wf_pool* team, const wf_matrix* m) {
    const int n = wf_matrix_rows(m), k = wf_matrix_columns(m), batch = pick({1, 2, 3, 4, 7, 8, 9, 17, 200});
    const auto x = normals(static_cast<size_t>(batch) * k);
    for (const wf_mode mode : {WF_INT8, WF_EXACT}) {
        std::vector<float> together(static_cast<size_t>(batch) * n), alone(n);
        float* to = together.data();
        require(!wf_matmul(many, &m, 1, x.data(), batch, &to, mode), "product");
        count_in(together);
        std::vector<float> of_team(together.size());
        to = of_team.data();
        require(!wf_matmul(team, &m, 1, x.data(), batch, &to, mode), "product by a team");
        require(of_team == together, "same bits by a team");
        for (int token = 0; token < batch; ++token) {
            float* one_token = alone.data();
            require(!wf_matmul(one, &m, 1, x.data() + static_cast<size_t>(token) * k, 1, &one_token, mode),
                    "product of one token");
            for (int i = 0; i < n; ++i) require(alone[i] == together[static_cast<size_t>(token) * n + i], "same bits");
        }
    }
}

void refuse() {
    const uint8_t index[8] = {0, 1, 2, 3, 0, 1, 2, 3};
    const float table[4] = {}, scale[2] = {1, 1}, endless[1] = {INFINITY};
    const int wrong[][6] = {{0, 4, 2, 1, 1}, {2, 0, 2, 1, 1}, {2, 4, 0, 1, 1}, {2, 4, 5, 1, 1},  {2, 4, 2, 3, 1},
                            {2, 4, 2, 1, 3}, {2, 4, 2, 1, 0}, {2, 4, 1, 1, 1}, {-1, 4, 2, 1, 1}, {2, 1 << 30, 2, 1, 1}};
    for (const auto& w : wrong)
        require(!wf_matrix_table(w[0], w[1], w[2], index, table, scale, w[3], w[4], 1, nullptr, nullptr, nullptr),
                "refusal");
    require(!wf_matrix_table(2, 4, 2, index, table, endless, 1, 1, 1, nullptr, nullptr, nullptr),
            "refusal of infinity");
    require(!wf_matrix_table(2, 4, 2, index, table, scale, 1, 1, 9, scale, scale, nullptr), "refusal of nine ranks");
    require(!wf_matrix_table(2, 4, 2, index, table, scale, 1, 1, 2, nullptr, scale, nullptr),
            "refusal of ranks without rows");
    require(!wf_matrix_complex(1, 4, 1, index, scale, 1, 1, nullptr, nullptr, nullptr), "refusal of an odd width");
    require(!wf_matrix_complex(2, 4, 5, index, scale, 1, 1, nullptr, nullptr, nullptr), "refusal of five stages");
    require(!wf_pool_new(0) && !wf_pool_new(-1) && !wf_pool_new(1 << 20), "refusal of threads");
    require(!wf_pool_on_team(0, short_team) && !wf_pool_on_team(2, nullptr), "refusal of a team");
    require(wf_matmul(nullptr, nullptr, 0, nullptr, 0, nullptr, WF_INT8) != 0, "refusal of nothing");
}

}  // namespace

int main(int count, char** arguments) {
    const int rounds = count > 1 ? std::atoi(arguments[1]) : 150;
    wf_pool* one = wf_pool_new(1);
    wf_pool* many = wf_pool_new(3);
    wf_pool* team = wf_pool_on_team(4, short_team);
    require(one && many && team, "threads");
    refuse();
    for (int round = 0; round < rounds; ++round) {
        wf_matrix* m = any_layer();
        require(m != nullptr, "layer");
        multiply(one, many, team, m);
        std::vector<float> row(wf_matrix_columns(m));
        require(!wf_matrix_row(m, below(wf_matrix_rows(m)), row.data()), "row");
        require(wf_matrix_row(m, wf_matrix_rows(m), row.data()) != 0, "refusal of a row");
        wf_matrix_free(m);
    }
    wf_pool_free(one);
    wf_pool_free(many);
    wf_pool_free(team);
    std::printf("%d layers, checksum %016llx on %s\n", rounds, static_cast<unsigned long long>(checksum), wf_isa());
    return 0;
}
