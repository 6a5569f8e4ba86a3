// Whole numbers of 32 bits and 8-bit codes, beside the floats of scalar.h.
#pragma once

#include "scalar.h"

namespace {

struct WholeScalar : Scalar {
    static F sub(F a, F b) { return a - b; }

    using I = uint32_t;
    static I whole(uint32_t x) { return x; }
    static I count_from(uint32_t x) { return x; }
    static I load_whole(const uint32_t* p) { return *p; }
    static void store_whole(uint32_t* p, I x) { *p = x; }
    static I iadd(I a, I b) { return a + b; }
    static I isub(I a, I b) { return a - b; }
    static I imul(I a, I b) { return a * b; }
    static I iand(I a, I b) { return a & b; }
    static I ixor(I a, I b) { return a ^ b; }
    static I without(I a, I mask) { return a & ~mask; }
    static I imax(I a, I b) { return int32_t(a) > int32_t(b) ? a : b; }
    template <int N>
    static I shift_right(I a) { return a >> N; }
    static I equal(I a, I b) { return a == b ? ~0u : 0u; }
    static I bits(F x) { return bits_of(x); }
    static F floats(I x) { return float_of(x); }
    static F to_float(I x) { return float(int32_t(x)); }
    static I truncate(F x) { return uint32_t(int32_t(x)); }
    static I sign_mask(F x) { return uint32_t(int32_t(bits_of(x)) >> 31); }
    static I greater(F a, F b) { return a > b ? ~0u : 0u; }
    static F lesser(F a, F b) { return a < b ? a : b; }  // b if there is a NaN
    static I load_i8(const uint8_t* p) { return uint32_t(int32_t(int8_t(*p))); }
    static I load_u8(const uint8_t* p) { return *p; }
    static void store_8(uint8_t* p, I x) { *p = uint8_t(x); }

    static void store_bf16_with(uint16_t* p, F x, I dice16) {
        *p = x != x ? 0x7FC0 : uint16_t((bits_of(x) + dice16) >> 16);
    }
};

}  // namespace
