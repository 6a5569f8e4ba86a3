// Eight elements: AVX2 with FMA and F16C (every processor that has AVX2 has these two).
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct Avx2 {
    using F = __m256;
    static constexpr int width = 8;

    static F set(float x) { return _mm256_set1_ps(x); }
    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, F x, bool stream) { stream ? _mm256_stream_ps(p, x) : _mm256_storeu_ps(p, x); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F div(F a, F b) { return _mm256_div_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F sqrt(F a) { return _mm256_sqrt_ps(a); }
    static bool has_nan(F a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)) != 0; }
    static void fence() { _mm_sfence(); }

    static F sign(F a) {
        const F one = _mm256_or_ps(_mm256_and_ps(a, set(-0.0f)), set(1.0f));
        return _mm256_blendv_ps(a, one, _mm256_cmp_ps(a, set(0.0f), _CMP_NEQ_OQ));
    }

    static F from_bf16(const uint16_t* p) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(p)), 16));
    }

    static F from_fp16(const uint16_t* p) { return _mm256_cvtph_ps(load_half(p)); }

    // In 16-bit lanes: a negative remainder borrows one from the upper half, unless that is zero.
    static F join(const uint16_t* hi, const uint16_t* lo) {
        const __m128i upper = load_half(hi), lower = load_half(lo);
        const __m128i negative = _mm_srai_epi16(lower, 15);
        const __m128i zero = _mm_cmpeq_epi16(_mm_slli_epi16(upper, 1), _mm_setzero_si128());
        const __m128i kept = _mm_andnot_si128(_mm_and_si128(zero, negative), lower);
        const __m128i borrowed = _mm_add_epi16(upper, _mm_andnot_si128(zero, negative));
        const __m128i first = _mm_unpacklo_epi16(kept, borrowed), second = _mm_unpackhi_epi16(kept, borrowed);
        return _mm256_castsi256_ps(_mm256_set_m128i(second, first));
    }

    static void store_split(uint16_t* lo, uint16_t* hi, F x, bool stream_lo, bool stream_hi) {
        const __m128i lower = low_halves(x);
        store_half(lo, lower, stream_lo);
        store_half(hi, rounded(x, lower), stream_hi);
    }

    static void store_bf16(uint16_t* p, F x, bool stream) { store_half(p, rounded(x, low_halves(x)), stream); }

    static void store_fp16(uint16_t* p, F x, bool stream) {
        store_half(p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT), stream);
    }

    static __m128i load_half(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

    static void store_half(uint16_t* p, __m128i x, bool stream) {
        auto* at = reinterpret_cast<__m128i*>(p);
        stream ? _mm_stream_si128(at, x) : _mm_storeu_si128(at, x);
    }

    // Eight numbers below 2^16 as 16-bit ones.
    static __m128i narrow(__m256i x) {
        return _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    }

    static __m128i low_halves(F x) {
        return narrow(_mm256_blend_epi16(_mm256_castps_si256(x), _mm256_setzero_si256(), 0b10101010));
    }

    // The upper halves, plus one where the lower half is 0x8000 or more; 0x7FC0 for a nan.
    static __m128i rounded(F x, __m128i lower) {
        const __m128i upper = narrow(_mm256_srli_epi32(_mm256_castps_si256(x), 16));
        const __m128i up = _mm_add_epi16(upper, _mm_srli_epi16(lower, 15));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        const __m128i nans = _mm_packs_epi32(_mm256_castsi256_si128(nan), _mm256_extracti128_si256(nan, 1));
        return _mm_blendv_epi8(up, _mm_set1_epi16(0x7FC0), nans);
    }
};

}  // namespace
