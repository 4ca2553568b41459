/* SLA and SALAD attention, forward and backward, behind a small C ABI: what a training framework
 * needs to call the kernels of this project without its C++ headers.
 *
 * Maths: SLA (arXiv 2509.24006), SALAD (arXiv 2601.16515); how both are read here stands in
 * kernels/backend.h (SlaArgs, SaladArgs and their backward forms).
 *
 * Conventions
 *   - Every tensor is dense and row-major, in the order of dimensions written beside its pointer.
 *     B samples, L tokens, H heads, D channels per head, d = H * D; Nq = ceil(L / block_q),
 *     Nk = ceil(L / block_k). "T" is the type that `dtype` names.
 *   - Pointers belong to the caller and point to memory of the context's device, aligned to 16
 *     bytes. A context for "cuda:N" takes device pointers of that GPU, one for "cpu" host pointers.
 *   - Everything an output pointer names is written completely; no output may overlap an input.
 *   - `stream` is a cudaStream_t (NULL: the legacy default stream). Work is ordered behind what the
 *     stream holds at the call, and what is queued on it later is ordered behind the work; the call
 *     itself does not wait for the device. On the CPU the call returns when it is done.
 *   - The first member of an argument struct is its size in bytes as the caller knows it. Members
 *     are only ever appended; those a caller does not know are taken as zero.
 *   - A context may be used from any thread; calls on one context take turns.
 *   - Working memory is held by the context and kept between calls.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define SLALOM_API __attribute__((visibility("default")))
#else
#define SLALOM_API
#endif

/* Goes up when something that callers rely on changes in a way that appending cannot express. */
#define SLALOM_ATTENTION_ABI 1

/* The ABI of the library that was loaded: compare it with SLALOM_ATTENTION_ABI. */
SLALOM_API int32_t slalom_attention_abi(void);

/* --- values --- */
/* Status: 0 is success, others are gRPC's canonical codes. */
enum {
  SLALOM_OK = 0,
  SLALOM_INVALID_ARGUMENT = 3,
  SLALOM_RESOURCE_EXHAUSTED = 8,  /* out of memory; the context stays usable */
  SLALOM_FAILED_PRECONDITION = 9, /* this build or this machine has no such device */
  SLALOM_INTERNAL = 13,           /* a shape or type that does not fit */
  SLALOM_UNAVAILABLE = 14         /* the device is lost */
};

enum { SLALOM_F32 = 0, SLALOM_BF16 = 1 };

/* Which key blocks the linear branch sums over, seen from a query block. */
enum { SLALOM_SCOPE_MARGINAL = 0, SLALOM_SCOPE_NONCRITICAL = 1, SLALOM_SCOPE_ALL = 2 };

/* softmax over the channels; elu(x) + 1; relu(x) */
enum { SLALOM_FEATURE_SOFTMAX = 0, SLALOM_FEATURE_ELU = 1, SLALOM_FEATURE_RELU = 2 };

/* Classes of block pairs in a map. */
enum { SLALOM_NEGLIGIBLE = 0, SLALOM_CRITICAL = 1, SLALOM_MARGINAL = 2 };

/* How a map is made: the largest pooled scores; or SALAD's spatial-temporal window, whose second
 * half of the heads orders its tokens (y, x, t). */
enum { SLALOM_MAP_TOPK = 0, SLALOM_MAP_WINDOW = 1 };

/* SALAD's gate: per token, or averaged over a sample's tokens. */
enum { SLALOM_GATE_TOKEN = 0, SLALOM_GATE_SAMPLE = 1 };

/* --- contexts --- */
typedef struct slalom_context slalom_context;

/* `device`: "cpu", "cuda" or "cuda:N". `cpu_threads`: 0 takes one per usable core. On failure
 * *context is NULL and a message is written to `error` (`error_size` bytes, may be NULL, 0). */
SLALOM_API int32_t slalom_context_create(const char* device, int32_t cpu_threads,
                                         slalom_context** context, char* error, size_t error_size);
/* Waits for its work. NULL is allowed. */
SLALOM_API void slalom_context_destroy(slalom_context* context);
/* Why the last call on this context that failed did so; "" if none has. Valid until the next call
 * on this context. */
SLALOM_API const char* slalom_context_error(const slalom_context* context);

/* --- maps --- */
typedef struct slalom_map_args {
  size_t size;
  void* stream;
  int64_t batch, length, heads, head_size;
  int32_t dtype;
  int32_t kind;      /* SLALOM_MAP_* */
  double topk;       /* share of key blocks that are critical, in (0, 1] */
  double negligible; /* share of key blocks that are dropped, in [0, 1) */
  int32_t block_q, block_k;
  int64_t grid_frames, grid_height, grid_width; /* SLALOM_MAP_WINDOW: their product is length */
  const void* q; /* [B, L, H, D] T, after rotation (SLALOM_MAP_TOPK) */
  const void* k; /* [B, L, H, D] T */
  uint8_t* map;  /* [B, H, Nq, Nk], written */
} slalom_map_args;

SLALOM_API int32_t slalom_make_map(slalom_context* context, const slalom_map_args* args);

/* --- SLA --- */
/* o = softmax over the critical blocks + (linear attention over the scope) W^T + b. One struct for
 * both directions. Head sizes: multiples of 8 up to 384; bf16 with 64 or 128 and blocks that are
 * multiples of 64 is what is fast on a GPU. */
typedef struct slalom_sla_args {
  size_t size;
  void* stream;
  int64_t batch, length, heads, head_size;
  int32_t dtype;
  int32_t block_q, block_k;
  int32_t scope;
  int32_t feature_map;
  int32_t reserved;
  const void* q;            /* [B, L, H, D] T, after rotation */
  const void* k;            /* [B, L, H, D] T */
  const void* v;            /* [B, L, H, D] T */
  const uint8_t* map;       /* [B, H, Nq, Nk] */
  const float* proj_weight; /* [D, D] f32; NULL: no linear branch */
  const float* proj_bias;   /* [D] f32, with proj_weight */
  void* out;                /* [B, L, H, D] T; written by forward, read by backward */
  float* lse;               /* [B, H, L] f32: log of a row's sum of exp over the critical blocks;
                               written by forward unless NULL, read by backward */
  /* backward alone */
  const void* d_out;    /* [B, L, H, D] T */
  void* d_q;            /* [B, L, H, D] T */
  void* d_k;            /* [B, L, H, D] T */
  void* d_v;            /* [B, L, H, D] T */
  float* d_proj_weight; /* [D, D] f32, with proj_weight */
  float* d_proj_bias;   /* [D] f32, with proj_weight */
} slalom_sla_args;

SLALOM_API int32_t slalom_sla_forward(slalom_context* context, const slalom_sla_args* args);
/* The map is held: it carries no gradient. */
SLALOM_API int32_t slalom_sla_backward(slalom_context* context, const slalom_sla_args* args);

/* --- SALAD --- */
/* o = sparse(q, k, v) + gate(x) * (linear(q_normed, k_normed, v) W_p^T + b_p), heads side by side,
 * before the layer's o projection. q = rotate(q_normed) and k = rotate(k_normed) are computed by
 * the caller, who adds d_q, turned back, to d_q_normed (they are separate inputs here). */
typedef struct slalom_salad_args {
  size_t size;
  void* stream;
  int64_t batch, length, heads, head_size;
  int32_t dtype;
  int32_t block_q, block_k;
  int32_t map_kind; /* SLALOM_MAP_*; with SLALOM_MAP_WINDOW the grid below */
  int32_t gate;     /* SLALOM_GATE_* */
  int32_t reserved;
  int64_t grid_frames, grid_height, grid_width;
  const void* q;            /* [B, L, H, D] T, after rotation */
  const void* k;            /* [B, L, H, D] T */
  const void* v;            /* [B, L, H, D] T */
  const void* q_normed;     /* [B, L, H, D] T, after RMSNorm, before rotation */
  const void* k_normed;     /* [B, L, H, D] T */
  const float* cos;         /* [L, D / 2] f32: interleaved pairs (2p, 2p + 1) are rotated */
  const float* sin;         /* [L, D / 2] f32 */
  const void* x;            /* [B, L, d] T: the layer's input, for the gate */
  const uint8_t* map;       /* [B, H, Nq, Nk] */
  const void* proj_weight;  /* [d, d] T; NULL: this layer has no linear branch (and no gate) */
  const float* proj_bias;   /* [d] f32 */
  const float* gate_weight; /* [1, d] f32 */
  const float* gate_bias;   /* [1] f32 */
  void* out;                /* [B, L, d] T; written by forward, read by backward */
  float* lse;               /* [B, H, L] f32, by position in the head's own order of tokens;
                               written by forward unless NULL, read by backward */
  float* gate_out;          /* [B, L] f32, may be NULL: the gate's values; forward alone */
  /* backward alone */
  const void* d_out;    /* [B, L, d] T */
  void* d_q;            /* [B, L, H, D] T, of the sparse branch */
  void* d_k;            /* [B, L, H, D] T */
  void* d_v;            /* [B, L, H, D] T, of both branches */
  void* d_q_normed;     /* [B, L, H, D] T, of the linear branch; with proj_weight, as all below */
  void* d_k_normed;     /* [B, L, H, D] T */
  void* d_x;            /* [B, L, d] T, through the gate */
  float* d_proj_weight; /* [d, d] f32 */
  float* d_proj_bias;   /* [d] f32 */
  float* d_gate_weight; /* [1, d] f32 */
  float* d_gate_bias;   /* [1] f32 */
} slalom_salad_args;

SLALOM_API int32_t slalom_salad_forward(slalom_context* context, const slalom_salad_args* args);
SLALOM_API int32_t slalom_salad_backward(slalom_context* context, const slalom_salad_args* args);

#ifdef __cplusplus
} /* extern "C" */
#endif
