// How a matrix lies in memory.
//
// A *cell* is 16 bytes: the codes of one row for one chunk of columns. A *panel* is 8 rows; its cells lie chunk by chunk,
// the 8 rows side by side, so that a thread reads one stream from end to end:
//
//     cells[panel][group][chunk][8 rows][16 bytes]
//
// The columns of a chunk come in *segments* of 16: byte j of a cell holds column j of each of its segments. Activations
// lie as the kernels meet them: 16 bytes for each segment. A group of columns with scales of its own is padded to whole
// chunks; padded activations are zero. So one kernel serves every width, and registers of 16, 32 or 64 bytes hold 1, 2 or
// 4 rows of the same memory.
//
// Complex (Fairy2i) layers: a row is a complex row j, which stands for the real rows j and n / 2 + j, its two *parts*;
// segments alternate between 16 real and 16 imaginary inputs.
#pragma once
#include <vector>

#include "common.h"

namespace wf {

constexpr int PANEL = 8, CELL = 16, CHUNK_BYTES = PANEL * CELL;

enum class Format {
    AFFINE2,      // q 2 bits, 4 segments: value 2 q - twice_zero
    TABLE2,       // q 2 bits, 4 segments: 16-bit table
    TABLE4,       // q 4 bits, 2 segments: 16-bit table
    TABLE2_BYTE,  // the same with tables that lie on a grid of 8 bits
    TABLE4_BYTE,
    COMPLEX1,       // nibble u + 4 w, (re, im) x 2: one stage, scales on a grid of 8 bits
    COMPLEX2,       // nibbles u0 + 4 u1, w0 + 4 w1, re, im: two stages, the same
    COMPLEX1_WIDE,  // as COMPLEX1, scales in two digits
    COMPLEX2_WIDE,
    INT8,  // one signed byte, 1 segment
};
constexpr int NUM_FORMATS = 10;

struct FormatSpec {
    int segments;  // of 16 in a chunk
    int parts;     // real rows of a row
    int heads;     // cells of scales in front of a group
};
constexpr FormatSpec SPECS[NUM_FORMATS] = {{4, 1, 0}, {4, 1, 0}, {2, 1, 0}, {4, 1, 0}, {2, 1, 0},
                                           {4, 2, 1}, {2, 2, 1}, {4, 2, 2}, {2, 2, 2}, {1, 1, 0}};
constexpr const FormatSpec& spec(Format format) { return SPECS[static_cast<int>(format)]; }

// Digits of a wide value: WIDE * high + low. A sum of four lows, and one of four highs, stays within a byte.
constexpr int WIDE = 63, WIDE_LOW = 31, WIDE_MAX = WIDE * 125;

// Where the activations of a product lie: one group after the other, each `stride` bytes.
struct Columns {
    bool complex = false;
    int groups = 1;
    int width = 0;   // columns of a group; of a complex layer, complex columns
    int stride = 0;  // bytes of a group, whole chunks
    bool operator==(const Columns& o) const {
        return complex == o.complex && groups == o.groups && width == o.width && stride == o.stride;
    }
};

// One pass over the columns.
struct Stream {
    Format format;
    int rows = 0, panels = 0, chunks = 0;  // chunks of one group
    Columns columns;
    Buffer<uint8_t> cells;
    Buffer<uint8_t> heads;      // [panel or 1][group][heads][8 rows][16]: the scales' integers, ahead of the codes
    size_t head_panel = 0;      // bytes from panel to panel, 0 where they share one
    Buffer<float> scales;       // [panel or 1][group][8]
    size_t scale_panel = 0;     // entries from panel to panel
    uint8_t table[2][16] = {};  // of TABLE2 and TABLE4: high and low byte of each entry, signed
    int twice_zero = 0;         // of AFFINE2
    float grain = 1;            // times every scale: what an integer 1 stands for

    const uint8_t* group_cells(int panel, int group) const {
        return cells.data() + (static_cast<size_t>(panel) * columns.groups + group) * chunks * CHUNK_BYTES;
    }
    const uint8_t* group_heads(int panel, int group) const {
        return heads.data() + panel * head_panel + static_cast<size_t>(group) * spec(format).heads * CHUNK_BYTES;
    }
    const float* group_scales(int panel, int group) const {
        return scales.data() + panel * scale_panel + static_cast<size_t>(group) * PANEL;
    }
    size_t bytes() const { return cells.bytes() + heads.bytes() + scales.bytes(); }
};

// Activations of several tokens as one set of columns wants them, in memory of the call's.
//
// Tokens come in tiles of up to TILE; the 16 bytes of one segment lie side by side for all tokens of a tile. Of a matrix of
// several ranks each token is as many tokens here, x times each of the rows of `col`; they share a tile.
constexpr int TILE = 8;

struct Activations {
    Columns columns;
    int batch = 0;
    int tile = TILE;          // tokens in a whole tile
    int8_t* data = nullptr;   // [tile][segment][token of the tile][16]
    int32_t* sums = nullptr;  // [token][group][4]: of bytes 0-3, 4-7, 8-11 and 12-15 of every segment

    size_t length() const { return static_cast<size_t>(columns.groups) * columns.stride; }
    int tokens(int index) const { return batch - index * tile < tile ? batch - index * tile : tile; }
    int8_t* at(int index) const { return data + static_cast<size_t>(index) * tile * length(); }
};

}  // namespace wf

enum class Kind { TABLE, COMPLEX, INT8, DENSE };

struct wf_matrix {
    Kind kind;
    int n = 0, k = 0;
    const char* kernel = "";
    std::vector<wf::Stream> streams;   // several passes add up
    int rank = 1;                      // rows of `row` and `col`, whose products add up
    wf::Buffer<float> row, col, bias;  // empty where not given; row and bias padded to whole panels of each part
    // What the codes stand for, for exact products.
    float values[16] = {};     // TABLE
    int num_stages = 0;        // COMPLEX
    wf::Buffer<float> scales;  // COMPLEX: [2, T, 2, R, G] as given
    int num_rows = 1, num_groups = 1;
    size_t read_bytes = 0;  // by one product
    // DENSE
    wf::Buffer<float> weight32;
    wf::Buffer<uint16_t> weight16;  // bf16

    int parts() const { return kind == Kind::COMPLEX ? 2 : 1; }
    int rows() const { return n / parts(); }
    int panels() const { return wf::ceil_div(rows(), wf::PANEL); }
    size_t padded_row(int n) const { return static_cast<size_t>(n / rows()) * panels() * wf::PANEL + n % rows(); }
    size_t padded_rows() const { return static_cast<size_t>(panels()) * wf::PANEL * parts(); }
};
