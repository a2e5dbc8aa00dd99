// One tile of exponentials in bfloat16, for `sweep.py`, in one pass and with float32 logits:
//
//     z = scale * (W x^T + bias),  e = exp(z - shift),  0 at the targets;  sums += e,  above += (z > shift)
//
// It is compiled on first use and called through ctypes. The products are torch's own small matrix kernels (AMX or
// AVX-512 by the machine), which add up in float32: no second product is needed for what a bfloat16 logit loses.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace c10 {
struct BFloat16;
enum class ScalarType : int8_t;
}
namespace at::native::cpublas {
bool could_pack(c10::ScalarType type);
void brgemm(int64_t m, int64_t n, int64_t k, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add,
            const c10::BFloat16 *a, const c10::BFloat16 *b, float *c, bool pairs);
void brgemm_release(bool pairs);
}

namespace {

constexpr int64_t HEIGHT = 128, WIDTH = 64;  // of the piece of a tile that stays in the cache

inline float exponential(float x) {
    // 2^n e^r with |r| <= ln(2)/2 and e^r to the 6th power: relative error 1e-7. NaN stays NaN.
    float y = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    float n = __builtin_rintf(y * 1.44269504089f);
    float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    float e = x < -87.0f ? 0.0f : p * power;
    return x != x ? x : e;
}

inline uint16_t rounded(float f) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    uint32_t up = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return f != f ? 0x7fc0 : static_cast<uint16_t>(up);
}

void row(const float *__restrict z, const float *__restrict shift, float bias, float scale, int64_t n,
         uint16_t *__restrict out, float *__restrict sum, float *__restrict above) {
    for (int64_t c = 0; c < n; c++) {
        float d = scale * (z[c] + bias) - shift[c];
        float e = exponential(d);
        sum[c] += e;
        above[c] += d > 0.0f ? 1.0f : 0.0f;
        out[c] = rounded(e);
    }
}

}  // namespace

// Whether torch has these matrix kernels for this machine.
extern "C" bool ygx_usable() { return at::native::cpublas::could_pack(static_cast<c10::ScalarType>(15)); }

// x [columns, size] to pieces of WIDTH columns, each [size / 2, columns of the piece, 2].
extern "C" void ygx_pack(const uint16_t *x, int64_t columns, int64_t size, uint16_t *packed) {
    for (int64_t c0 = 0; c0 < columns; c0 += WIDTH) {
        int64_t width = columns - c0 < WIDTH ? columns - c0 : WIDTH;
        uint16_t *piece = packed + c0 * size;
        for (int64_t c = 0; c < width; c++)
            for (int64_t k = 0; k < size; k++)
                piece[(k / 2 * width + c) * 2 + k % 2] = x[(c0 + c) * size + k];
    }
}

// weight [rows, size]; out [rows, columns] with `stride`; token (ascending), column [marks]: where e is 0.
extern "C" void ygx_exponentials(const uint16_t *weight, int64_t rows, int64_t size, const uint16_t *packed,
                                 int64_t columns, uint16_t *out, int64_t stride, const float *shift,
                                 const float *bias, float scale, const int64_t *token, const int64_t *column,
                                 int64_t marks, double *sums, int64_t *aboves) {
    int64_t pieces = (rows + HEIGHT - 1) / HEIGHT;
#pragma omp parallel
    {
        std::vector<float> z(HEIGHT * WIDTH), sum(columns), above(columns);
        std::vector<double> total(columns);
#pragma omp for schedule(static)
        for (int64_t piece = 0; piece < pieces; piece++) {
            int64_t v0 = piece * HEIGHT, height = rows - v0 < HEIGHT ? rows - v0 : HEIGHT;
            int64_t first = std::lower_bound(token, token + marks, v0) - token;
            int64_t last = std::lower_bound(token, token + marks, v0 + height) - token;
            std::memset(sum.data(), 0, columns * sizeof(float));
            for (int64_t c0 = 0; c0 < columns; c0 += WIDTH) {
                int64_t width = columns - c0 < WIDTH ? columns - c0 : WIDTH;
                at::native::cpublas::brgemm(
                    height, width, size, size, width, width, false,
                    reinterpret_cast<const c10::BFloat16 *>(weight + v0 * size),
                    reinterpret_cast<const c10::BFloat16 *>(packed + c0 * size), z.data(), true);
                for (int64_t m = first; m < last; m++) {
                    int64_t c = column[m] - c0;
                    if (c >= 0 && c < width) z[(token[m] - v0) * width + c] = -__builtin_inff();
                }
                for (int64_t v = 0; v < height; v++)
                    row(&z[v * width], shift + c0, bias ? bias[v0 + v] : 0.0f, scale, width,
                        out + (v0 + v) * stride + c0, &sum[c0], &above[c0]);
            }
            for (int64_t c = 0; c < columns; c++) total[c] += sum[c];
        }
        at::native::cpublas::brgemm_release(true);
#pragma omp critical
        for (int64_t c = 0; c < columns; c++) {
            sums[c] += total[c];
            aboves[c] += static_cast<int64_t>(above[c]);
        }
    }
}
