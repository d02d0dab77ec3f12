// How a matrix lies in memory.
//
// A *cell* is 16 bytes: the codes of one row for one *chunk* of columns. A *panel* is 8 rows. Its cells lie chunk by
// chunk with the 8 rows side by side, so that a thread reads its memory from end to end:
//
//     cells[panel][group][chunk][8 rows][16 bytes]
//
// A chunk has *segments* of 16 columns each: byte j of a cell holds the codes of column j of every segment. Activations
// lie in the order in which the kernels need them, 16 bytes for each segment. A *group* is columns with scales of their
// own. It is padded to whole chunks, and padded activations are zero, so that one kernel serves every width. Registers
// of 16, 32 or 64 bytes hold 1, 2 or 4 rows of the same memory.
//
// In complex layers a row is the complex row j. It stands for two real rows, j and n / 2 + j, which are its two
// *parts*. Segments alternate: 16 real inputs, then 16 imaginary ones.
//
// Instruction sets without dot products of bytes have complex codes as *planes* of bits instead (planes.inc), in *double
// panels* of 16 rows:
//
//     cells[double panel][group][half][matrix and stage][segment][2 lanes][16 rows]
//
// Each byte has two bits, p and q, for 4 neighbouring columns: p in its low nibble, q in its high one. A segment is 16
// complex columns, and lane l has its columns 4 l to 4 l + 3; half h has lanes 2 h and 2 h + 1. Rows 0 to 7 have the even
// bytes and rows 8 to 15 the odd ones.
#pragma once
#include <vector>

#include "common.h"

namespace wf {

constexpr int PANEL = 8, CELL = 16, CHUNK_BYTES = PANEL * CELL, PLANE_ROWS = 2 * PANEL;
// Bytes of tables for half a segment: [real, imaginary inputs][low, high digit][2 lanes][16].
constexpr int TABLES = 2 * 2 * 2 * 16;

enum class Format {
    AFFINE2,        // codes of 2 bits, 4 segments; code q has the value 2 q - twice_zero
    TABLE2,         // codes of 2 bits, 4 segments; a table of 16-bit values
    TABLE4,         // codes of 4 bits, 2 segments; a table of 16-bit values
    TABLE2_BYTE,    // as TABLE2, with a table of 8-bit values
    TABLE4_BYTE,    // as TABLE4, with a table of 8-bit values
    COMPLEX1,       // one stage, nibbles u + 4 w, segments re, im, re, im; scales are 8-bit values
    COMPLEX2,       // two stages, nibbles u0 + 4 u1 and w0 + 4 w1, segments re, im; scales are 8-bit values
    COMPLEX1_WIDE,  // as COMPLEX1, with scales of two digits
    COMPLEX2_WIDE,  // as COMPLEX2, with scales of two digits
    INT8,           // one signed byte, 1 segment
};
constexpr int NUM_FORMATS = 10;

struct FormatSpec {
    int segments;  // in a chunk
    int parts;     // real rows that a row stands for
    int heads;     // cells of scales that each row of a group has
};
constexpr FormatSpec SPECS[NUM_FORMATS] = {{4, 1, 0}, {4, 1, 0}, {2, 1, 0}, {4, 1, 0}, {2, 1, 0},
                                           {4, 2, 1}, {2, 2, 1}, {4, 2, 2}, {2, 2, 2}, {1, 1, 0}};
constexpr const FormatSpec& spec(Format format) { return SPECS[static_cast<int>(format)]; }

// A wide value has two digits: WIDE * high + low. A sum of four low digits fits a byte, and so does one of four high
// digits.
constexpr int WIDE = 63, WIDE_LOW = 31, WIDE_MAX = WIDE * 125;

// How the activations of a product lie: one group after the other, each of `stride` bytes.
struct Columns {
    bool complex = false;
    bool planes = false;  // the activations are tables, for codes that are planes of bits
    int groups = 1;
    int width = 0;                                   // columns of a group, complex columns if the layer is complex
    int stride = 0;                                  // bytes of a group, which are whole chunks
    int num_sums() const { return planes ? 8 : 4; }  // of a group of activations
    bool operator==(const Columns& o) const {
        return complex == o.complex && planes == o.planes && groups == o.groups && width == o.width &&
               stride == o.stride;
    }
};

// One pass over the columns. A complex layer of more than two stages has several, whose results add up.
struct Stream {
    Format format;
    int rows = 0, panels = 0;
    int chunks = 0;  // of one group; with planes, its segments
    Columns columns;
    Buffer<uint8_t> cells;
    Buffer<uint8_t> heads;      // [panel or 1][group][heads][8 rows][16]: scales as integers
    size_t head_panel = 0;      // bytes from panel to panel, or 0 if all panels share one
    Buffer<float> scales;       // [panel or 1][group][8]
    size_t scale_panel = 0;     // entries from panel to panel, or 0
    uint8_t table[2][16] = {};  // high and low byte of each entry, signed; TABLE2_BYTE and TABLE4_BYTE use the first
    int twice_zero = 0;         // of AFFINE2
    float grain = 1;            // what an integer 1 stands for: every scale is multiplied by it

    const uint8_t* group_cells(int panel, int group) const {
        return cells.data() + (static_cast<size_t>(panel) * columns.groups + group) * chunks * CHUNK_BYTES;
    }
    int stages() const { return format == Format::COMPLEX1 || format == Format::COMPLEX1_WIDE ? 1 : 2; }
    static int plane_byte(int row) { return row % PANEL * 2 + row % PLANE_ROWS / PANEL; }
    size_t half_bytes() const { return static_cast<size_t>(chunks) * 2 * PLANE_ROWS; }
    size_t group_planes(int double_panel, int group) const {
        return (static_cast<size_t>(double_panel) * columns.groups + group) * 2 * stages() * 2 * half_bytes();
    }
    const uint8_t* group_heads(int panel, int group) const {
        return heads.data() + panel * head_panel + static_cast<size_t>(group) * spec(format).heads * CHUNK_BYTES;
    }
    const float* group_scales(int panel, int group) const {
        return scales.data() + panel * scale_panel + static_cast<size_t>(group) * PANEL;
    }
    size_t bytes() const { return cells.bytes() + heads.bytes() + scales.bytes(); }
};

// Rounded activations of several tokens in the order that one set of columns needs, in memory of the call.
//
// Tokens come in tiles of up to TILE tokens. The 16 bytes of a segment lie side by side for all tokens of a tile. If a
// matrix has several ranks, each token is that many tokens here, x times each row of `col`, and they share a tile.
constexpr int TILE = 8;

struct Activations {
    Columns columns;
    int batch = 0;
    int tile = TILE;         // tokens in a whole tile
    int8_t* data = nullptr;  // [tile][segment][token of the tile][16]
    // [token][group][4]: sums of bytes 0-3, 4-7, 8-11 and 12-15 of every segment. With planes, [token][group][2][4]: those
    // of the real and of the imaginary inputs.
    int32_t* sums = nullptr;

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
    std::vector<wf::Stream> streams;
    int rank = 1;                      // pairs of `row` and `col`, whose results add up
    wf::Buffer<float> row, col, bias;  // empty if not given; row and bias are padded to whole panels of each part
    // What codes stand for: exact products need it.
    float values[16] = {};     // TABLE
    int num_stages = 0;        // COMPLEX
    wf::Buffer<float> scales;  // COMPLEX: [2, T, 2, R, G], as they were given
    int num_rows = 1, num_groups = 1;
    size_t read_bytes = 0;  // that one product reads
    // DENSE
    wf::Buffer<float> weight32;
    wf::Buffer<uint16_t> weight16;  // bf16

    int parts() const { return kind == Kind::COMPLEX ? 2 : 1; }
    int rows() const { return n / parts(); }
    int panels() const { return wf::ceil_div(rows(), wf::PANEL); }
    // What a thread takes at least: a panel, or a double panel.
    int panels_in_task() const { return !streams.empty() && streams[0].columns.planes ? 2 : 1; }
    int tasks() const { return wf::ceil_div(panels(), panels_in_task()); }
    size_t padded_row(int n) const { return static_cast<size_t>(n / rows()) * panels() * wf::PANEL + n % rows(); }
    size_t padded_rows() const { return static_cast<size_t>(panels()) * wf::PANEL * parts(); }
};
