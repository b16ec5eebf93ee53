// Rounding with feedback in both directions: see techniques/_shared/two_sided.py.
//
// An element is unit * level(code) + offset; level is code - zero, or one of 16 table entries. All matrices are dense
// and row-major, float32. `metric` is A (columns x columns), `coupling` is B (rows x rows) or null for the identity.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t TOGETHER = 8;  // rows that share one pass over A and over the other rows' errors
constexpr int TABLE = 16;

struct Grid {
    const float* unit;
    const float* offset;  // null: 0
    const float* levels;  // null: code - zero
    int zero;
    int top;
    uint8_t* codes;
    float* value;

    // The code whose value is nearest to `wanted` at element `i`; returns the value.
    float nearest(int64_t i, float wanted) const {
        const float base = offset ? offset[i] : 0.0f;
        const float place = unit[i] == 0.0f ? 0.0f : (wanted - base) / unit[i];
        if (levels) {
            int code = 0;
            for (int k = 0; k + 1 < TABLE; ++k) code += place > 0.5f * (levels[k] + levels[k + 1]);
            codes[i] = static_cast<uint8_t>(code);
            return levels[code] * unit[i] + base;
        }
        const int code = std::clamp(static_cast<int>(std::nearbyintf(std::clamp(place, -1e6f, 1e6f))) + zero, 0, top);
        codes[i] = static_cast<uint8_t>(code);
        return static_cast<float>(code - zero) * unit[i] + base;
    }
};

inline void add(float* out, const float* in, float factor, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] += factor * in[i];
}

}  // namespace

extern "C" {

// Every element once, in order. `across` (columns) and `down` (rows, or null) are upper triangular with
// inverse(A) = across^T across and inverse(B) = down^T down.
void first_pass(int64_t rows, int64_t columns, const float* matrix, const float* unit, const float* offset,
                const float* levels, int zero, int top, const float* across, const float* down, uint8_t* codes,
                float* value) {
    const Grid grid{unit, offset, levels, zero, top, codes, value};
    std::vector<float> lost(down ? rows * columns : 0), wanted(TOGETHER * columns), work(columns);
    for (int64_t first = 0; first < rows; first += TOGETHER) {
        const int64_t last = std::min(first + TOGETHER, rows);
        std::copy(matrix + first * columns, matrix + last * columns, wanted.begin());
        for (int64_t k = 0; down && k < first; ++k)
            for (int64_t r = first; r < last; ++r)
                add(&wanted[(r - first) * columns], &lost[k * columns], -down[k * rows + r], columns);
        for (int64_t r = first; r < last; ++r) {
            float* target = &wanted[(r - first) * columns];
            for (int64_t k = first; down && k < r; ++k)
                add(target, &lost[k * columns], -down[k * rows + r], columns);
            std::copy(target, target + columns, work.begin());
            for (int64_t j = 0; j < columns; ++j) {
                const int64_t at = r * columns + j;
                value[at] = grid.nearest(at, work[j]);
                const float* rest = across + j * columns;
                add(&work[j + 1], rest + j + 1, -(work[j] - value[at]) / rest[j], columns - j - 1);
            }
            for (int64_t j = 0; down && j < columns; ++j)
                lost[r * columns + j] = (target[j] - value[r * columns + j]) / down[r * rows + r];
        }
    }
}

// One sweep of coordinate descent on tr(A D^T B D), D = value - matrix, over all codes; returns how many changed.
int64_t sweep(int64_t rows, int64_t columns, const float* matrix, const float* unit, const float* offset,
              const float* levels, int zero, int top, const float* metric, const float* coupling, uint8_t* codes,
              float* value) {
    const Grid grid{unit, offset, levels, zero, top, codes, value};
    std::vector<float> error(rows * columns), pull(TOGETHER * columns), slope(TOGETHER * columns);
    for (int64_t i = 0; i < rows * columns; ++i) error[i] = value[i] - matrix[i];
    int64_t changed = 0;
    for (int64_t first = 0; first < rows; first += TOGETHER) {
        const int64_t last = std::min(first + TOGETHER, rows), count = last - first;
        std::copy(error.begin() + first * columns, error.begin() + last * columns, pull.begin());
        for (int64_t k = 0; coupling && k < rows; ++k)
            for (int64_t r = first; r < last; ++r)
                if (k != r)
                    add(&pull[(r - first) * columns], &error[k * columns],
                        coupling[r * rows + k] / coupling[r * rows + r], columns);
        std::fill(slope.begin(), slope.end(), 0.0f);
        for (int64_t j = 0; j < columns; ++j)
            for (int64_t r = 0; r < count; ++r)
                add(&slope[r * columns], metric + j * columns, pull[r * columns + j], columns);
        for (int64_t r = first; r < last; ++r) {
            float* own = &slope[(r - first) * columns];
            for (int64_t j = 0; j < columns; ++j) {
                const int64_t at = r * columns + j;
                const uint8_t before = codes[at];
                const float now = grid.nearest(at, value[at] - own[j] / metric[j * columns + j]);
                if (codes[at] == before) continue;
                const float moved = now - value[at];
                value[at] = now;
                error[at] += moved;
                ++changed;
                add(own, metric + j * columns, moved, columns);
                for (int64_t k = r + 1; coupling && k < last; ++k)
                    add(&slope[(k - first) * columns], metric + j * columns,
                        moved * coupling[k * rows + r] / coupling[k * rows + k], columns);
            }
        }
    }
    return changed;
}

}  // extern "C"
