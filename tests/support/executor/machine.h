// The state of a launch: programs (CTAs), warps, registers, and the reports about them.
//
// A warp executes one instruction for a set of its lanes at once. Every register is an array of 32 lanes; a predicate is a
// word of 32 bits. Beside its value each register has a mask of the lanes in which it is defined.
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;
typedef int8_t i8;
typedef int16_t i16;
typedef int32_t i32;
typedef long long i64;
typedef float f32;
typedef double f64;

enum { FULL_WARP = -1, SHARED_BASE = 1024, COLUMNS = 512, MAX_WARPS = 32, SYNC_WORDS = 1024 };

// Byte offset in the register file of a warp, the register's number and its bytes (1: a predicate); added, where it is an address.
typedef struct { i32 at, id, bytes, offset; } Operand;
typedef struct {
    i32 op, guard, guard_at, negated, target, first, results, inputs, value[8]; // value: as the opcode's form says
} Instruction;

typedef struct Program Program;
typedef struct Warp Warp;

// Who accessed a byte last. thread: 1 + 1024 * program + thread, 0 for nobody; epoch: how many CTA barriers its program
// had passed; sync: how many warp barriers its warp had.
// strong: of how many bytes, or 0.
typedef struct { u32 thread, epoch; u16 sync, strong; } Access;
// The last write of a byte and the last read; which warps of that program have read it in that epoch, and which lanes of the last
// warp since its last barrier.
typedef struct { Access write, read; u32 warps, lanes; } Byte;
// Of a byte of shared memory: when it was written, the last product of each warpgroup that reads it, whether a cp.async still
// writes it, and whether it was written with no product reading it since.
typedef struct { u32 write_time, async[4]; u8 in_flight, generic; } Pending;
typedef struct { u64 start, end; Byte *bytes; Access *others; const char *name; } Tensor; // others: the last reads by one more program
typedef struct { u64 address; u32 *clock; } SyncWord; // what a release to this address has published: epochs of each program
typedef struct { u32 destination, size, source_size, group; u64 source; } Copy;
typedef struct { Copy *list; u32 count, capacity, group; } Copies;

struct Warp {
    Program *program;
    u32 index, ready, at_barrier, at_collective, done; // masks of lanes
    u32 sync, fence_epoch, wgmma_fence, committed, group, group_done, group_done_at_barrier, mma_seen, busy_count, unfenced;
    i32 pc[32];
    u32 fence_time[32];
    u8 *file;
    u32 *defined, *written, *busy; // by register. busy: why its value must not be touched, 0 for no reason
    u32 (*parts)[6];               // of a register put together from parts: in which lanes each is defined, when that was, how many
    u32 *clock[32];                // what a lane has acquired since the last CTA barrier
    Copies copies[32];
};
enum { ACCUMULATOR = 1 << 24, OPERAND = 2 << 24, TENSOR_LOAD = 3 << 24, GROUP = (1 << 24) - 1 };

typedef struct { Access stored, loaded; u32 store_pending, load_pending, product; } Cell;
typedef struct { const Instruction *instruction; u64 a, b; u32 destination, descriptor, a_in_tensor, add; } Product;
typedef struct { u32 at, seen; } Barrier;     // an mbarrier, and the products that are complete where its phase is
typedef struct { u32 barrier, last; } Commit; // an arrival at an mbarrier, due after the product `last`
struct Program {
    u32 number, id[3], warps, epoch, fenced_epoch, slot, live;
    u8 *shared;
    Byte *bytes;
    Pending *pending;
    u32 *clock;
    Warp *warp;
    // Tensor memory: columns, allocated ones, and the products (tcgen05.mma) issued, completed and known to all threads.
    u32 *tensor, columns, products, completed, capacity, seen_at_barrier, commits, barriers;
    Cell (*cell)[4]; // [column][quarter of the lanes]
    Product *queue;
    Commit commit[64];
    Barrier barrier[64];
};

typedef int (*Handler)(Warp *, const Instruction *, u32 mask); // 1 of a collective: cannot proceed yet
typedef enum { LANES, WARP, WARPGROUP, BRANCH, EXIT, BARRIER } Kind;
typedef struct { const char *opcode; Handler run; i64 kind, results, inputs, size[4]; } Operation; // bytes of the operands
static Operation operations[1024];
static int operation_count;
#define CAT_(a, b) a##b
#define CAT(a, b) CAT_(a, b)
#define RUN(N) static int CAT(run_, N)(Warp *w, const Instruction *i, u32 mask)
#define REGISTER(N, ...) __attribute__((constructor)) static void CAT(add_, N)(void) { operations[operation_count++] = (Operation){__VA_ARGS__}; }
// An operation with operands of any form: INSTRUCTION("opcodes and forms, as instructions.py reads them", KIND) { what it does }.
// What it reads has to be defined, unless it is PROPAGATING: then it says of its results in which lanes they are.
#define INSTRUCTION(OPCODES, KIND) INSTRUCTION_(__COUNTER__, OPCODES, KIND, use_all(w, i, mask))
#define PROPAGATING(OPCODES, KIND) INSTRUCTION_(__COUNTER__, OPCODES, KIND, )
#define INSTRUCTION_(N, OPCODES, KIND, CHECK) \
    static int CAT(do_, N)(Warp *w, const Instruction *i, u32 mask); \
    RUN(N) { CHECK; return CAT(do_, N)(w, i, mask); } \
    REGISTER(N, OPCODES, CAT(run_, N), KIND, -1) \
    static int CAT(do_, N)(Warp *w, const Instruction *i, u32 mask)

// Filled by build.py: each field has 8 bytes.
typedef struct {
    const Instruction *code;
    const Operand *operands;
    const u8 *image;    // the register file of a warp at its start
    const u32 *defined; // of each register: the lanes in which it is defined at the start
    i64 instructions, registers, file_size, waits, uses_tensor_memory;
} Kernel;
typedef struct {
    i64 grid[3], threads, shared, tensors, concurrent, programs_per_sm, seed;
    const u8 *parameters;
    const u64 *starts, *ends;
    const char **names;
    char *message;
    i64 message_size, parameter_bytes;
    // Counted: instructions of warps, accesses to tensor memory without a thread-sync fence, operands of a wgmma in flight that are
    // overwritten, and zeros moved to accumulators behind the wgmma.fence. PTX forbids the last three. ptxas waits for a product
    // whose operands are overwritten, and of one whose accumulators are zeroed late makes a product without a sum.
    i64 steps, unfenced, serialized, late_zeros;
} Launch;

enum { RACE_SHARED, RACE_GLOBAL, UNDEFINED, UNINITIALISED, BOUNDS, IN_FLIGHT, PROXY, DIVERGENCE, DEADLOCK, TENSOR, WGMMA, TRAP, LEFT };
static const char *const KINDS[] = {
    "race in shared memory", "race in global memory", "undefined register", "uninitialised shared memory", "out of bounds or misaligned",
    "asynchronous copy or product not waited for", "proxy fence missing", "divergence", "deadlock", "tensor memory", "wgmma", "trap", "left over",
};

static struct {
    const Kernel *kernel;
    Launch *launch;
    Tensor *tensor;
    SyncWord *sync;
    u8 *reported; // by instruction and kind
    u32 sync_count, program_count, time, random, idle, *columns;
    int length, reports;
    jmp_buf end;
} M;

static u32 draw(void) {
    M.random ^= M.random << 13;
    M.random ^= M.random >> 17;
    return M.random ^= M.random << 5;
}

static const Operand *operand(const Instruction *i, int k) { return &M.kernel->operands[i->first + k]; }
static void *lanes(const Warp *w, const Operand *o) { return w->file + o->at; }
static u32 *word(const Warp *w, const Instruction *i, int k) { return lanes(w, operand(i, k)); }
static u32 number_of(const Warp *w, int lane) { return 1 + 1024 * w->program->number + 32 * w->index + lane; }

// One report a kind and instruction. Python completes it with the source line.
static void report(const Warp *w, int lane, const Instruction *i, int kind, const char *format, ...) {
    const int at = i ? (int)(i - M.kernel->code) : -1;
    u8 *seen = &M.reported[(at + 1) * 16 + kind];
    if (*seen || M.launch->message_size - M.length < 600) return;
    *seen = 1;
    M.reports++;
    const int program = w ? (int)w->program->number : -1, thread = w ? (int)w->index * 32 + lane : -1;
    M.length += sprintf(M.launch->message + M.length, "%s\t%d\t%d\t%d\t", KINDS[kind], program, thread, at);
    va_list arguments;
    va_start(arguments, format);
    M.length += vsnprintf(M.launch->message + M.length, 400, format, arguments);
    va_end(arguments);
    M.length += sprintf(M.launch->message + M.length, "\n");
}
#define FATAL(...) (report(__VA_ARGS__), longjmp(M.end, 1))

static int first_lane(u32 mask) { return __builtin_ctz(mask); }
#define EACH_WARP(w, c) for (Warp *w = (c)->warp; w < (c)->warp + (c)->warps; w++)
#define EACH(l, mask) for (u32 l##_ = (mask), l = 0; l##_ && (l = first_lane(l##_), 1); l##_ &= l##_ - 1)

// What an instruction reads; 1 if some of it must not be read yet, which is reported.
static void check_busy(Warp *w, const Instruction *i, const Operand *o) {
    const u32 why = w->busy[o->id] & ~GROUP;
    if (why == ACCUMULATOR) report(w, 0, i, WGMMA, "reads an accumulator before wgmma.wait_group");
    if (why == TENSOR_LOAD) report(w, 0, i, IN_FLIGHT, "reads what tcgen05.ld loads before tcgen05.wait::ld");
}
static u32 defined(Warp *w, const Instruction *i, const Operand *o, u32 mask) {
    const u32 ok = w->defined[o->id];
    if (mask & ~ok && w->busy_count) check_busy(w, i, o);
    return ok;
}
// Values that become visible outside of registers, or decide what is executed, have to be defined.
static void *used(Warp *w, const Instruction *i, int k, u32 mask) {
    const Operand *o = operand(i, k);
    const u32 bad = mask & ~defined(w, i, o, mask);
    if (bad && !w->busy[o->id]) {
        report(w, first_lane(bad), i, UNDEFINED, "operand %d is a register that nothing has written", k + 1);
        w->defined[o->id] |= bad;
    }
    return lanes(w, o);
}
static void use_all(Warp *w, const Instruction *i, u32 mask) {
    for (int k = i->results; k < i->results + i->inputs; k++) used(w, i, k, mask);
}
static void define(Warp *w, const Instruction *i, const Operand *o, u32 mask, u32 ok) {
    const u32 why = w->busy_count ? w->busy[o->id] & ~GROUP : 0;
    if (why == OPERAND) M.launch->serialized++;
    else if (why) report(w, 0, i, why == TENSOR_LOAD ? IN_FLIGHT : WGMMA, "writes a register that an asynchronous instruction still writes");
    w->defined[o->id] = (w->defined[o->id] & ~mask) | (mask & ok);
    w->written[o->id] = M.time;
}
// The same for part k, of as many, of a register that consists of parts.
static u32 part_defined(Warp *w, const Instruction *i, const Operand *o, u32 mask, int k, int of) {
    const u32 *parts = w->parts[o->id], all = w->defined[o->id];
    if (!(mask & ~all)) return all;
    const int count = parts[5];
    if (!count || parts[4] != w->written[o->id]) return defined(w, i, o, mask);
    u32 ok = FULL_WARP;
    for (int n = k * count / of; n * of < (k + 1) * count; n++) ok &= parts[n];
    return all | ok;
}
static void define_parts(Warp *w, const Instruction *i, const Operand *o, u32 mask, int count, const u32 *ok) {
    u32 all = FULL_WARP, *parts = w->parts[o->id];
    for (int k = 0; k < count; k++) all &= parts[k] = ok[k];
    define(w, i, o, mask, all);
    parts[4] = M.time, parts[5] = count;
}
// A register of which parts may be undefined, moved.
static void define_alike(Warp *w, const Instruction *i, const Operand *o, const Operand *from, u32 mask) {
    u32 ok[4];
    const int count = mask & ~w->defined[from->id] && w->parts[from->id][4] == w->written[from->id] ? w->parts[from->id][5] : 0;
    for (int k = 0; k < count; k++) ok[k] = part_defined(w, i, from, mask, k, count);
    if (count) define_parts(w, i, o, mask, count, ok);
    else define(w, i, o, mask, defined(w, i, from, mask));
}
static void make_busy(Warp *w, const Operand *o, u32 why) {
    w->busy_count += !w->busy[o->id];
    w->busy[o->id] = why;
    if ((why & ~(u32)GROUP) != OPERAND) w->defined[o->id] = 0;
}
// Registers of asynchronous instructions up to this group are free again.
static void release_busy(Warp *w, u32 least, u32 most, u32 group) {
    for (i32 r = 0; w->busy_count && r < M.kernel->registers; r++) {
        const u32 why = w->busy[r] & ~GROUP;
        if (!w->busy[r] || why < least || why > most || (w->busy[r] & GROUP) > group) continue;
        w->busy[r] = 0;
        w->busy_count--;
        if (why != OPERAND) w->defined[r] = FULL_WARP;
    }
}

static inline f32 as_f32(u32 x) { f32 f; memcpy(&f, &x, 4); return f; }
static inline u32 bits_f32(f32 f) { u32 x; memcpy(&x, &f, 4); return x; }
static inline f32 from_bf16(u16 x) { return as_f32((u32)x << 16); }
static inline u16 to_bf16(f32 f) {
    const u32 x = bits_f32(f);
    return (x & 0x7fffffff) > 0x7f800000 ? 0x7fff : (x + 0x7fff + (x >> 16 & 1)) >> 16;
}
static inline f32 from_f16(u16 h) {
    const u32 sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
    if (exponent == 31) return as_f32(sign | 0x7f800000 | mantissa << 13);
    if (!exponent) return as_f32(sign | bits_f32(mantissa * 0x1p-24f));
    return as_f32(sign | (exponent + 112) << 23 | mantissa << 13);
}
static inline u16 to_f16(f32 f) {
    const u32 x = bits_f32(f), a = x & 0x7fffffff;
    const u16 sign = x >> 16 & 0x8000;
    if (a > 0x7f800000) return 0x7fff;
    if (a >= 0x477ff000) return sign | 0x7c00;
    if (a < 0x38800000) return sign | (u16)rintf(fabsf(f) * 0x1p24f);
    return sign | (a + 0xfff + (a >> 13 & 1) - 0x38000000) >> 13;
}
static inline f32 truncated_tf32(u32 x) { return as_f32(x & 0xffffe000u); } // the tensor core does not read the low bits
