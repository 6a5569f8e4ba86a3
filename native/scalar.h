// A vector of one element: the baseline of every processor. fmaf of libm is exact where the processor has no such
// instruction.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

struct Scalar {
    using F = float;
    static constexpr int width = 1;

    static F set(float x) { return x; }
    static F load(const float* p) { return *p; }
    static void store(float* p, F x, bool) { *p = x; }
    static F mul(F a, F b) { return a * b; }
    static F add(F a, F b) { return a + b; }
    static F div(F a, F b) { return a / b; }
    static F fma(F a, F b, F c) { return __builtin_fmaf(a, b, c); }
    static F sqrt(F a) { return __builtin_sqrtf(a); }
    static F sign(F a) { return a > 0.0f ? 1.0f : a < 0.0f ? -1.0f : a; }
    static bool has_nan(F a) { return a != a; }
    static void fence() {}

    static F from_bf16(const uint16_t* p) { return float_of(uint32_t(*p) << 16); }

    static F from_fp16(const uint16_t* p) {
        const uint32_t sign = uint32_t(*p & 0x8000) << 16, rest = *p & 0x7FFF;
        if (rest >= 0x7C00) return float_of(sign | 0x7F800000 | (rest & 0x3FF) << 13);
        // Exponent and mantissa in their new places, then times 2^(127 - 15): exact, and right for denormals.
        return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
    }

    static F join(const uint16_t* hi, const uint16_t* lo) {
        const uint32_t upper = *hi;
        int32_t lower = int16_t(*lo);
        if ((upper & 0x7FFF) == 0 && lower < 0) lower = 0;  // see [Note: split master] in lorica/precision/rounding.py
        return float_of((upper << 16) + uint32_t(lower));
    }

    static void store_low(uint16_t* p, F x, bool) { *p = uint16_t(bits_of(x)); }

    static void store_bf16(uint16_t* p, F x, bool) {
        *p = x != x ? 0x7FC0 : uint16_t((bits_of(x) + 0x8000) >> 16);  // ties away from zero
    }

    static void store_split(uint16_t* lo, uint16_t* hi, F x, bool stream_lo, bool stream_hi) {
        store_low(lo, x, stream_lo);
        store_bf16(hi, x, stream_hi);
    }

    static void store_fp16(uint16_t* p, F x, bool) {
        const uint32_t sign = bits_of(x) >> 16 & 0x8000, rest = bits_of(x) & 0x7FFFFFFF;
        uint32_t half;
        if (rest > 0x7F800000) {
            half = 0x7E00 | (rest >> 13 & 0x3FF);
        } else if (rest >= 0x477FF000) {  // 65520 and more: half a unit above the largest fp16, and beyond
            half = 0x7C00;
        } else if (rest < 0x38800000) {  // below 2^-14: adding 0.5 leaves multiples of 2^-24, ties to even
            half = bits_of(float_of(rest) + 0.5f) - 0x3F000000;
        } else {
            half = (rest - 0x38000000 + 0xFFF + (rest >> 13 & 1)) >> 13;
        }
        *p = uint16_t(sign | half);
    }
};

}  // namespace
