// Sixteen elements: AVX-512F alone.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct Avx512 {
    using F = __m512;
    static constexpr int width = 16;

    static F set(float x) { return _mm512_set1_ps(x); }
    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F x, bool stream) { stream ? _mm512_stream_ps(p, x) : _mm512_storeu_ps(p, x); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F sqrt(F a) { return _mm512_sqrt_ps(a); }
    static bool has_nan(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) != 0; }
    static void fence() { _mm_sfence(); }

    static F sign(F a) {
        const __m512i sign_bit = _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(int(0x80000000u)));
        const F one = _mm512_castsi512_ps(_mm512_or_si512(sign_bit, _mm512_castps_si512(set(1.0f))));
        return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, set(0.0f), _CMP_NEQ_OQ), a, one);
    }

    static F from_bf16(const uint16_t* p) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_half(p)), 16));
    }

    static F from_fp16(const uint16_t* p) { return _mm512_cvtph_ps(load_half(p)); }

    static F join(const uint16_t* hi, const uint16_t* lo) {
        const __m512i none = _mm512_setzero_si512();
        const __m512i upper = _mm512_cvtepu16_epi32(load_half(hi));
        const __m512i lower = _mm512_cvtepi16_epi32(load_half(lo));
        const __mmask16 zero = _mm512_testn_epi32_mask(upper, _mm512_set1_epi32(0x7FFF));
        const __mmask16 drop = _mm512_mask_cmplt_epi32_mask(zero, lower, none);
        const __m512i kept = _mm512_mask_mov_epi32(lower, drop, none);
        return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(upper, 16), kept));
    }

    static void store_low(uint16_t* p, F x, bool stream) {
        store_half(p, _mm512_cvtepi32_epi16(_mm512_castps_si512(x)), stream);  // keeps the low halves
    }

    static void store_bf16(uint16_t* p, F x, bool stream) {
        const __m512i up = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
        const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        const __m512i hi = _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7FC0));
        store_half(p, _mm512_cvtepi32_epi16(hi), stream);
    }

    static void store_split(uint16_t* lo, uint16_t* hi, F x, bool stream_lo, bool stream_hi) {
        store_low(lo, x, stream_lo);
        store_bf16(hi, x, stream_hi);
    }

    static void store_fp16(uint16_t* p, F x, bool stream) {
        store_half(p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT), stream);
    }

    static __m256i load_half(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

    static void store_half(uint16_t* p, __m256i x, bool stream) {
        auto* at = reinterpret_cast<__m256i*>(p);
        stream ? _mm256_stream_si256(at, x) : _mm256_storeu_si256(at, x);
    }
};

}  // namespace
