// Instructions that access memory, fences, and moves of parts of a register.

static u64 get_lane(const Warp *w, const Operand *o, int lane) {
    const void *x = lanes(w, o);
    return o->bytes == 8 ? ((u64 *)x)[lane] : o->bytes == 4 ? ((u32 *)x)[lane] : ((u16 *)x)[lane];
}
static void set_lane(const Warp *w, const Operand *o, int lane, u64 value) {
    void *x = lanes(w, o);
    if (o->bytes == 8) ((u64 *)x)[lane] = value;
    else if (o->bytes == 4) ((u32 *)x)[lane] = value;
    else ((u16 *)x)[lane] = value;
}
static u64 address_of(const Warp *w, const Instruction *i, int k, int lane) { return get_lane(w, operand(i, k), lane) + (i64)operand(i, k)->offset; }

// value of ld, st and atom: state space, bytes of an element, signed, strong, releases or acquires (atom: releases, acquires, operation)
INSTRUCTION("ld", LANES) {
    const u32 element = i->value[1], count = i->results, unused = 64 - 8 * element;
    EACH(l, mask) {
        const u64 address = address_of(w, i, count, l);
        const u8 *from = read_from(w, l, i, locate(w, l, i, i->value[0], address, element * count), i->value[3] * element);
        if (i->value[4]) acquire(w, l, address);
        for (u32 k = 0; k < count; k++) {
            u64 value = 0;
            memcpy(&value, from + k * element, element);
            set_lane(w, operand(i, k), l, i->value[2] ? (u64)((i64)(value << unused) >> unused) : value);
        }
    }
    for (u32 k = 0; k < count; k++) define(w, i, operand(i, k), mask, FULL_WARP);
    return 0;
}

INSTRUCTION("st", LANES) {
    const u32 element = i->value[1], count = i->inputs - 1;
    EACH(l, mask) {
        const u64 address = address_of(w, i, 0, l);
        u8 bytes[32];
        for (u32 k = 0; k < count; k++) {
            const u64 value = get_lane(w, operand(i, 1 + k), l);
            memcpy(bytes + k * element, &value, element);
        }
        write_to(w, l, i, locate(w, l, i, i->value[0], address, element * count), bytes, i->value[3] * element, AT_ONCE);
        if (i->value[4]) memset(sync_word(address)->clock, 0, 4 * M.program_count), publish(w, l, address);
    }
    return 0;
}

// Addition of integers, of float32, or one more but 0 past the operand; with or without a result.
INSTRUCTION("atom", LANES) {
    const int result = i->results, bytes = i->value[1], operation = i->value[6];
    EACH(l, mask) {
        const u64 address = address_of(w, i, result, l), term = get_lane(w, operand(i, result + 1), l);
        const Place p = locate(w, l, i, GLOBAL, address, bytes);
        u64 old = 0;
        memcpy(&old, read_from(w, l, i, p, bytes), bytes);
        const u64 sum = operation == 2 ? (old >= term ? 0 : old + 1) : operation ? bits_f32(as_f32(old) + as_f32(term)) : old + term;
        write_to(w, l, i, p, (u8 *)&sum, bytes, AT_ONCE);
        if (i->value[4]) publish(w, l, address);
        if (i->value[5]) acquire(w, l, address);
        if (result) set_lane(w, operand(i, 0), l, old);
    }
    if (result) define(w, i, operand(i, 0), mask, FULL_WARP);
    return 0;
}

// ---- cp.async: the bytes arrive when they are waited for ----

// value: size
INSTRUCTION("cp.async.c[ag].shared(?:::cta)?.global = [48] [8] #4|8|16 4?", LANES) {
    const u32 size = i->value[0], *sizes = i->inputs > 2 ? word(w, i, 2) : 0;
    EACH(l, mask) {
        Copies *all = &w->copies[l];
        const Copy copy = {address_of(w, i, 0, l), size, sizes ? sizes[l] : size, all->group, address_of(w, i, 1, l)};
        if (copy.source_size > size) FATAL(w, l, i, BOUNDS, "cp.async of %u bytes into %u", copy.source_size, size);
        if (copy.source_size) locate(w, l, i, GLOBAL, copy.source, copy.source_size);
        write_to(w, l, i, locate(w, l, i, SHARED, copy.destination, size), 0, 0, STARTS);
        if (all->count == all->capacity) all->list = realloc(all->list, (all->capacity = 2 * all->capacity + 8) * sizeof(Copy));
        all->list[all->count++] = copy;
    }
    return 0;
}
INSTRUCTION("cp.async.commit_group =", LANES) {
    EACH(l, mask) w->copies[l].group++;
    return 0;
}
// value: groups that may stay in flight
INSTRUCTION("cp.async.wait_group = #", LANES) {
    EACH(l, mask) {
        Copies *all = &w->copies[l];
        u32 kept = 0;
        for (u32 k = 0; k < all->count; k++) {
            const Copy *copy = &all->list[k];
            u8 bytes[16] = {0};
            if ((i64)copy->group >= (i64)all->group - i->value[0]) {
                all->list[kept++] = *copy;
                continue;
            }
            if (copy->source_size) memcpy(bytes, read_from(w, l, i, locate(w, l, i, GLOBAL, copy->source, copy->source_size), 0), copy->source_size);
            write_to(w, l, i, locate(w, l, i, SHARED, copy->destination, copy->size), bytes, 0, ARRIVES);
        }
        all->count = kept;
    }
    return 0;
}

// ---- fences ----

INSTRUCTION("fence.proxy.async.shared::cta =", LANES) {
    EACH(l, mask) w->fence_time[l] = M.time;
    w->fence_epoch = w->program->epoch;
    return 0;
}
INSTRUCTION("membar.sys =", LANES) { return 0; } // before a trap
INSTRUCTION("trap =", LANES) { FATAL(w, first_lane(mask), i, TRAP, "the kernel has stopped itself"); }

// ---- parts of a register ----

// LLVM moves this above tcgen05.wait::ld, where it only names registers together: the whole is then in flight as its parts are.
PROPAGATING("mov.b32 4 = 2x2; mov.b64 8 = 4x2 or 8 = 2x4", LANES) {
    u32 ok[4];
    int loading = 0;
    for (int k = 0; k < i->inputs; k++) {
        const int in_flight = w->busy[operand(i, 1 + k)->id] == TENSOR_LOAD;
        ok[k] = in_flight ? 0 : defined(w, i, operand(i, 1 + k), mask);
        loading |= in_flight;
    }
    EACH(l, mask) {
        u64 value = 0;
        for (int k = 0; k < i->inputs; k++) value |= get_lane(w, operand(i, 1 + k), l) << 8 * operand(i, 1)->bytes * k;
        set_lane(w, operand(i, 0), l, value);
    }
    if (loading && w->busy[operand(i, 0)->id] == TENSOR_LOAD) return 0; // other lanes of the warp have been here
    define_parts(w, i, operand(i, 0), mask, i->inputs, ok);
    if (loading) make_busy(w, operand(i, 0), TENSOR_LOAD);
    return 0;
}
PROPAGATING("mov.b32 2x2 = 4; mov.b64 4x2 = 8 or 2x4 = 8", LANES) {
    const Operand *from = operand(i, i->results);
    EACH(l, mask) {
        const u64 value = get_lane(w, from, l);
        for (int k = 0; k < i->results; k++) set_lane(w, operand(i, k), l, value >> 8 * operand(i, k)->bytes * k);
    }
    for (int k = 0; k < i->results; k++) define(w, i, operand(i, k), mask, part_defined(w, i, from, mask, k, i->results));
    return 0;
}
