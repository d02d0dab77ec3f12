// See exact.h.
#include "exact.h"

#include <algorithm>

#include "wf.h"

namespace wf {
namespace {

const uint8_t* cell(const Stream& s, int row, int group, int chunk) {
    return s.group_cells(row / PANEL, group) + static_cast<size_t>(chunk) * CHUNK_BYTES + row % PANEL * CELL;
}

void table_row(const wf_matrix& m, int n, float* out) {
    const Stream& s = m.streams[0];
    const int bits = 8 / spec(s.format).segments, mask = (1 << bits) - 1, per_chunk = spec(s.format).segments * CELL;
    for (int group = 0; group < s.columns.groups; ++group) {
        const float scale = s.group_scales(n / PANEL, group)[n % PANEL];
        for (int j = 0; j < s.columns.width; ++j) {
            const int at = j % per_chunk;
            const uint8_t byte = cell(s, n, group, j / per_chunk)[at % CELL];
            *out++ = m.values[byte >> (at / CELL * bits) & mask] * scale;
        }
    }
}

void int8_row(const wf_matrix& m, int n, float* out) {
    for (int j = 0; j < m.k; ++j) out[j] = static_cast<int8_t>(cell(m.streams[0], n, 0, j / CELL)[j % CELL]);
}

// The codes of complex column `inside` of a group: of matrix p and stage t, from bit 2 p with one stage, and from bit
// 4 p + 2 t with two.
int cell_codes(const Stream& s, int row, int group, int inside) {
    const int per_chunk = spec(s.format).segments / 2 * CELL, at = inside % per_chunk;
    return cell(s, row, group, inside / per_chunk)[at % CELL] >> (at / CELL * 4);
}

int plane_codes(const Stream& s, int row, int group, int inside) {
    static constexpr int CODES[4] = {2, 3, 1, 0};  // of the bits p + 2 q
    const int lane = inside % CELL / 4;
    const uint8_t* from = s.cells.data() + s.group_planes(row / PLANE_ROWS, group) +
                          lane / 2 * 2 * s.stages() * s.half_bytes() + (inside / CELL * 2 + lane % 2) * PLANE_ROWS +
                          Stream::plane_byte(row);
    int codes = 0;
    for (int i = 0; i < 2 * s.stages(); ++i, from += s.half_bytes()) {
        const int bits = *from >> inside % 4;
        codes |= CODES[(bits & 1) | (bits >> 3 & 2)] << 2 * i;
    }
    return codes;
}

constexpr float REAL[4] = {1, 0, -1, 0}, IMAGINARY[4] = {0, 1, 0, -1};

// Adds the stages of one stream to row n of the real weight, which is a row of [A11 A12] or of [A21 A22]
// (kernel_formats.inc).
void add_complex(const wf_matrix& m, const Stream& s, int first, int n, float* out) {
    const int half_rows = m.n / 2, half = m.k / 2, row = n % half_rows, count = std::min(2, m.num_stages - first);
    const bool top = n < half_rows;
    for (int j = 0; j < half; ++j) {
        const int group = j / s.columns.width, inside = j % s.columns.width;
        const int codes = s.columns.planes ? plane_codes(s, row, group, inside) : cell_codes(s, row, group, inside);
        float sum[2][2] = {};  // [p][axis]
        for (int p = 0; p < 2; ++p)
            for (int t = 0; t < count; ++t) {
                const int code = codes >> (count == 1 ? 2 * p : 4 * p + 2 * t) & 3;
                const size_t at_stage = (static_cast<size_t>(p) * m.num_stages + first + t) * 2;
                const size_t at_row = static_cast<size_t>(m.num_rows == 1 ? 0 : row);
                for (int axis = 0; axis < 2; ++axis)
                    sum[p][axis] += (axis ? IMAGINARY : REAL)[code] *
                                    m.scales[((at_stage + axis) * m.num_rows + at_row) * m.num_groups + group];
            }
        out[j] += top ? sum[0][0] + sum[1][0] : sum[0][1] + sum[1][1];
        out[half + j] += top ? sum[1][1] - sum[0][1] : sum[0][0] - sum[1][0];
    }
}

void dense_row(const wf_matrix& m, int n, float* out) {
    for (int j = 0; j < m.k; ++j) {
        const size_t at = static_cast<size_t>(n) * m.k + j;
        if (m.weight32.size()) {
            out[j] = m.weight32[at];
        } else {
            const uint32_t bits = static_cast<uint32_t>(m.weight16[at]) << 16;
            std::memcpy(out + j, &bits, 4);
        }
    }
}

void code_row(const wf_matrix& m, int n, float* out) {
    switch (m.kind) {
        case Kind::TABLE: return table_row(m, n, out);
        case Kind::INT8: return int8_row(m, n, out);
        case Kind::DENSE: return dense_row(m, n, out);
        case Kind::COMPLEX:
            std::fill_n(out, m.k, 0.0f);
            for (size_t i = 0; i < m.streams.size(); ++i) add_complex(m, m.streams[i], static_cast<int>(2 * i), n, out);
    }
}

// The sum of row[n] * col[j] over the ranks.
float factor(const wf_matrix& m, int n, int j) {
    float sum = 0;
    for (int rank = 0; rank < m.rank; ++rank) {
        const float row = m.row.size() ? m.row[rank * m.padded_rows() + m.padded_row(n)] : 1.0f;
        sum += m.col.size() ? row * m.col[static_cast<size_t>(rank) * m.k + j] : row;
    }
    return sum;
}

}  // namespace

void decode_row(const wf_matrix& m, int n, float* out) {
    code_row(m, n, out);
    if (!m.row.size() && !m.col.size()) return;
    for (int j = 0; j < m.k; ++j) out[j] *= factor(m, n, j);
}

}  // namespace wf

extern "C" int wf_matrix_row(const wf_matrix* m, int n, float* out) {
    return wf::guarded(1, [&] {
        wf::check(m && out, "matrix, out: must be given");
        wf::check(n >= 0 && n < m->n, "row: not of this matrix");
        wf::decode_row(*m, n, out);
        return 0;
    });
}
