// Executes a launch: programs, warps and lanes take turns in random order.
#include "machine.h"
#include "access.h"
#include "arithmetic.h"
#include "memory.h"
#include "matrix.h"
#include "tensor.h"

INSTRUCTION("bra(?:.uni)? = label", BRANCH) { return 0; }
INSTRUCTION("ret =; exit =", EXIT) { return 0; }
INSTRUCTION("bar(?:rier)?(?:.cta)?.sync(?:.aligned)? = !0", BARRIER) { return 0; }

enum { SPINS = 100000 }; // so many backward branches in a launch, with no memory changed in between, are a deadlock

static const Instruction *next_of(const Warp *w, int lane) { return &M.kernel->code[w->pc[lane]]; }

static void where_all_are(const Program *all, u32 count) {
    int told = 0;
    for (const Program *c = all; c < all + count; c++) {
        if (!c->live) continue;
        EACH_WARP(w, c) {
            const u32 here = w->ready | w->at_barrier | w->at_collective;
            if (!here || told++ >= 12) continue;
            const int l = first_lane(here);
            report(w, l, next_of(w, l), DEADLOCK, "%s here while no other thread can go on either",
                   w->ready >> l & 1 ? "runs in a loop" : w->at_barrier >> l & 1 ? "waits at a barrier" : "waits for its warp, or blocks");
        }
    }
    longjmp(M.end, 1);
}

// The barrier opens once all threads of the program are there; each at the same instruction.
static int try_barrier(Program *c) {
    const Warp *first = 0;
    EACH_WARP(w, c) {
        if (w->ready || w->at_collective) return 0;
        if (w->at_barrier && !first) first = w;
    }
    if (!first) return 0;
    const Instruction *i = next_of(first, first_lane(first->at_barrier));
    EACH_WARP(w, c) {
        if (w->done) FATAL(w, first_lane(w->done), i, DIVERGENCE, "has ended, while other threads wait at this barrier");
        for (int l = 0; l < 32; l++)
            if (next_of(w, l) != i) FATAL(w, l, next_of(w, l), DIVERGENCE, "waits at this barrier, while thread %u waits at another", 32 * first->index);
    }
    EACH_WARP(w, c) {
        if (w->fence_epoch == c->epoch) c->fenced_epoch = c->epoch;
        if (w->mma_seen > c->seen_at_barrier) c->seen_at_barrier = w->mma_seen;
        w->group_done_at_barrier = w->group_done;
        w->ready = w->at_barrier;
        w->at_barrier = 0;
        w->unfenced = 1;
        for (int l = 0; l < 32; l++) {
            w->pc[l]++;
            if (w->clock[l]) join(c->clock, w->clock[l]);
        }
    }
    c->epoch++;
    return 1;
}

// A collective runs once all lanes of the warp (of the four warps of a group) are at it.
static int try_collective(Warp *w) {
    const Instruction *i = next_of(w, first_lane(w->at_collective));
    const Operation *operation = &operations[i->op];
    const int of_group = operation->kind == WARPGROUP;
    Warp *first = of_group ? w - w->index % 4 : w, *last = of_group ? first + 3 : w;
    if (last >= w->program->warp + w->program->warps) FATAL(w, 0, i, DIVERGENCE, "needs the four warps of a warpgroup");
    for (Warp *x = first; x <= last; x++) {
        const u32 others = x->at_collective ^ (u32)FULL_WARP;
        int together = !others;
        EACH(l, x->at_collective) together &= next_of(x, l) == i;
        if (together) continue;
        if (!x->ready && (others || x == w))
            FATAL(x, others ? first_lane(others) : 0, i, DIVERGENCE, "is not among the lanes that wait here: all of %s have to execute this", of_group ? "the warpgroup" : "the warp");
        return 0;
    }
    M.time++;
    if (operation->run(w, i, FULL_WARP)) return 0;
    for (Warp *x = first; x <= last; x++) {
        x->ready = FULL_WARP;
        x->at_collective = 0;
        for (int l = 0; l < 32; l++) x->pc[l]++;
    }
    return 1;
}

static void leave(Warp *w, u32 mask, i32 pc) { EACH(l, mask) w->pc[l] = pc; }

// Lanes that are at the same instruction go on together for a while. 0: none can.
static int run_warp(Warp *w, int quantum) {
    if (!w->ready) return w->at_collective ? try_collective(w) : 0;
    // Usually those that are furthest behind, so that lanes meet again; and now and then only some of them.
    int leader = first_lane(w->ready);
    if (draw() % 4) { EACH(l, w->ready) if (w->pc[l] < w->pc[leader]) leader = l; }
    else for (u32 skip = draw() % 32, left = w->ready; left && skip--; left &= left - 1) leader = first_lane(left);
    i32 pc = w->pc[leader];
    u32 mask = 0;
    EACH(l, w->ready) mask |= (u32)(w->pc[l] == pc) << l;
    if (draw() % 16 == 0) mask = (mask & draw()) | 1u << leader;
    for (; quantum > 0; quantum--) {
        const Instruction *i = &M.kernel->code[pc];
        const Operation *operation = &operations[i->op];
        u32 active = mask;
        M.time++;
        M.launch->steps++;
        if (i->guard >= 0) {
            const u32 bad = mask & ~w->defined[i->guard];
            if (bad) report(w, first_lane(bad), i, UNDEFINED, "the predicate is a register that nothing has written"), w->defined[i->guard] |= bad;
            const u32 p = *(u32 *)(w->file + i->guard_at);
            active &= i->negated ? ~p : p;
        }
        if (!active) { pc++; continue; }
        if (operation->kind == LANES) {
            operation->run(w, i, active);
            pc++;
            continue;
        }
        if (operation->kind == BRANCH) {
            const int back = i->target <= pc;
            if (back && ++M.idle > SPINS) where_all_are(w->program - w->program->slot, M.launch->concurrent);
            if (active == mask) {
                pc = i->target;
                if (back && draw() % 4 == 0) break; // who polls lets others go on
                continue;
            }
            const u32 stay = mask & ~active, go_on = draw() & 1 ? active : stay;
            leave(w, active, i->target);
            leave(w, stay, pc + 1);
            mask = go_on;
            pc = go_on == active ? i->target : pc + 1;
            continue;
        }
        leave(w, active, pc);
        leave(w, mask & ~active, pc + 1);
        w->ready &= ~active;
        if (operation->kind == EXIT) {
            w->done |= active;
            M.idle = 0;
            EACH(l, active) if (w->copies[l].count) report(w, l, i, LEFT, "ends with a cp.async in flight");
        } else if (operation->kind == BARRIER) w->at_barrier |= active;
        else {
            w->at_collective |= active;
            if (w->at_collective == (u32)FULL_WARP && operation->kind == WARP && try_collective(w)) { pc++; mask = FULL_WARP; continue; }
        }
        return 1;
    }
    leave(w, mask, pc);
    return 1;
}

static int run_program(Program *c) {
    int moved = draw() % 4 == 0 && complete_next(c);
    const u32 first = draw() % c->warps;
    u32 done = 0;
    for (u32 k = 0; k < c->warps; k++) moved |= run_warp(&c->warp[(first + k) % c->warps], 1 + draw() % 256);
    EACH_WARP(w, c) done += w->done == (u32)FULL_WARP;
    if (done == c->warps) {
        while (complete_next(c)) {}
        if (c->columns) report(&c->warp[0], 0, 0, LEFT, "ends with %u columns of tensor memory allocated", c->columns);
        c->live = 0;
        return M.idle = 0, 1;
    }
    return moved | try_barrier(c);
}

static void start_program(Program *c, u32 number, u32 slot) {
    const Kernel *kernel = M.kernel;
    const Launch *launch = M.launch;
    *c = (Program){.number = number, .warps = launch->threads / 32, .epoch = 1, .slot = slot, .live = 1};
    c->id[0] = number % launch->grid[0];
    c->id[1] = number / launch->grid[0] % launch->grid[1];
    c->id[2] = number / launch->grid[0] / launch->grid[1];
    c->shared = malloc(launch->shared + 16);
    memset(c->shared, 0xff, launch->shared + 16);
    c->bytes = calloc(launch->shared + 1, sizeof(Byte));
    c->pending = calloc(launch->shared + 1, sizeof(Pending));
    c->clock = kernel->waits ? calloc(M.program_count, 4) : 0;
    c->warp = calloc(c->warps, sizeof(Warp));
    if (kernel->uses_tensor_memory) {
        c->tensor = malloc(128 * COLUMNS * 4);
        memset(c->tensor, 0xff, 128 * COLUMNS * 4);
        c->cell = calloc(COLUMNS, sizeof *c->cell);
    }
    EACH_WARP(w, c) {
        w->program = c;
        w->index = w - c->warp;
        w->ready = FULL_WARP;
        w->sync = 1;
        w->file = aligned_alloc(64, (kernel->file_size + 63) & ~63);
        memcpy(w->file, kernel->image, kernel->file_size);
        w->defined = calloc(3 * kernel->registers, 4);
        w->written = w->defined + kernel->registers;
        w->busy = w->written + kernel->registers;
        w->parts = calloc(kernel->registers, sizeof *w->parts);
        memcpy(w->defined, kernel->defined, 4 * kernel->registers);
        for (u32 l = 0; l < 32; l++) { // the special registers are the first ones, in the order of encode.py
            const u32 values[] = {32 * w->index + l, c->id[0], c->id[1], c->id[2], launch->grid[0], launch->grid[1], launch->grid[2], launch->threads, l, w->index};
            for (u32 k = 0; k < sizeof values / 4; k++) ((u32 *)w->file)[32 * k + l] = values[k];
        }
    }
}
static void free_program(Program *c) {
    EACH_WARP(w, c) {
        for (int l = 0; l < 32; l++) free(w->copies[l].list), free(w->clock[l]);
        free(w->file), free(w->defined), free(w->parts);
    }
    free(c->shared), free(c->bytes), free(c->pending), free(c->clock), free(c->warp), free(c->tensor), free(c->cell), free(c->queue);
    *c = (Program){0};
}

// Runs the launch; how many reports were made. The programs run `concurrent` at a time.
int execute(const Kernel *kernel, Launch *launch) {
    memset(&M, 0, sizeof M);
    M.kernel = kernel;
    M.launch = launch;
    M.random = 2 * launch->seed + 1;
    M.program_count = launch->grid[0] * launch->grid[1] * launch->grid[2];
    M.reported = calloc(kernel->instructions + 1, 16);
    M.sync = calloc(SYNC_WORDS, sizeof(SyncWord));
    M.columns = calloc(launch->concurrent + 1, 4);
    M.tensor = calloc(launch->tensors + 1, sizeof(Tensor));
    for (i32 k = 0; k < launch->tensors; k++)
        M.tensor[k] = (Tensor){launch->starts[k], launch->ends[k], .name = launch->names[k]};
    for (Tensor *t = M.tensor; t < M.tensor + launch->tensors; t++)
        t->bytes = calloc(t->end - t->start + 1, sizeof(Byte)), t->others = calloc(t->end - t->start + 1, sizeof(Access));
    Program *volatile running = calloc(launch->concurrent, sizeof(Program));
    if (!setjmp(M.end)) {
        u32 started = 0, live = 0, idle = 0;
        for (;;) {
            const u32 slot = draw() % launch->concurrent;
            int moved = 0;
            for (u32 n = 0; n < (u32)launch->concurrent; n++) {
                Program *c = &running[(slot + n) % launch->concurrent];
                if (!c->live && started < M.program_count) {
                    free_program(c);
                    start_program(c, started++, c - running);
                    live++;
                }
                if (!c->live) continue;
                moved |= run_program(c);
                live -= !c->live;
            }
            if (!live && started == M.program_count) break;
            idle = moved ? 0 : idle + 1;
            for (u32 n = 0; idle > 8 && n < (u32)launch->concurrent; n++) if (running[n].live && complete_next(&running[n])) idle = 0;
            if (idle > 8) where_all_are(running, launch->concurrent);
        }
    }
    for (i32 k = 0; k < launch->concurrent; k++) free_program(&running[k]);
    for (i32 k = 0; k < launch->tensors; k++) free(M.tensor[k].bytes), free(M.tensor[k].others);
    for (u32 k = 0; k < M.sync_count; k++) free(M.sync[k].clock);
    free(running), free(M.tensor), free(M.columns), free(M.sync), free(M.reported);
    return M.reports;
}

const Operation *operation_at(int k) { return &operations[k]; }
int operations_known(void) { return operation_count; }
