// Both sweeps of the head (see `tiled.py`) on the small matrix kernels that torch brings along (AMX or AVX-512):
//
//     first    e = exp(scale (W x^T + bias) - shift), 0 at the targets;  sums of e and of e (z - shift), ranks,
//              and total = e^T W
//     second   e again, what the targets hold added;  dW = e y with y = factor x
//
// No exponential leaves the cache, and all sums are float32 or wider. A float32 number counts as the sum of three
// bfloat16 ones, its planes; a product of two such matrices is what matters of the nine products of their planes.
// Compiled on first use, called through ctypes.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
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

using bf16 = uint16_t;
using std::min;

constexpr int64_t WIDTH = 64;  // columns of a right factor that lie together
template <int P> constexpr int64_t FIRST = P == 1 ? 256 : 128;  // tokens of a tile of the first sweep
constexpr int64_t SECOND = 256;  // and of the second
constexpr int64_t DEEP = 256;  // columns whose exponentials the second sweep multiplies at once

// Working memory that begins with a cache line, as a row that crosses two costs the matrix unit twice.
template <typename T> struct Room {
    struct Free {
        void operator()(T *p) const { std::free(p); }
    };
    std::unique_ptr<T, Free> at;

    explicit Room(int64_t n) : at(static_cast<T *>(std::aligned_alloc(64, (n * sizeof(T) + 64) / 64 * 64))) {
        if (!at) std::abort();
    }
    T *data() const { return at.get(); }
    T &operator[](int64_t i) const { return at.get()[i]; }
};

template <typename T> constexpr int PLANES = sizeof(T) == 2 ? 1 : 3;

// Elements [token, column] of e that differ from the rest, ascending by token.
struct Marks {
    const int64_t *token, *column;
    const float *value;
    int64_t count;

    template <typename F> void within(int64_t v0, int64_t n, int64_t c0, int64_t width, F f) const {
        int64_t i = std::lower_bound(token, token + count, v0) - token;
        for (; i < count && token[i] < v0 + n; i++)
            if (column[i] >= c0 && column[i] < c0 + width)
                f((token[i] - v0) * width + column[i] - c0, value ? value[i] : 0.0f);
    }
};

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

inline bf16 rounded(float f) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    uint32_t up = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return f != f ? 0x7fc0 : static_cast<bf16>(up);
}

inline float widened(float f) { return f; }
inline float widened(bf16 b) {
    uint32_t bits = static_cast<uint32_t>(b) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

template <int P> inline void split(float f, bf16 *planes) {
    for (int p = 0; p < P; p++) {
        planes[p] = rounded(f);
        f -= widened(planes[p]);
    }
}

// c [m, n] (+)= a b. Left factors have their planes side by side, largest first: [m, P k]; right ones below each
// other, smallest first, and neighbours in k in pairs: [P k / 2, n, 2]. So the beginning of one meets the end of the
// other, in P products that add up the smallest terms first and leave out those below the last digit.
template <int P>
void multiply(int64_t m, int64_t n, int64_t k, const bf16 *a, const bf16 *b, float *c, int64_t ld_c, bool add) {
    for (int p = 0; p < P; p++)
        at::native::cpublas::brgemm(m, n, (P - p) * k, P * k, n, ld_c, add || p,
                                    reinterpret_cast<const c10::BFloat16 *>(a),
                                    reinterpret_cast<const c10::BFloat16 *>(b + p * k * n), c, true);
}

// Rows of the head as a left factor [n, P size]; bfloat16 is one already.
const bf16 *left(const bf16 *w, int64_t, int64_t, const Room<bf16> &) { return w; }
const bf16 *left(const float *w, int64_t n, int64_t size, const Room<bf16> &room) {
    for (int64_t v = 0; v < n; v++)
        for (int64_t k = 0; k < size; k++) {
            bf16 p[3];
            split<3>(w[v * size + k], p);
            for (int i = 0; i < 3; i++) room[(3 * v + i) * size + k] = p[i];
        }
    return room.data();
}

void transpose(const uint32_t *in, int64_t ld_in, uint32_t *out, int64_t ld_out) {  // 16 by 16
    typedef uint32_t Line __attribute__((vector_size(64)));
    Line a[16], b[16];
    for (int i = 0; i < 16; i++) std::memcpy(&a[i], in + i * ld_in, 64);
    for (int round = 0; round < 4; round++) {
        for (int i = 0; i < 8; i++) {
            b[2 * i] = __builtin_shufflevector(a[i], a[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            b[2 * i + 1] =
                __builtin_shufflevector(a[i], a[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
        std::memcpy(a, b, sizeof a);
    }
    for (int i = 0; i < 16; i++) std::memcpy(out + i * ld_out, &a[i], 64);
}

// n rows of a left factor [n, P size] as right factors [P FIRST / 2, width, 2], a strip of WIDTH columns after the
// other; zeros after the n-th.
template <int P> void strips(const bf16 *w, int64_t n, int64_t size, bf16 *out) {
    uint32_t *pairs = reinterpret_cast<uint32_t *>(out);
    for (int64_t v = 0; v < FIRST<P>; v += 2)
        for (int64_t p = 0; p < P; p++) {
            const bf16 *even = w + (v * P + p) * size, *odd = even + P * size;
            const bool has_even = v < n, has_odd = v + 1 < n;
            for (int64_t k0 = 0; k0 < size; k0 += WIDTH) {
                const int64_t width = min(WIDTH, size - k0);
                uint32_t *to = pairs + P * FIRST<P> / 2 * k0 + ((P - 1 - p) * FIRST<P> + v) / 2 * width;
                for (int64_t k = 0; k < width; k++)
                    to[k] = (has_even ? even[k0 + k] : 0) | (has_odd ? uint32_t{odd[k0 + k]} << 16 : 0);
            }
        }
}

// Logits z [n, width] to exponentials, in place; MOMENTS: also the sums of e (z - shift).
template <bool MOMENTS>
void exponentiate(float *z, int64_t n, int64_t width, const float *shift, const float *bias, float scale, float *sum,
                  float *moment, float *above) {
    for (int64_t v = 0; v < n; v++) {
        float b = bias ? bias[v] : 0.0f, *__restrict row = z + v * width;
        for (int64_t c = 0; c < width; c++) {
            float d = scale * (row[c] + b) - shift[c];
            row[c] = exponential(d);
            sum[c] += row[c];
            if (MOMENTS) moment[c] += row[c] * (d < -200.0f ? -200.0f : d);  // 0 times -inf would be NaN
            above[c] += d > 0.0f ? 1.0f : 0.0f;
        }
    }
}

// e [n, width] turned into a left factor [width, P FIRST]; zeros after the n-th row.
template <int P> void turned(float *e, int64_t n, int64_t width, bf16 *out, const Room<uint32_t> &pairs) {
    std::fill(e + n * width, e + FIRST<P> * width, 0.0f);
    uint32_t *to = reinterpret_cast<uint32_t *>(out);
    constexpr int64_t HALF = FIRST<P> / 2;
    for (int64_t v = 0; v < HALF; v++)
        for (int64_t c = 0; c < width; c++) {
            bf16 even[P], odd[P];
            split<P>(e[2 * v * width + c], even);
            split<P>(e[(2 * v + 1) * width + c], odd);
            for (int p = 0; p < P; p++) pairs[(p * HALF + v) * width + c] = even[p] | uint32_t{odd[p]} << 16;
        }
    for (int64_t v = 0; v < P * HALF; v += 16)
        for (int64_t c = 0; c < width; c += 16)
            transpose(&pairs[v * width + c], width, to + c * P * HALF + v, P * HALF);
}

// What both sweeps read: the head, and the columns with their marks.
template <typename T> struct Tiles {
    const T *weight;
    int64_t tokens, size;
    const bf16 *x;
    int64_t columns;
    const float *shift, *bias;
    float scale;
    Marks targets;

    // e [n, width] of the tokens from v0 on, whose rows are `w` as a left factor.
    void exponentials(const bf16 *w, int64_t v0, int64_t n, int64_t c0, int64_t width, float *e, float *sum,
                      float *moment, float *above) const {
        multiply<PLANES<T>>(n, width, size, w, x + c0 * size * PLANES<T>, e, width, false);
        targets.within(v0, n, c0, width, [e](int64_t at, float) { e[at] = -__builtin_inff(); });
        (moment ? exponentiate<true> : exponentiate<false>)(e, n, width, shift + c0, bias ? bias + v0 : nullptr, scale,
                                                             sum, moment, above);
    }

    // Tokens [begin, end) and columns [from, to): sums, above [columns]; moments [columns], total [columns, size] or
    // null.
    void first(int64_t begin, int64_t end, int64_t from, int64_t to, double *sums, double *moments, int64_t *above,
               float *total) const {
        constexpr int P = PLANES<T>;
        const Room<bf16> room(P > 1 ? P * FIRST<P> * size : 0), right(total ? P * FIRST<P> * size : 0);
        const Room<bf16> factor(P * FIRST<P> * WIDTH);
        const Room<uint32_t> pairs(P * FIRST<P> / 2 * WIDTH);
        const Room<float> e(FIRST<P> * WIDTH);
        std::vector<float> sum(WIDTH), moment(WIDTH), higher(columns);
        for (int64_t v0 = begin; v0 < end; v0 += FIRST<P>) {
            const int64_t n = min(FIRST<P>, end - v0);
            const bf16 *w = left(weight + v0 * size, n, size, room);
            if (total) strips<P>(w, n, size, right.data());
            for (int64_t c0 = from; c0 < to; c0 += WIDTH) {
                const int64_t width = min(WIDTH, to - c0);
                std::fill(sum.begin(), sum.end(), 0.0f);
                std::fill(moment.begin(), moment.end(), 0.0f);
                exponentials(w, v0, n, c0, width, e.data(), sum.data(), moments ? moment.data() : nullptr, &higher[c0]);
                for (int64_t c = 0; c < width; c++) sums[c0 + c] += sum[c];
                for (int64_t c = 0; moments && c < width; c++) moments[c0 + c] += moment[c];
                if (!total) continue;
                turned<P>(e.data(), n, width, factor.data(), pairs);
                for (int64_t k0 = 0; k0 < size; k0 += WIDTH)
                    multiply<P>(width, min(WIDTH, size - k0), FIRST<P>, factor.data(), &right[P * FIRST<P> * k0],
                                total + c0 * size + k0, size, true);
            }
        }
        for (int64_t c = from; c < to; c++) above[c] += static_cast<int64_t>(higher[c]);
        at::native::cpublas::brgemm_release(true);
    }

    // dW of the tokens from v0 on, and of the bias where it is wanted. y: a right factor per DEEP columns and strip.
    struct Second {
        const Tiles &tiles;
        const bf16 *y;
        const float *factor;
        Marks held;
        Room<bf16> room{PLANES<T> > 1 ? PLANES<T> * SECOND * tiles.size : 0}, deep_e{PLANES<T> * SECOND * DEEP};
        Room<float> e{SECOND * WIDTH}, sum{SECOND * tiles.size};
        std::vector<float> unused = std::vector<float>(2 * WIDTH);

        void operator()(int64_t v0, int64_t n, T *d_weight, float *d_bias, bool add) {
            constexpr int P = PLANES<T>;
            const int64_t size = tiles.size;
            const bf16 *w = left(tiles.weight + v0 * size, n, size, room);
            for (int64_t d0 = 0; d0 < tiles.columns; d0 += DEEP) {
                const int64_t deep = min(DEEP, tiles.columns - d0);
                for (int64_t c0 = d0; c0 < d0 + deep; c0 += WIDTH)
                    fill(w, v0, n, c0, min(WIDTH, tiles.columns - c0), &deep_e[c0 - d0], deep, d_bias);
                for (int64_t k0 = 0; k0 < size; k0 += WIDTH) {
                    const int64_t strip = min(WIDTH, size - k0);
                    const bf16 *right = y + (d0 * size + k0 * deep) * P;
                    if constexpr (P == 1)  // a strip [n, strip] after the other
                        multiply<P>(n, strip, deep, deep_e.data(), right, &sum[k0 * n], strip, d0 > 0);
                    else
                        multiply<P>(n, strip, deep, deep_e.data(), right, d_weight + k0, size, add || d0 > 0);
                }
            }
            if constexpr (P == 1)
                for (int64_t k0 = 0; k0 < size; k0 += WIDTH)
                    for (int64_t v = 0, strip = min(WIDTH, size - k0); v < n; v++)
                        for (int64_t k = 0; k < strip; k++)
                            d_weight[v * size + k0 + k] = rounded(
                                sum[k0 * n + v * strip + k] + (add ? widened(d_weight[v * size + k0 + k]) : 0.0f));
        }

        void fill(const bf16 *w, int64_t v0, int64_t n, int64_t c0, int64_t width, bf16 *out, int64_t deep,
                  float *d_bias) {
            constexpr int P = PLANES<T>;
            tiles.exponentials(w, v0, n, c0, width, e.data(), unused.data(), nullptr, &unused[WIDTH]);
            held.within(v0, n, c0, width, [this](int64_t at, float value) { e[at] += value; });
            for (int64_t v = 0; v < n; v++)
                for (int64_t c = 0; c < width; c++) {
                    bf16 planes[P];
                    split<P>(e[v * width + c], planes);
                    for (int p = 0; p < P; p++) out[(v * P + p) * deep + c] = planes[p];
                }
            for (int64_t v = 0; d_bias && v < n; v++)
                for (int64_t c = 0; c < width; c++) d_bias[v] += e[v * width + c] * factor[c0 + c];
        }
    };
};

template <typename T>
void first(const Tiles<T> &tiles, int64_t groups, int64_t parts, double *sums, double *moments, int64_t *above,
           float *total) {
    constexpr int64_t STEP = FIRST<PLANES<T>>;
    const int64_t pieces = (tiles.columns + WIDTH - 1) / WIDTH, steps = (tiles.tokens + STEP - 1) / STEP;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < groups * parts; i++) {
        const int64_t g = i / parts, p = i % parts;
        tiles.first(steps * p / parts * STEP, min(tiles.tokens, steps * (p + 1) / parts * STEP),
                    pieces * g / groups * WIDTH, min(tiles.columns, pieces * (g + 1) / groups * WIDTH),
                    sums + p * tiles.columns, moments ? moments + p * tiles.columns : nullptr,
                    above + p * tiles.columns,
                    total ? total + p * tiles.columns * tiles.size : nullptr);
    }
}

template <typename T>
void second(const Tiles<T> &tiles, const bf16 *y, const float *factor, Marks held, T *d_weight, float *d_bias,
            bool add) {
#pragma omp parallel
    {
        typename Tiles<T>::Second of{tiles, y, factor, held};
#pragma omp for schedule(dynamic)
        for (int64_t v0 = 0; v0 < tiles.tokens; v0 += SECOND)
            of(v0, min(SECOND, tiles.tokens - v0), d_weight + v0 * tiles.size, d_bias ? d_bias + v0 : nullptr, add);
        at::native::cpublas::brgemm_release(true);
    }
}

// Rows of `hidden` as right factors: x for logits, k along the hidden size, WIDTH columns apart; y = factor x for dW,
// k along the columns, DEEP of them apart and in strips of the hidden size. Zeros after the last row.
template <typename T>
void pack(const T *hidden, const int64_t *rows, int64_t count, int64_t columns, int64_t size, const float *factor,
          bf16 *x, bf16 *y) {
    constexpr int P = PLANES<T>;
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < columns; c++) {
        const int64_t c0 = c / WIDTH * WIDTH, width = min(WIDTH, columns - c0);
        const int64_t d0 = c / DEEP * DEEP, deep = min(DEEP, columns - d0);
        for (int64_t k = 0; k < size; k++) {
            float f = c < count ? widened(hidden[rows[c] * size + k]) : 0.0f;
            bf16 planes[P];
            split<P>(y && c < count ? f * factor[c] : f, planes);
            const int64_t k0 = k / WIDTH * WIDTH, strip = min(WIDTH, size - k0);
            for (int p = 0; p < P; p++)
                if (const int64_t q = P - 1 - p; x)
                    x[c0 * size * P + ((q * size + k) / 2 * width + c - c0) * 2 + k % 2] = planes[p];
                else
                    y[(d0 * size + k0 * deep) * P + ((q * deep + c - d0) / 2 * strip + k - k0) * 2 + c % 2] = planes[p];
        }
    }
}

}  // namespace

// Whether torch has these matrix kernels for this machine.
extern "C" bool ygx_usable() { return at::native::cpublas::could_pack(static_cast<c10::ScalarType>(15)); }

// weight [tokens, size]; shift [columns]; bias [tokens] or null; sums, above [parts, columns], and moments or null;
// total [parts, columns, size] or null; d_weight [tokens, size]; d_bias [tokens] or null.
// columns: a multiple of 16; size: even. groups * parts: threads, each with its share of the columns and of the tokens.
#define EXPORT(NAME, T)                                                                                              \
    extern "C" void ygx_pack_##NAME(const T *hidden, const int64_t *rows, int64_t count, int64_t columns,            \
                                    int64_t size, const float *factor, bf16 *x, bf16 *y) {                           \
        pack<T>(hidden, rows, count, columns, size, factor, x, y);                                                   \
    }                                                                                                                \
    extern "C" void ygx_first_##NAME(const T *weight, int64_t tokens, int64_t size, const bf16 *x, int64_t columns,  \
                                     const float *shift, const float *bias, float scale, const int64_t *token,       \
                                     const int64_t *column, int64_t targets, int64_t groups, int64_t parts,          \
                                     double *sums, double *moments, int64_t *above, float *total) {                  \
        first<T>({weight, tokens, size, x, columns, shift, bias, scale, {token, column, nullptr, targets}}, groups,  \
                 parts, sums, moments, above, total);                                                                \
    }                                                                                                                \
    extern "C" void ygx_second_##NAME(const T *weight, int64_t tokens, int64_t size, const bf16 *x, int64_t columns, \
                                      const float *shift, const float *bias, float scale, const int64_t *token,      \
                                      const int64_t *column, int64_t targets, const bf16 *y, const float *factor,    \
                                      const int64_t *held_token, const int64_t *held_column, const float *held,      \
                                      int64_t helds, T *d_weight, float *d_bias, int64_t add) {                      \
        second<T>({weight, tokens, size, x, columns, shift, bias, scale, {token, column, nullptr, targets}}, y,      \
                  factor, {held_token, held_column, held, helds}, d_weight, d_bias, add);                            \
    }
EXPORT(bfloat16, bf16)
EXPORT(float32, float)
