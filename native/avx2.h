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

    static F join(const uint16_t* hi, const uint16_t* lo) {
        const __m256i none = _mm256_setzero_si256();
        const __m256i upper = _mm256_cvtepu16_epi32(load_half(hi));
        const __m256i lower = _mm256_cvtepi16_epi32(load_half(lo));
        const __m256i zero = _mm256_cmpeq_epi32(_mm256_and_si256(upper, _mm256_set1_epi32(0x7FFF)), none);
        const __m256i drop = _mm256_and_si256(zero, _mm256_cmpgt_epi32(none, lower));
        const __m256i kept = _mm256_andnot_si256(drop, lower);
        return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(upper, 16), kept));
    }

    static void store_low(uint16_t* p, F x, bool stream) {
        store_half(p, narrow(_mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0xFFFF))), stream);
    }

    static void store_bf16(uint16_t* p, F x, bool stream) {
        const __m256i up = _mm256_add_epi32(_mm256_castps_si256(x), _mm256_set1_epi32(0x8000));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        const __m256i hi = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7FC0), nan);
        store_half(p, narrow(hi), stream);
    }

    static void store_fp16(uint16_t* p, F x, bool stream) {
        store_half(p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT), stream);
    }

    static __m128i load_half(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

    static void store_half(uint16_t* p, __m128i x, bool stream) {
        auto* at = reinterpret_cast<__m128i*>(p);
        stream ? _mm_stream_si128(at, x) : _mm_storeu_si128(at, x);
    }

    // Eight numbers below 2^16 as 16-bit ones; the pack works on each half of a register by itself.
    static __m128i narrow(__m256i x) {
        return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(x, x), 0b1000));
    }
};

}  // namespace
