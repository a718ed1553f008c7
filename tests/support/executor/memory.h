// Instructions that access memory.

// value: offset, space (0 global, 1 shared, 2 generic), bytes of an element, elements, signed, strong (those bytes, or 0), acquires
static int shared_address(const Instruction *i, u64 address) { return i->value[1] == 1 || (i->value[1] == 2 && address < 1ull << 32); }
static u64 address_of(Warp *w, const Instruction *i, int k, int lane) {
    const Operand *o = operand(i, k);
    return i->value[7] & 1 << k ? ((u32 *)lanes(w, o))[lane] : ((u64 *)lanes(w, o))[lane];
}
static void set_lane(Warp *w, const Operand *o, int lane, u64 value, int bytes) {
    if (bytes == 8) ((u64 *)lanes(w, o))[lane] = value;
    else if (bytes == 4) ((u32 *)lanes(w, o))[lane] = value;
    else ((u16 *)lanes(w, o))[lane] = value;
}
static u64 get_lane(const Warp *w, const Operand *o, int lane, int bytes) {
    return bytes == 8 ? ((u64 *)lanes(w, o))[lane] : bytes == 4 ? ((u32 *)lanes(w, o))[lane] : ((u16 *)lanes(w, o))[lane];
}
static int register_bytes(const Instruction *i) { return i->value[7] >> 16; }

static int load(Warp *w, const Instruction *i, u32 mask) {
    const u32 element = i->value[2], count = i->value[3], size = element * count;
    used(w, i, count, mask, "the address");
    EACH(l, mask) {
        const u64 address = address_of(w, i, count, l) + (i64)i->value[0];
        u8 bytes[32];
        if (shared_address(i, address)) {
            shared_read(w, l, i, address, size);
            memcpy(bytes, shared_at(w->program, address), size);
        } else {
            global_read(w, l, i, address, size, i->value[5]);
            memcpy(bytes, (u8 *)address, size);
            if (i->value[6]) acquire(w, l, address);
        }
        for (u32 k = 0; k < count; k++) {
            u64 value = 0;
            memcpy(&value, bytes + k * element, element);
            if (i->value[4]) value = (u64)((i64)(value << (64 - 8 * element)) >> (64 - 8 * element));
            set_lane(w, operand(i, k), l, value, register_bytes(i));
        }
    }
    for (u32 k = 0; k < count; k++) define(w, i, operand(i, k), mask, FULL_WARP);
    return 0;
}
FAMILY("ld", LANES, load)

static int store(Warp *w, const Instruction *i, u32 mask) {
    const u32 element = i->value[2], count = i->value[3], size = element * count;
    used(w, i, 0, mask, "the address");
    for (u32 k = 0; k < count; k++) used(w, i, 1 + k, mask, "what is stored");
    EACH(l, mask) {
        const u64 address = address_of(w, i, 0, l) + (i64)i->value[0];
        u8 bytes[32];
        for (u32 k = 0; k < count; k++) {
            const u64 value = get_lane(w, operand(i, 1 + k), l, register_bytes(i));
            memcpy(bytes + k * element, &value, element);
        }
        if (shared_address(i, address)) {
            shared_write(w, l, i, address, size, bytes, 0);
            memcpy(shared_at(w->program, address), bytes, size);
        } else {
            global_write(w, l, i, address, size, bytes, i->value[5]);
            if (i->value[6]) memset(sync_word(address)->clock, 0, 4 * M.program_count), publish(w, l, address);
            memcpy((u8 *)address, bytes, size);
        }
    }
    return 0;
}
FAMILY("st", LANES, store)

// value: offset, bytes, signed; operands: result, address
static int load_parameter(Warp *w, const Instruction *i, u32 mask) {
    const u32 bytes = i->value[1];
    used(w, i, 1, mask, "the address");
    EACH(l, mask) {
        const u64 address = address_of(w, i, 1, l) + (i64)i->value[0];
        u64 value = 0;
        if (address + bytes > (u64)M.launch->parameter_bytes) FATAL(w, l, i, BOUNDS, "byte %llu of the parameters", (unsigned long long)address);
        memcpy(&value, M.launch->parameters + address, bytes);
        if (i->value[2]) value = (u64)((i64)(value << (64 - 8 * bytes)) >> (64 - 8 * bytes));
        set_lane(w, operand(i, 0), l, value, register_bytes(i));
    }
    define(w, i, operand(i, 0), mask, FULL_WARP);
    return 0;
}
FAMILY("ld.param", LANES, load_parameter)

// value: offset, space, bytes, returns, operation (addition of integers, of float32, or one more but 0 past the operand), releases,
// acquires
static int atomic_add(Warp *w, const Instruction *i, u32 mask) {
    const int result = i->value[3], bytes = i->value[2];
    used(w, i, result, mask, "the address");
    used(w, i, result + 1, mask, "what is added");
    EACH(l, mask) {
        const u64 address = address_of(w, i, result, l) + (i64)i->value[0], term = get_lane(w, operand(i, result + 1), l, bytes);
        u64 old = 0, sum;
        global_read(w, l, i, address, bytes, bytes);
        memcpy(&old, (u8 *)address, bytes);
        sum = i->value[4] == 2 ? (old >= term ? 0 : old + 1) : i->value[4] ? bits_f32(as_f32(old) + as_f32(term)) : old + term;
        global_write(w, l, i, address, bytes, (u8 *)&sum, bytes);
        if (i->value[5]) publish(w, l, address);
        memcpy((u8 *)address, &sum, bytes);
        if (i->value[6]) acquire(w, l, address);
        if (result) set_lane(w, operand(i, 0), l, old, bytes);
    }
    if (result) define(w, i, operand(i, 0), mask, FULL_WARP);
    return 0;
}
FAMILY("atom.add", LANES, atomic_add)

// ---- cp.async: the bytes arrive when they are waited for, or by chance at once ----

static void copy_now(Warp *w, int lane, const Instruction *i, const Copy *copy) {
    u8 bytes[16] = {0};
    if (copy->source_size) {
        global_read(w, lane, i, copy->source, copy->source_size, 0);
        memcpy(bytes, (u8 *)copy->source, copy->source_size);
    }
    shared_write(w, lane, i, copy->destination, copy->size, bytes, -1);
    memcpy(shared_at(w->program, copy->destination), bytes, copy->size);
}
// value: offset of the destination, offset of the source, size
static int copy_async(Warp *w, const Instruction *i, u32 mask) {
    const u32 *sizes = i->inputs > 2 ? used(w, i, 2, mask, "the size") : 0;
    used(w, i, 0, mask, "the destination");
    const u64 *source = used(w, i, 1, mask, "the source");
    EACH(l, mask) {
        Copies *all = &w->copies[l];
        const u32 size = i->value[2];
        const Copy copy = {address_of(w, i, 0, l) + i->value[0], size, sizes ? sizes[l] : size, all->group, source[l] + (i64)i->value[1]};
        if (copy.source_size > size) FATAL(w, l, i, BOUNDS, "cp.async of %u bytes into %u", copy.source_size, size);
        if (copy.source_size) global_range(w, l, i, copy.source, copy.source_size);
        shared_write(w, l, i, copy.destination, size, 0, 1);
        memset(shared_at(w->program, copy.destination), 0xff, size);
        if (all->count == all->capacity) all->list = realloc(all->list, (all->capacity = 2 * all->capacity + 8) * sizeof(Copy));
        all->list[all->count++] = copy;
    }
    return 0;
}
FAMILY("cp.async", LANES, copy_async)

static int copy_commit(Warp *w, const Instruction *i, u32 mask) {
    EACH(l, mask) w->copies[l].group++;
    (void)i;
    return 0;
}
FAMILY("cp.async.commit_group", LANES, copy_commit)

// value: groups that may stay in flight
static int copy_wait(Warp *w, const Instruction *i, u32 mask) {
    EACH(l, mask) {
        Copies *all = &w->copies[l];
        u32 kept = 0;
        for (u32 k = 0; k < all->count; k++) {
            if ((i64)all->list[k].group < (i64)all->group - i->value[0]) copy_now(w, l, i, &all->list[k]);
            else all->list[kept++] = all->list[k];
        }
        all->count = kept;
    }
    return 0;
}
FAMILY("cp.async.wait_group", LANES, copy_wait)

// ---- fences ----

static int proxy_fence(Warp *w, const Instruction *i, u32 mask) {
    EACH(l, mask) w->fence_time[l] = M.time;
    w->fence_epoch = w->program->epoch;
    (void)i;
    return 0;
}
FAMILY("fence.proxy.async.shared::cta", LANES, proxy_fence)

static int nothing(Warp *w, const Instruction *i, u32 mask) { return (void)w, (void)i, (void)mask, 0; }
FAMILY("membar.sys", LANES, nothing) // before a trap

static int trap(Warp *w, const Instruction *i, u32 mask) { FATAL(w, first_lane(mask), i, TRAP, "the kernel has stopped itself"); }
FAMILY("trap", LANES, trap)

// ---- parts of a register: value: bytes of a part, bytes of the whole ----

// LLVM moves this above tcgen05.wait::ld, where it only names registers together: the whole is then in flight as its parts are.
static int pack(Warp *w, const Instruction *i, u32 mask) {
    const int part = i->value[0], whole = i->value[1];
    u32 ok[4];
    int loading = 0;
    for (int k = 0; k < i->inputs; k++) {
        const int in_flight = w->busy[operand(i, 1 + k)->id] == TENSOR_LOAD;
        ok[k] = in_flight ? 0 : defined(w, i, operand(i, 1 + k), mask);
        loading |= in_flight;
    }
    EACH(l, mask) {
        u64 value = 0;
        for (int k = 0; k < i->inputs; k++) value |= get_lane(w, operand(i, 1 + k), l, part) << 8 * part * k;
        set_lane(w, operand(i, 0), l, value, whole);
    }
    if (loading && w->busy[operand(i, 0)->id] == TENSOR_LOAD) return 0; // other lanes of the warp have been here
    define_parts(w, i, operand(i, 0), mask, i->inputs, ok);
    if (loading) make_busy(w, operand(i, 0), TENSOR_LOAD);
    return 0;
}
FAMILY("mov.pack", LANES, pack)

static int unpack(Warp *w, const Instruction *i, u32 mask) {
    const int part = i->value[0], whole = i->value[1];
    const Operand *from = operand(i, i->results);
    EACH(l, mask) {
        const u64 value = get_lane(w, from, l, whole);
        for (int k = 0; k < i->results; k++) set_lane(w, operand(i, k), l, value >> 8 * part * k, part);
    }
    for (int k = 0; k < i->results; k++) define(w, i, operand(i, k), mask, part_defined(w, i, from, mask, k, i->results));
    return 0;
}
FAMILY("mov.unpack", LANES, unpack)
