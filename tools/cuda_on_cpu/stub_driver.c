/* A libcuda.so.1 for machines without a GPU: memory of the "device" is the host's, images are PTX
   text, and a launch calls back into Python, where ptxrun.py executes the PTX.

   What it is told (stub_*) decides how many devices there are, which CUDA the driver knows and how
   much memory a device has; so errors of a driver can be tested as well.  Only what numba-cuda calls
   is here: a missing function is an error that names it. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int result;
enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_PTX = 218, NOT_FOUND = 500, LAUNCH_FAILED = 719 };

typedef int (*launcher)(const char *ptx, const char *name, const unsigned *dims, void *stream, void **parameters);
typedef struct { uint64_t base, size; int device; } allocation;
typedef struct { char *ptx; size_t size; } image;
typedef struct { image *of; char name[4096]; } function;

static int DEVICES = 1, VERSION = 13000, MOST = 1 << 16, N_ALLOCATIONS;
static uint64_t MEMORY = 1ull << 32, USED;
static launcher LAUNCH;
static allocation ALLOCATIONS[1 << 16];
static pthread_mutex_t LOCK = PTHREAD_MUTEX_INITIALIZER; /* of the allocations: any thread may call */
static struct { int allocations, copies, waits; } CALLS;
static char CONTEXTS[16];
static __thread void *STACK[64];
static __thread int DEPTH;

void stub_configure(int devices, int version, uint64_t memory, launcher launch) {
  DEVICES = devices, VERSION = version, MEMORY = memory, LAUNCH = launch;
}
int stub_allocations(allocation *to) {
  pthread_mutex_lock(&LOCK);
  int n = N_ALLOCATIONS;
  memcpy(to, ALLOCATIONS, sizeof(allocation) * n);
  pthread_mutex_unlock(&LOCK);
  return n;
}

/* How often memory was allocated, copied or set, and waited for, since it was asked last. */
void stub_calls(void *to) {
  memcpy(to, &CALLS, sizeof CALLS);
  memset(&CALLS, 0, sizeof CALLS);
}

static void *current(void) { return DEPTH ? STACK[DEPTH - 1] : 0; }
static int device_of(void *context) { return context ? (int)((char *)context - CONTEXTS) : 0; }

/* ---- driver and devices */
result cuInit(unsigned flags) { return DEVICES < 0 ? NO_DEVICE : SUCCESS; }
result cuDriverGetVersion(int *version) { *version = VERSION; return SUCCESS; }
result cuDeviceGetCount(int *n) { *n = DEVICES < 0 ? 0 : DEVICES; return SUCCESS; }
result cuDeviceGet(int *device, int n) { *device = n; return n < DEVICES ? SUCCESS : INVALID_VALUE; }
result cuDeviceGetName(char *name, int n, int device) { snprintf(name, n, "stub"); return SUCCESS; }
result cuDeviceGetUuid_v2(char *uuid, int device) { memset(uuid, device + 1, 16); return SUCCESS; }
result cuDeviceGetUuid(char *uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }
result cuDeviceTotalMem_v2(size_t *n, int device) { *n = MEMORY; return SUCCESS; }
result cuDeviceComputeCapability(int *major, int *minor, int device) { *major = 9, *minor = 0; return SUCCESS; }
result cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 1: *value = 1024; break;               /* threads of a block */
    case 2: case 3: *value = 1024; break;       /* block x, y */
    case 4: *value = 64; break;
    case 5: *value = 2147483647; break;         /* grid x, y, z */
    case 6: case 7: *value = 65535; break;
    case 8: *value = 49152; break;              /* shared memory of a block */
    case 9: *value = 65536; break;              /* constant memory */
    case 10: *value = 32; break;                /* warp */
    case 12: *value = 65536; break;             /* registers of a block */
    case 16: *value = 132; break;               /* multiprocessors */
    case 39: *value = 2048; break;              /* threads of one */
    case 41: *value = 1; break;                 /* unified addresses */
    case 75: *value = 9; break;                 /* compute capability */
    case 76: *value = 0; break;
    case 81: *value = 233472; break;            /* shared memory of a multiprocessor */
    case 82: *value = 65536; break;             /* registers of one */
    case 97: *value = 232448; break;
    default: *value = 0;
  }
  return SUCCESS;
}

/* ---- contexts */
result cuDevicePrimaryCtxRetain(void **context, int device) { *context = &CONTEXTS[device]; return SUCCESS; }
result cuDevicePrimaryCtxRelease_v2(int device) { return SUCCESS; }
result cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0, *active = 1; return SUCCESS; }
result cuCtxGetCurrent(void **context) { *context = current(); return SUCCESS; }
result cuCtxSetCurrent(void *context) { if (DEPTH) STACK[DEPTH - 1] = context; else STACK[DEPTH++] = context; if (!context) DEPTH--; return SUCCESS; }
result cuCtxPushCurrent_v2(void *context) { STACK[DEPTH++] = context; return SUCCESS; }
result cuCtxPopCurrent_v2(void **context) { *context = DEPTH ? STACK[--DEPTH] : 0; return SUCCESS; }
result cuCtxGetDevice(int *device) { *device = device_of(current()); return SUCCESS; }
result cuCtxGetDevice_v2(int *device, void *context) { return cuCtxGetDevice(device); } /* called with one argument too */
result cuCtxGetApiVersion(void *context, unsigned *v) { *v = 13000; return SUCCESS; }
result cuCtxSynchronize(void) { CALLS.waits++; return SUCCESS; }
result cuCtxSynchronize_v2(void *context) { return cuCtxSynchronize(); }

/* ---- memory */
result cuMemGetInfo_v2(size_t *left, size_t *total) { *left = MEMORY - USED, *total = MEMORY; return SUCCESS; }
result cuMemAlloc_v2(uint64_t *pointer, size_t n) {
  pthread_mutex_lock(&LOCK);
  int fits = USED + n <= MEMORY && N_ALLOCATIONS < MOST;
  CALLS.allocations++;
  if (fits) {
    void *p = aligned_alloc(256, (n + 255) & ~255ull);
    memset(p, 0xff, n); /* NaN: what nobody wrote */
    *pointer = (uint64_t)p;
    ALLOCATIONS[N_ALLOCATIONS++] = (allocation){(uint64_t)p, n, device_of(current())};
    USED += n;
  }
  pthread_mutex_unlock(&LOCK);
  return fits ? SUCCESS : OUT_OF_MEMORY;
}
static int find(uint64_t pointer, allocation *found, int remove) {
  int there = 0;
  pthread_mutex_lock(&LOCK);
  for (int i = 0; i < N_ALLOCATIONS && !there; i++) {
    there = pointer >= ALLOCATIONS[i].base && pointer < ALLOCATIONS[i].base + ALLOCATIONS[i].size;
    if (there) *found = ALLOCATIONS[i];
    if (there && remove && found->base == pointer) USED -= found->size, ALLOCATIONS[i] = ALLOCATIONS[--N_ALLOCATIONS];
  }
  pthread_mutex_unlock(&LOCK);
  return there;
}
result cuMemFree_v2(uint64_t pointer) {
  allocation a;
  if (!find(pointer, &a, 1) || a.base != pointer) return INVALID_VALUE;
  free((void *)pointer);
  return SUCCESS;
}
static int fits(uint64_t pointer, size_t n) {
  allocation a;
  return find(pointer, &a, 0) && pointer + n <= a.base + a.size;
}
result cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t n) { CALLS.copies++; if (!fits(to, n)) return INVALID_VALUE; memcpy((void *)to, from, n); return SUCCESS; }
result cuMemcpyDtoH_v2(void *to, uint64_t from, size_t n) { CALLS.copies++; if (!fits(from, n)) return INVALID_VALUE; memcpy(to, (void *)from, n); return SUCCESS; }
result cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t n) { CALLS.copies++; if (!fits(to, n) || !fits(from, n)) return INVALID_VALUE; memmove((void *)to, (void *)from, n); return SUCCESS; }
result cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t n, void *stream) { return cuMemcpyHtoD_v2(to, from, n); }
result cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t n, void *stream) { return cuMemcpyDtoH_v2(to, from, n); }
result cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t n, void *stream) { return cuMemcpyDtoD_v2(to, from, n); }
result cuMemsetD8_v2(uint64_t to, unsigned char x, size_t n) { CALLS.copies++; if (!fits(to, n)) return INVALID_VALUE; memset((void *)to, x, n); return SUCCESS; }
result cuMemsetD8Async(uint64_t to, unsigned char x, size_t n, void *stream) { return cuMemsetD8_v2(to, x, n); }
result cuMemHostAlloc(void **pointer, size_t n, unsigned flags) { *pointer = malloc(n); return SUCCESS; }
result cuMemFreeHost(void *pointer) { free(pointer); return SUCCESS; }
result cuMemGetAddressRange_v2(uint64_t *base, size_t *n, uint64_t pointer) {
  allocation a;
  if (!find(pointer, &a, 0)) return INVALID_VALUE;
  *base = a.base, *n = a.size;
  return SUCCESS;
}
result cuPointerGetAttribute(void *value, int attribute, uint64_t pointer) {
  allocation a;
  if (!find(pointer, &a, 0)) return INVALID_VALUE;
  switch (attribute) {
    case 1: *(void **)value = &CONTEXTS[a.device]; break;
    case 2: *(int *)value = 2; break;               /* device memory */
    case 3: *(uint64_t *)value = pointer; break;
    case 8: *(int *)value = 0; break;               /* not managed */
    case 9: *(int *)value = a.device; break;
    default: return INVALID_VALUE;
  }
  return SUCCESS;
}
result cuPointerGetAttributes(unsigned n, int *attributes, void **values, uint64_t pointer) {
  for (unsigned i = 0; i < n; i++) cuPointerGetAttribute(values[i], attributes[i], pointer);
  return SUCCESS;
}

/* ---- streams and events: everything is done when it is called */
static int N_STREAMS;
result cuStreamCreate(void **stream, unsigned flags) { *stream = (void *)(uint64_t)(1000 + ++N_STREAMS); return SUCCESS; }
result cuStreamCreateWithPriority(void **stream, unsigned flags, int priority) { return cuStreamCreate(stream, flags); }
result cuStreamDestroy_v2(void *stream) { return SUCCESS; }
result cuStreamSynchronize(void *stream) { return cuCtxSynchronize(); }
result cuStreamQuery(void *stream) { return SUCCESS; }
result cuStreamWaitEvent(void *stream, void *event, unsigned flags) { return SUCCESS; }
result cuStreamGetCtx(void *stream, void **context) { *context = current(); return SUCCESS; }
result cuStreamAddCallback(void *stream, void (*call)(void *, int, void *), void *data, unsigned flags) { call(stream, 0, data); return SUCCESS; }
result cuEventCreate(void **event, unsigned flags) { *event = (void *)1; return SUCCESS; }
result cuEventDestroy_v2(void *event) { return SUCCESS; }
result cuEventRecord(void *event, void *stream) { return SUCCESS; }
result cuEventSynchronize(void *event) { return cuCtxSynchronize(); }
result cuEventQuery(void *event) { return SUCCESS; }
result cuEventElapsedTime(float *ms, void *first, void *last) { *ms = 1; return SUCCESS; }
result cuEventElapsedTime_v2(float *ms, void *first, void *last) { *ms = 1; return SUCCESS; }

/* ---- images: the linker hands on the PTX it is given */
static image *kept(const void *ptx, size_t n) {
  image *new = malloc(sizeof(image));
  *new = (image){malloc(n + 1), n};
  memcpy(new->ptx, ptx, n);
  new->ptx[n] = 0;
  return new;
}
result cuLinkCreate_v2(unsigned n, int *options, void **values, void **state) { *state = calloc(1, sizeof(image *)); return SUCCESS; }
result cuLinkAddData_v2(void *state, int type, void *data, size_t n, const char *name, unsigned m, int *options, void **values) {
  if (type != 1) return INVALID_PTX;
  *(image **)state = kept(data, n);
  return SUCCESS;
}
result cuLinkComplete(void *state, void **cubin, size_t *n) {
  image *of = *(image **)state;
  *cubin = of->ptx, *n = of->size + 1;
  return SUCCESS;
}
result cuLinkDestroy(void *state) { return SUCCESS; }
result cuModuleLoadDataEx(void **module, const void *data, unsigned n, int *options, void **values) { *module = kept(data, strlen(data)); return SUCCESS; }
result cuModuleLoadData(void **module, const void *data) { return cuModuleLoadDataEx(module, data, 0, 0, 0); }
result cuModuleUnload(void *module) { return SUCCESS; }
result cuModuleGetFunction(void **to, void *module, const char *name) {
  function *f = malloc(sizeof(function));
  f->of = module;
  snprintf(f->name, sizeof f->name, "%s", name);
  *to = f;
  return strstr(((image *)module)->ptx, name) ? SUCCESS : NOT_FOUND;
}
result cuLibraryLoadData(void **library, const void *code, int *a, void **b, unsigned c, int *d, void **e, unsigned f) { return cuModuleLoadData(library, code); }
result cuLibraryUnload(void *library) { return SUCCESS; }
result cuLibraryGetKernel(void **kernel, void *library, const char *name) { return cuModuleGetFunction(kernel, library, name); }
result cuLibraryGetModule(void **module, void *library) { *module = library; return SUCCESS; }
result cuKernelGetFunction(void **to, void *kernel) { *to = kernel; return SUCCESS; }
result cuKernelGetAttribute(int *value, int attribute, void *kernel, int device) { *value = 0; return SUCCESS; }
result cuKernelGetParamInfo(void *kernel, size_t i, size_t *offset, size_t *size) { return INVALID_VALUE; }
result cuFuncGetModule(void **module, void *f) { *module = ((function *)f)->of; return SUCCESS; }
result cuFuncGetName(const char **name, void *f) { *name = ((function *)f)->name; return SUCCESS; }
result cuFuncGetAttribute(int *value, int attribute, void *f) { *value = attribute == 0 ? 1024 : 0; return SUCCESS; }
result cuFuncSetAttribute(void *f, int attribute, int value) { return SUCCESS; }
result cuFuncSetCacheConfig(void *f, int config) { return SUCCESS; }
result cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, void *f, int threads, size_t shared) { *n = 1; return SUCCESS; }

result cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                      unsigned shared, void *stream, void **parameters, void **extra) {
  unsigned dims[7] = {gx, gy, gz, bx, by, bz, shared};
  function *what = f;
  if (gx == 0 || gy == 0 || gz == 0 || gy > 65535 || gz > 65535 || bx * by * bz > 1024) return INVALID_VALUE;
  return LAUNCH && LAUNCH(what->of->ptx, what->name, dims, stream, parameters) == 0 ? SUCCESS : LAUNCH_FAILED;
}

typedef struct { unsigned grid[3], block[3], shared; void *stream, *attributes; unsigned n; } config;
result cuLaunchKernelEx(const config *c, void *f, void **parameters, void **extra) {
  return cuLaunchKernel(f, c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2],
                        c->shared, c->stream, parameters, extra);
}

result cuGetErrorString(int code, const char **text) { *text = "stub error"; return SUCCESS; }
result cuGetErrorName(int code, const char **text) { *text = "CUDA_ERROR"; return SUCCESS; }

result cuGetProcAddress_v2(const char *symbol, void **to, int version, uint64_t flags, int *status) {
  char name[128];
  for (const char **s = (const char *[]){"_v2", "", 0}; *s; s++) {
    snprintf(name, sizeof name, "%s%s", symbol, *s);
    if ((*to = dlsym(RTLD_DEFAULT, name))) break;
    Dl_info info;
    dladdr((void *)cuInit, &info);
    void *self = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if ((*to = dlsym(self, name))) break;
  }
  if (status) *status = *to ? 0 : 1;
  if (!*to && getenv("STUB_LOG")) fprintf(stderr, "stub: no %s\n", symbol);
  return *to ? SUCCESS : NOT_FOUND;
}
result cuGetProcAddress(const char *symbol, void **to, int version, uint64_t flags) { return cuGetProcAddress_v2(symbol, to, version, flags, 0); }
