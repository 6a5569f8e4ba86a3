// Persistent threads that run one task at a time, each its own part. Owns threads and their cores; knows no task.
#pragma once

#include <cstdint>

namespace lorica {

// Called once for every part in [0, num_parts), each by another thread.
using Task = void (*)(void* context, int part, int num_parts);

struct Pool;

// `cores`: one core for each thread, or null: not bound, and the calling thread takes the first part.
// Null if the threads cannot be started or bound; errno says why.
Pool* create_pool(int num_threads, const int32_t* cores);

// Waits for the task that is running.
void destroy_pool(Pool* pool);

// Runs `task` in at most `max_parts` parts and returns when all are done. Calls from several threads take turns. The
// parts run in the default floating-point environment (denormals are kept) whatever the caller's is.
void run(Pool* pool, Task task, void* context, int64_t max_parts);

}  // namespace lorica
