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
// strong: the bytes of an element where the access is, or 0.
static Access access_now(const Warp *w, int lane, int strong) {
    return (Access){number_of(w, lane), w->program->epoch, w->sync, strong, 0};
}

// ---- global memory ----

static Tensor *tensor_at(u64 address) {
    static i32 last;
    if (last < M.launch->tensors && address >= M.tensor[last].start && address < M.tensor[last].end) return &M.tensor[last];
    for (i32 k = 0; k < M.launch->tensors; k++)
        if (address >= M.tensor[k].start && address < M.tensor[k].end) return &M.tensor[last = k];
    return 0;
}
static Tensor *global_range(Warp *w, int lane, const Instruction *i, u64 address, u32 size) {
    Tensor *t = tensor_at(address);
    if (!t) FATAL(w, lane, i, BOUNDS, "%u bytes at %#llx of global memory belong to no tensor of the launch", size, (unsigned long long)address);
    if (address + size > t->end) FATAL(w, lane, i, BOUNDS, "%u bytes at byte %llu of %s, which has %llu", size, (unsigned long long)(address - t->start), t->name, (unsigned long long)(t->end - t->start));
    if (address & (size - 1)) FATAL(w, lane, i, BOUNDS, "%u bytes at byte %llu of %s: misaligned", size, (unsigned long long)(address - t->start), t->name);
    return t;
}
static void global_race(Warp *w, int lane, const Instruction *i, const Tensor *t, u64 byte, const char *what, const Access *a) {
    report(w, lane, i, RACE_GLOBAL, "%s at byte %llu of %s by program %u, thread %u: nothing orders the two", what, (unsigned long long)byte, t->name,
           (a->thread - 1) / 1024, (a->thread - 1) % 1024);
}
static void global_read(Warp *w, int lane, const Instruction *i, u64 address, u32 size, int strong) {
    Tensor *t = global_range(w, lane, i, address, size);
    if (!M.launch->check) return;
    const Access now = access_now(w, lane, strong);
    for (u64 k = address - t->start; k < address - t->start + size; k++) {
        GlobalByte *b = &t->bytes[k];
        if (b->write.thread && !(strong && strong == b->write.strong) && !ordered(w, lane, &b->write)) {
            global_race(w, lane, i, t, k, "reads what is written", &b->write);
            b->write.thread = 0;
        }
        if (b->read.thread && (b->read.thread - 1) / 1024 != w->program->number) b->other = b->read;
        const int several = b->read.epoch == now.epoch && (b->read.thread - 1) / 1024 == w->program->number && (b->read.several || b->read.thread != now.thread);
        b->read = now;
        b->read.several = several;
    }
}
static void global_write(Warp *w, int lane, const Instruction *i, u64 address, u32 size, const u8 *value, int strong) {
    Tensor *t = global_range(w, lane, i, address, size);
    if (memcmp((u8 *)address, value, size)) M.idle = 0;
    if (!M.launch->check) return;
    for (u32 n = 0; n < size; n++) {
        const u64 k = address - t->start + n;
        GlobalByte *b = &t->bytes[k];
        const Access *bad = 0;
        const char *what = "writes what is read";
        if (b->read.thread && !(strong && strong == b->read.strong) && (!ordered(w, lane, &b->read) || (b->read.several && b->read.epoch == w->program->epoch && (b->read.thread - 1) / 1024 == w->program->number))) bad = &b->read;
        if (b->other.thread && !(strong && strong == b->other.strong) && !ordered(w, lane, &b->other)) bad = &b->other;
        if (b->write.thread && !(strong && strong == b->write.strong) && !ordered(w, lane, &b->write)) bad = &b->write, what = "writes what is written";
        if (bad && b->write.thread && ((u8 *)address)[n] == value[n]) { // changes nothing, and is as if it had not been
            M.launch->benign++;
            continue;
        }
        if (bad) global_race(w, lane, i, t, k, what, bad);
        b->write = access_now(w, lane, strong);
        b->read.thread = b->other.thread = 0;
    }
}

// ---- shared memory ----

static u8 *shared_at(const Program *c, u32 address) { return c->shared + (address - SHARED_BASE); }
static void shared_range(Warp *w, int lane, const Instruction *i, u32 address, u32 size) {
    const u32 all = M.launch->shared, at = address - SHARED_BASE, unit = size < 16 ? size : 16;
    if (address < SHARED_BASE || at + size > all) FATAL(w, lane, i, BOUNDS, "%u bytes at byte %d of shared memory, which has %u", size, (int)at, all);
    if (address & (unit - 1)) FATAL(w, lane, i, BOUNDS, "%u bytes at byte %u of shared memory: misaligned", size, at);
}
static void shared_race(Warp *w, int lane, const Instruction *i, u32 byte, const char *what, u32 thread) {
    report(w, lane, i, RACE_SHARED, "%s at byte %u by thread %u: no barrier between the two", what, byte, thread % 1024);
}
static void shared_read(Warp *w, int lane, const Instruction *i, u32 address, u32 size) {
    shared_range(w, lane, i, address, size);
    if (!M.launch->check) return;
    const Program *c = w->program;
    for (u32 k = address - SHARED_BASE; k < address - SHARED_BASE + size; k++) {
        SharedByte *b = &c->bytes[k];
        if (b->in_flight) report(w, lane, i, IN_FLIGHT, "byte %u of shared memory, which a cp.async in flight writes", k);
        else if (!b->write.thread) report(w, lane, i, UNINITIALISED, "byte %u of shared memory, which nothing has written", k), b->write = access_now(w, lane, 0);
        else if (!ordered(w, lane, &b->write)) shared_race(w, lane, i, k, "reads what is written", b->write.thread - 1), b->write.epoch = 0;
        if (b->read_epoch != c->epoch) b->read_warps = b->read_lanes = 0, b->read_epoch = c->epoch;
        if (b->read_warp != w->index || b->read_sync != w->sync) b->read_lanes = 0;
        b->read_warps |= 1u << w->index % 16;
        b->read_lanes |= 1u << lane;
        b->read_warp = w->index;
        b->read_sync = w->sync;
    }
}
// What products of an asynchronous instruction still read. Each warp waits for the wgmma of its warpgroup by itself; a commit
// of tcgen05 is known to the warps that have seen its mbarrier complete, and behind a barrier to all.
static int still_read(const Warp *w, const SharedByte *b) {
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
// A thread that has read the byte, with nothing between that and what this lane does now; -1 if there is none.
static int reader_of(const Warp *w, int lane, const SharedByte *b) {
    if (b->read_epoch != w->program->epoch) return -1;
    if (b->read_warp != w->index) return b->read_warps ? 32 * b->read_warp + first_lane(b->read_lanes) : -1;
    const u32 others = b->read_warps & ~(1u << w->index % 16), lanes_ = b->read_sync == w->sync ? b->read_lanes & ~(1u << lane) : 0;
    return others ? 32 * first_lane(others) : lanes_ ? 32 * (int)w->index + first_lane(lanes_) : -1;
}
static void shared_write(Warp *w, int lane, const Instruction *i, u32 address, u32 size, const u8 *value, int in_flight) {
    shared_range(w, lane, i, address, size);
    Program *c = w->program;
    if (value && memcmp(shared_at(c, address), value, size)) M.idle = 0;
    if (!M.launch->check) return;
    for (u32 n = 0; n < size; n++) {
        const u32 k = address - SHARED_BASE + n;
        SharedByte *b = &c->bytes[k];
        const int same = value && b->write.thread && c->shared[k] == value[n];
        if (b->in_flight && in_flight >= 0) report(w, lane, i, IN_FLIGHT, "writes byte %u of shared memory, which a cp.async in flight writes", k);
        if (still_read(w, b)) report(w, lane, i, IN_FLIGHT, "writes byte %u of shared memory, which an asynchronous product may still read", k);
        const int written = b->write.thread && !ordered(w, lane, &b->write), reader = reader_of(w, lane, b);
        if (same && (written || reader >= 0)) { // changes nothing, and is as if it had not been
            M.launch->benign++;
            continue;
        }
        if (written) shared_race(w, lane, i, k, "writes what is written", b->write.thread - 1);
        if (reader >= 0) shared_race(w, lane, i, k, "writes what is read", reader);
        b->write = access_now(w, lane, 0);
        b->read_epoch = 0;
        b->in_flight = in_flight > 0;
        b->generic = 1;
        b->write_time = M.time;
    }
}
// What the matrix unit reads, through the asynchronous proxy: group g of products, of which all has to be complete and fenced.
static void proxy_read(Warp *w, int lane, const Instruction *i, u32 address, u32 size, u32 g, u32 product) {
    shared_range(w, lane, i, address, size);
    if (!M.launch->check) return;
    Program *c = w->program;
    const int is_wgmma = !M.kernel->uses_tensor_memory;
    for (u32 k = address - SHARED_BASE; k < address - SHARED_BASE + size; k++) {
        SharedByte *b = &c->bytes[k];
        if (b->in_flight) report(w, lane, i, IN_FLIGHT, "byte %u of shared memory, which a cp.async in flight writes", k);
        else if (!b->write.thread) report(w, lane, i, UNINITIALISED, "byte %u of shared memory, which nothing has written", k);
        else if (b->write.epoch >= c->epoch && (is_wgmma || !ordered(w, lane, &b->write)))
            shared_race(w, lane, i, k, "a matrix product reads what is written", b->write.thread - 1);
        if (b->generic && b->write.thread) {
            // Fenced by the writer behind its write, or by some thread between a barrier and this product.
            const u32 writer = (b->write.thread - 1) % 1024;
            int fenced = c->warp[writer / 32].fence_time[writer % 32] > b->write_time || c->fenced_epoch > b->write.epoch;
            for (u32 v = is_wgmma ? 4 * g : w->index; v < (is_wgmma ? 4 * g + 4 : w->index + 1) && v < c->warps; v++) fenced |= c->warp[v].fence_epoch > b->write.epoch;
            if (!fenced) report(w, lane, i, PROXY, "byte %u of shared memory, written by thread %u: no fence.proxy.async between", k, writer);
            b->generic = 0;
        }
        b->async[g] = product;
    }
}
