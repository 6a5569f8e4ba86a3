// Whole numbers of 32 bits and 8-bit codes, beside the floats of avx2.h.
#pragma once

#include "avx2.h"

namespace {

struct WholeAvx2 : Avx2 {
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }

    using I = __m256i;
    static I whole(uint32_t x) { return _mm256_set1_epi32(int(x)); }
    static I count_from(uint32_t x) { return _mm256_add_epi32(whole(x), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
    static I load_whole(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static void store_whole(uint32_t* p, I x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
    static I iadd(I a, I b) { return _mm256_add_epi32(a, b); }
    static I isub(I a, I b) { return _mm256_sub_epi32(a, b); }
    static I imul(I a, I b) { return _mm256_mullo_epi32(a, b); }
    static I iand(I a, I b) { return _mm256_and_si256(a, b); }
    static I ixor(I a, I b) { return _mm256_xor_si256(a, b); }
    static I without(I a, I mask) { return _mm256_andnot_si256(mask, a); }
    static I imax(I a, I b) { return _mm256_max_epi32(a, b); }
    template <int N>
    static I shift_right(I a) { return _mm256_srli_epi32(a, N); }
    static I equal(I a, I b) { return _mm256_cmpeq_epi32(a, b); }
    static I bits(F x) { return _mm256_castps_si256(x); }
    static F floats(I x) { return _mm256_castsi256_ps(x); }
    static F to_float(I x) { return _mm256_cvtepi32_ps(x); }
    static I truncate(F x) { return _mm256_cvttps_epi32(x); }
    static I sign_mask(F x) { return _mm256_srai_epi32(bits(x), 31); }
    static I greater(F a, F b) { return bits(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
    static F lesser(F a, F b) { return _mm256_min_ps(a, b); }  // b if there is a NaN
    static I load_i8(const uint8_t* p) { return _mm256_cvtepi8_epi32(load_eight(p)); }
    static I load_u8(const uint8_t* p) { return _mm256_cvtepu8_epi32(load_eight(p)); }

    static void store_8(uint8_t* p, I x) {
        const __m128i narrower = narrow(iand(x, whole(0xFF)));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(narrower, narrower));
    }

    static void store_bf16_with(uint16_t* p, F x, I dice16) {
        const __m256i up = _mm256_srli_epi32(iadd(bits(x), dice16), 16);
        store_half(p, narrow(_mm256_blendv_epi8(up, whole(0x7FC0), bits(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)))), false);
    }

    static __m128i load_eight(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
};

}  // namespace
