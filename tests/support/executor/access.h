// Checks of every access to shared and global memory.
//
// Two accesses to a byte, of which one writes, are a race unless one happens before the other. Inside a program a CTA barrier
// orders all threads and a warp barrier those of its warp; between programs a release orders what its thread and, behind a
// barrier, its program have done before everything behind the acquire that reads it. Two strong accesses of one size are no race:
// they are atomic, and aligned, so of one address. They order nothing, but a value may say itself that it has been written.

// ---- order between programs: vector clocks, each entry the epochs of a program of which everything has been seen ----

static u32 seen_epoch(const Warp *w, int lane, u32 program) {
    const u32 *clock = w->program->clock, *acquired = w->clock[lane];
    const u32 all = clock ? clock[program] : 0;
    return acquired && acquired[program] > all ? acquired[program] : all;
}
static void join(u32 *clock, const u32 *other) {
    for (u32 p = 0; other && p < M.program_count; p++) clock[p] = clock[p] > other[p] ? clock[p] : other[p];
}
static SyncWord *sync_word(u64 address) {
    u32 k = 0;
    while (k < M.sync_count && M.sync[k].address != address) k++;
    if (k == SYNC_WORDS) FATAL(0, 0, 0, LEFT, "more than %d words are used to synchronise", SYNC_WORDS);
    if (k == M.sync_count) M.sync[M.sync_count++] = (SyncWord){address, calloc(M.program_count, 4)};
    return &M.sync[k];
}
static void publish(Warp *w, int lane, u64 address) {
    u32 *clock = sync_word(address)->clock;
    Program *c = w->program;
    join(clock, c->clock);
    join(clock, w->clock[lane]);
    if (clock[c->number] < c->epoch) clock[c->number] = c->epoch;
}
static void acquire(Warp *w, int lane, u64 address) {
    if (!w->clock[lane]) w->clock[lane] = calloc(M.program_count, 4);
    join(w->clock[lane], sync_word(address)->clock);
}

// Whether an access of the past happens before what this lane does now.
static int ordered(const Warp *w, int lane, const Access *a) {
    const u32 thread = a->thread - 1, me = number_of(w, lane) - 1;
    if (thread == me) return 1;
    if (thread / 1024 != me / 1024) return a->epoch < seen_epoch(w, lane, thread / 1024);
    return a->epoch < w->program->epoch || (thread / 32 == me / 32 && a->sync < w->sync);
}
static Access access_now(const Warp *w, int lane, u32 strong) { return (Access){number_of(w, lane), w->program->epoch, w->sync, strong}; }

// ---- where an address is ----

enum { GLOBAL, SHARED, GENERIC, PARAMETERS }; // state spaces
// `size` bytes of memory and what is known of each; pending: of shared memory, others: of global; at: the first in what has this name.
typedef struct { u8 *data; Byte *bytes; Access *others; Pending *pending; u32 size; u64 at; const char *name; } Place;

static const Tensor *tensor_at(u64 address) {
    static i32 last;
    if (last < M.launch->tensors && address >= M.tensor[last].start && address < M.tensor[last].end) return &M.tensor[last];
    for (i32 k = 0; k < M.launch->tensors; k++)
        if (address >= M.tensor[k].start && address < M.tensor[k].end) return &M.tensor[last = k];
    return 0;
}
static inline __attribute__((always_inline)) Place locate(const Warp *w, int lane, const Instruction *i, int space, u64 address, u32 size) {
    const Program *c = w->program;
    Tensor all = {0, M.launch->parameter_bytes, 0, 0, "the parameters"};
    if (space == SHARED || (space == GENERIC && address < 1ull << 32)) {
        address = (u32)address;
        all = (Tensor){SHARED_BASE, SHARED_BASE + M.launch->shared, c->bytes, 0, "shared memory"};
    } else if (space != PARAMETERS) {
        const Tensor *t = tensor_at(address);
        if (!t) FATAL(w, lane, i, BOUNDS, "%u bytes at %#llx of global memory belong to no tensor of the launch", size, address);
        all = *t;
    }
    const u64 at = address - all.start;
    if (address < all.start || address + size > all.end)
        FATAL(w, lane, i, BOUNDS, "%u bytes at byte %lld of %s, which has %llu", size, at, all.name, all.end - all.start);
    if (address & (size - 1)) FATAL(w, lane, i, BOUNDS, "%u bytes at byte %llu of %s: misaligned", size, at, all.name);
    if (all.bytes == c->bytes) return (Place){c->shared + at, c->bytes + at, 0, c->pending + at, size, at, all.name};
    if (space == PARAMETERS) return (Place){(u8 *)M.launch->parameters + at, 0, 0, 0, size, at, all.name};
    return (Place){(u8 *)address, all.bytes + at, all.others + at, 0, size, at, all.name};
}
static u8 *shared_at(const Program *c, u32 address) { return c->shared + (address - SHARED_BASE); }

// ---- reads and writes ----

static int is_atomic(u32 strong, const Access *other) { return strong && strong == other->strong; }
// The thread, counted from 1, whose access to a byte this one races with, or 0 if there is none.
static u32 racing_writer(const Warp *w, int lane, const Byte *b, u32 strong) {
    return b->write.thread && !is_atomic(strong, &b->write) && !ordered(w, lane, &b->write) ? b->write.thread : 0;
}
static u32 racing_reader(const Warp *w, int lane, const Byte *b, const Access *other, u32 strong) {
    if (other && other->thread && !is_atomic(strong, other) && !ordered(w, lane, other)) return other->thread;
    if (!b->read.thread || is_atomic(strong, &b->read)) return 0;
    const u32 first = 1 + 1024 * w->program->number, reader = (b->read.thread - 1) % 1024 / 32;
    if (b->read.thread - first >= 1024) return ordered(w, lane, &b->read) ? 0 : b->read.thread;
    if (b->read.epoch < w->program->epoch) return 0;
    if (reader != w->index) return b->read.thread;
    const u32 warps = b->warps & ~(1u << w->index), lanes_ = b->read.sync == w->sync ? b->lanes & ~(1u << lane) : 0;
    return warps ? first + 32 * first_lane(warps) : lanes_ ? first + 32 * reader + first_lane(lanes_) : 0;
}
static void race(const Warp *w, int lane, const Instruction *i, const Place *p, u32 k, const char *what, u32 thread) {
    report(w, lane, i, p->pending ? RACE_SHARED : RACE_GLOBAL, "%s at byte %llu of %s by program %u, thread %u: nothing orders the two", what,
           p->at + k, p->name, (thread - 1) / 1024, (thread - 1) % 1024);
}
// What is wrong with reading a byte of shared memory, apart from races.
static int is_unreadable(const Warp *w, int lane, const Instruction *i, const Place *p, u32 k) {
    if (p->pending[k].in_flight) report(w, lane, i, IN_FLIGHT, "byte %llu of shared memory, which a cp.async in flight writes", p->at + k);
    else if (!p->bytes[k].write.thread) report(w, lane, i, UNINITIALISED, "byte %llu of shared memory, which nothing has written", p->at + k);
    else return 0;
    return 1;
}
// strong: the bytes of an element where the access is, or 0.
static inline __attribute__((always_inline)) const u8 *read_from(const Warp *w, int lane, const Instruction *i, Place p, u32 strong) {
    const Access now = access_now(w, lane, strong);
    for (u32 k = 0; p.bytes && k < p.size; k++) {
        Byte *b = &p.bytes[k];
        if (p.pending && is_unreadable(w, lane, i, &p, k)) {
            if (!p.pending[k].in_flight) b->write = now;
        } else {
            const u32 writer = racing_writer(w, lane, b, strong);
            if (writer) race(w, lane, i, &p, k, "reads what is written", writer);
        }
        const Access last = b->read;
        const u32 apart = (last.thread - 1) ^ (now.thread - 1), warps = apart < 1024 && last.epoch == now.epoch ? b->warps : 0;
        if (p.others && last.thread && apart >= 1024) p.others[k] = last;
        *b = (Byte){b->write, now, warps | 1u << w->index, (warps && apart < 32 && last.sync == now.sync ? b->lanes : 0) | 1u << lane};
    }
    return p.data;
}
// What products of an asynchronous instruction still read. Each warp waits for the wgmma of its warpgroup by itself; a commit
// of tcgen05 is known to the warps that have seen its mbarrier complete, and behind a barrier to all.
static int still_read(const Warp *w, const Pending *b) {
    const Program *c = w->program;
    for (u32 g = 0; g < 4; g++) {
        if (!b->async[g]) continue;
        if (M.kernel->uses_tensor_memory) {
            if (b->async[g] > w->mma_seen && b->async[g] > c->seen_at_barrier) return 1;
            continue;
        }
        for (u32 v = 4 * g; v < 4 * g + 4 && v < c->warps; v++)
            if (b->async[g] > (v == w->index ? c->warp[v].group_done : c->warp[v].group_done_at_barrier)) return 1;
    }
    return 0;
}
// A cp.async writes twice: NaN when it starts, and its value when it arrives.
typedef enum { AT_ONCE, STARTS, ARRIVES } When;
static void write_to(const Warp *w, int lane, const Instruction *i, Place p, const u8 *value, u32 strong, When when) {
    if (when != STARTS && memcmp(p.data, value, p.size)) M.idle = 0;
    const Byte fresh = {access_now(w, lane, strong)};
    for (u32 k = 0; k < p.size; k++) {
        Byte *b = &p.bytes[k];
        Pending *pending = p.pending ? &p.pending[k] : 0;
        if (pending && pending->in_flight && when != ARRIVES)
            report(w, lane, i, IN_FLIGHT, "writes byte %llu of shared memory, which a cp.async in flight writes", p.at + k);
        if (pending && still_read(w, pending))
            report(w, lane, i, IN_FLIGHT, "writes byte %llu of shared memory, which an asynchronous product may still read", p.at + k);
        const u32 writer = racing_writer(w, lane, b, strong), reader = writer ? 0 : racing_reader(w, lane, b, p.others ? &p.others[k] : 0, strong);
        // What changes nothing is as if it had not been.
        if ((writer || reader) && when != STARTS && b->write.thread && p.data[k] == value[k]) continue;
        if (writer) race(w, lane, i, &p, k, "writes what is written", writer);
        if (reader) race(w, lane, i, &p, k, "writes what is read", reader);
        *b = fresh;
        if (p.others && p.others[k].thread) p.others[k].thread = 0;
        if (pending) pending->in_flight = when == STARTS, pending->generic = 1, pending->write_time = M.time;
    }
    if (when == STARTS) memset(p.data, 0xff, p.size);
    else memcpy(p.data, value, p.size);
}
// What the matrix unit reads, through the asynchronous proxy: group g of products, of which all has to be complete and fenced.
static void proxy_read(const Warp *w, const Instruction *i, u32 address, u32 size, u32 g, u32 product) {
    Program *c = w->program;
    const Place p = locate(w, 0, i, SHARED, address, size);
    const int is_wgmma = !M.kernel->uses_tensor_memory;
    for (u32 k = 0; k < size; k++) {
        Byte *b = &p.bytes[k];
        Pending *pending = &p.pending[k];
        if (!is_unreadable(w, 0, i, &p, k) && b->write.epoch >= c->epoch && (is_wgmma || !ordered(w, 0, &b->write)))
            race(w, 0, i, &p, k, "a matrix product reads what is written", b->write.thread);
        if (pending->generic && b->write.thread) {
            // Fenced by the writer behind its write, or by some thread between a barrier and this product.
            const u32 writer = (b->write.thread - 1) % 1024, first = is_wgmma ? 4 * g : w->index, last = is_wgmma ? 4 * g + 3 : w->index;
            int fenced = c->warp[writer / 32].fence_time[writer % 32] > pending->write_time || c->fenced_epoch > b->write.epoch;
            for (u32 v = first; v <= last && v < c->warps; v++) fenced |= c->warp[v].fence_epoch > b->write.epoch;
            if (!fenced) report(w, 0, i, PROXY, "byte %llu of shared memory, written by thread %u: no fence.proxy.async between", p.at + k, writer);
            pending->generic = 0;
        }
        pending->async[g] = product;
    }
}
