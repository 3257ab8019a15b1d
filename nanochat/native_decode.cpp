// One decode step of all blocks of a GPT, and its head, as one function: see native_decode.py.
//
// Every thread of one team runs all of run(), on its share of each product and of the pairs of a
// sequence and a head. Between two phases of which one reads what the other writes is a barrier.
//
// Weights (N, K) are in tiles of 32 outputs: each row of a tile has 32 numbers of 32 bits, one for
// each output, which holds the weights of one float32, two bfloat16 or four int8 neighbours in K.
// One of int8 weights holds all bytes but the highest as weight + 128, so that a mask takes them
// out; byte b then stands for weight * 2^(8 b), for which the activations are divided by that.
//
// A vector is as wide as the processor's: GCC takes wider ones apart into the narrowest.
//
// Sums run over K in the same order for any number of sequences: a sequence gets the same logits
// alone and among others, to the last bit.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#include <omp.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, MAX_ROWS = 8;     // rows whose sums stay in registers, two vectors each
#elif defined(__AVX__)
constexpr int LANES = 8, MAX_ROWS = 6;
#else
constexpr int LANES = 4, MAX_ROWS = 6;
#endif
constexpr int TILE = 32, VECTORS = TILE / LANES;
constexpr int SPINS = 20000;     // some ten microseconds
using Floats = float __attribute__((vector_size(4 * LANES)));
using Ints = int32_t __attribute__((vector_size(4 * LANES)));

// ---- what Python hands over; the same structures stand in native_decode.py

struct Matrix {
    const char* tiles;
    const float* scale;     // of int8 weights, (N)
    int64_t N, K;
};

struct Layer {
    Matrix q, k, v, out, gate, up, down;    // gate: of SwiGLU, else empty
    void *cache_k, *cache_v;            // (slots, kv_heads, cache_length, head_dim)
    const float *attention_gain, *mlp_gain, *q_gain, *k_gain;   // of the norms; null: none
    // latent attention: k makes what is cached, (kv_rank + rope_dim), and v is empty
    const float *latent_gain, *k_up, *v_up;     // (kv_rank); (heads, nope_dim or v_dim, kv_rank)
    float blend_x, blend_x0;            // the block reads blend_x * x + blend_x0 * x0
};

enum QKNorm { NO_QK_NORM, ROTATE_THEN_NORM, NORM_THEN_ROTATE };

struct Model {
    int64_t depth, width, heads, kv_heads, head_dim, hidden, cache_length, threads, qk_norm;
    int64_t kv_rank, nope_dim, rope_dim, v_dim;     // of latent attention, else 0
    float eps, latent_eps, softcap;
    const Layer* layers;
    Matrix head;
    const float* final_gain;            // of the norm before the head; null: none
    const float *cos, *sin;             // (positions, half of what is rotated)
};

struct Step {
    int64_t n;                          // sequences
    const int64_t *slots, *positions;   // (n)
    const float* x0;                    // (n, width), what enters the first block
    const float* const* values;         // per layer what is added to v, (n, kv_heads * head_dim)
    float *features, *logits;           // (n, width); (n, N of the head) or null
};

// ---- numbers

inline Floats as_floats(Ints x) { return (Floats)x; }
inline Ints as_ints(Floats x) { return (Ints)x; }
inline Floats load(const float* p) { Floats x; memcpy(&x, p, sizeof x); return x; }
inline void store(float* p, Floats x) { memcpy(p, &x, sizeof x); }

inline float sum_of(Floats x) {
    using Four = float __attribute__((vector_size(16)));
    Four parts[LANES / 4];
    memcpy(parts, &x, sizeof x);
    for (int half = LANES / 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++) parts[i] += parts[i + half];
    return (parts[0][0] + parts[0][1]) + (parts[0][2] + parts[0][3]);
}

// e^x to 2e-7 of its value for x <= 0: 2^n times the Taylor series of what is left
inline Floats exp_of(Floats x) {
    x = x < -87.0f ? Floats{} - 87.0f : x;
    Floats turns = x * 1.44269504f;
    Ints n = __builtin_convertvector(turns - 0.5f, Ints);       // rounds towards 0, from below
    Floats r = (turns - __builtin_convertvector(n, Floats)) * 0.693147181f;
    Floats y = Floats{} + 1.0f / 5040;
    for (float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        y = y * r + term;
    return as_floats(as_ints(y) + (n << 23));
}

inline uint16_t to_bfloat16(float x) {          // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return 0x7fc0;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline float from_bfloat16(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

// ---- dtypes of activations and of the cache. Activation: one number as products read it.
// Operand: what one multiplication of a lane takes of them, PER of them at once.

struct Float32 {
    using Cached = float;
    using Activation = float;
    using Operand = float;
    static constexpr int PER = 1;
    static float round(float x) { return x; }
    static Activation activation(float x) { return x; }
    static float value(Activation x) { return x; }
    static Cached cached(float x) { return x; }
    static float from_cached(Cached x) { return x; }
    static Floats add_product(Floats sum, Floats weights, Operand x) { return sum + weights * x; }
};

#ifdef __AVX512BF16__
struct BFloat16 {                       // multiplied in pairs by an instruction of its own
    using Cached = uint16_t;
    using Activation = uint16_t;
    using Operand = int32_t;
    static constexpr int PER = 2;
    static float round(float x) { return from_bfloat16(to_bfloat16(x)); }
    static Activation activation(float x) { return to_bfloat16(x); }
    static float value(Activation x) { return from_bfloat16(x); }
    static Cached cached(float x) { return to_bfloat16(x); }
    static float from_cached(Cached x) { return from_bfloat16(x); }
    static Floats add_product(Floats sum, Floats weights, Operand x) {
        return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(x));
    }
};
#else
struct BFloat16 : Float32 {             // multiplied as float32
    using Cached = uint16_t;
    static float round(float x) { return from_bfloat16(to_bfloat16(x)); }
    static Activation activation(float x) { return round(x); }
    static Cached cached(float x) { return to_bfloat16(x); }
    static float from_cached(Cached x) { return from_bfloat16(x); }
};
#endif

// ---- dtypes of weights. PARTS: vectors of operands in one vector of weights, each by part().

template <class A> struct PlainWeights;     // of the dtype of the activations

template <> struct PlainWeights<Float32> {
    static constexpr int PARTS = 1;
    static constexpr bool HAS_SCALE = false;
    static Floats part(Ints w, int) { return as_floats(w); }
};

template <> struct PlainWeights<BFloat16> {
    static constexpr int PARTS = 2 / BFloat16::PER;
    static constexpr bool HAS_SCALE = false;
    static Floats part(Ints w, int p) {
        if (PARTS == 1) return as_floats(w);
        return as_floats(p == 0 ? w << 16 : w & -65536);
    }
};

template <class A> struct Int8Weights {
    static constexpr int PARTS = 4 / A::PER;
    static constexpr bool HAS_SCALE = true;
    static Floats byte(Ints w, int b) {
        constexpr int masks[] = {0xff, 0xff00, 0xff0000, -(1 << 24)};
        return __builtin_convertvector(w & masks[b], Floats);
    }
    static Floats part(Ints w, int p) {
        if (PARTS == 4) return byte(w, p);
        // two numbers that are exact in bfloat16, which is the upper half of a float32
        Ints even = as_ints(byte(w, 2 * p)) >> 16 & 0xffff, odd = as_ints(byte(w, 2 * p + 1));
        return as_floats(even | odd);
    }
};

// The activation of column k in the form that a product with these weights takes
template <class A, class W> inline typename A::Activation operand_at(float x, int k) {
    constexpr float shifts[] = {1, 1.0f / (1 << 8), 1.0f / (1 << 16), 1.0f / (1 << 24)};
    return A::activation(W::HAS_SCALE ? A::round(x) * shifts[k % 4] : x);
}

// ---- products

// For each row of x (n, K) 128 times the sum of the activations whose weights have an offset
template <class A, class W>
void find_offsets(const typename A::Activation* x, int n, int K, float* offsets) {
    if (!W::HAS_SCALE) return;
    for (int r = 0; r < n; r++, x += K) {
        float sums[4] = {};
        for (int k = 0; k < K; k += 4)
            for (int b = 0; b < 4; b++) sums[b] += A::value(x[k + b]);
        offsets[r] = 128 * (sums[0] + 256 * sums[1] + 65536 * sums[2]);
    }
}

// R rows and V vectors of a tile, from vector `from` on
template <class A, class W, int R, int V, class Use>
inline void multiply_block(const Matrix& m, const typename A::Activation* x, const float* offsets,
                           int tile, int from, int row, Use use) {
    constexpr int step = W::PARTS * A::PER;         // of K in one vector
    Floats sums[R][V] = {};
    const Ints* w = (const Ints*)m.tiles + tile * (m.K / step) * VECTORS + from;
    const auto* first = x + row * m.K;
    for (int k = 0; k < m.K; k += step, w += VECTORS) {
#pragma GCC unroll 4
        for (int p = 0; p < W::PARTS; p++) {
            Floats weights[V];
            for (int v = 0; v < V; v++) weights[v] = W::part(w[v], p);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                typename A::Operand operand;
                memcpy(&operand, first + r * m.K + k + p * A::PER, sizeof operand);
#pragma GCC unroll 8
                for (int v = 0; v < V; v++)
                    sums[r][v] = A::add_product(sums[r][v], weights[v], operand);
            }
        }
    }
    for (int r = 0; r < R; r++) {
        for (int v = 0; v < V; v++) {
            int output = tile * TILE + (from + v) * LANES;
            Floats y = sums[r][v];
            if (W::HAS_SCALE) y = (y - offsets[row + r]) * load(m.scale + output);
            use(row + r, output, y);
        }
    }
}

// As many rows as there are in blocks of R; returns the first row that is left
template <class A, class W, int R, class Use>
inline int multiply_rows(const Matrix& m, const typename A::Activation* x, const float* offsets,
                         int n, int tile, int row, Use use) {
    constexpr int V = R <= 2 ? VECTORS : 2;
    for (; row + R <= n; row += R)
        for (int from = 0; from < VECTORS; from += V)
            multiply_block<A, W, R, V>(m, x, offsets, tile, from, row, use);
    return row;
}

// use(row, output, LANES floats) for all rows of x (n, K) and the outputs of a tile
template <class A, class W, class Use>
void multiply(const Matrix& m, const typename A::Activation* x, const float* offsets, int n,
              int tile, Use use) {
    int row = multiply_rows<A, W, MAX_ROWS>(m, x, offsets, n, tile, 0, use);
    row = multiply_rows<A, W, 4>(m, x, offsets, n, tile, row, use);
    row = multiply_rows<A, W, 2>(m, x, offsets, n, tile, row, use);
    multiply_rows<A, W, 1>(m, x, offsets, n, tile, row, use);
}

// ---- threads

class Team {
public:
    // Spins, for the others are here in microseconds; then it sleeps, for where they are not,
    // another process has their core.
    void barrier() {
        int before = turn.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
            arrived.store(0, std::memory_order_relaxed);
            turn.store(before + 1, std::memory_order_release);
            turn.notify_all();
            return;
        }
        for (int spins = 0; spins < SPINS; spins++)
            if (turn.load(std::memory_order_acquire) != before) return;
        turn.wait(before, std::memory_order_acquire);
    }
    int size = 1;

private:
    std::atomic<int> arrived{0}, turn{0};
};

// ---- attention

// A vector of the cache as float32: one part of LANES neighbours, or of bfloat16 the even ones of
// twice as many and the odd ones. place_in_parts(i): where element i then is.
inline void split(const float* p, Floats* parts) { parts[0] = load(p); }
inline void split(const uint16_t* p, Floats* parts) {
    Ints pairs;
    memcpy(&pairs, p, sizeof pairs);
    parts[0] = as_floats(pairs << 16);
    parts[1] = as_floats(pairs & -65536);
}
template <class Cached> constexpr int parts_of = 4 / sizeof(Cached);
template <class Cached> inline int place_in_parts(int i) {
    constexpr int both = 2 * LANES;
    return parts_of<Cached> == 1 ? i : i / both * both + i % 2 * LANES + i % both / 2;
}

template <class Cached> inline float dot(const float* q, const Cached* key, int D) {
    constexpr int P = parts_of<Cached>;
    Floats sum = {};
    for (int i = 0; i < D; i += P * LANES) {
        Floats parts[P];
        split(key + i, parts);
        for (int p = 0; p < P; p++) sum += parts[p] * load(q + i + p * LANES);
    }
    return sum_of(sum);
}

// N elements of the values, weighted
template <int N, class Cached>
inline void add_values(const float* weights, const Cached* values, int64_t keys, int D, float* y) {
    constexpr int P = parts_of<Cached>, vectors = N / LANES;
    Floats sums[vectors] = {};
    for (int64_t s = 0; s < keys; s++)
        for (int i = 0; i < vectors; i += P) {
            Floats parts[P];
            split(values + s * D + i * LANES, parts);
            for (int p = 0; p < P; p++) sums[i + p] += weights[s] * parts[p];
        }
    for (int i = 0; i < vectors; i++) store(y + i * LANES, sums[i]);
}

// One query against the first D numbers of each key, and the weighted sum of the first V of each
// value: q (D) and sums (V) in parts; keys and values (n, stride). Returns what sums are to be
// multiplied with. scores: room for n + LANES numbers.
template <class Cached>
float attend_to(const float* q, const Cached* keys, const Cached* values, int64_t n, int stride,
                int D, int V, float scale, float* scores, float* sums) {
    // 1. scores
    float largest = -INFINITY;
    for (int64_t s = 0; s < n; s++) {
        scores[s] = scale * dot(q, keys + s * stride, D);
        largest = std::fmax(largest, scores[s]);
    }

    // 2. probabilities; behind the last key are scores whose exponential is next to nothing
    for (int i = 0; i < LANES; i++) scores[n + i] = -INFINITY;
    Floats total = {};
    for (int64_t s = 0; s < n; s += LANES) {
        Floats p = exp_of(load(scores + s) - largest);
        store(scores + s, p);
        total += p;
    }

    // 3. the weighted sum of the values
    int i = 0;
    for (; i + 64 <= V; i += 64) add_values<64>(scores, values + i, n, stride, sums + i);
    if (i < V) add_values<32>(scores, values + i, n, stride, sums + i);
    return 1 / sum_of(total);
}

// y = x / the root of its mean square, times the gains where there are any
template <class A>
inline void normalise_vector(const float* x, const float* gain, int D, float eps, float* y) {
    float square = 0;
    for (int i = 0; i < D; i++) square += x[i] * x[i];
    float factor = 1 / std::sqrt(square / D + eps);
    for (int i = 0; i < D; i++) y[i] = A::round(x[i] * factor * (gain ? gain[i] : 1));
}

template <class A>
inline void rotate(const float* x, const float* cos, const float* sin, int half, float* y) {
    for (int i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        y[i] = A::round(a * cos[i] + b * sin[i]);
        y[i + half] = A::round(b * cos[i] - a * sin[i]);
    }
}

// One sequence and one key/value head: place the new key and value in the cache, and attend with
// each query head that they serve. qkv (N of q, k and v), y (heads * head_dim).
template <class A, class W>
void attend(const Model& model, const Layer& layer, const Step& step, int l, int row, int g,
            const float* qkv, typename A::Activation* y, std::vector<float>& scratch) {
    const int D = model.head_dim, half = D / 2, group = model.heads / model.kv_heads;
    const int64_t position = step.positions[row], keys = position + 1;
    const float *cos = model.cos + position * half, *sin = model.sin + position * half;
    const int64_t start = (step.slots[row] * model.kv_heads + g) * model.cache_length * D;
    using Cached = typename A::Cached;
    auto *cached_k = (Cached*)layer.cache_k + start, *cached_v = (Cached*)layer.cache_v + start;
    const size_t room = 4 * D + keys + LANES;
    if (scratch.size() < room) scratch.resize(room);
    float *rounded = scratch.data(), *placed = rounded + D, *q = placed + D, *sums = q + D;
    float* scores = sums + D;

    // rotated and normalised, in the model's order
    auto place = [&](const float* x, const float* gain) {
        for (int i = 0; i < D; i++) rounded[i] = A::round(x[i]);
        if (model.qk_norm == NORM_THEN_ROTATE)
            normalise_vector<A>(rounded, gain, D, model.eps, rounded);
        rotate<A>(rounded, cos, sin, half, placed);
        if (model.qk_norm == ROTATE_THEN_NORM)
            normalise_vector<A>(placed, gain, D, model.eps, placed);
    };

    // 1. the new key and value
    const float *k = qkv + model.heads * D + g * D, *v = k + model.kv_heads * D;
    place(k, layer.k_gain);
    const float* value = step.values[l];
    for (int i = 0; i < D; i++) {
        cached_k[position * D + i] = A::cached(placed[i]);
        float more = value ? value[(row * model.kv_heads + g) * D + i] : 0;
        cached_v[position * D + i] = A::cached(v[i] + more);
    }

    // 2. the queries
    const float scale = 1 / std::sqrt(float(D));
    for (int h = g * group; h < (g + 1) * group; h++) {
        place(qkv + h * D, layer.q_gain);
        for (int i = 0; i < D; i++) q[place_in_parts<Cached>(i)] = placed[i];
        float share = attend_to(q, cached_k, cached_v, keys, D, D, D, scale, scores, sums);
        for (int i = 0; i < D; i++) {
            float value = sums[place_in_parts<Cached>(i)] * share;
            y[h * D + i] = operand_at<A, W>(value, h * D + i);
        }
    }
}

// Latent attention (variants/mla.py): all heads share a latent and a rotated key of each token, one
// behind the other in the cache. First every sequence's new ones are placed there; qkv (N of q and
// of what is cached).
template <class A>
void place_latent(const Model& model, const Layer& layer, const Step& step, int row,
                  const float* qkv, std::vector<float>& scratch) {
    const int r = model.kv_rank, rope = model.rope_dim, D = r + rope, half = rope / 2;
    const int64_t position = step.positions[row];
    const float *cos = model.cos + position * half, *sin = model.sin + position * half;
    using Cached = typename A::Cached;
    auto* cached = (Cached*)layer.cache_k + step.slots[row] * model.cache_length * D;
    if (scratch.size() < size_t(2 * D)) scratch.resize(2 * D);
    float *rounded = scratch.data(), *placed = rounded + D;

    const float* latent = qkv + model.heads * (model.nope_dim + rope);
    for (int i = 0; i < D; i++) rounded[i] = A::round(latent[i]);
    normalise_vector<A>(rounded, layer.latent_gain, r, model.latent_eps, placed);
    rotate<A>(rounded + r, cos, sin, half, placed + r);
    for (int i = 0; i < D; i++) cached[position * D + i] = A::cached(placed[i]);
}

// Then one head of one sequence attends to them: k_up is multiplied with the query, and v_up with
// the weighted sum of the latents. y (heads * v_dim).
template <class A, class W>
void attend_latent(const Model& model, const Layer& layer, const Step& step, int row, int h,
                   const float* qkv, typename A::Activation* y, std::vector<float>& scratch) {
    const int r = model.kv_rank, nope = model.nope_dim, rope = model.rope_dim, V = model.v_dim;
    const int D = r + rope, half = rope / 2, longest = std::max(D, nope + rope);
    const int64_t position = step.positions[row], keys = position + 1;
    const float *cos = model.cos + position * half, *sin = model.sin + position * half;
    using Cached = typename A::Cached;
    auto* cached = (Cached*)layer.cache_k + step.slots[row] * model.cache_length * D;
    const size_t room = 4 * longest + keys + LANES;
    if (scratch.size() < room) scratch.resize(room);
    float *rounded = scratch.data(), *placed = rounded + longest, *q = placed + longest;
    float *sums = q + longest, *scores = sums + longest;

    // 1. the query, as long as what is cached
    const float *x = qkv + h * (nope + rope), *k_up = layer.k_up + h * nope * r;
    for (int i = 0; i < nope + rope; i++) rounded[i] = A::round(x[i]);
    std::fill(placed, placed + r, 0.0f);
    for (int i = 0; i < nope; i++, k_up += r)
        for (int j = 0; j < r; j++) placed[j] += rounded[i] * k_up[j];
    rotate<A>(rounded + nope, cos, sin, half, placed + r);
    const float scale = 1 / std::sqrt(float(nope + rope));
    for (int i = 0; i < D; i++)
        q[place_in_parts<Cached>(i)] = A::round(A::round(placed[i]) * scale);

    // 2. attend, and make values of the sum of the latents
    float share = attend_to(q, cached, cached, keys, D, D, r, 1.0f, scores, sums);
    for (int j = 0; j < r; j++) placed[j] = A::round(sums[place_in_parts<Cached>(j)] * share);
    const float* v_up = layer.v_up + h * V * r;
    for (int i = 0; i < V; i++, v_up += r) {
        float value = 0;
        for (int j = 0; j < r; j++) value += v_up[j] * placed[j];
        y[h * V + i] = operand_at<A, W>(value, h * V + i);
    }
}

// ---- the step

// RMS norm of each row of x (n, C) as operands, with gains where there are any; x may be a blend
template <class A, class W>
void normalise(const float* x, const float* x0, float a, float b, const float* gain, int n, int C,
               float eps, typename A::Activation* y) {
    for (int r = 0; r < n; r++, x += C, x0 += C, y += C) {
        float square = 0;
        for (int i = 0; i < C; i++) {
            float value = A::round(a * x[i] + b * x0[i]);
            square += value * value;
        }
        float factor = 1 / std::sqrt(square / C + eps);
        for (int i = 0; i < C; i++) {
            float value = A::round(a * x[i] + b * x0[i]) * factor;
            y[i] = operand_at<A, W>(gain ? value * gain[i] : value, i);
        }
    }
}

// x * sigmoid(x)
inline Floats silu(Floats x) {
    Floats e = exp_of(x < 0.0f ? x : -x);
    return x * ((x < 0.0f ? e : Floats{} + 1.0f) / (1.0f + e));
}

template <class A, class W> void run(const Model& model, const Step& step) {
    using Activation = typename A::Activation;
    const int n = step.n, C = model.width, hidden = model.hidden;
    const Layer& first = model.layers[0];
    const int qkv_width = first.q.N + first.k.N + first.v.N;
    const int y_width = first.out.K;        // of all heads
    // kept from call to call: fresh memory would cost more than what is done in it
    static thread_local std::vector<float> x, qkv;
    static thread_local std::vector<Activation> attended, raised;
    x.assign(step.x0, step.x0 + n * C);
    qkv.resize(n * qkv_width);
    attended.resize(n * y_width);
    raised.resize(n * hidden);
    float *xs = x.data(), *all_qkv = qkv.data();
    Activation *ys = attended.data(), *zs = raised.data();
    Team team;

#pragma omp parallel num_threads(model.threads)
    {
#pragma omp single
        team.size = omp_get_num_threads();      // fewer than asked for, where the user limits them
        static thread_local std::vector<Activation> normed;
        static thread_local std::vector<float> scratch;
        static thread_local std::vector<float> all_offsets, gates;
        normed.resize(n * C);
        gates.resize(n * TILE);
        const Activation* xs_normed = normed.data();
        all_offsets.resize(n);
        float* offsets = all_offsets.data();
        const int me = omp_get_thread_num();
        auto for_share = [&](int count, auto work) {
            int64_t end = int64_t(count) * (me + 1) / team.size;
            for (int64_t i = int64_t(count) * me / team.size; i < end; i++) work(i);
        };
        auto tiles_of = [](const Matrix& m) { return int(m.N / TILE); };

        for (int l = 0; l < model.depth; l++) {
            const Layer& layer = model.layers[l];
            const float a = layer.blend_x, b = layer.blend_x0;

            // 1. queries, keys and values
            const float* gain = layer.attention_gain;
            normalise<A, W>(xs, step.x0, a, b, gain, n, C, model.eps, normed.data());
            find_offsets<A, W>(normed.data(), n, C, offsets);
            int start = 0;
            for (const Matrix* m : {&layer.q, &layer.k, &layer.v}) {
                for_share(tiles_of(*m), [&](int tile) {
                    multiply<A, W>(*m, xs_normed, offsets, n, tile, [&](int r, int at, Floats y) {
                        store(all_qkv + r * qkv_width + start + at, y);
                    });
                });
                start += m->N;
            }
            team.barrier();

            // 2. attention
            if (model.kv_rank) {
                for_share(n, [&](int r) {
                    place_latent<A>(model, layer, step, r, all_qkv + r * qkv_width, scratch);
                });
                team.barrier();
            }
            const int parts = model.kv_rank ? model.heads : model.kv_heads;     // of a sequence
            for_share(n * parts, [&](int pair) {
                int r = pair / parts, part = pair % parts;
                const float* qkv = all_qkv + r * qkv_width;
                Activation* y = ys + r * y_width;
                if (model.kv_rank)
                    attend_latent<A, W>(model, layer, step, r, part, qkv, y, scratch);
                else
                    attend<A, W>(model, layer, step, l, r, part, qkv, y, scratch);
            });
            team.barrier();
            find_offsets<A, W>(ys, n, y_width, offsets);
            for_share(tiles_of(layer.out), [&](int tile) {
                multiply<A, W>(layer.out, ys, offsets, n, tile, [&](int r, int at, Floats y) {
                    float* own = xs + r * C + at;
                    store(own, a * load(own) + b * load(step.x0 + r * C + at) + y);
                });
            });
            team.barrier();

            // 3. MLP
            gain = layer.mlp_gain;
            normalise<A, W>(xs, step.x0, 1, 0, gain, n, C, model.eps, normed.data());
            find_offsets<A, W>(normed.data(), n, C, offsets);
            const bool is_gated = layer.gate.N > 0;
            for_share(tiles_of(layer.up), [&](int tile) {
                auto gate_at = [&](int r, int at) { return &gates[r * TILE + at - tile * TILE]; };
                if (is_gated) {
                    const Matrix& m = layer.gate;
                    multiply<A, W>(m, xs_normed, offsets, n, tile, [&](int r, int at, Floats y) {
                        store(gate_at(r, at), silu(y));
                    });
                }
                multiply<A, W>(layer.up, xs_normed, offsets, n, tile, [&](int r, int at, Floats y) {
                    if (is_gated) y *= load(gate_at(r, at));
                    else y = y < 0.0f ? Floats{} : y * y;   // NaN stays
                    for (int i = 0; i < LANES; i++)
                        zs[r * hidden + at + i] = operand_at<A, W>(y[i], at + i);
                });
            });
            team.barrier();
            find_offsets<A, W>(zs, n, hidden, offsets);
            for_share(tiles_of(layer.down), [&](int tile) {
                multiply<A, W>(layer.down, zs, offsets, n, tile, [&](int r, int at, Floats y) {
                    float* own = xs + r * C + at;
                    store(own, load(own) + y);
                });
            });
            team.barrier();
        }

        // 4. the head
        const float* gain = model.final_gain;
        normalise<A, W>(xs, step.x0, 1, 0, gain, n, C, model.eps, normed.data());
        find_offsets<A, W>(normed.data(), n, C, offsets);
        if (step.logits) {
            const Matrix& head = model.head;
            for_share(tiles_of(head), [&](int tile) {
                multiply<A, W>(head, xs_normed, offsets, n, tile, [&](int r, int at, Floats z) {
                    if (model.softcap > 0) {            // softcap * tanh(z / softcap)
                        Floats size = z < 0.0f ? -z : z;
                        Floats e = exp_of(size * (-2 / model.softcap));
                        Floats y = model.softcap * (1.0f - e) / (1.0f + e);
                        z = z < 0.0f ? -y : y;
                    }
                    store(step.logits + r * head.N + at, z);
                });
            });
        }
    }
    if (step.features) {
        std::vector<float> normed(n * C);
        using Plain = PlainWeights<Float32>;
        const float* gain = model.final_gain;
        normalise<Float32, Plain>(xs, step.x0, 1, 0, gain, n, C, model.eps, normed.data());
        memcpy(step.features, normed.data(), 4 * normed.size());
    }
}

}  // namespace

extern "C" void decode_step(const Model* model, const Step* step, int is_bfloat16, int is_int8) {
    if (is_bfloat16 && is_int8) run<BFloat16, Int8Weights<BFloat16>>(*model, *step);
    else if (is_bfloat16) run<BFloat16, PlainWeights<BFloat16>>(*model, *step);
    else if (is_int8) run<Float32, Int8Weights<Float32>>(*model, *step);
    else run<Float32, PlainWeights<Float32>>(*model, *step);
}
