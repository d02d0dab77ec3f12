// The constructors of wf_matrix: from codes to the memory that layout.h describes. They check everything before they
// take memory.
#include <algorithm>
#include <cmath>
#include <memory>
#include <string>

#include "kernels.h"
#include "layout.h"
#include "wf.h"

using namespace wf;

namespace {

constexpr int MAX_ROWS = 1 << 24;
constexpr int MAX_COLUMNS = 1 << 16;   // a sum of products then fits int32: 255 * 127 * 65536
constexpr float NEARLY = 1.0f / 8192;  // times the largest entry: even steps, once rounded to fp16, may be off by this

void check_shape(int n, int k) {
    check(n >= 1 && n <= MAX_ROWS, "n: must be 1 to 16777216");
    check(k >= 1 && k <= MAX_COLUMNS, "k: must be 1 to 65536");
}

std::unique_ptr<wf_matrix> empty(Kind kind, int n, int k) {
    auto made = std::make_unique<wf_matrix>();
    made->kind = kind;
    made->n = n;
    made->k = k;
    return made;
}

void check_grid(int rows, int columns, int num_rows, int num_groups) {
    check(num_rows == 1 || num_rows == rows, "num_rows: must be 1, or a scale for each row");
    check(num_groups >= 1 && num_groups <= columns && columns % num_groups == 0, "num_groups: must divide the columns");
}

void check_finite(const float* values, size_t size, const char* text) {
    for (size_t i = 0; i < size; ++i) check(std::isfinite(values[i]), text);
}

void check_codes(const uint8_t* codes, size_t size, int limit) {
    uint8_t largest = 0;
    for (size_t i = 0; i < size; ++i) largest = std::max(largest, codes[i]);
    check(largest < limit, "codes: an entry is too large for the bits");
}

// Copies numbers of rows [rank, n], padding them to whole panels of each part.
void set_rows(const wf_matrix& m, int rank, Buffer<float>& to, const float* from, const char* text) {
    if (!from) return;
    check_finite(from, static_cast<size_t>(rank) * m.n, text);
    to.reset(rank * m.padded_rows());
    for (int r = 0; r < rank; ++r)
        for (int n = 0; n < m.n; ++n)
            to[r * m.padded_rows() + m.padded_row(n)] = from[static_cast<size_t>(r) * m.n + n];
}

// The last thing that each constructor does.
void set_factors(wf_matrix& m, const float* row, const float* col, const float* bias) {
    set_rows(m, m.rank, m.row, row, "row: not finite");
    set_rows(m, 1, m.bias, bias, "bias: not finite");
    for (const Stream& s : m.streams) m.read_bytes += s.bytes();
    m.read_bytes += m.weight32.bytes() + m.weight16.bytes();
    if (!col) return;
    const size_t size = static_cast<size_t>(m.rank) * m.k;
    check_finite(col, size, "col: not finite");
    m.col.reset(size);
    std::copy_n(col, size, m.col.data());
}

Stream stream(Format format, int rows, int columns, int num_rows, int num_groups) {
    Stream s;
    s.format = format;
    s.rows = rows;
    s.panels = ceil_div(rows, PANEL);
    const bool complex = spec(format).parts == 2;
    const int width = columns / num_groups;
    // Real and imaginary inputs are each padded to whole segments. A group is padded to the chunks of the widest
    // format, so that matrices of different formats share their activations.
    const int inputs = complex ? 2 * ceil_div(width, CELL) * CELL : width;
    if (complex && kernels().tables) {
        s.chunks = ceil_div(width, CELL);
        s.columns = {complex, true, num_groups, width, s.chunks * 2 * TABLES};
        s.cells.reset(s.group_planes(ceil_div(rows, PLANE_ROWS), 0));
    } else {
        s.chunks = ceil_div(inputs, spec(format).segments * CELL);
        s.columns = {complex, false, num_groups, width, ceil_div(inputs, 64) * 64};
        s.cells.reset(static_cast<size_t>(s.panels) * num_groups * s.chunks * CHUNK_BYTES);
    }
    const int scale_panels = num_rows == 1 ? 1 : s.panels;
    s.scale_panel = num_rows == 1 ? 0 : static_cast<size_t>(num_groups) * PANEL;
    s.scales.reset(static_cast<size_t>(scale_panels) * num_groups * PANEL);
    const size_t group_heads = static_cast<size_t>(spec(format).heads) * CHUNK_BYTES;
    s.head_panel = num_rows == 1 ? 0 : group_heads * num_groups;
    s.heads.reset(group_heads * num_groups * scale_panels);
    return s;
}

// The cell of a row in one chunk of a group.
uint8_t* cell(Stream& s, int row, int group, int chunk) {
    return s.cells.data() +
           ((static_cast<size_t>(row / PANEL) * s.columns.groups + group) * s.chunks + chunk) * CHUNK_BYTES +
           row % PANEL * CELL;
}

// Stores a code of `bits` bits for each column. Segment i of a chunk has the bits from i * bits on.
void fill(Stream& s, const uint8_t* codes, const uint8_t* stored_as, int bits) {
    const int width = s.columns.width, groups = s.columns.groups, per_chunk = spec(s.format).segments * CELL;
    for (int row = 0; row < s.rows; ++row)
        for (int group = 0; group < groups; ++group, codes += width)
            for (int first = 0, chunk = 0; first < width; first += per_chunk, ++chunk) {
                uint8_t* to = cell(s, row, group, chunk);
                const int count = std::min(per_chunk, width - first);
                for (int j = 0; j < count; ++j)
                    to[j % CELL] |= static_cast<uint8_t>(stored_as[codes[first + j]] << (j / CELL * bits));
            }
}

void fill_scales(Stream& s, const float* scales, int num_rows) {
    const int groups = s.columns.groups;
    for (int row = 0; row < (num_rows == 1 ? PANEL : num_rows); ++row)
        for (int group = 0; group < groups; ++group)
            s.scales[(static_cast<size_t>(row / PANEL) * groups + group) * PANEL + row % PANEL] =
                scales[static_cast<size_t>(num_rows == 1 ? 0 : row) * groups + group];
}

// ---- Tables

// A table of even steps: code i is stored as c = stored_as[i], and its value is step * (c - twice_zero / 2).
struct Even {
    bool found = false;
    uint8_t stored_as[16] = {};
    float step = 0;
    int twice_zero = 0;
};

Even even_steps(const float* table, int size, const bool* used) {
    std::vector<float> distinct;
    for (int i = 0; i < size; ++i)
        if (used[i]) distinct.push_back(table[i]);
    std::sort(distinct.begin(), distinct.end());
    distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
    const float low = distinct.front(), high = distinct.back(), most = std::max(std::fabs(low), std::fabs(high));
    Even even;
    if (distinct.size() == 1) {  // its value is step * 1
        std::fill_n(even.stored_as, 16, uint8_t{1});
        even.step = low;
        even.found = true;
        return even;
    }
    for (int steps = 1; steps <= 3 && !even.found; ++steps) {
        const float step = (high - low) / steps;
        even.step = step;
        even.twice_zero = static_cast<int>(std::lrint(std::clamp(-2 * low / step, -100.0f, 100.0f)));
        even.found = std::abs(even.twice_zero) <= 6 && std::isfinite(step);
        for (int i = 0; i < size && even.found; ++i) {
            if (!used[i]) continue;
            const int code = static_cast<int>(std::lrint((table[i] - low) / step));
            even.stored_as[i] = static_cast<uint8_t>(code);
            even.found = std::fabs(step * (code - 0.5f * even.twice_zero) - table[i]) <= NEARLY * most;
        }
    }
    return even;
}

// Looks for integers of at most `limit` that are exactly proportional to the values. Returns the largest of them, or 0
// if there are none.
int exact_steps(const float* values, int size, int limit, int* integers) {
    float most = 0;
    for (int i = 0; i < size; ++i) most = std::max(most, std::fabs(values[i]));
    for (int steps = 1; steps <= limit && most > 0; ++steps) {
        bool exact = true;
        for (int i = 0; i < size && exact; ++i) {
            integers[i] = static_cast<int>(std::lrint(static_cast<double>(values[i]) * steps / most));
            exact = static_cast<double>(values[i]) * steps == static_cast<double>(most) * integers[i];
        }
        if (exact) return steps;
    }
    return 0;
}

constexpr int TABLE_MOST = 127 * 256 + 127;  // the largest value of two digits

// Stores a table as two digits for each entry.
void set_table(Stream& s, const float* table, int size, float most) {
    s.grain = most / TABLE_MOST;
    for (int i = 0; i < size && most > 0; ++i) {
        const int value = static_cast<int>(std::lrint(static_cast<double>(table[i]) / most * TABLE_MOST));
        const int high = static_cast<int>(std::floor((value + 128) / 256.0));
        s.table[0][i] = static_cast<uint8_t>(high);
        s.table[1][i] = static_cast<uint8_t>(value - 256 * high);
    }
}

wf_matrix* table_matrix(int n, int k, int bits, const uint8_t* codes, const float* table, const float* scales,
                        int num_rows, int num_groups, int rank, const float* row, const float* col, const float* bias) {
    check_shape(n, k);
    check(rank >= 1 && rank <= TILE, "rank: must be 1 to 8");
    check(rank == 1 || (row && col), "row, col: must be given where there are several ranks");
    check(bits >= 1 && bits <= 4, "bits: must be 1 to 4");
    check(codes && table && scales, "codes, table, scales: must be given");
    check_grid(n, k, num_rows, num_groups);
    const int size = 1 << bits;
    check_codes(codes, static_cast<size_t>(n) * k, size);
    check_finite(table, size, "table: not finite");
    check_finite(scales, static_cast<size_t>(num_rows) * num_groups, "scales: not finite");
    bool used[256] = {};
    for (size_t i = 0; i < static_cast<size_t>(n) * k; ++i) used[codes[i]] = true;

    auto made = empty(Kind::TABLE, n, k);
    wf_matrix& m = *made;
    m.rank = rank;
    for (int i = 0; i < size; ++i) m.values[i] = used[i] ? table[i] : 0.0f;
    const float most = std::fabs(
        *std::max_element(m.values, m.values + size, [](float a, float b) { return std::fabs(a) < std::fabs(b); }));
    const Even even = bits <= 2 ? even_steps(table, size, used) : Even{};
    int integers[16] = {};
    const int steps = even.found ? 0 : exact_steps(m.values, size, 127, integers);
    const Format two = steps ? Format::TABLE2_BYTE : Format::TABLE2,
                 four = steps ? Format::TABLE4_BYTE : Format::TABLE4;
    m.streams.push_back(stream(even.found ? Format::AFFINE2 : bits <= 2 ? two : four, n, k, num_rows, num_groups));
    Stream& s = m.streams.back();
    uint8_t stored_as[16];
    for (int i = 0; i < size; ++i) stored_as[i] = even.found ? even.stored_as[i] : static_cast<uint8_t>(i);
    if (even.found) {
        for (int i = size - 1; i >= 0; --i)
            if (used[i]) m.values[stored_as[i]] = table[i];
        s.twice_zero = even.twice_zero;
        s.grain = even.step / 2;
        m.kernel = even.twice_zero == 2 ? "ternary" : "affine2";
    } else if (steps) {
        s.grain = most / steps;
        for (int i = 0; i < size; ++i) s.table[0][i] = static_cast<uint8_t>(integers[i]);
        m.kernel = bits <= 2 ? "table2-byte" : "table4-byte";
    } else {
        set_table(s, m.values, size, most);
        m.kernel = bits <= 2 ? "table2" : "table4";
    }
    fill(s, codes, stored_as, bits <= 2 ? 2 : 4);
    fill_scales(s, scales, num_rows);
    set_factors(m, row, col, bias);
    return made.release();
}

// ---- Complex codes

// The scales of one row, group and stream, [p][t][axis], as integers times a unit. p is the matrix (U, W), t the stage,
// axis 0 the scale of real codes and 1 that of imaginary codes.
struct Grid {
    bool exact = false;
    int integers[8] = {};
    float unit = 0;
};

// The largest sum that codes can make of these scales.
int reach(const int* integers) {
    int most = 0;
    for (int axis = 0; axis < 2; ++axis) {
        int sum = 0;
        for (int i = axis; i < 8; i += 2) sum += std::abs(integers[i]);
        most = std::max(most, sum);
    }
    return most;
}

Grid exact_grid(const float* scales) {
    Grid grid;
    float most = 0;
    for (int i = 0; i < 8; ++i) most = std::max(most, std::fabs(scales[i]));
    const int steps = exact_steps(scales, 8, 127, grid.integers);
    grid.exact = most == 0 || (steps && reach(grid.integers) <= 127);
    grid.unit = steps ? most / steps : 0.0f;
    return grid;
}

Grid wide_grid(const float* scales) {
    Grid grid;
    double most = 0;
    for (int axis = 0; axis < 2; ++axis) {
        double sum = 0;
        for (int i = axis; i < 8; i += 2) sum += std::fabs(scales[i]);
        most = std::max(most, sum);
    }
    grid.unit = static_cast<float>(most / (WIDE_MAX - 4));  // 4 terms, each rounded by half
    for (int i = 0; i < 8 && most > 0; ++i)
        grid.integers[i] = static_cast<int>(std::lrint(scales[i] / most * (WIDE_MAX - 4)));
    return grid;
}

struct ComplexCodes {
    int rows, columns, num_stages, num_rows, num_groups;  // complex
    const uint8_t* codes;
    const float* scales;

    const uint8_t* codes_of(int p, int t) const {
        return codes + (static_cast<size_t>(p) * num_stages + t) * rows * columns;
    }
    float scale(int p, int t, int axis, int row, int group) const {
        return scales[(((static_cast<size_t>(p) * num_stages + t) * 2 + axis) * num_rows + row) * num_groups + group];
    }
    // The scales of `count` stages from `first` on, [p][t][axis], 0 for a second stage that does not exist.
    void gather(int first, int count, int row, int group, float* to) const {
        for (int i = 0; i < 8; ++i) {
            const int p = i / 4, t = i / 2 % 2, axis = i % 2;
            to[i] = t < count ? scale(p, first + t, axis, row, group) : 0.0f;
        }
    }
};

void set_head(Stream& s, int panel, int group, int slot, const Grid& grid, bool wide) {
    int8_t* at = reinterpret_cast<int8_t*>(s.heads.data() + panel * s.head_panel) +
                 static_cast<size_t>(group) * spec(s.format).heads * CHUNK_BYTES + slot * CELL;
    for (int i = 0; i < 8; ++i) {
        const int value = grid.integers[i];
        const int high = wide ? static_cast<int>(std::lrint(static_cast<double>(value) / WIDE)) : value;
        at[i] = static_cast<int8_t>(high);
        at[i + 8] = static_cast<int8_t>(-high);
        if (wide) {
            at[i + CHUNK_BYTES] = static_cast<int8_t>(value - WIDE * high);
            at[i + 8 + CHUNK_BYTES] = static_cast<int8_t>(WIDE * high - value);
        }
    }
}

void fill_heads(Stream& s, const ComplexCodes& f, int first, int count, bool wide) {
    float scales[8];
    for (int row = 0; row < (f.num_rows == 1 ? PANEL : f.num_rows); ++row)
        for (int group = 0; group < f.num_groups; ++group) {
            f.gather(first, count, f.num_rows == 1 ? 0 : row, group, scales);
            const Grid grid = wide ? wide_grid(scales) : exact_grid(scales);
            set_head(s, row / PANEL, group, row % PANEL, grid, wide);
            s.scales[(static_cast<size_t>(row / PANEL) * f.num_groups + group) * PANEL + row % PANEL] = grid.unit;
        }
}

// Stores codes as planes of bits. Code k stands for i^k, which is (p + q - 1) + i (q - p).
void fill_planes(Stream& s, const ComplexCodes& f, int first, int count) {
    static constexpr uint8_t BITS[4] = {0x11, 0x10, 0x00, 0x01};  // p in bit 0, q in bit 4
    const int width = s.columns.width;
    for (int i = 0; i < 2 * count; ++i) {
        const uint8_t* codes = f.codes_of(i / count, first + i % count);
        for (int row = 0; row < s.rows; ++row)
            for (int column = 0; column < f.columns; ++column, ++codes) {
                const int inside = column % width, lane = inside % CELL / 4;
                uint8_t* half = s.cells.data() + s.group_planes(row / PLANE_ROWS, column / width) +
                                static_cast<size_t>(lane / 2 * 2 * count + i) * s.half_bytes();
                half[(inside / CELL * 2 + lane % 2) * PLANE_ROWS + Stream::plane_byte(row)] |=
                    static_cast<uint8_t>(BITS[*codes] << inside % 4);
            }
    }
}

void fill_complex(Stream& s, const ComplexCodes& f, int first, int count) {
    const int width = s.columns.width, per_chunk = spec(s.format).segments / 2 * CELL;
    for (int p = 0; p < 2; ++p)
        for (int t = 0; t < count; ++t) {
            const uint8_t* codes = f.codes_of(p, first + t);
            const int shift = count == 1 ? 2 * p : 4 * p + 2 * t;
            for (int row = 0; row < s.rows; ++row)
                for (int column = 0; column < f.columns; ++column) {
                    const int group = column / width, inside = column % width, at = inside % per_chunk;
                    cell(s, row, group, inside / per_chunk)[at % CELL] |= static_cast<uint8_t>(
                        codes[static_cast<size_t>(row) * f.columns + column] << (shift + at / CELL * 4));
                }
        }
}

bool on_grid(const ComplexCodes& f, int first, int count) {
    float scales[8];
    for (int row = 0; row < f.num_rows; ++row)
        for (int group = 0; group < f.num_groups; ++group) {
            f.gather(first, count, row, group, scales);
            if (!exact_grid(scales).exact) return false;
        }
    return true;
}

wf_matrix* complex_matrix(int n, int k, int num_stages, const uint8_t* codes, const float* scales, int num_rows,
                          int num_groups, const float* row, const float* col, const float* bias) {
    check_shape(n, k);
    check(n % 2 == 0 && k % 2 == 0, "n, k: must be even");
    check(num_stages >= 1 && num_stages <= 4, "num_stages: must be 1 to 4");
    check(codes && scales, "codes, scales: must be given");
    check_grid(n / 2, k / 2, num_rows, num_groups);
    check_codes(codes, size_t{2} * num_stages * (n / 2) * (k / 2), 4);
    const size_t num_scales = size_t{4} * num_stages * num_rows * num_groups;
    check_finite(scales, num_scales, "scales: not finite");

    auto made = empty(Kind::COMPLEX, n, k);
    wf_matrix& m = *made;
    m.num_stages = num_stages;
    m.num_rows = num_rows;
    m.num_groups = num_groups;
    m.scales.reset(num_scales);
    std::copy_n(scales, num_scales, m.scales.data());
    const ComplexCodes f{n / 2, k / 2, num_stages, num_rows, num_groups, codes, scales};
    bool any_wide = false;
    for (int first = 0; first < num_stages; first += 2) {
        const int count = std::min(2, num_stages - first);
        const bool wide = !on_grid(f, first, count);
        any_wide = any_wide || wide;
        const Format format = count == 1 ? (wide ? Format::COMPLEX1_WIDE : Format::COMPLEX1)
                                         : (wide ? Format::COMPLEX2_WIDE : Format::COMPLEX2);
        m.streams.push_back(stream(format, f.rows, f.columns, num_rows, num_groups));
        if (m.streams.back().columns.planes) {
            fill_planes(m.streams.back(), f, first, count);
        } else {
            fill_complex(m.streams.back(), f, first, count);
        }
        fill_heads(m.streams.back(), f, first, count, wide);
    }
    m.kernel = any_wide ? "complex-wide" : "complex-grid";
    set_factors(m, row, col, bias);
    return made.release();
}

wf_matrix* int8_matrix(int n, int k, const int8_t* weight, const float* row, const float* bias) {
    check_shape(n, k);
    check(weight && row, "weight, row: must be given");
    auto made = empty(Kind::INT8, n, k);
    wf_matrix& m = *made;
    m.kernel = "int8";
    m.streams.push_back(stream(Format::INT8, n, k, 1, 1));
    Stream& s = m.streams.back();
    for (int r = 0; r < n; ++r)
        for (int first = 0, chunk = 0; first < k; first += CELL, ++chunk)
            std::memcpy(cell(s, r, 0, chunk), weight + static_cast<size_t>(r) * k + first, std::min(CELL, k - first));
    std::fill_n(s.scales.data(), PANEL, 1.0f);
    set_factors(m, row, nullptr, bias);
    return made.release();
}

uint16_t to_bf16(float x) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

wf_matrix* dense_matrix(int n, int k, const float* weight, const float* bias, int exact) {
    check_shape(n, k);
    check(weight, "weight: must be given");
    const size_t size = static_cast<size_t>(n) * k;
    check_finite(weight, size, "weight: not finite");
    auto made = empty(Kind::DENSE, n, k);
    wf_matrix& m = *made;
    m.kernel = exact ? "dense-fp32" : "dense-bf16";
    if (exact) {
        m.weight32.reset(size);
        std::copy_n(weight, size, m.weight32.data());
    } else {
        m.weight16.reset(size);
        for (size_t i = 0; i < size; ++i) m.weight16[i] = to_bf16(weight[i]);
    }
    set_factors(m, nullptr, nullptr, bias);
    return made.release();
}

}  // namespace

extern "C" {

wf_matrix* wf_matrix_table(int n, int k, int bits, const uint8_t* codes, const float* table, const float* scales,
                           int num_rows, int num_groups, int rank, const float* row, const float* col,
                           const float* bias) {
    return guarded<wf_matrix*>(nullptr, [&] {
        return table_matrix(n, k, bits, codes, table, scales, num_rows, num_groups, rank, row, col, bias);
    });
}

wf_matrix* wf_matrix_complex(int n, int k, int num_stages, const uint8_t* codes, const float* scales, int num_rows,
                             int num_groups, const float* row, const float* col, const float* bias) {
    return guarded<wf_matrix*>(
        nullptr, [&] { return complex_matrix(n, k, num_stages, codes, scales, num_rows, num_groups, row, col, bias); });
}

wf_matrix* wf_matrix_int8(int n, int k, const int8_t* weight, const float* row, const float* bias) {
    return guarded<wf_matrix*>(nullptr, [&] { return int8_matrix(n, k, weight, row, bias); });
}

wf_matrix* wf_matrix_dense(int n, int k, const float* weight, const float* bias, int exact) {
    return guarded<wf_matrix*>(nullptr, [&] { return dense_matrix(n, k, weight, bias, exact); });
}

void wf_matrix_free(wf_matrix* m) { delete m; }

size_t wf_matrix_bytes(const wf_matrix* m) {
    size_t bytes = sizeof(wf_matrix) + m->row.bytes() + m->col.bytes() + m->bias.bytes() + m->scales.bytes() +
                   m->weight32.bytes() + m->weight16.bytes();
    for (const Stream& s : m->streams) bytes += s.bytes();
    return bytes;
}

int wf_matrix_rows(const wf_matrix* m) { return m->n; }

int wf_matrix_columns(const wf_matrix* m) { return m->k; }

const char* wf_matrix_kernel(const wf_matrix* m) { return m->kernel; }

}  // extern "C"
