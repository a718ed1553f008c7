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
static int in_order(const Warp *w, u32 by, u32 epoch) { return !by || by == w->index + 1 || epoch < w->program->epoch; }

// What must be complete before a cell is read, or (writes) overwritten. Products follow each other in order.
static void check_cell(Warp *w, const Instruction *i, u32 column, u32 q, int writes, int is_product) {
    const Cell *cell = &w->program->cell[column][q];
    if (!is_product && later_than_seen(w, cell->product)) report(w, 0, i, TENSOR, "column %u, of a product that is not waited for", column);
    if (cell->store_pending) report(w, 0, i, TENSOR, "column %u, stored without tcgen05.wait::st", column);
    if (!in_order(w, cell->stored_by, cell->stored_epoch)) report(w, 0, i, TENSOR, "column %u, stored by warp %u with no barrier between", column, cell->stored_by - 1);
    if (!writes && !cell->product && !cell->stored_by) report(w, 0, i, TENSOR, "column %u, which nothing has written", column);
    if (!writes) return;
    if (cell->load_pending) report(w, 0, i, TENSOR, "writes column %u, loaded without tcgen05.wait::ld", column);
    if (!in_order(w, cell->loaded_by, cell->loaded_epoch)) report(w, 0, i, TENSOR, "writes column %u, loaded by warp %u with no barrier between", column, cell->loaded_by - 1);
}

// value: offset; operands: where the address goes, columns
static int allocate(Warp *w, const Instruction *i, u32 mask) {
    Program *c = w->program;
    const u32 count = *(u32 *)used(w, i, 1, mask, "the number of columns"), address = *(u32 *)used(w, i, 0, mask, "the address") + i->value[0];
    u32 *columns = &M.columns[c->slot / M.launch->programs_per_sm];
    if (count < 32 || count > COLUMNS || count & (count - 1)) FATAL(w, 0, i, TENSOR, "%u columns cannot be allocated", count);
    if (*columns + count > COLUMNS) return 1;
    shared_write(w, 0, i, address, 4, (u8 *)&c->columns, 0);
    memcpy(shared_at(c, address), &c->columns, 4);
    *columns += count;
    c->columns += count;
    return M.idle = 0;
}
FAMILY("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32", WARP, allocate)

static int deallocate(Warp *w, const Instruction *i, u32 mask) {
    const u32 count = *(u32 *)used(w, i, 1, mask, "the number of columns");
    if (count > w->program->columns) FATAL(w, 0, i, TENSOR, "%u columns are freed, of %u", count, w->program->columns);
    if (w->program->completed < w->program->products) report(w, 0, i, TENSOR, "columns are freed before products are complete");
    w->program->columns -= count;
    M.columns[w->program->slot / M.launch->programs_per_sm] -= count;
    return M.idle = 0;
}
FAMILY("tcgen05.dealloc.cta_group::1.sync.aligned.b32", WARP, deallocate)
FAMILY("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned", WARP, nothing)

FAMILY("tcgen05.fence::before_thread_sync", LANES, nothing)
static int fence_after(Warp *w, const Instruction *i, u32 mask) { return (void)i, (void)mask, w->unfenced = 0; }
FAMILY("tcgen05.fence::after_thread_sync", LANES, fence_after)

// value: offset, registers, distance of the columns of lanes 16 to 31 (shape 16x32bx2) or -1 (32x32b), loads; operands: registers, address
static int tensor_move(Warp *w, const Instruction *i, u32 mask) {
    Program *c = w->program;
    const int count = i->value[1], apart = i->value[2], loads = i->value[3], first = loads ? 0 : 1;
    const u32 address = *(u32 *)used(w, i, loads ? count : 0, mask, "the address") + i->value[0], lane0 = address >> 16, column0 = address & 0xffff, q = lane0 / 32;
    if (q != w->index % 4 || lane0 & (apart < 0 ? 31 : 15)) FATAL(w, 0, i, TENSOR, "lane %u of tensor memory is not for warp %u", lane0, w->index);
    for (int part = 0; part < (apart < 0 ? 1 : 2); part++) {
        tensor_range(w, i, column0 + part * apart, count);
        for (int k = 0; k < count; k++) {
            Cell *cell = &c->cell[column0 + part * apart + k][q];
            check_cell(w, i, column0 + part * apart + k, q, !loads, 0);
            if (loads) cell->loaded_by = cell->load_pending = w->index + 1, cell->loaded_epoch = c->epoch;
            else cell->stored_by = cell->store_pending = w->index + 1, cell->stored_epoch = c->epoch;
        }
    }
    for (int k = 0; k < count; k++) {
        const Operand *o = operand(i, first + k);
        u32 *r = loads ? lanes(w, o) : used(w, i, first + k, mask, "what is stored");
        if (loads) define(w, i, o, FULL_WARP, FULL_WARP);
        for (int l = 0; l < 32; l++) {
            const u32 lane = apart < 0 ? lane0 + l : lane0 + l % 16, column = column0 + k + (apart < 0 ? 0 : l / 16 * apart);
            u32 *value = &c->tensor[lane * COLUMNS + column];
            *(loads ? &r[l] : value) = loads ? *value : r[l];
        }
        if (loads) make_busy(w, o, TENSOR_LOAD);
    }
    return 0;
}
FAMILY("tcgen05.ld/st", WARP, tensor_move)

static int wait_loads(Warp *w, const Instruction *i, u32 mask) {
    (void)i, (void)mask;
    release_busy(w, TENSOR_LOAD, TENSOR_LOAD, 0);
    for (int k = 0; k < COLUMNS; k++)
        for (int q = 0; q < 4; q++) if (w->program->cell[k][q].load_pending == w->index + 1) w->program->cell[k][q].load_pending = 0;
    return 0;
}
FAMILY("tcgen05.wait::ld.sync.aligned", WARP, wait_loads)
static int wait_stores(Warp *w, const Instruction *i, u32 mask) {
    (void)i, (void)mask;
    for (int k = 0; k < COLUMNS; k++)
        for (int q = 0; q < 4; q++) if (w->program->cell[k][q].store_pending == w->index + 1) w->program->cell[k][q].store_pending = 0;
    return 0;
}
FAMILY("tcgen05.wait::st.sync.aligned", WARP, wait_stores)

// The fields of a product's instruction descriptor (PTX ISA, tcgen05 instruction descriptor).
static const int TENSOR_SWIZZLE[8] = {0, -1, 3, -1, 2, -1, 1, -1};
static int rows_of(const Product *p) { return (p->descriptor >> 24 & 31) * 16; }
static int columns_of(const Product *p) { return (p->descriptor >> 17 & 63) * 8; }
static int type_of(const Product *p) { return p->instruction->value[0] == TF32 ? TF32 : (p->descriptor >> 7 & 7) == 1 ? BF16 : F16; }
static int depth_of(const Product *p) { return type_of(p) == TF32 ? 8 : 16; }
static Tile tile_a(const Product *p) { return (Tile){p->a, TENSOR_SWIZZLE[p->a >> 61], p->descriptor >> 15 & 1, rows_of(p), depth_of(p), type_of(p)}; }
static Tile tile_b(const Product *p) { return (Tile){p->b, TENSOR_SWIZZLE[p->b >> 61], p->descriptor >> 16 & 1, columns_of(p), depth_of(p), type_of(p)}; }

// value: type, offset, A in tensor memory, its offset; operands: destination, A, B, descriptor, whether to add
static int tensor_product(Warp *w, const Instruction *i, u32 mask) {
    Program *c = w->program;
    const int in_tensor = i->value[2];
    static const char *const names[] = {"the destination", "A", "B", "the instruction descriptor", "whether to add"};
    for (int k = 0; k < 5; k++) used(w, i, k, mask, names[k]);
    EACH(l, mask) {
        const u64 a = in_tensor ? ((u32 *)lanes(w, operand(i, 1)))[l] + i->value[3] : ((u64 *)lanes(w, operand(i, 1)))[l];
        const Product p = {i, a, ((u64 *)lanes(w, operand(i, 2)))[l], ((u32 *)lanes(w, operand(i, 0)))[l] + i->value[1],
                           ((u32 *)lanes(w, operand(i, 3)))[l], in_tensor, *(u32 *)lanes(w, operand(i, 4)) >> l & 1};
        const int rows = rows_of(&p), types = p.descriptor >> 7 & 63;
        if ((p.descriptor >> 4 & 3) != 1 || (rows != 64 && rows != 128) || (types != 0 && types != 9 && types != 18) || TENSOR_SWIZZLE[p.b >> 61] < 0 || (!in_tensor && TENSOR_SWIZZLE[p.a >> 61] < 0))
            FATAL(w, l, i, TENSOR, "unknown instruction descriptor %#x or swizzle", p.descriptor);
        if (c->products == c->capacity) c->queue = realloc(c->queue, (c->capacity = 2 * c->capacity + 64) * sizeof(Product));
        c->queue[c->products++] = p;
        read_operand(w, i, tile_b(&p), 0, 0, c->products);
        if (!in_tensor) read_operand(w, i, tile_a(&p), 0, 0, c->products);
        tensor_range(w, i, p.destination & 0xffff, columns_of(&p));
        for (int q = 0; q < 4; q++) {
            for (int n = 0; n < columns_of(&p); n++) {
                check_cell(w, i, (p.destination & 0xffff) + n, q, 1, 1);
                if (p.add) check_cell(w, i, (p.destination & 0xffff) + n, q, 0, 1);
                c->cell[(p.destination & 0xffff) + n][q].product = c->products;
            }
            for (int k = 0; in_tensor && k < 8; k++) {
                check_cell(w, i, (a & 0xffff) + k, q, 0, 1);
                c->cell[(a & 0xffff) + k][q].product = c->products;
            }
        }
    }
    return M.idle = 0;
}
FAMILY("tcgen05.mma", LANES, tensor_product)

static void compute(Program *c, const Product *p) {
    static f32 a[16][256], b[16][256];
    static f64 sums[256];
    const int type = type_of(p), K = depth_of(p), N = columns_of(p), per = type == TF32 ? 1 : 2;
    read_operand(c->warp, p->instruction, tile_b(p), b, 0, 0);
    if (!p->a_in_tensor) read_operand(c->warp, p->instruction, tile_a(p), a, 0, 0);
    for (int row = 0; row < rows_of(p); row++) {
        const u32 lane = rows_of(p) == 128 ? row : row / 16 * 32 + row % 16;
        f32 *result = (f32 *)&c->tensor[((p->destination >> 16) + lane) * COLUMNS + (p->destination & 0xffff)];
        for (int k = 0; p->a_in_tensor && k < K; k++) a[k][row] = element(type, c->tensor[((p->a >> 16) + lane) * COLUMNS + (p->a & 0xffff) + k / per], k % per);
        for (int n = 0; n < N; n++) sums[n] = p->add ? result[n] : 0;
        for (int k = 0; k < K; k++)
            for (int n = 0; n < N; n++) sums[n] += (f64)a[k][row] * b[k][n];
        for (int n = 0; n < N; n++) result[n] = sums[n];
    }
}

// ---- mbarrier: the word in shared memory counts arrivals still to come, and in its high half the phase and its count ----

static Barrier *barrier_at(Warp *w, const Instruction *i, u32 address) {
    Program *c = w->program;
    for (u32 k = 0; k < c->barriers; k++) if (c->barrier[k].address == address) return &c->barrier[k];
    if (c->barriers == 64) FATAL(w, 0, i, TENSOR, "more than 64 mbarriers");
    c->barrier[c->barriers] = (Barrier){address, 0};
    return &c->barrier[c->barriers++];
}
// value: offset
static int barrier_init(Warp *w, const Instruction *i, u32 mask) {
    used(w, i, 0, mask, "the address");
    const u32 *count = used(w, i, 1, mask, "the count");
    EACH(l, mask) {
        const u32 address = address_of(w, i, 0, l) + i->value[0], word[2] = {count[l], count[l]};
        shared_write(w, l, i, address, 8, (u8 *)word, 0);
        memcpy(shared_at(w->program, address), word, 8);
        barrier_at(w, i, address)->seen = 0;
    }
    return 0;
}
FAMILY("mbarrier.init.shared::cta.b64", LANES, barrier_init)
static int barrier_end(Warp *w, const Instruction *i, u32 mask) {
    used(w, i, 0, mask, "the address");
    static const u8 nothing_valid[8] = {0};
    EACH(l, mask) shared_write(w, l, i, address_of(w, i, 0, l) + i->value[0], 8, nothing_valid, 0);
    return 0;
}
FAMILY("mbarrier.inval.shared::cta.b64", LANES, barrier_end)
static int barrier_test(Warp *w, const Instruction *i, u32 mask) {
    used(w, i, 1, mask, "the address");
    const u32 *parity = used(w, i, 2, mask, "the parity");
    u32 *result = lanes(w, operand(i, 0));
    EACH(l, mask) {
        const u32 address = address_of(w, i, 1, l) + i->value[0];
        u32 word[2];
        shared_read(w, l, i, address, 8);
        memcpy(word, shared_at(w->program, address), 8);
        const u32 complete = (word[1] >> 16 & 1) != (parity[l] & 1);
        *result = (*result & ~(1u << l)) | complete << l;
        if (!complete) continue;
        const u32 seen = barrier_at(w, i, address)->seen;
        if (seen > w->mma_seen) w->mma_seen = seen;
        w->unfenced = 1;
    }
    define(w, i, operand(i, 0), mask, FULL_WARP);
    return 0;
}
FAMILY("mbarrier.try_wait.parity", LANES, barrier_test)
static int commit(Warp *w, const Instruction *i, u32 mask) {
    Program *c = w->program;
    used(w, i, 0, mask, "the address");
    EACH(l, mask) {
        const u32 address = address_of(w, i, 0, l) + i->value[0];
        if (c->commits == 64) FATAL(w, l, i, TENSOR, "more than 64 commits at once");
        shared_range(w, l, i, address, 8);
        if (M.launch->check && !ordered(w, l, &c->bytes[address - SHARED_BASE].write)) shared_race(w, l, i, address - SHARED_BASE, "arrives at an mbarrier that is written", c->bytes[address - SHARED_BASE].write.thread - 1);
        c->commit[c->commits++] = (Commit){address, c->products};
    }
    return 0;
}
FAMILY("tcgen05.commit", LANES, commit)

// The next product completes, and the commits behind it arrive. 1 if there was anything to do.
static int complete_next(Program *c) {
    if (c->completed < c->products) compute(c, &c->queue[c->completed++]);
    else if (!c->commits) return 0;
    u32 kept = 0;
    for (u32 k = 0; k < c->commits; k++) {
        const Commit *due = &c->commit[k];
        if (due->last > c->completed) { c->commit[kept++] = *due; continue; }
        u32 *word = (u32 *)shared_at(c, due->barrier);
        Barrier *barrier = barrier_at(c->warp, 0, due->barrier);
        if (due->last > barrier->seen) barrier->seen = due->last;
        if (--word[0] == 0) word[0] = word[1] & 0xffff, word[1] ^= 0x10000;
    }
    c->commits = kept;
    M.idle = 0;
    return 1;
}
