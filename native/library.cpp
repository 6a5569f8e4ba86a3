// What Python calls: choose the instruction set, cut the range into parts, run them. Owns the exported names.
#include <cerrno>
#include <cstdlib>

#include "planes.h"
#include "pool.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace lorica {

extern const Kernels scalar, avx2, avx512, neon;

namespace {

constexpr int64_t MIN_PART = 1 << 14;  // elements: less is done before another thread has woken up

// In the order of `lorica_isas`.
const Kernels* kernels_of(int isa) {
#if defined(__x86_64__)
    const Kernels* known[] = {&scalar, &avx2, &avx512};
#elif defined(__aarch64__)
    const Kernels* known[] = {&scalar, &neon};
#else
    const Kernels* known[] = {&scalar};
#endif
    return known[isa];
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Range {
    int64_t begin, end;
};

Range range_of(int64_t numel, int64_t granule, int part, int num_parts) {
    const int64_t size = ceil_div(ceil_div(numel, granule), num_parts) * granule;
    const int64_t begin = part * size, end = begin + size;
    return {begin < numel ? begin : numel, end < numel ? end : numel};
}

struct Update {
    const Planes* planes;
    const Kernels* kernels;
    int found_inf;
};

void update_part(void* context, int part, int num_parts) {
    auto* update = static_cast<Update*>(context);
    const Range range = range_of(update->planes->numel, GRANULE, part, num_parts);
    if (range.begin < range.end && update->kernels->update(*update->planes, range.begin, range.end)) {
        __atomic_store_n(&update->found_inf, 1, __ATOMIC_RELAXED);
    }
}

struct SquareSum {
    const void* grad;
    int32_t grad_type;
    int64_t numel;
    const Kernels* kernels;
    double* blocks;
};

void square_sum_part(void* context, int part, int num_parts) {
    auto* sum = static_cast<SquareSum*>(context);
    const Range range = range_of(sum->numel, SQUARE_BLOCK, part, num_parts);
    for (int64_t at = range.begin; at < range.end; at += SQUARE_BLOCK) {
        const int64_t end = at + SQUARE_BLOCK < range.end ? at + SQUARE_BLOCK : range.end;
        sum->blocks[at / SQUARE_BLOCK] = sum->kernels->square_sum(sum->grad, sum->grad_type, at, end);
    }
}

}  // namespace
}  // namespace lorica

using namespace lorica;

EXPORT int32_t lorica_abi() { return ABI; }

// The instruction sets of this processor, the best one last; their places are the numbers below.
EXPORT const char* lorica_isas() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return "scalar";
    return __builtin_cpu_supports("avx512f") ? "scalar avx2 avx512" : "scalar avx2";
#elif defined(__aarch64__)
    return "scalar neon";
#else
    return "scalar";
#endif
}

EXPORT Pool* lorica_pool_create(int32_t num_threads, const int32_t* cores) { return create_pool(num_threads, cores); }

EXPORT void lorica_pool_destroy(Pool* pool) { destroy_pool(pool); }

// One update; returns 1 if an element of the gradient was inf or nan, else 0.
EXPORT int32_t lorica_update(Pool* pool, int32_t isa, const Planes* planes) {
    Update update{planes, kernels_of(isa), 0};
    run(pool, update_part, &update, ceil_div(planes->numel, MIN_PART));
    return update.found_inf;
}

// The sum of squares, the same for any number of threads; -1 if there is no memory for the partial sums.
EXPORT double lorica_square_sum(Pool* pool, int32_t isa, const void* grad, int32_t grad_type, int64_t numel) {
    const int64_t num_blocks = ceil_div(numel, SQUARE_BLOCK);
    auto* blocks = static_cast<double*>(std::calloc(num_blocks ? num_blocks : 1, sizeof(double)));
    if (!blocks) return -1.0;
    SquareSum sum{grad, grad_type, numel, kernels_of(isa), blocks};
    run(pool, square_sum_part, &sum, num_blocks);
    double total = 0.0;
    for (int64_t i = 0; i < num_blocks; ++i) total += blocks[i];
    std::free(blocks);
    return total;
}
