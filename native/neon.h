// Four elements: NEON, which every aarch64 processor has. Streaming stores are ordinary ones: the compiler has no name
// for STNP that both GCC and Clang know.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace {

struct Neon {
    using F = float32x4_t;
    static constexpr int width = 4;

    static F set(float x) { return vdupq_n_f32(x); }
    static F load(const float* p) { return vld1q_f32(p); }
    static void store(float* p, F x, bool) { vst1q_f32(p, x); }
    static F mul(F a, F b) { return vmulq_f32(a, b); }
    static F add(F a, F b) { return vaddq_f32(a, b); }
    static F div(F a, F b) { return vdivq_f32(a, b); }
    static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
    static F sqrt(F a) { return vsqrtq_f32(a); }
    static bool has_nan(F a) { return vminvq_u32(vceqq_f32(a, a)) == 0; }
    static void fence() {}

    static F sign(F a) {
        const uint32x4_t sign_bit = vandq_u32(vreinterpretq_u32_f32(a), vdupq_n_u32(0x80000000u));
        const F one = vreinterpretq_f32_u32(vorrq_u32(sign_bit, vreinterpretq_u32_f32(set(1.0f))));
        const uint32x4_t moved = vorrq_u32(vcgtq_f32(a, set(0.0f)), vcltq_f32(a, set(0.0f)));
        return vbslq_f32(moved, one, a);
    }

    static F from_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }

    static F from_fp16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }

    static F join(const uint16_t* hi, const uint16_t* lo) {
        const uint32x4_t upper = vmovl_u16(vld1_u16(hi));
        const int32x4_t lower = vmovl_s16(vreinterpret_s16_u16(vld1_u16(lo)));
        const uint32x4_t zero = vceqq_u32(vandq_u32(upper, vdupq_n_u32(0x7FFF)), vdupq_n_u32(0));
        const uint32x4_t drop = vandq_u32(zero, vcltq_s32(lower, vdupq_n_s32(0)));
        const uint32x4_t kept = vbicq_u32(vreinterpretq_u32_s32(lower), drop);
        return vreinterpretq_f32_u32(vaddq_u32(vshlq_n_u32(upper, 16), kept));
    }

    static void store_low(uint16_t* p, F x, bool) { vst1_u16(p, vmovn_u32(vreinterpretq_u32_f32(x))); }

    static void store_bf16(uint16_t* p, F x, bool) {
        const uint32x4_t up = vaddq_u32(vreinterpretq_u32_f32(x), vdupq_n_u32(0x8000));
        const uint32x4_t hi = vbslq_u32(vceqq_f32(x, x), vshrq_n_u32(up, 16), vdupq_n_u32(0x7FC0));
        vst1_u16(p, vmovn_u32(hi));
    }

    static void store_split(uint16_t* lo, uint16_t* hi, F x, bool stream_lo, bool stream_hi) {
        store_low(lo, x, stream_lo);
        store_bf16(hi, x, stream_hi);
    }

    static void store_fp16(uint16_t* p, F x, bool) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
};

}  // namespace
