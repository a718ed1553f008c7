// Instructions of a whole warp, or of the four of a warpgroup: shuffles, votes, ldmatrix, and matrix products.
//
// A product of one instruction is exact (in float64) up to one rounding of each sum to float32. Hardware rounds less well and in
// an order that is not documented. TF32 operands lose their 13 low bits, as on the hardware.

enum { BF16, F16, TF32, F64 };
static void define_all(Warp *w, const Instruction *i) {
    for (int k = 0; k < i->results; k++) define(w, i, operand(i, k), FULL_WARP, FULL_WARP);
}

// value: mode (up, down, bfly, idx); operands: result, value, lane, clamp
PROPAGATING("shfl.sync.(up|down|bfly|idx).b32 4 = 4 4 4 !-1", WARP) {
    const u32 *x = word(w, i, 1), *b = used(w, i, 2, mask), *clamp = used(w, i, 3, mask);
    const u32 ok = defined(w, i, operand(i, 1), mask);
    u32 result[32], result_ok = 0;
    for (int l = 0; l < 32; l++) {
        const int segment = clamp[l] >> 8 & 31, most = (l & segment) | (clamp[l] & 31 & ~segment), least = l & segment, by = b[l] & 31;
        const int from = i->value[0] == 0 ? l - by : i->value[0] == 1 ? l + by : i->value[0] == 2 ? l ^ by : (least | (by & ~segment));
        const int j = (i->value[0] == 0 ? from >= most : from <= most) ? from : l;
        result[l] = x[j];
        result_ok |= (ok >> j & 1) << l;
    }
    memcpy(word(w, i, 0), result, sizeof result);
    define(w, i, operand(i, 0), FULL_WARP, result_ok);
    return 0;
}

// PTX leaves open which lane is chosen; hardware takes the lowest, and Triton 3.6.0 counts on it.
INSTRUCTION("elect.sync 4 1 = !-1", WARP) {
    memset(word(w, i, 0), 0, 32 * 4);
    *word(w, i, 1) = 1;
    return define_all(w, i), 0;
}

// value: any, all, ballot
INSTRUCTION("vote.sync.(any|all).pred 1 = 1 !-1; vote.sync.(ballot).b32 4 = 1 !-1", WARP) {
    const u32 p = *word(w, i, 1), all = FULL_WARP;
    const u32 result = i->value[0] == 2 ? p : (i->value[0] ? p == all : p != 0) * all;
    for (int l = 0; l < (i->value[0] < 2 ? 1 : 32); l++) word(w, i, 0)[l] = result;
    return define_all(w, i), 0;
}

// value: add, min, max; whether NaN wins; s32, u32, f32
INSTRUCTION("redux.sync.(add|min|max)().(s32|u32) 4 = 4 4; redux.sync.(min|max)(.NaN)?.(f32) 4 = 4 4", WARP) {
    const int add = i->value[0] == 0, min = i->value[0] == 1, type = i->value[2];
    const u32 *x = word(w, i, 1), *members = word(w, i, 2);
    for (int l = 0; l < 32; l++) if (members[l] != (u32)FULL_WARP) FATAL(w, l, i, DIVERGENCE, "is one of a part of a warp, which is not known");
    u32 r = x[0];
    for (int l = 1; l < 32; l++) {
        const u32 a = x[l];
        const f32 f = as_f32(r), g = as_f32(a);
        if (type == 2) r = i->value[1] && (f != f || g != g) ? 0x7fffffff : bits_f32(min ? fminf(f, g) : fmaxf(f, g));
        else if (add) r += a;
        else if ((type ? a < r : (i32)a < (i32)r) == min) r = a;
    }
    for (int l = 0; l < 32; l++) word(w, i, 0)[l] = r;
    return define_all(w, i), 0;
}

INSTRUCTION("bar.warp.sync = !-1", WARP) { return w->sync++, 0; }

// ---- ldmatrix, stmatrix: value: matrices, whether transposed ----

// Where a matrix has the halves of a lane's word.
static u16 *half_of(u16 m[8][8], int transposed, int lane, int half) {
    const int row = lane / 4, column = 2 * (lane % 4) + half;
    return transposed ? &m[column][row] : &m[row][column];
}
INSTRUCTION("ldmatrix.sync.aligned.m8n8.x([124])(.trans)?.shared(?:::cta)?.b16 4x{0} = [4]", WARP) {
    const u32 count = i->value[0];
    u16 m[4][8][8];
    for (u32 row = 0; row < 8 * count; row++)
        memcpy(m[row / 8][row % 8], read_from(w, row, i, locate(w, row, i, SHARED, address_of(w, i, count, row), 16), 0), 16);
    for (u32 k = 0; k < count; k++)
        for (int l = 0; l < 32; l++) word(w, i, k)[l] = *half_of(m[k], i->value[1], l, 0) | (u32)*half_of(m[k], i->value[1], l, 1) << 16;
    return define_all(w, i), 0;
}
INSTRUCTION("stmatrix.sync.aligned.m8n8.x([124])(.trans)?.shared(?:::cta)?.b16 = [4] 4x{0}", WARP) {
    const u32 count = i->value[0];
    u16 m[4][8][8];
    for (u32 k = 0; k < count; k++)
        for (int l = 0; l < 64; l++) *half_of(m[k], i->value[1], l / 2, l % 2) = word(w, i, 1 + k)[l / 2] >> 16 * (l % 2);
    for (u32 row = 0; row < 8 * count; row++)
        write_to(w, row, i, locate(w, row, i, SHARED, address_of(w, i, 0, row), 16), (u8 *)m[row / 8][row % 8], 0, AT_ONCE);
    return 0;
}

// ---- matrix products ----

// The operands, [k][row] and [k][column], and a row of sums, to each of which its products are added in order.
static f64 A[16][256], B[16][256], sums[256];
static inline void multiply(int row, int K, int N) {
    for (int k = 0; k < K; k++)
        for (int n = 0; n < N; n++) sums[n] = fma(A[k][row], B[k][n], sums[n]);
}
static int elements(int type) { return type < TF32 ? 2 : 1; } // of a register
static f64 element(int type, const void *x, int at, int half) {
    const u32 word = type == F64 ? 0 : ((u32 *)x)[at];
    const u16 part = word >> 16 * half;
    return type == F64 ? ((f64 *)x)[at] : type == TF32 ? truncated_tf32(word) : type == BF16 ? from_bf16(part) : from_f16(part);
}
// A register of an operand: lane l has one element, or two, of row l / 4.
static void unpack(f64 (*matrix)[256], const void *x, int type, int row, int k) {
    for (int l = 0; l < 32; l++)
        for (int h = 0; h < elements(type); h++) matrix[k + l % 4 * elements(type) + h][row + l / 4] = element(type, x, l, h);
}
static void *sum_at(const Warp *w, const Instruction *i, int first, int row, int n) {
    const Operand *o = operand(i, first + 4 * (n / 8) + 2 * (row % 16 / 8) + n % 2);
    return (u8 *)lanes(w, o) + o->bytes * (row % 8 * 4 + n % 8 / 2);
}
// Results of warps, of 16 rows each: A B and the sums in the registers from `first`, or 0 if that is negative.
static void multiply_registers(const Warp *w, const Instruction *i, int rows, int K, int N, int first) {
    const int is_double = operand(i, 0)->bytes == 8;
    for (int row = 0; row < rows; row++) {
        const Warp *x = w + row / 16;
        for (int n = 0; n < N; n++) {
            const void *sum = first < 0 ? 0 : sum_at(x, i, first, row, n);
            sums[n] = !sum ? 0 : is_double ? *(f64 *)sum : *(f32 *)sum;
        }
        if (N == 8) multiply(row, K, 8); // as fast as only a known number allows
        else multiply(row, K, N);
        for (int n = 0; n < N; n++) {
            void *result = sum_at(x, i, 0, row, n);
            if (is_double) *(f64 *)result = sums[n];
            else *(f32 *)result = sums[n];
        }
    }
}

// value: rows, K, type; operands: results, registers of A, of B, sums
INSTRUCTION("mma.sync.aligned.m(16)n8k(16).row.col.f32.(bf16|f16).\\3.f32 4x4 = 4x4 4x2 4x4; "
            "mma.sync.aligned.m(16)n8k(8).row.col.f32.(tf32).\\3.f32 4x4 = 4x4 4x2 4x4; "
            "mma.sync.aligned.m(16)n8k(16).row.col.f64.(f64).\\3.f64 8x4 = 8x8 8x4 8x4; "
            "mma.sync.aligned.m(8)n8k(4).row.col.f64.(f64).\\3.f64 8x2 = 8x1 8x1 8x2", WARP) {
    const int rows = i->value[0], K = i->value[1], type = i->value[2], step = 4 * elements(type);
    int o = i->results;
    for (int k = 0; k < K; k += step)
        for (int row = 0; row < rows; row += 8) unpack(A, word(w, i, o++), type, row, k);
    for (int k = 0; k < K; k += step) unpack(B, word(w, i, o++), type, 0, k);
    multiply_registers(w, i, rows, K, 8, o);
    return define_all(w, i), 0;
}

// Element (mn, k) of the operand of a matrix descriptor. swizzle: log2(bytes / 16).
typedef struct { u64 descriptor; int swizzle, mn_major, size, K, type; } Tile;
static u32 descriptor_address(Tile t, int mn, int k) {
    const u32 start = (t.descriptor & 0x3fff) << 4, leading = (t.descriptor >> 16 & 0x3fff) << 4, stride = (t.descriptor >> 32 & 0x3fff) << 4;
    const int bytes = 4 / elements(t.type), chunk = 16 / bytes, width = 1 << t.swizzle, span = chunk * width;
    u32 at = start;
    if (!t.mn_major) at += mn % 8 * 16 * width + mn / 8 * stride + k % chunk * bytes + k / chunk * (t.swizzle ? 16 : leading);
    else at += mn % span * bytes + k % 8 * 16 * width + (t.swizzle ? mn / span * leading + k / 8 * stride : mn / span * stride + k / 8 * leading);
    return t.swizzle ? at ^ (at >> 7 & (width - 1)) << 4 : at;
}
// The operand as matrix[k][mn], if that is given; its bytes are checked for the product of this number, if there is one.
static void read_operand(const Warp *w, const Instruction *i, Tile t, f64 (*matrix)[256], u32 group, u32 number) {
    const int chunk = 4 * elements(t.type);
    for (int k = 0; k < t.K; k++)
        for (int n = 0; n < t.size; n++) {
            const u32 at = descriptor_address(t, n, k);
            u32 word = 0;
            if (number && (t.mn_major ? n : k) % chunk == 0) proxy_read(w, i, at, 16, group, number);
            if (!matrix) continue;
            memcpy(&word, shared_at(w->program, at), 4 / elements(t.type));
            matrix[k][n] = element(t.type, &word, 0, 0);
        }
}

// value: N, type, whether A (if not in registers) and B are transposed; operands: N / 2 sums, A, B, whether to add
PROPAGATING("wgmma.mma_async.sync.aligned.m64n([0-9]+)k16.f32.(bf16|f16).\\2 4x{0}/2 = 8 8 1 !1 !1 #0|1 #0|1 or 4x{0}/2 = 4x4 8 1 !1 !1 #0|1; "
            "wgmma.mma_async.sync.aligned.m64n([0-9]+)k8.f32.(tf32).\\2 4x{0}/2 = 8 8 1 !1 !1 or 4x{0}/2 = 4x4 8 1 !1 !1", WARPGROUP) {
    static const int swizzles[4] = {0, 3, 2, 1};
    const int N = i->value[0], type = i->value[1], K = 8 * elements(type), in_registers = i->inputs > 3;
    const int first_b = i->results + (in_registers ? 4 : 1);
    Warp *group = w - w->index % 4;
    const u32 number = w->group + 1;
    for (int v = 0; v < 4; v++) used(group + v, i, first_b, mask), used(group + v, i, first_b + 1, mask);
    const u64 b = get_lane(w, operand(i, first_b), 0);
    const u32 add = *word(w, i, first_b + 1) & 1;
    read_operand(w, i, (Tile){b, swizzles[b >> 62], i->value[in_registers ? 2 : 3], N, K, type}, B, w->index / 4, number);
    if (!in_registers) {
        const u64 a = *(u64 *)used(w, i, i->results, mask);
        read_operand(w, i, (Tile){a, swizzles[a >> 62], i->value[2], 64, K, type}, A, w->index / 4, number);
    }
    for (Warp *x = group; x < group + 4; x++) {
        for (int k = 0; in_registers && k < 4; k++) {
            const Operand *o = operand(i, i->results + k);
            unpack(A, used(x, i, i->results + k, mask), type, 16 * (x - group) + 8 * (k % 2), k / 2 * K / 2);
            if (x->written[o->id] > x->wgmma_fence) report(x, 0, i, WGMMA, "an operand was written after the last wgmma.fence");
            make_busy(x, o, OPERAND | number);
        }
        for (int s = 0; s < i->results; s++) {
            const Operand *o = operand(i, s);
            const u32 busy = x->busy[o->id] & ~(u32)GROUP;
            if (!busy && add) used(x, i, s, mask);
            if (!busy && x->written[o->id] > x->wgmma_fence) {
                int zeros = x->wgmma_fence > x->committed;
                for (int l = 0; l < 32; l++) zeros &= word(x, i, s)[l] == 0;
                if (zeros) M.launch->late_zeros++;
                else report(x, 0, i, WGMMA, "an accumulator was written after the last wgmma.fence");
            }
            make_busy(x, o, ACCUMULATOR | number);
        }
    }
    multiply_registers(group, i, 64, K, N, add ? 0 : -1);
    return 0;
}
INSTRUCTION("wgmma.fence.sync.aligned =", WARP) { return w->wgmma_fence = M.time, 0; }
INSTRUCTION("wgmma.commit_group.sync.aligned =", WARP) { return w->committed = M.time, w->group++, 0; }
// value: groups that may stay pending
INSTRUCTION("wgmma.wait_group.sync.aligned = #", WARP) {
    const i64 done = (i64)w->group - i->value[0];
    if (done > (i64)w->group_done) w->group_done = done;
    release_busy(w, ACCUMULATOR, OPERAND, w->group_done);
    return 0;
}
