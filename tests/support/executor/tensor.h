// Tensor memory and tcgen05: 512 columns of 128 lanes on an SM, of which a program allocates some, and waits for them.
//
// A product completes some time after it is issued, and a commit behind it then arrives at an mbarrier. Only who has seen that
// phase complete, or has passed a CTA barrier behind a thread that has, may touch what the product reads or writes. Loads and
// stores are complete after tcgen05.wait.

static void tensor_range(Warp *w, const Instruction *i, u32 column, u32 count) {
    if (column + count > w->program->columns) FATAL(w, 0, i, BOUNDS, "column %u of tensor memory, of which %u are allocated", column + count - 1, w->program->columns);
    M.launch->unfenced += w->unfenced;
}
static int later_than_seen(const Warp *w, u32 product) { return product > w->mma_seen && product > w->program->seen_at_barrier; }
// A warp accesses a cell as a whole: its first thread stands for it.
static int in_order(const Warp *w, const Access *a) { return !a->thread || ordered(w, 0, a); }
static u32 warp_of(const Access *a) { return (a->thread - 1) % 1024 / 32; }

// What must be complete before a cell is read, or (writes) overwritten. Products follow each other in order.
static void check_cell(Warp *w, const Instruction *i, u32 column, u32 q, int writes, int is_product) {
    const Cell *cell = &w->program->cell[column][q];
    if (!is_product && later_than_seen(w, cell->product)) report(w, 0, i, TENSOR, "column %u, of a product that is not waited for", column);
    if (cell->store_pending) report(w, 0, i, TENSOR, "column %u, stored without tcgen05.wait::st", column);
    if (!in_order(w, &cell->stored)) report(w, 0, i, TENSOR, "column %u, stored by warp %u with no barrier between", column, warp_of(&cell->stored));
    if (!writes && !cell->product && !cell->stored.thread) report(w, 0, i, TENSOR, "column %u, which nothing has written", column);
    if (!writes) return;
    if (cell->load_pending) report(w, 0, i, TENSOR, "writes column %u, loaded without tcgen05.wait::ld", column);
    if (!in_order(w, &cell->loaded)) report(w, 0, i, TENSOR, "writes column %u, loaded by warp %u with no barrier between", column, warp_of(&cell->loaded));
}

// operands: where the address goes, columns
INSTRUCTION("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 = [4] 4", WARP) {
    Program *c = w->program;
    const u32 count = *word(w, i, 1);
    u32 *columns = &M.columns[c->slot / M.launch->programs_per_sm];
    if (count < 32 || count > COLUMNS || count & (count - 1)) FATAL(w, 0, i, TENSOR, "%u columns cannot be allocated", count);
    if (*columns + count > COLUMNS) return 1;
    write_to(w, 0, i, locate(w, 0, i, SHARED, address_of(w, i, 0, 0), 4), (u8 *)&c->columns, 0, AT_ONCE);
    *columns += count;
    c->columns += count;
    return M.idle = 0;
}
INSTRUCTION("tcgen05.dealloc.cta_group::1.sync.aligned.b32 = 4 4", WARP) {
    Program *c = w->program;
    const u32 count = *word(w, i, 1);
    if (count > c->columns) FATAL(w, 0, i, TENSOR, "%u columns are freed, of %u", count, c->columns);
    if (c->completed < c->products) report(w, 0, i, TENSOR, "columns are freed before products are complete");
    c->columns -= count;
    M.columns[c->slot / M.launch->programs_per_sm] -= count;
    return M.idle = 0;
}
INSTRUCTION("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned =", WARP) { return 0; }
INSTRUCTION("tcgen05.fence::before_thread_sync =", LANES) { return 0; }
INSTRUCTION("tcgen05.fence::after_thread_sync =", LANES) { return w->unfenced = 0; }

// value: whether lanes 16 to 31 have columns of their own (shape 16x32bx2), and how far they are
static void tensor_move(Warp *w, const Instruction *i, int loads) {
    Program *c = w->program;
    const int count = loads ? i->results : i->inputs - 1, first = !loads, halves = 1 + i->value[0], apart = i->value[2];
    const u32 address = address_of(w, i, loads ? count : 0, 0);
    const u32 lane0 = address >> 16, column0 = address & 0xffff, q = lane0 / 32;
    if (q != w->index % 4 || lane0 & (32 / halves - 1)) FATAL(w, 0, i, TENSOR, "lane %u of tensor memory is not for warp %u", lane0, w->index);
    for (int half = 0; half < halves; half++) {
        tensor_range(w, i, column0 + half * apart, count);
        for (int k = 0; k < count; k++) {
            Cell *cell = &c->cell[column0 + half * apart + k][q];
            check_cell(w, i, column0 + half * apart + k, q, !loads, 0);
            *(loads ? &cell->loaded : &cell->stored) = access_now(w, 0, 0);
            *(loads ? &cell->load_pending : &cell->store_pending) = w->index + 1;
        }
    }
    for (int k = 0; k < count; k++) {
        const Operand *o = operand(i, first + k);
        u32 *r = lanes(w, o);
        if (loads) define(w, i, o, FULL_WARP, FULL_WARP);
        for (int l = 0; l < 32; l++) {
            const int half = l / (32 / halves);
            u32 *value = &c->tensor[(lane0 + l - half * 16) * COLUMNS + column0 + k + half * apart];
            *(loads ? &r[l] : value) = loads ? *value : r[l];
        }
        if (loads) make_busy(w, o, TENSOR_LOAD);
    }
}
INSTRUCTION("tcgen05.ld.sync.aligned.(32x32b|16x32bx2).x([0-9]+).b32 4x{1} = [4] #?", WARP) { return tensor_move(w, i, 1), 0; }
INSTRUCTION("tcgen05.st.sync.aligned.(32x32b|16x32bx2).x([0-9]+).b32 = [4] #? 4x{1}", WARP) { return tensor_move(w, i, 0), 0; }

#define EACH_CELL(x, w) for (Cell *x = (w)->program->cell[0]; x < (w)->program->cell[COLUMNS]; x++)
INSTRUCTION("tcgen05.wait::ld.sync.aligned =", WARP) {
    release_busy(w, TENSOR_LOAD, TENSOR_LOAD, 0);
    EACH_CELL(x, w) if (x->load_pending == w->index + 1) x->load_pending = 0;
    return 0;
}
INSTRUCTION("tcgen05.wait::st.sync.aligned =", WARP) {
    EACH_CELL(x, w) if (x->store_pending == w->index + 1) x->store_pending = 0;
    return 0;
}

// The fields of a product's instruction descriptor (PTX ISA, tcgen05 instruction descriptor).
static const int TENSOR_SWIZZLE[8] = {0, -1, 3, -1, 2, -1, 1, -1};
static int rows_of(const Product *p) { return (p->descriptor >> 24 & 31) * 16; }
static int columns_of(const Product *p) { return (p->descriptor >> 17 & 63) * 8; }
static int type_of(const Product *p) { return p->instruction->value[0] == TF32 ? TF32 : (p->descriptor >> 7 & 7) == 1 ? BF16 : F16; }
static int depth_of(const Product *p) { return 8 * elements(type_of(p)); }
static Tile tile_of(const Product *p, int b) {
    const u64 descriptor = b ? p->b : p->a;
    return (Tile){descriptor, TENSOR_SWIZZLE[descriptor >> 61], p->descriptor >> (15 + b) & 1, b ? columns_of(p) : rows_of(p), depth_of(p), type_of(p)};
}

// value: type; operands: destination, A, B, descriptor, whether to add
INSTRUCTION("tcgen05.mma.cta_group::1.kind::(f16|tf32) = [4] 8 8 4 1 or = [4] [4] 8 4 1", LANES) {
    Program *c = w->program;
    const int in_tensor = operand(i, 1)->bytes == 4;
    EACH(l, mask) {
        const Product p = {i, address_of(w, i, 1, l), address_of(w, i, 2, l), address_of(w, i, 0, l), word(w, i, 3)[l], in_tensor, *word(w, i, 4) >> l & 1};
        const int rows = rows_of(&p), types = p.descriptor >> 7 & 63;
        if ((p.descriptor >> 4 & 3) != 1 || (rows != 64 && rows != 128) || (types != 0 && types != 9 && types != 18) || TENSOR_SWIZZLE[p.b >> 61] < 0 || (!in_tensor && TENSOR_SWIZZLE[p.a >> 61] < 0))
            FATAL(w, l, i, TENSOR, "unknown instruction descriptor %#x or swizzle", p.descriptor);
        if (c->products == c->capacity) c->queue = realloc(c->queue, (c->capacity = 2 * c->capacity + 64) * sizeof(Product));
        c->queue[c->products++] = p;
        for (int b = in_tensor; b < 2; b++) read_operand(w, i, tile_of(&p, b), 0, 0, c->products);
        const u32 to = p.destination & 0xffff, from = p.a & 0xffff;
        tensor_range(w, i, to, columns_of(&p));
        for (int q = 0; q < 4; q++) {
            for (int n = 0; n < columns_of(&p); n++) {
                check_cell(w, i, to + n, q, 1, 1);
                if (p.add) check_cell(w, i, to + n, q, 0, 1);
                c->cell[to + n][q].product = c->products;
            }
            for (int k = 0; in_tensor && k < 8; k++) {
                check_cell(w, i, from + k, q, 0, 1);
                c->cell[from + k][q].product = c->products;
            }
        }
    }
    return M.idle = 0;
}

static void compute(Program *c, const Product *p) {
    const int type = type_of(p), K = depth_of(p), N = columns_of(p);
    read_operand(c->warp, p->instruction, tile_of(p, 1), B, 0, 0);
    if (!p->a_in_tensor) read_operand(c->warp, p->instruction, tile_of(p, 0), A, 0, 0);
    for (int row = 0; row < rows_of(p); row++) {
        const u32 lane = rows_of(p) == 128 ? row : row / 16 * 32 + row % 16;
        f32 *result = (f32 *)&c->tensor[((p->destination >> 16) + lane) * COLUMNS + (p->destination & 0xffff)];
        const u32 *a = p->a_in_tensor ? &c->tensor[((p->a >> 16) + lane) * COLUMNS + (p->a & 0xffff)] : 0;
        for (int k = 0; a && k < K; k++) A[k][row] = element(type, a, k / elements(type), k % elements(type));
        for (int n = 0; n < N; n++) sums[n] = p->add ? result[n] : 0;
        multiply(row, K, N);
        for (int n = 0; n < N; n++) result[n] = sums[n];
    }
}

// ---- mbarrier: the word in shared memory counts arrivals still to come, and in its high half the phase and its count ----

static Place barrier_place(const Warp *w, const Instruction *i, int k, int lane) { return locate(w, lane, i, SHARED, address_of(w, i, k, lane), 8); }
// What is known of the mbarrier at this byte of shared memory.
static Barrier *barrier_at(const Warp *w, const Instruction *i, u32 at) {
    Program *c = w->program;
    for (u32 k = 0; k < c->barriers; k++) if (c->barrier[k].at == at) return &c->barrier[k];
    if (c->barriers == 64) FATAL(w, 0, i, TENSOR, "more than 64 mbarriers");
    c->barrier[c->barriers] = (Barrier){at, 0};
    return &c->barrier[c->barriers++];
}
INSTRUCTION("mbarrier.init.shared::cta.b64 = [48] 4", LANES) {
    const u32 *count = word(w, i, 1);
    EACH(l, mask) {
        const Place p = barrier_place(w, i, 0, l);
        const u32 words[2] = {count[l], count[l]};
        write_to(w, l, i, p, (u8 *)words, 0, AT_ONCE);
        barrier_at(w, i, p.at)->seen = 0;
    }
    return 0;
}
INSTRUCTION("mbarrier.inval.shared::cta.b64 = [48]", LANES) {
    EACH(l, mask) write_to(w, l, i, barrier_place(w, i, 0, l), (u8[8]){0}, 0, AT_ONCE);
    return 0;
}
INSTRUCTION("mbarrier.try_wait.parity.shared(?:::cta)?.b64 1 = [48] 4", LANES) {
    const u32 *parity = word(w, i, 2);
    u32 *result = word(w, i, 0);
    EACH(l, mask) {
        const Place p = barrier_place(w, i, 1, l);
        const u32 *words = (u32 *)read_from(w, l, i, p, 0), complete = (words[1] >> 16 & 1) != (parity[l] & 1);
        *result = (*result & ~(1u << l)) | complete << l;
        if (!complete) continue;
        const u32 seen = barrier_at(w, i, p.at)->seen;
        if (seen > w->mma_seen) w->mma_seen = seen;
        w->unfenced = 1;
    }
    define(w, i, operand(i, 0), mask, FULL_WARP);
    return 0;
}
INSTRUCTION("tcgen05.commit.cta_group::1.mbarrier::arrive::one(?:.shared::cluster)?.b64 = [48]", LANES) {
    Program *c = w->program;
    EACH(l, mask) {
        if (c->commits == 64) FATAL(w, l, i, TENSOR, "more than 64 commits at once");
        const Place p = barrier_place(w, i, 0, l);
        const u32 writer = racing_writer(w, l, p.bytes, 0);
        if (writer) race(w, l, i, &p, 0, "arrives at an mbarrier that is written", writer);
        c->commit[c->commits++] = (Commit){p.at, c->products};
    }
    return 0;
}

// The next product completes, and the commits behind it arrive. 1 if there was anything to do.
static int complete_next(Program *c) {
    if (c->completed < c->products) compute(c, &c->queue[c->completed++]);
    else if (!c->commits) return 0;
    u32 kept = 0;
    for (u32 k = 0; k < c->commits; k++) {
        const Commit due = c->commit[k];
        if (due.last > c->completed) { c->commit[kept++] = due; continue; }
        u32 *words = (u32 *)(c->shared + due.barrier);
        Barrier *barrier = barrier_at(c->warp, 0, due.barrier);
        if (due.last > barrier->seen) barrier->seen = due.last;
        if (--words[0] == 0) words[0] = words[1] & 0xffff, words[1] ^= 0x10000;
    }
    c->commits = kept;
    M.idle = 0;
    return 1;
}
