// The bandwidth that a kernel is measured against: a = b + factor * c, 12 bytes an element.
// Source: McCalpin 1995, STREAM; `a` is written past the caches, so that its lines are not read first.
#include <cstdint>
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "pool.h"

namespace {

struct Triad {
    float* a;
    const float *b, *c;
    float factor;
    int64_t numel;
};

void triad_part(void* context, int part, int num_parts) {
    const auto& t = *static_cast<Triad*>(context);
    const int64_t size = (t.numel / 16 + num_parts - 1) / num_parts * 16;
    const int64_t begin = part * size, end = begin + size < t.numel ? begin + size : t.numel;
#if defined(__SSE2__)
    const __m128 factor = _mm_set1_ps(t.factor);
    for (int64_t i = begin; i < end; i += 4) {
        _mm_stream_ps(t.a + i, _mm_add_ps(_mm_load_ps(t.b + i), _mm_mul_ps(factor, _mm_load_ps(t.c + i))));
    }
    _mm_sfence();
#else
    for (int64_t i = begin; i < end; ++i) t.a[i] = t.b[i] + t.factor * t.c[i];
#endif
}

}  // namespace

// a, b, c: numel floats, aligned to 64 bytes; numel a multiple of 16.
extern "C" __attribute__((visibility("default"))) void lorica_triad(
    lorica::Pool* pool, float* a, const float* b, const float* c, float factor, int64_t numel) {
    Triad triad{a, b, c, factor, numel};
    lorica::run(pool, triad_part, &triad, numel / 16);
}
