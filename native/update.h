// The update rules, once for all instruction sets: a template over the vector type `S` (scalar.h, avx2.h, avx512.h,
// neon.h). Owns the order of operations; owns no thread.
//
// The same IEEE operations in the same order as lorica/kernels/update.py, each correctly rounded, fused multiply-adds
// only where `fma` is written (hence -ffp-contract=off): the bits are the same on every instruction set and on the GPU.
// Everything is in an unnamed namespace: code of a file that was compiled for AVX must not be linked into another.
//
// In place, states are written by ordinary stores (their lines were just read); what is only written goes past the
// caches by streaming stores, which saves reading its lines.
#pragma once

#include <cstring>

#include "planes.h"

namespace {

using namespace lorica;

constexpr int LINE = 32;         // elements of an inner block: one cache line of 16-bit values
constexpr int64_t AHEAD = 512;   // elements that are prefetched ahead
constexpr int64_t STREAM = 1 << 18;  // elements; shorter planes stay in the caches, where the next reader wants them

// -- rules ------------------------------------------------------------------------------------------------------------

template <class S>
struct Adam {
    using F = typename S::F;
    static constexpr int moments = 2;
    F b1, rest1, b2, rest2, eps, l2, shrink, step, inverse2;

    explicit Adam(const float* h)
        : b1(S::set(h[0])), rest1(S::set(h[1])), b2(S::set(h[2])), rest2(S::set(h[3])), eps(S::set(h[4])),
          l2(S::set(h[5])), shrink(S::set(h[6])), step(S::set(h[7])), inverse2(S::set(h[8])) {}

    void operator()(F& master, F grad, F& m, F& v) const {
        grad = S::fma(l2, master, grad);
        m = S::fma(b1, m, S::mul(rest1, grad));
        v = S::fma(b2, v, S::mul(rest2, S::mul(grad, grad)));
        const F denominator = S::fma(S::sqrt(v), inverse2, eps);
        master = S::fma(step, S::div(m, denominator), S::mul(master, shrink));
    }
};

template <class S>
struct Lion {
    using F = typename S::F;
    static constexpr int moments = 1;
    F b1, rest1, b2, rest2, shrink, step;

    explicit Lion(const float* h)
        : b1(S::set(h[0])), rest1(S::set(h[1])), b2(S::set(h[2])), rest2(S::set(h[3])), shrink(S::set(h[4])),
          step(S::set(h[5])) {}

    void operator()(F& master, F grad, F& m, F&) const {
        const F mixed = S::fma(b1, m, S::mul(rest1, grad));
        master = S::fma(step, S::sign(mixed), S::mul(master, shrink));
        m = S::fma(b2, m, S::mul(rest2, grad));
    }
};

template <class S, bool MOMENTUM>
struct Sgd {
    using F = typename S::F;
    static constexpr int moments = MOMENTUM ? 1 : 0;
    F keep, take, decay, with_grad, step, ahead;

    explicit Sgd(const float* h)
        : keep(S::set(h[0])), take(S::set(h[1])), decay(S::set(h[2])), with_grad(S::set(h[3])), step(S::set(h[4])),
          ahead(S::set(h[5])) {}

    void operator()(F& master, F grad, F& buffer, F&) const {
        grad = S::fma(decay, master, grad);
        if constexpr (MOMENTUM) {
            buffer = S::fma(keep, buffer, S::mul(take, grad));
            grad = S::fma(ahead, buffer, S::mul(with_grad, grad));
        }
        master = S::fma(step, grad, master);
    }
};

template <class S>
struct Adagrad {
    using F = typename S::F;
    static constexpr int moments = 1;
    F decay, eps, step;

    explicit Adagrad(const float* h) : decay(S::set(h[0])), eps(S::set(h[1])), step(S::set(h[2])) {}

    void operator()(F& master, F grad, F& sum, F&) const {
        grad = S::fma(decay, master, grad);
        sum = S::fma(grad, grad, sum);
        master = S::fma(step, S::div(grad, S::add(S::sqrt(sum), eps)), master);
    }
};

// -- one vector ---------------------------------------------------------------------------------------------------------

template <Float G>
constexpr int float_bytes = G == F32 ? 4 : 2;

template <class S, Float G>
inline typename S::F load_grad(const void* grad, int64_t i) {
    if constexpr (G == F32) return S::load(static_cast<const float*>(grad) + i);
    if constexpr (G == BF16) return S::from_bf16(static_cast<const uint16_t*>(grad) + i);
    if constexpr (G == FP16) return S::from_fp16(static_cast<const uint16_t*>(grad) + i);
}

// Where an update reads and writes; the flags say which outputs are written by streaming stores.
struct Cursor {
    const void* grad;
    const void* master_in;
    void* master_out;
    const uint16_t* hi_in;
    uint16_t* out;
    const float* m_in;
    float* m_out;
    const float* v_in;
    float* v_out;
    bool stream_master, stream_out, stream_m, stream_v;
};

template <class S, Float G, Form K, class Op>
inline void update_vector(const Cursor& c, int64_t i, const Op& op, typename S::F coef, typename S::F& poison) {
    using F = typename S::F;
    const F raw = load_grad<S, G>(c.grad, i);
    poison = S::fma(raw, S::set(0.0f), poison);  // 0 times inf or nan is nan, and stays
    F master, m = coef, v = coef;
    if constexpr (K == SPLIT) {
        master = S::join(c.hi_in + i, static_cast<const uint16_t*>(c.master_in) + i);
    } else {
        master = S::load(static_cast<const float*>(c.master_in) + i);
    }
    if constexpr (Op::moments > 0) m = S::load(c.m_in + i);
    if constexpr (Op::moments > 1) v = S::load(c.v_in + i);
    op(master, S::mul(raw, coef), m, v);
    if constexpr (Op::moments > 0) S::store(c.m_out + i, m, c.stream_m);
    if constexpr (Op::moments > 1) S::store(c.v_out + i, v, c.stream_v);
    if constexpr (K == SPLIT) {
        S::store_split(static_cast<uint16_t*>(c.master_out) + i, c.out + i, master, c.stream_master, c.stream_out);
    } else {
        S::store(static_cast<float*>(c.master_out) + i, master, c.stream_master);
    }
    if constexpr (K == WITH_BF16) S::store_bf16(c.out + i, master, c.stream_out);
    if constexpr (K == WITH_FP16) S::store_fp16(c.out + i, master, c.stream_out);
}

// -- a range ------------------------------------------------------------------------------------------------------------

template <Float G, Form K, int MOMENTS>
inline void prefetch(const Cursor& c, int64_t i) {
    constexpr int master_bytes = K == SPLIT ? 2 : 4;
    const auto touch = [i](const void* base, int bytes) {
        const char* at = static_cast<const char*>(base) + (i + AHEAD) * bytes;
        for (int offset = 0; offset < LINE * bytes; offset += 64) __builtin_prefetch(at + offset);
    };
    touch(c.grad, float_bytes<G>);
    touch(c.master_in, master_bytes);
    if constexpr (K == SPLIT) touch(c.hi_in, 2);
    if constexpr (MOMENTS > 0) touch(c.m_in, 4);
    if constexpr (MOMENTS > 1) touch(c.v_in, 4);
}

// The last elements, fewer than LINE: the same operations on padded copies.
template <class S, Float G, Form K, class Op>
void update_tail(const Cursor& c, int64_t at, int64_t rest, const Op& op, typename S::F coef, typename S::F& poison) {
    constexpr int master_bytes = K == SPLIT ? 2 : 4;
    alignas(64) char grad[LINE * 4] = {}, master[LINE * 4] = {};
    alignas(64) uint16_t hi[LINE] = {};
    alignas(64) float m[LINE] = {}, v[LINE] = {};
    std::memcpy(grad, static_cast<const char*>(c.grad) + at * float_bytes<G>, rest * float_bytes<G>);
    std::memcpy(master, static_cast<const char*>(c.master_in) + at * master_bytes, rest * master_bytes);
    if (K == SPLIT) std::memcpy(hi, c.hi_in + at, rest * 2);
    if (Op::moments > 0) std::memcpy(m, c.m_in + at, rest * 4);
    if (Op::moments > 1) std::memcpy(v, c.v_in + at, rest * 4);
    const Cursor padded{grad, master, master, hi, hi, m, m, v, v, false, false, false, false};
    for (int k = 0; k < LINE; k += S::width) update_vector<S, G, K, Op>(padded, k, op, coef, poison);
    std::memcpy(static_cast<char*>(c.master_out) + at * master_bytes, master, rest * master_bytes);
    if (K != PLAIN) std::memcpy(c.out + at, hi, rest * 2);
    if (Op::moments > 0) std::memcpy(c.m_out + at, m, rest * 4);
    if (Op::moments > 1) std::memcpy(c.v_out + at, v, rest * 4);
}

inline bool streams(const Planes& p, const void* in, const void* out) {
    return in != out && p.numel >= STREAM && reinterpret_cast<uintptr_t>(out) % 64 == 0;
}

template <class S, Float G, Form K, class Op>
bool update_range(const Planes& p, int64_t begin, int64_t end) {
    const Cursor c{
        p.grad, p.master_in, p.master_out, p.hi_in, p.out, p.m_in, p.m_out, p.v_in, p.v_out,
        streams(p, p.master_in, p.master_out), streams(p, K == SPLIT ? p.hi_in : nullptr, p.out),
        streams(p, p.m_in, p.m_out), streams(p, p.v_in, p.v_out),
    };
    const Op op(p.hyper);
    const auto coef = S::set(p.coef);
    auto poison = S::set(0.0f);
    int64_t at = begin;
    for (; at + LINE <= end; at += LINE) {
        prefetch<G, K, Op::moments>(c, at);
        for (int k = 0; k < LINE; k += S::width) update_vector<S, G, K, Op>(c, at + k, op, coef, poison);
    }
    if (at < end) update_tail<S, G, K, Op>(c, at, end - at, op, coef, poison);
    S::fence();
    return S::has_nan(poison);
}

// -- choosing the instance ------------------------------------------------------------------------------------------------

template <class S, Float G, Form K>
bool choose_rule(const Planes& p, int64_t begin, int64_t end) {
    switch (p.rule) {
        case ADAM: return update_range<S, G, K, Adam<S>>(p, begin, end);
        case LION: return update_range<S, G, K, Lion<S>>(p, begin, end);
        case SGD: return update_range<S, G, K, Sgd<S, false>>(p, begin, end);
        case SGD_MOMENTUM: return update_range<S, G, K, Sgd<S, true>>(p, begin, end);
        default: return update_range<S, G, K, Adagrad<S>>(p, begin, end);
    }
}

template <class S, Float G>
bool choose_form(const Planes& p, int64_t begin, int64_t end) {
    switch (p.form) {
        case PLAIN: return choose_rule<S, G, PLAIN>(p, begin, end);
        case WITH_BF16: return choose_rule<S, G, WITH_BF16>(p, begin, end);
        case WITH_FP16: return choose_rule<S, G, WITH_FP16>(p, begin, end);
        default: return choose_rule<S, G, SPLIT>(p, begin, end);
    }
}

template <class S>
bool update(const Planes& p, int64_t begin, int64_t end) {
    switch (p.grad_type) {
        case F32: return choose_form<S, F32>(p, begin, end);
        case BF16: return choose_form<S, BF16>(p, begin, end);
        default: return choose_form<S, FP16>(p, begin, end);
    }
}

// -- sum of squares -------------------------------------------------------------------------------------------------------

// In double precision, in 16 sums whatever the width of a vector: products of two fp32 values are exact there, and the
// order of additions is the same on every instruction set.
template <class S, Float G>
double square_sum_of(const void* grad, int64_t begin, int64_t end) {
    constexpr int SUMS = 16;
    double sums[SUMS] = {};
    alignas(64) float x[LINE];
    const auto add = [&sums](const float* values) {
        for (int k = 0; k < LINE; k += SUMS) {
            for (int j = 0; j < SUMS; ++j) sums[j] += double(values[k + j]) * double(values[k + j]);
        }
    };
    int64_t at = begin;
    for (; at + LINE <= end; at += LINE) {
        for (int k = 0; k < LINE; k += S::width) S::store(x + k, load_grad<S, G>(grad, at + k), false);
        add(x);
    }
    if (at < end) {
        alignas(64) char rest[LINE * 4] = {};
        std::memcpy(rest, static_cast<const char*>(grad) + at * float_bytes<G>, (end - at) * float_bytes<G>);
        for (int k = 0; k < LINE; k += S::width) S::store(x + k, load_grad<S, G>(rest, k), false);
        add(x);
    }
    double total = 0.0;
    for (double sum : sums) total += sum;
    return total;
}

template <class S>
double square_sum(const void* grad, int32_t grad_type, int64_t begin, int64_t end) {
    switch (grad_type) {
        case F32: return square_sum_of<S, F32>(grad, begin, end);
        case BF16: return square_sum_of<S, BF16>(grad, begin, end);
        default: return square_sum_of<S, FP16>(grad, begin, end);
    }
}

}  // namespace
