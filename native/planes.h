// What the Python side hands over: pointers, dtypes and scalars of one update. Owns the layout of that record, no code.
//
// lorica/kernels/native.py has the same record as a ctypes.Structure; ABI changes with it.
#pragma once

#include <cstdint>

namespace lorica {

constexpr int32_t ABI = 2;
constexpr int NUM_HYPER = 12;

// Parts of a range start at multiples of this many elements, so that results do not depend on the number of threads.
constexpr int64_t GRANULE = 128;
constexpr int BLOCK = 128;                 // elements that share a scale
constexpr int64_t SQUARE_BLOCK = 1 << 16;  // elements of one partial sum of squares

enum Float : int32_t { F32 = 0, BF16 = 1, FP16 = 2 };
// fp32 master [+ rounded out]; lower and upper halves; a bf16 parameter without a master, rounded stochastically
enum Form : int32_t { PLAIN = 0, WITH_BF16 = 1, WITH_FP16 = 2, SPLIT = 3, ROUNDED = 4 };
enum Rule : int32_t { ADAM = 0, LION = 1, SGD = 2, SGD_MOMENTUM = 3, ADAGRAD = 4 };
// Of Adam's moments; all but EXACT, and ROUNDED, want whole blocks: see lorica/precision/compact.py.
enum Format : int32_t { EXACT = 0, BF16_MOMENTS = 1, INT8 = 2, INT8_BLOCK = 3 };

extern "C" struct lorica_planes {
    int64_t numel;
    const void* grad;
    const void* master_in;  // float[numel]; SPLIT: int16_t[numel], the lower halves; ROUNDED: bf16[numel]
    void* master_out;       // the same as master_in, or apart from it
    const uint16_t* hi_in;  // SPLIT only: the upper halves
    uint16_t* out;          // rounded master; PLAIN, ROUNDED: null
    const float* m_in;      // first moment, or null; in another format: bf16[numel] or int8_t[numel]
    float* m_out;
    const float* v_in;  // second moment, or null; in another format: bf16[numel], uint8_t[numel] or float[numel / BLOCK]
    float* v_out;
    const float* m_scale_in;  // of 8-bit codes, [numel / BLOCK], or null
    float* m_scale_out;
    const float* v_scale_in;
    float* v_scale_out;
    int32_t grad_type;  // Float
    int32_t form;       // Form
    int32_t rule;       // Rule
    int32_t format;     // Format
    uint32_t start;     // number of the first element in its plane, for the dice
    uint32_t moment_key;
    uint32_t parameter_key;
    float coef;
    float hyper[NUM_HYPER];
};

using Planes = lorica_planes;

// One instruction set: an update, and a sum of squares, of elements [begin, end).
struct Kernels {
    bool (*update)(const Planes&, int64_t begin, int64_t end);  // whether an element of the gradient was inf or nan
    double (*square_sum)(const void* grad, int32_t grad_type, int64_t begin, int64_t end);
};

}  // namespace lorica
