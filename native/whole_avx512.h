// Whole numbers of 32 bits and 8-bit codes, beside the floats of avx512.h.
#pragma once

#include "avx512.h"

namespace {

struct WholeAvx512 : Avx512 {
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }

    using I = __m512i;
    static I whole(uint32_t x) { return _mm512_set1_epi32(int(x)); }

    static I count_from(uint32_t x) {
        return iadd(whole(x), _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    }

    static I load_whole(const uint32_t* p) { return _mm512_loadu_si512(p); }
    static void store_whole(uint32_t* p, I x) { _mm512_storeu_si512(p, x); }
    static I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
    static I isub(I a, I b) { return _mm512_sub_epi32(a, b); }
    static I imul(I a, I b) { return _mm512_mullo_epi32(a, b); }
    static I iand(I a, I b) { return _mm512_and_si512(a, b); }
    static I ixor(I a, I b) { return _mm512_xor_si512(a, b); }
    static I without(I a, I mask) { return _mm512_andnot_si512(mask, a); }
    static I imax(I a, I b) { return _mm512_max_epi32(a, b); }
    template <int N>
    static I shift_right(I a) { return _mm512_srli_epi32(a, N); }
    static I equal(I a, I b) { return mask_of(_mm512_cmpeq_epi32_mask(a, b)); }
    static I bits(F x) { return _mm512_castps_si512(x); }
    static F floats(I x) { return _mm512_castsi512_ps(x); }
    static F to_float(I x) { return _mm512_cvtepi32_ps(x); }
    static I truncate(F x) { return _mm512_cvttps_epi32(x); }
    static I sign_mask(F x) { return _mm512_srai_epi32(bits(x), 31); }
    static I greater(F a, F b) { return mask_of(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ)); }
    static F lesser(F a, F b) { return _mm512_min_ps(a, b); }  // b if there is a NaN
    static I load_i8(const uint8_t* p) { return _mm512_cvtepi8_epi32(load_sixteen(p)); }
    static I load_u8(const uint8_t* p) { return _mm512_cvtepu8_epi32(load_sixteen(p)); }
    static void store_8(uint8_t* p, I x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x)); }

    static void store_bf16_with(uint16_t* p, F x, I dice16) {
        const __m512i up = _mm512_srli_epi32(iadd(bits(x), dice16), 16);
        const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        store_half(p, _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(up, nan, whole(0x7FC0))), false);
    }

    static __m512i mask_of(__mmask16 mask) { return _mm512_maskz_mov_epi32(mask, _mm512_set1_epi32(-1)); }
    static __m128i load_sixteen(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
};

}  // namespace
