// Adam on moments of one or two bytes, and on parameters without a master: block by block, in the order of operations of
// lorica/kernels/compact.py. Owns the codes; the rule is update.h's. The formulas, and why: lorica/precision/compact.py.
#pragma once

#include "update.h"

namespace {

constexpr uint32_t INFINITY_BITS = 0x7F800000, FLOOR_BITS = 0x0D800000;  // 2^-100
constexpr int32_t LOWEST_EXPONENT = 31;

inline uint32_t bits_of_float(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float float_of_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// -- dice -------------------------------------------------------------------------------------------------------------

template <class S>
inline typename S::I dice(uint32_t element, uint32_t key) {
    auto x = S::count_from(element);
    x = S::imul(S::ixor(x, S::template shift_right<16>(x)), S::whole(0x7FEB352D));
    x = S::ixor(x, S::whole(key));
    x = S::imul(S::ixor(x, S::template shift_right<15>(x)), S::whole(0x846CA68B));
    return S::ixor(x, S::template shift_right<16>(x));
}

template <class S>
inline typename S::I low(typename S::I x) { return S::iand(x, S::whole(0xFFFF)); }

template <class S>
inline typename S::I high(typename S::I x) { return S::template shift_right<16>(x); }

// -- 8-bit codes ------------------------------------------------------------------------------------------------------

template <class S>
inline uint32_t largest(typename S::I x) {
    uint32_t lanes[S::width], top = 0;
    S::store_whole(lanes, x);
    for (uint32_t lane : lanes) top = lane > top ? lane : top;
    return top;
}

// The scale of a block whose largest bits are `top`, as floats without a sign.
template <int LEVELS>
struct Scaling {
    static constexpr float square = float(LEVELS * LEVELS);
    float inverse, scale;

    explicit Scaling(uint32_t top) {
        const float size = float_of_bits(top > FLOOR_BITS ? top : FLOOR_BITS);
        inverse = square / size;
        scale = size * float(1.0 / (LEVELS * LEVELS));
    }
};

// The code of a size: the root of its share of the scale, rounded up where the share above q^2 beats the dice.
template <class S>
inline typename S::I code_of(typename S::F size, typename S::F inverse, typename S::F square, typename S::I dice16) {
    const auto t = S::lesser(S::mul(size, inverse), square);
    const auto q = S::truncate(S::sqrt(t));
    const auto whole = S::to_float(q), one = S::set(1.0f);
    const auto uniform = S::mul(S::to_float(S::iadd(S::iadd(dice16, dice16), S::whole(1))), S::set(0x1p-17f));
    const auto chance = S::mul(S::add(S::add(whole, whole), one), uniform);
    return S::isub(q, S::greater(S::sub(t, S::mul(whole, whole)), chance));  // a mask is -1
}

template <class S>
inline typename S::F absolute(typename S::F x) { return S::floats(S::iand(S::bits(x), S::whole(0x7FFFFFFF))); }

template <class S>
inline typename S::I signed_code_of(typename S::F x, typename S::F inverse, typename S::F square, typename S::I bits) {
    const auto q = code_of<S>(absolute<S>(x), inverse, square, low<S>(bits)), sign = S::sign_mask(x);
    return S::isub(S::ixor(q, sign), sign);
}

template <class S>
inline typename S::F signed_of(typename S::I code, typename S::F scale) {
    const auto q = S::to_float(code);
    return S::mul(S::mul(q, absolute<S>(q)), scale);
}

template <class S>
inline typename S::F root_of(typename S::I code, typename S::F scale) {
    const auto q = S::to_float(code);
    return S::mul(S::mul(q, q), scale);
}

// -- a block ----------------------------------------------------------------------------------------------------------

// The rule, with its parts by name.
template <class S>
struct BlockAdam : Adam<S> {
    using F = typename S::F;
    using Adam<S>::Adam;

    F decayed(F master, F grad) const { return S::fma(this->l2, master, grad); }
    F first(F m, F grad) const { return S::fma(this->b1, m, S::mul(this->rest1, grad)); }
    F stepped(F master, F m, F denominator) const {
        return S::fma(this->step, S::div(m, denominator), S::mul(master, this->shrink));
    }
};

// Where one block lies; pointers to its first element, scales to its own.
struct Place {
    const void* grad;
    const void *master_in, *m_in, *v_in;
    void *master_out, *m_out, *v_out;
    const uint16_t* hi_in;
    uint16_t* out;
    const float *m_scale_in, *v_scale_in;
    float *m_scale_out, *v_scale_out;
    uint32_t element;
};

template <class T>
inline T* moved(T* base, int64_t count) { return base ? base + count : base; }

inline const void* moved_bytes(const void* base, int64_t count) { return static_cast<const char*>(base) + count; }
inline void* moved_bytes(void* base, int64_t count) { return static_cast<char*>(base) + count; }

template <Float G, Form K, Format M>
Place place_of(const Planes& p, int64_t at) {
    constexpr int master_bytes = K == SPLIT || K == ROUNDED ? 2 : 4;
    constexpr int m_bytes = M == EXACT ? 4 : M == BF16_MOMENTS ? 2 : 1;
    const int64_t w = at * master_bytes, m = at * m_bytes, block = at / BLOCK, v = M == INT8_BLOCK ? block * 4 : m;
    return {
        moved_bytes(p.grad, at * float_bytes<G>),
        moved_bytes(p.master_in, w), moved_bytes(static_cast<const void*>(p.m_in), m),
        moved_bytes(static_cast<const void*>(p.v_in), v),
        moved_bytes(p.master_out, w), moved_bytes(static_cast<void*>(p.m_out), m),
        moved_bytes(static_cast<void*>(p.v_out), v),
        moved(p.hi_in, at), moved(p.out, at),
        moved(p.m_scale_in, block), moved(p.v_scale_in, block), moved(p.m_scale_out, block), moved(p.v_scale_out, block),
        p.start + uint32_t(at),
    };
}

template <class S, Form K>
inline typename S::F load_master(const Place& b, int i) {
    const auto* half = static_cast<const uint16_t*>(b.master_in) + i;
    if constexpr (K == SPLIT) return S::join(b.hi_in + i, half);
    if constexpr (K == ROUNDED) return S::from_bf16(half);
    return S::load(static_cast<const float*>(b.master_in) + i);
}

template <class S, Form K>
inline void store_master(const Place& b, int i, typename S::F master, uint32_t key) {
    auto* half = static_cast<uint16_t*>(b.master_out) + i;
    if constexpr (K == SPLIT) S::store_split(half, b.out + i, master, false, false);
    if constexpr (K == ROUNDED) S::store_bf16_with(half, master, low<S>(dice<S>(b.element + i, key)));
    if constexpr (K != SPLIT && K != ROUNDED) S::store(static_cast<float*>(b.master_out) + i, master, false);
    if constexpr (K == WITH_BF16) S::store_bf16(b.out + i, master, false);
    if constexpr (K == WITH_FP16) S::store_fp16(b.out + i, master, false);
}

template <Float G, Form K, Format M>
inline void prefetch_block(const Place& b) {
    constexpr int64_t ahead = 4;  // blocks
    const auto touch = [](const void* base, int bytes) {
        const char* at = static_cast<const char*>(base) + ahead * bytes;
        for (int offset = 0; offset < bytes; offset += 64) __builtin_prefetch(at + offset);
    };
    constexpr int m_bytes = M == EXACT ? 4 : M == BF16_MOMENTS ? 2 : 1;
    touch(b.grad, BLOCK * float_bytes<G>);
    touch(b.master_in, BLOCK * (K == SPLIT || K == ROUNDED ? 2 : 4));
    if constexpr (K == SPLIT) touch(b.hi_in, BLOCK * 2);
    touch(b.m_in, BLOCK * m_bytes);
    if constexpr (M != INT8_BLOCK) touch(b.v_in, BLOCK * m_bytes);
}

// Moments of a float each: one pass.
template <class S, Float G, Form K, Format M>
inline void update_floats(const Place& b, const Planes& p, const Adam<S>& op, typename S::F& poison) {
    const auto coef = S::set(p.coef);
    for (int i = 0; i < BLOCK; i += S::width) {
        const auto raw = load_grad<S, G>(b.grad, i);
        poison = S::fma(raw, S::set(0.0f), poison);
        auto master = load_master<S, K>(b, i);
        if constexpr (M == EXACT) {
            auto m = S::load(static_cast<const float*>(b.m_in) + i), v = S::load(static_cast<const float*>(b.v_in) + i);
            op(master, S::mul(raw, coef), m, v);
            S::store(static_cast<float*>(b.m_out) + i, m, false);
            S::store(static_cast<float*>(b.v_out) + i, v, false);
        } else {
            auto m = S::from_bf16(static_cast<const uint16_t*>(b.m_in) + i);
            auto v = S::from_bf16(static_cast<const uint16_t*>(b.v_in) + i);
            op(master, S::mul(raw, coef), m, v);
            const auto bits = dice<S>(b.element + i, p.moment_key);
            S::store_bf16_with(static_cast<uint16_t*>(b.m_out) + i, m, low<S>(bits));
            S::store_bf16_with(static_cast<uint16_t*>(b.v_out) + i, v, high<S>(bits));
        }
        store_master<S, K>(b, i, master, p.parameter_key);
    }
}

// Both moments in 8 bits: one pass that updates, one that encodes, when the largest values are known.
template <class S, Float G, Form K>
inline void update_codes(const Place& b, const Planes& p, const Adam<S>& op, typename S::F& poison) {
    using F = typename S::F;
    alignas(64) float ms[BLOCK], roots[BLOCK];
    const F coef = S::set(p.coef), m_scale = S::set(*b.m_scale_in), v_scale = S::set(*b.v_scale_in);
    auto m_top = S::whole(0), v_top = S::whole(0);
    for (int i = 0; i < BLOCK; i += S::width) {
        const F raw = load_grad<S, G>(b.grad, i);
        poison = S::fma(raw, S::set(0.0f), poison);
        F master = load_master<S, K>(b, i);
        F m = signed_of<S>(S::load_i8(static_cast<const uint8_t*>(b.m_in) + i), m_scale);
        F v = root_of<S>(S::load_u8(static_cast<const uint8_t*>(b.v_in) + i), v_scale);
        v = S::mul(v, v);
        op(master, S::mul(raw, coef), m, v);
        const F root = S::sqrt(v);
        store_master<S, K>(b, i, master, p.parameter_key);
        S::store(ms + i, m, false);
        S::store(roots + i, root, false);
        m_top = S::imax(m_top, S::bits(absolute<S>(m)));
        v_top = S::imax(v_top, S::bits(absolute<S>(root)));
    }
    const Scaling<127> of_m(largest<S>(m_top));
    const Scaling<255> of_v(largest<S>(v_top));
    const F m_inverse = S::set(of_m.inverse), v_inverse = S::set(of_v.inverse);
    const F m_square = S::set(of_m.square), v_square = S::set(of_v.square);
    for (int i = 0; i < BLOCK; i += S::width) {
        const auto bits = dice<S>(b.element + i, p.moment_key);
        S::store_8(static_cast<uint8_t*>(b.m_out) + i, signed_code_of<S>(S::load(ms + i), m_inverse, m_square, bits));
        const F root = S::load(roots + i);
        const auto some = S::iand(S::greater(root, S::set(0.0f)), S::whole(1));
        const auto q = code_of<S>(root, v_inverse, v_square, high<S>(bits));
        S::store_8(static_cast<uint8_t*>(b.v_out) + i, S::imax(q, some));
    }
    *b.m_scale_out = of_m.scale;
    *b.v_scale_out = of_v.scale;
}

// The mean of `count` squares of which `top` has the largest bits, in fixed point.
template <class S>
inline float mean_of(const float* squares, uint32_t top, int count) {
    if (top >= INFINITY_BITS) return float_of_bits(top);
    const int32_t found = int32_t(top >> 23), exponent = found > LOWEST_EXPONENT ? found : LOWEST_EXPONENT;
    const auto up = S::set(float_of_bits(uint32_t(277 - exponent) << 23));
    auto total = S::whole(0);
    for (int i = 0; i < BLOCK; i += S::width) total = S::iadd(total, S::truncate(S::mul(S::load(squares + i), up)));
    uint32_t lanes[S::width];
    S::store_whole(lanes, total);
    uint32_t sum = 0;
    for (uint32_t lane : lanes) sum += lane;
    return float(int32_t(sum)) * float_of_bits(uint32_t(exponent - 23) << 23) / float(count > 1 ? count : 1);
}

// One second moment for the block: a pass over the gradients, one that updates, one that encodes.
template <class S, Float G, Form K>
inline void update_block(const Place& b, const Planes& p, const BlockAdam<S>& op, typename S::F& poison) {
    using F = typename S::F;
    alignas(64) float grads[BLOCK], values[BLOCK];
    alignas(64) uint32_t padding[BLOCK];
    const auto* codes = static_cast<const uint8_t*>(b.m_in);
    const F coef = S::set(p.coef), m_scale = S::set(*b.m_scale_in);
    auto top = S::whole(0), outside = S::whole(0);
    for (int i = 0; i < BLOCK; i += S::width) {
        const F raw = load_grad<S, G>(b.grad, i);
        poison = S::fma(raw, S::set(0.0f), poison);
        const auto is_padding = S::equal(S::load_i8(codes + i), S::whole(uint32_t(-128)));
        const F grad = op.decayed(load_master<S, K>(b, i), S::mul(raw, coef));
        const F kept = S::floats(S::without(S::bits(grad), is_padding)), square = S::mul(kept, kept);
        S::store(grads + i, kept, false);
        S::store(values + i, square, false);
        S::store_whole(padding + i, S::iand(is_padding, S::whole(0x80)));
        top = S::imax(top, S::bits(absolute<S>(square)));
        outside = S::isub(outside, is_padding);
    }
    uint32_t lanes[S::width], num_outside = 0;
    S::store_whole(lanes, outside);
    for (uint32_t lane : lanes) num_outside += lane;
    const float mean = mean_of<S>(values, largest<S>(top), BLOCK - int(num_outside));
    const float v = __builtin_fmaf(p.hyper[2], *static_cast<const float*>(b.v_in), p.hyper[3] * mean);
    *static_cast<float*>(b.v_out) = v;
    const F denominator = S::set(__builtin_fmaf(__builtin_sqrtf(v), p.hyper[8], p.hyper[4]));
    auto m_top = S::whole(0);
    for (int i = 0; i < BLOCK; i += S::width) {
        const auto code = S::load_i8(codes + i);
        const auto real = S::without(code, S::equal(code, S::whole(uint32_t(-128))));
        const F m = op.first(signed_of<S>(real, m_scale), S::load(grads + i));
        const F master = op.stepped(load_master<S, K>(b, i), m, denominator);
        S::store(values + i, m, false);
        m_top = S::imax(m_top, S::bits(absolute<S>(m)));
        store_master<S, K>(b, i, master, p.parameter_key);
    }
    const Scaling<127> of_m(largest<S>(m_top));
    const F m_inverse = S::set(of_m.inverse), m_square = S::set(of_m.square);
    for (int i = 0; i < BLOCK; i += S::width) {
        const auto bits = dice<S>(b.element + i, p.moment_key);
        const auto code = signed_code_of<S>(S::load(values + i), m_inverse, m_square, bits);
        S::store_8(static_cast<uint8_t*>(b.m_out) + i, S::iadd(code, S::load_whole(padding + i)));
    }
    *b.m_scale_out = of_m.scale;
}

// -- a range ----------------------------------------------------------------------------------------------------------

template <class S, Float G, Form K, Format M>
bool update_blocks(const Planes& p, int64_t begin, int64_t end) {
    const BlockAdam<S> op(p.hyper);
    auto poison = S::set(0.0f);
    for (int64_t at = begin; at < end; at += BLOCK) {
        const Place b = place_of<G, K, M>(p, at);
        prefetch_block<G, K, M>(b);
        if constexpr (M == EXACT || M == BF16_MOMENTS) update_floats<S, G, K, M>(b, p, op, poison);
        if constexpr (M == INT8) update_codes<S, G, K>(b, p, op, poison);
        if constexpr (M == INT8_BLOCK) update_block<S, G, K>(b, p, op, poison);
    }
    return S::has_nan(poison);
}

template <class S, Float G, Form K>
bool choose_format(const Planes& p, int64_t begin, int64_t end) {
    switch (p.format) {
        case BF16_MOMENTS: return update_blocks<S, G, K, BF16_MOMENTS>(p, begin, end);
        case INT8: return update_blocks<S, G, K, INT8>(p, begin, end);
        case INT8_BLOCK: return update_blocks<S, G, K, INT8_BLOCK>(p, begin, end);
        default: return update_blocks<S, G, K, EXACT>(p, begin, end);
    }
}

template <class S, Float G>
bool choose_compact_form(const Planes& p, int64_t begin, int64_t end) {
    switch (p.form) {
        case PLAIN: return choose_format<S, G, PLAIN>(p, begin, end);
        case WITH_BF16: return choose_format<S, G, WITH_BF16>(p, begin, end);
        case WITH_FP16: return choose_format<S, G, WITH_FP16>(p, begin, end);
        case SPLIT: return choose_format<S, G, SPLIT>(p, begin, end);
        default: return choose_format<S, G, ROUNDED>(p, begin, end);
    }
}

template <class S>
bool update_compact(const Planes& p, int64_t begin, int64_t end) {
    switch (p.grad_type) {
        case F32: return choose_compact_form<S, F32>(p, begin, end);
        case BF16: return choose_compact_form<S, BF16>(p, begin, end);
        default: return choose_compact_form<S, FP16>(p, begin, end);
    }
}

template <class S>
bool update_any(const Planes& p, int64_t begin, int64_t end) {
    const bool compact = p.format != EXACT || p.form == ROUNDED;
    return compact ? update_compact<S>(p, begin, end) : update<S>(p, begin, end);
}

}  // namespace
