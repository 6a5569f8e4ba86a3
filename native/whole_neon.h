// Whole numbers of 32 bits and 8-bit codes, beside the floats of neon.h.
#pragma once

#include "neon.h"

namespace {

struct WholeNeon : Neon {
    static F sub(F a, F b) { return vsubq_f32(a, b); }

    using I = uint32x4_t;
    static I whole(uint32_t x) { return vdupq_n_u32(x); }

    static I count_from(uint32_t x) {
        const uint32_t lanes[4] = {0, 1, 2, 3};
        return vaddq_u32(vdupq_n_u32(x), vld1q_u32(lanes));
    }

    static I load_whole(const uint32_t* p) { return vld1q_u32(p); }
    static void store_whole(uint32_t* p, I x) { vst1q_u32(p, x); }
    static I iadd(I a, I b) { return vaddq_u32(a, b); }
    static I isub(I a, I b) { return vsubq_u32(a, b); }
    static I imul(I a, I b) { return vmulq_u32(a, b); }
    static I iand(I a, I b) { return vandq_u32(a, b); }
    static I ixor(I a, I b) { return veorq_u32(a, b); }
    static I without(I a, I mask) { return vbicq_u32(a, mask); }

    static I imax(I a, I b) {
        return vreinterpretq_u32_s32(vmaxq_s32(vreinterpretq_s32_u32(a), vreinterpretq_s32_u32(b)));
    }

    template <int N>
    static I shift_right(I a) { return vshrq_n_u32(a, N); }
    static I equal(I a, I b) { return vceqq_u32(a, b); }
    static I bits(F x) { return vreinterpretq_u32_f32(x); }
    static F floats(I x) { return vreinterpretq_f32_u32(x); }
    static F to_float(I x) { return vcvtq_f32_s32(vreinterpretq_s32_u32(x)); }
    static I truncate(F x) { return vreinterpretq_u32_s32(vcvtq_s32_f32(x)); }
    static I sign_mask(F x) { return vreinterpretq_u32_s32(vshrq_n_s32(vreinterpretq_s32_f32(x), 31)); }
    static I greater(F a, F b) { return vcgtq_f32(a, b); }
    static F lesser(F a, F b) { return vbslq_f32(vcltq_f32(a, b), a, b); }  // b if there is a NaN
    static I load_i8(const uint8_t* p) {
        return vreinterpretq_u32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(load_four(p))))));
    }
    static I load_u8(const uint8_t* p) { return vmovl_u16(vget_low_u16(vmovl_u8(load_four(p)))); }

    static void store_8(uint8_t* p, I x) {
        const uint16x4_t half = vmovn_u32(x);
        uint8_t eight[8];
        vst1_u8(eight, vmovn_u16(vcombine_u16(half, half)));
        for (int k = 0; k < 4; ++k) p[k] = eight[k];
    }

    static void store_bf16_with(uint16_t* p, F x, I dice16) {
        const uint32x4_t up = vshrq_n_u32(vaddq_u32(bits(x), dice16), 16);
        vst1_u16(p, vmovn_u32(vbslq_u32(vceqq_f32(x, x), up, vdupq_n_u32(0x7FC0))));
    }

    static uint8x8_t load_four(const uint8_t* p) {
        uint8_t eight[8] = {p[0], p[1], p[2], p[3], 0, 0, 0, 0};
        return vld1_u8(eight);
    }
};

}  // namespace
