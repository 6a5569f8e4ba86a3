// POSIX threads rather than std::thread: nothing here needs the C++ runtime library, of which a Python process may have
// loaded another version than the compiler's.
#include "pool.h"

#include <cerrno>
#include <cfenv>
#include <csignal>
#include <cstdlib>
#include <pthread.h>
#ifdef __linux__
#include <sched.h>
#endif

namespace lorica {

namespace {

struct Worker {
    Pool* pool;
    pthread_t thread;
    int part;
    uint64_t seen;  // the last task that this worker knows of
};

}  // namespace

struct Pool {
    int num_threads;
    int num_started;   // workers that run; 0 after a fork, in the child
    bool bound;        // workers have cores of their own, and the caller only waits
    int32_t* cores;    // [num_threads] if bound
    Worker* workers;   // [num_threads]; the first is unused if not bound
    pthread_mutex_t turn;  // held by the caller for a whole task
    pthread_mutex_t lock;  // guards what follows
    pthread_cond_t wake, done;
    uint64_t number;  // of the task
    int num_parts, pending;
    bool stop;
    Task task;
    void* context;
    Pool *next, *previous;  // of all pools, for fork
};

namespace {

pthread_mutex_t list_lock = PTHREAD_MUTEX_INITIALIZER;
pthread_once_t fork_handlers = PTHREAD_ONCE_INIT;
Pool* all_pools = nullptr;

void init_locks(Pool* pool) {
    pthread_mutex_init(&pool->turn, nullptr);
    pthread_mutex_init(&pool->lock, nullptr);
    pthread_cond_init(&pool->wake, nullptr);
    pthread_cond_init(&pool->done, nullptr);
}

// A child process has none of its parent's threads, and locks may be held by one of those: all anew.
void before_fork() { pthread_mutex_lock(&list_lock); }
void after_fork_in_parent() { pthread_mutex_unlock(&list_lock); }
void after_fork_in_child() {
    pthread_mutex_init(&list_lock, nullptr);
    for (Pool* pool = all_pools; pool; pool = pool->next) {
        init_locks(pool);
        pool->num_started = pool->pending = 0;
    }
}

void watch_forks() { pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child); }

void run_part(const Pool* pool, int part) { pool->task(pool->context, part, pool->num_parts); }

void* work(void* argument) {
    auto* worker = static_cast<Worker*>(argument);
    Pool* pool = worker->pool;
    std::fesetenv(FE_DFL_ENV);
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        while (pool->number == worker->seen && !pool->stop) pthread_cond_wait(&pool->wake, &pool->lock);
        if (pool->stop) break;
        worker->seen = pool->number;
        if (worker->part >= pool->num_parts) continue;
        pthread_mutex_unlock(&pool->lock);
        run_part(pool, worker->part);
        pthread_mutex_lock(&pool->lock);
        if (--pool->pending == 0) pthread_cond_signal(&pool->done);
    }
    pthread_mutex_unlock(&pool->lock);
    return nullptr;
}

int bind(pthread_t thread, int32_t core) {
#ifdef __linux__
    if (core < 0 || core >= CPU_SETSIZE) return EINVAL;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    return pthread_setaffinity_np(thread, sizeof set, &set);
#else
    (void)thread, (void)core;  // no such call
    return 0;
#endif
}

// Start the workers that do not run yet; returns an error number. They leave signals to the threads of the program.
int start_workers(Pool* pool) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = 0;
    const int first = pool->bound ? 0 : 1;
    for (int i = first + pool->num_started; i < pool->num_threads && !error; ++i) {
        Worker& worker = pool->workers[i];
        worker = {pool, pthread_t(), i, pool->number};
        error = pthread_create(&worker.thread, nullptr, work, &worker);
        if (!error) {
            ++pool->num_started;
            if (pool->bound) error = bind(worker.thread, pool->cores[i]);
        }
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return error;
}

void stop_workers(Pool* pool) {
    pthread_mutex_lock(&pool->lock);
    pool->stop = true;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    const int first = pool->bound ? 0 : 1;
    for (int i = 0; i < pool->num_started; ++i) pthread_join(pool->workers[first + i].thread, nullptr);
}

void free_pool(Pool* pool) {
    std::free(pool->cores);
    std::free(pool->workers);
    std::free(pool);
}

void enlist(Pool* pool) {
    pthread_once(&fork_handlers, watch_forks);
    pthread_mutex_lock(&list_lock);
    pool->next = all_pools;
    if (all_pools) all_pools->previous = pool;
    all_pools = pool;
    pthread_mutex_unlock(&list_lock);
}

void delist(Pool* pool) {
    pthread_mutex_lock(&list_lock);
    if (pool->next) pool->next->previous = pool->previous;
    (pool->previous ? pool->previous->next : all_pools) = pool->next;
    pthread_mutex_unlock(&list_lock);
}

// The parts that no worker has taken, in the caller's thread.
void run_own_parts(const Pool* pool) {
    std::fenv_t callers;
    std::feholdexcept(&callers);
    std::fesetenv(FE_DFL_ENV);
    const int first_worker = pool->bound ? 0 : 1;
    for (int part = 0; part < pool->num_parts; ++part) {
        if (part < first_worker || part >= first_worker + pool->num_started) run_part(pool, part);
    }
    std::fesetenv(&callers);
}

}  // namespace

Pool* create_pool(int num_threads, const int32_t* cores) {
    auto* pool = static_cast<Pool*>(std::calloc(1, sizeof(Pool)));
    auto* workers = static_cast<Worker*>(std::calloc(num_threads, sizeof(Worker)));
    auto* own_cores = static_cast<int32_t*>(std::calloc(num_threads, sizeof(int32_t)));
    if (!pool || !workers || !own_cores) {
        std::free(pool), std::free(workers), std::free(own_cores);
        errno = ENOMEM;
        return nullptr;
    }
    for (int i = 0; cores && i < num_threads; ++i) own_cores[i] = cores[i];
    pool->num_threads = num_threads;
    pool->bound = cores != nullptr;
    pool->cores = own_cores;
    pool->workers = workers;
    init_locks(pool);
    if (const int error = start_workers(pool)) {
        stop_workers(pool);
        free_pool(pool);
        errno = error;
        return nullptr;
    }
    enlist(pool);
    return pool;
}

void destroy_pool(Pool* pool) {
    pthread_mutex_lock(&pool->turn);
    delist(pool);
    stop_workers(pool);
    pthread_mutex_unlock(&pool->turn);
    free_pool(pool);
}

void run(Pool* pool, Task task, void* context, int64_t max_parts) {
    if (max_parts <= 0) return;
    pthread_mutex_lock(&pool->turn);
    const int num_workers = pool->num_threads - (pool->bound ? 0 : 1);
    // In a child process the workers are missing. If the system refuses them now, the caller does their parts.
    if (pool->num_started < num_workers) start_workers(pool);
    pthread_mutex_lock(&pool->lock);
    pool->task = task;
    pool->context = context;
    pool->num_parts = int(max_parts < pool->num_threads ? max_parts : pool->num_threads);
    const int for_workers = pool->num_parts - (pool->bound ? 0 : 1);
    pool->pending = for_workers < pool->num_started ? for_workers : pool->num_started;
    if (pool->pending > 0) {
        ++pool->number;
        pthread_cond_broadcast(&pool->wake);
    }
    pthread_mutex_unlock(&pool->lock);
    run_own_parts(pool);
    pthread_mutex_lock(&pool->lock);
    while (pool->pending > 0) pthread_cond_wait(&pool->done, &pool->lock);
    pthread_mutex_unlock(&pool->lock);
    pthread_mutex_unlock(&pool->turn);
}

}  // namespace lorica
