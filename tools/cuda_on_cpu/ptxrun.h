/* The machine that a translated kernel runs on (ptxrun.py writes the kernel and includes this).

   Every CUDA thread of a block has a stack of its own.  One runs until it waits, then another one,
   drawn at random; blocks run one after another in random order.  Every access goes through
   global_at() or shared_at(), which check bounds and alignment and keep a record of each granule of
   memory: who wrote it last, who has read it since, and whether a barrier lies between.

   The translated kernel defines before it: LOCAL_BYTES of local memory of a thread, SHARED_SHIFT,
   the binary logarithm of a granule of shared memory, and constant_at(), its tables. */

#define _GNU_SOURCE
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { OUT_OF_BOUNDS = 1, MISALIGNED, RACE, UNINITIALISED, BARRIER, DEADLOCK };
enum { RUNNING, AT_BARRIER, IN_WARP };                           /* what a thread waits for */
enum { SHUFFLE, BALLOT, SYNCWARP, MMA };                         /* what a warp does together */

typedef struct {
  int kind, line, thread, block, other_thread, other_line;
  uint64_t address;
} finding;

typedef struct {
  uint64_t base, size;
  int shift; /* binary logarithm of a granule's bytes */
} buffer;

/* One access: by whom, where in the text, and between which barriers. Block 0 is none at all. */
typedef struct {
  uint32_t block, epoch, warp_epoch;
  int32_t thread, line;
  uint8_t atomic;
} access_;

typedef struct {
  access_ written, read;   /* the last ones; `read` is none after a write */
  uint8_t initialised;
  uint8_t several_threads; /* of one warp have read since its last syncwarp */
  uint8_t several_warps;   /* have read since the last barrier */
  uint8_t several_blocks;  /* have read since the last write: no barrier will ever order them */
} word;

typedef struct {
  void *stack; /* where its registers lie while another thread runs */
  int x, y, z, id, lane, warp;
  int done, waits, line; /* the line at which it waits */
  int operation, source_lane;
  uint32_t mask, sent, received;
  uint32_t factors[6]; /* of mma: four registers of A, two of B */
  float sums[4];       /* and of C, then of D */
  uint8_t *local;
} thread_;

/* One access of block 0, those of each thread in their order. */
typedef struct {
  uint64_t address;
  int32_t line, thread, bytes, shared;
} traced;

static finding *FINDINGS;
static int FOUND, MOST_FINDINGS, CHECK;
static buffer *BUFFERS;
static int N_BUFFERS;
static word **SHADOWS, *SHARED_SHADOW;
static uint8_t *PARAMETERS, *SHARED, *SHARED_OWNED;
static uint64_t SHARED_BYTES, ACCESSES, BARRIERS;
static traced *TRACE;
static uint64_t TRACED, MOST_TRACED;
static uint32_t EPOCH, WARP_EPOCH[64], BLOCK;
static int DYNAMIC_BYTES, CTAID_X, CTAID_Y, CTAID_Z, NCTAID_X, NCTAID_Y, NCTAID_Z, NTID_X, NTID_Y, NTID_Z;
static thread_ *THREADS, *self;
static void *scheduler;

static const uint64_t SHARED_WINDOW = 0x7f0000000000ull; /* generic addresses of shared memory */

static void kernel(void);

/* ---- findings, one of a kind for each line */

static void report(int kind, int line, uint64_t address, int other_thread, int other_line) {
  for (int i = 0; i < FOUND; i++)
    if (FINDINGS[i].kind == kind && FINDINGS[i].line == line) return;
  if (FOUND < MOST_FINDINGS)
    FINDINGS[FOUND++] = (finding){kind,  line, self ? self->id : -1, BLOCK, other_thread, other_line,
                                  address};
}

/* ---- memory */

int word_size(void) { return sizeof(word); }

/* Is what was done before, by whatever of that thread's warp, ordered before what `self` does? */
static inline int ordered(const access_ *before) {
  if (before->block != BLOCK + 1) return 0;
  if (before->epoch != EPOCH || before->thread == self->id) return 1;
  return before->thread / 32 == self->warp && before->warp_epoch < WARP_EPOCH[self->warp];
}

static inline int reads_ordered(const word *w) {
  if (w->several_blocks || w->read.block != BLOCK + 1) return 0;
  if (w->read.epoch != EPOCH) return 1;
  if (w->several_warps || w->read.thread / 32 != self->warp) return 0;
  return w->read.warp_epoch != WARP_EPOCH[self->warp] ||
         (w->read.thread == self->id && !w->several_threads);
}

static inline void note_read(word *w, access_ now) {
  const access_ *old = &w->read;
  if (old->block && old->block != now.block) w->several_blocks = 1;
  if (old->block != now.block || old->epoch != EPOCH) {
    w->several_threads = w->several_warps = 0;
  } else if (old->thread != now.thread) {
    if (old->thread / 32 != self->warp) w->several_warps = 1;
    w->several_threads = old->warp_epoch == now.warp_epoch;
  } else if (old->warp_epoch != now.warp_epoch) {
    w->several_threads = 0;
  }
  w->read = now;
}

static inline void touch(word *w, int writes, int atomic, int line, uint64_t address, int shared) {
  access_ now = {BLOCK + 1, EPOCH, WARP_EPOCH[self->warp], self->id, line, atomic};
  if (w->written.block && !(atomic && w->written.atomic) && !ordered(&w->written))
    report(RACE, line, address, w->written.thread, w->written.line);
  if (!writes) {
    if (shared && !w->initialised) report(UNINITIALISED, line, address, -1, 0);
    note_read(w, now);
    return;
  }
  if (w->read.block && !(atomic && w->read.atomic) && !reads_ordered(w))
    report(RACE, line, address, w->read.thread, w->read.line);
  w->written = now;
  w->initialised = 1;
  w->several_threads = w->several_warps = w->several_blocks = 0;
  w->read = atomic ? now : (access_){0};
}

static void touch_all(word *shadow, uint64_t offset, int bytes, int shift, int writes, int atomic,
                      int line, uint64_t address, int shared) {
  for (uint64_t i = offset >> shift; i <= (offset + bytes - 1) >> shift; i++)
    touch(&shadow[i], writes, atomic, line, address, shared);
}

static inline void trace(uint64_t address, int bytes, int line, int shared) {
  if (MOST_TRACED && !BLOCK && TRACED++ < MOST_TRACED)
    TRACE[TRACED - 1] = (traced){address, line, self->id, bytes, shared};
}

/* Where `bytes` bytes of shared memory lie, or 0 with a finding. */
static uint8_t *shared_at(uint64_t address, int bytes, int writes, int atomic, int line) {
  ACCESSES++;
  uint64_t offset = address >= SHARED_WINDOW ? address - SHARED_WINDOW : address;
  int inside = offset + bytes <= SHARED_BYTES && SHARED_OWNED[offset] &&
               SHARED_OWNED[offset + bytes - 1]; /* a red zone is wider than any access */
  if (!inside) {
    report(OUT_OF_BOUNDS, line, address, -1, 0);
    return 0;
  }
  if (offset % bytes) report(MISALIGNED, line, address, -1, 0);
  trace(offset, bytes, line, 1);
  if (CHECK) touch_all(SHARED_SHADOW, offset, bytes, SHARED_SHIFT, writes, atomic, line, address, 1);
  return SHARED + offset;
}

/* The same for a generic or global address. */
static uint8_t *global_at(uint64_t address, int bytes, int writes, int atomic, int line) {
  static int last;
  if (address >= SHARED_WINDOW && address < SHARED_WINDOW + SHARED_BYTES + 4096)
    return shared_at(address, bytes, writes, atomic, line);
  ACCESSES++;
  if (LOCAL_BYTES && address >= (uint64_t)self->local &&
      address + bytes <= (uint64_t)self->local + LOCAL_BYTES) {
    if (address % bytes) report(MISALIGNED, line, address, -1, 0);
    return (uint8_t *)address;
  }
  for (int k = 0; k < N_BUFFERS; k++) {
    int i = (last + k) % N_BUFFERS;
    buffer b = BUFFERS[i];
    if (address < b.base || address + bytes > b.base + b.size) continue;
    last = i;
    if (address % bytes) report(MISALIGNED, line, address, -1, 0);
    trace(address, bytes, line, 0);
    if (CHECK)
      touch_all(SHADOWS[i], address - b.base, bytes, b.shift, writes, atomic, line, address, 0);
    return (uint8_t *)address;
  }
  if (!writes && constant_at(address, bytes)) return (uint8_t *)address;
  report(OUT_OF_BOUNDS, line, address, -1, 0);
  return 0;
}

/* ---- arithmetic: registers hold bits */

static inline float f32_of(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t of_f32(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
static inline double f64_of(uint64_t bits) { double x; memcpy(&x, &bits, 8); return x; }
static inline uint64_t of_f64(double x) { uint64_t bits; memcpy(&bits, &x, 8); return bits; }
static inline float flushed(float x) { return fpclassify(x) == FP_SUBNORMAL ? copysignf(0, x) : x; }
static inline int unordered(double a, double b) { return a != a || b != b; }
static inline float bf16_of(uint16_t bits) { return f32_of((uint32_t)bits << 16); }
static inline uint16_t of_bf16(float x) { /* to nearest, ties to even */
  uint32_t bits = of_f32(x);
  return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
#if HALF
static inline float f16_of(uint16_t bits) { _Float16 x; memcpy(&x, &bits, 2); return x; }
static inline uint16_t of_f16(float x) { _Float16 h = x; uint16_t b; memcpy(&b, &h, 2); return b; }
#endif

/* ---- threads and warps */

/* Go on with another stack: swapcontext without its two system calls.  x86-64 only. */
__attribute__((naked)) static void go_on(void **left, void *stack) {
  __asm__("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15; mov %rsp, (%rdi);"
          "mov %rsi, %rsp; pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}

static void wait_for(int what, int line) {
  self->waits = what;
  self->line = line;
  go_on(&self->stack, scheduler);
}

static void with_warp(int operation, uint32_t mask, int line) {
  self->operation = operation;
  self->mask = mask;
  wait_for(IN_WARP, line);
}

static void entry(void) {
  kernel();
  self->done = 1;
  go_on(&self->stack, scheduler);
}

/* A stack that begins with `entry`: six registers, its address, and no address to return to. */
static void *new_stack(uint8_t *end) {
  uint64_t *top = (uint64_t *)end - 8;
  memset(top, 0, 64);
  top[6] = (uint64_t)entry;
  return top;
}

/* One number of a register that holds two of bfloat16. */
static inline float half_of(uint32_t pair, int upper) { return bf16_of(pair >> 16 * upper); }

/* mma.m16n8k16 of bfloat16.  Of C a lane holds rows lane / 4 and 8 below, columns 2 (lane % 4) and
   the next, of A the same rows, of B column lane / 4; along k both have pairs lane % 4 and 4 on.
   A GPU sums in an order, and with a rounding, of its own: here a sum is exact but for its last
   rounding. */
static void multiply_warp(thread_ **lanes) {
  for (int i = 0; i < 32; i++)
    for (int n = 0; n < 4; n++) {
      int row = lanes[i]->lane / 4, column = lanes[i]->lane % 4 * 2 + n % 2;
      double total = lanes[i]->sums[n];
      for (int k = 0; k < 16; k++) {
        const uint32_t *a = lanes[row * 4 + k % 8 / 2]->factors, *b = lanes[column * 4 + k % 8 / 2]->factors;
        total += (double)half_of(a[k / 8 * 2 + n / 2], k % 2) * half_of(b[4 + k / 8], k % 2);
      }
      lanes[i]->sums[n] = total;
    }
}

/* All lanes of the mask have arrived: do what they came for. */
static void meet(thread_ **lanes, int n) {
  uint32_t ballot = 0;
  for (int i = 0; i < n; i++) {
    thread_ *t = lanes[i];
    t->received = t->sent;
    for (int j = 0; j < n; j++)
      if (lanes[j]->lane == t->source_lane) t->received = lanes[j]->sent;
    if (t->sent) ballot |= 1u << t->lane;
  }
  for (int i = 0; i < n; i++) {
    if (lanes[i]->operation != lanes[0]->operation) report(BARRIER, lanes[i]->line, 0, -1, 0);
    if (lanes[i]->operation == BALLOT) lanes[i]->received = ballot;
    lanes[i]->waits = RUNNING;
  }
  if (lanes[0]->operation == SYNCWARP) WARP_EPOCH[lanes[0]->warp]++;
  if (lanes[0]->operation == MMA) {
    if (n == 32) multiply_warp(lanes);
    else report(BARRIER, lanes[0]->line, 1, n, 0);
  }
}

/* The lanes that `self` waits for, if all of them are there; else 0. */
static int gather(thread_ **lanes, int n_threads) {
  int n = 0;
  for (int l = 0; l < 32 && self->warp * 32 + l < n_threads; l++) {
    if (!(self->mask >> l & 1)) continue;
    thread_ *t = &THREADS[self->warp * 32 + l];
    if (t->done || t->waits != IN_WARP || t->mask != self->mask) return 0;
    lanes[n++] = t;
  }
  return n;
}

static uint64_t state;
static uint32_t draw(uint32_t below) {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return (uint32_t)(state >> 33) % below;
}

/* Let every thread run to its next barrier or to its end, in random order. */
static void run_to_barrier(int n_threads, int *ready, thread_ **lanes) {
  int n = 0;
  for (int i = 0; i < n_threads; i++)
    if (!THREADS[i].done && THREADS[i].waits == RUNNING) ready[n++] = i;
  while (n) {
    int k = draw(n), i = ready[k], together;
    ready[k] = ready[--n];
    self = &THREADS[i];
    go_on(&scheduler, self->stack);
    if (self->done || self->waits != IN_WARP || !(together = gather(lanes, n_threads))) continue;
    meet(lanes, together);
    for (int l = 0; l < together; l++) ready[n++] = lanes[l]->id;
  }
  self = 0;
}

/* All wait or have returned.  0: the block has ended, or cannot go on. */
static int pass_barrier(int n_threads) {
  int alive = 0, line = 0, apart = 0;
  for (int i = 0; i < n_threads; i++) {
    thread_ *t = &THREADS[i];
    if (t->done) continue;
    if (t->waits == IN_WARP) {
      report(DEADLOCK, t->line, 0, -1, 0);
      return 0;
    }
    apart |= alive && t->line != line;
    line = t->line;
    alive++;
  }
  if (!alive) return 0;
  if (apart) report(BARRIER, line, 0, -1, 0);
  else if (alive < n_threads) report(BARRIER, line, 1, alive, 0);
  EPOCH++;
  BARRIERS++;
  for (int i = 0; i < n_threads; i++) THREADS[i].waits = RUNNING;
  return 1;
}

static const size_t STACK = 96 * 1024;

static void run_block(int n_threads, uint8_t *stacks, uint8_t *locals, int *ready, thread_ **lanes) {
  EPOCH++;
  memset(SHARED, 0xff, SHARED_BYTES); /* NaN */
  memset(SHARED_SHADOW, 0, ((SHARED_BYTES >> SHARED_SHIFT) + 1) * sizeof(word));
  memset(WARP_EPOCH, 0, sizeof WARP_EPOCH);
  memset(locals, 0xff, (size_t)(LOCAL_BYTES + 64) * n_threads);
  for (int i = 0; i < n_threads; i++) {
    thread_ *t = &THREADS[i];
    memset(t, 0, sizeof *t);
    t->id = i;
    t->x = i % NTID_X;
    t->y = i / NTID_X % NTID_Y;
    t->z = i / NTID_X / NTID_Y;
    t->lane = i % 32;
    t->warp = i / 32;
    t->local = (uint8_t *)(((uint64_t)locals + (uint64_t)(LOCAL_BYTES + 64) * i + 63) & ~63ull);
    t->stack = new_stack(stacks + STACK * (i + 1));
  }
  do run_to_barrier(n_threads, ready, lanes);
  while (pass_barrier(n_threads));
}

/* Run all blocks; the number of findings.  `dims`: grid, block, bytes of dynamic shared memory;
   `counts`: accesses, barriers, and how many accesses there were to trace. */
int run(finding *findings, int most, buffer *buffers, int n_buffers, word **shadows,
        uint8_t *parameters, const int *dims, uint64_t shared_bytes, uint8_t *shared_owned,
        uint64_t seed, int check, traced *trace_of_block, uint64_t most_traced, uint64_t *counts) {
  FINDINGS = findings, MOST_FINDINGS = most, FOUND = 0, CHECK = check;
  BUFFERS = buffers, N_BUFFERS = n_buffers, SHADOWS = shadows, PARAMETERS = parameters;
  NCTAID_X = dims[0], NCTAID_Y = dims[1], NCTAID_Z = dims[2];
  NTID_X = dims[3], NTID_Y = dims[4], NTID_Z = dims[5], DYNAMIC_BYTES = dims[6];
  SHARED_BYTES = shared_bytes, SHARED_OWNED = shared_owned;
  TRACE = trace_of_block, MOST_TRACED = most_traced;
  TRACED = ACCESSES = BARRIERS = 0, EPOCH = 1, state = seed * 7919 + 1;

  int n_threads = NTID_X * NTID_Y * NTID_Z, n_blocks = NCTAID_X * NCTAID_Y * NCTAID_Z;
  SHARED = aligned_alloc(64, (shared_bytes + 63) & ~63ull);
  SHARED_SHADOW = calloc((shared_bytes >> SHARED_SHIFT) + 1, sizeof(word));
  THREADS = calloc(n_threads, sizeof(thread_));
  uint8_t *stacks = malloc(STACK * n_threads);
  uint8_t *locals = malloc((size_t)(LOCAL_BYTES + 64) * n_threads);
  int *order = malloc(sizeof(int) * n_blocks), *ready = malloc(sizeof(int) * n_threads);
  thread_ *lanes[32];

  for (int i = 0; i < n_blocks; i++) order[i] = i;
  for (int i = n_blocks - 1; i > 0; i--) {
    int j = draw(i + 1), swapped = order[i];
    order[i] = order[j];
    order[j] = swapped;
  }
  for (int i = 0; i < n_blocks; i++) {
    BLOCK = order[i];
    CTAID_X = BLOCK % NCTAID_X;
    CTAID_Y = BLOCK / NCTAID_X % NCTAID_Y;
    CTAID_Z = BLOCK / NCTAID_X / NCTAID_Y;
    run_block(n_threads, stacks, locals, ready, lanes);
  }
  free(SHARED), free(SHARED_SHADOW), free(THREADS), free(stacks), free(locals), free(order);
  free(ready);
  counts[0] = ACCESSES;
  counts[1] = BARRIERS;
  counts[2] = TRACED;
  return FOUND;
}
