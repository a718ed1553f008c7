// Instructions of a whole warp, or of the four of a warpgroup: shuffles, votes, ldmatrix, and matrix products.
//
// A product of one instruction is exact (in float64) up to one rounding of each sum to float32. Hardware rounds less well and in
// an order that is not documented. TF32 operands lose their 13 low bits, as on the hardware.

enum { BF16, F16, TF32, F64 }; // value[0] of every product

// value: mode (up, down, bfly, idx); operands: result (and predicate), value, lane, clamp
static int shuffle(Warp *w, const Instruction *i, u32 mask) {
    const int k = i->results;
    const u32 *x = lanes(w, operand(i, k)), *b = used(w, i, k + 1, mask, "the lane"), *clamp = used(w, i, k + 2, mask, "the clamp");
    const u32 ok = defined(w, i, operand(i, k), mask);
    u32 result[32], inside = 0, result_ok = 0;
    for (int l = 0; l < 32; l++) {
        const int segment = clamp[l] >> 8 & 31, most = (l & segment) | (clamp[l] & 31 & ~segment), least = l & segment, by = b[l] & 31;
        const int from = i->value[0] == 0 ? l - by : i->value[0] == 1 ? l + by : i->value[0] == 2 ? l ^ by : (least | (by & ~segment));
        const int in = i->value[0] == 0 ? from >= most : from <= most, j = in ? from : l;
        inside |= (u32)in << l;
        result[l] = x[j];
        result_ok |= (ok >> j & 1) << l;
    }
    memcpy(lanes(w, operand(i, 0)), result, sizeof result);
    define(w, i, operand(i, 0), FULL_WARP, result_ok);
    if (k > 1) *(u32 *)lanes(w, operand(i, 1)) = inside, define(w, i, operand(i, 1), FULL_WARP, FULL_WARP);
    return 0;
}
FAMILY("shfl.sync", WARP, shuffle)

// PTX leaves open which lane is chosen; hardware takes the lowest, and Triton 3.6.0 counts on it.
static int elect(Warp *w, const Instruction *i, u32 mask) {
    (void)mask;
    memset(lanes(w, operand(i, 0)), 0, 32 * 4);
    *(u32 *)lanes(w, operand(i, 1)) = 1;
    for (int k = 0; k < 2; k++) define(w, i, operand(i, k), FULL_WARP, FULL_WARP);
    return 0;
}
FAMILY("elect.sync", WARP, elect)

// value: any, all, ballot
static int vote(Warp *w, const Instruction *i, u32 mask) {
    const u32 p = *(u32 *)used(w, i, 1, mask, "the vote"), result = i->value[0] == 2 ? p : (i->value[0] ? p == (u32)FULL_WARP : p != 0) * (u32)FULL_WARP;
    for (int l = 0; l < (i->value[0] < 2 ? 1 : 32); l++) ((u32 *)lanes(w, operand(i, 0)))[l] = result;
    define(w, i, operand(i, 0), FULL_WARP, FULL_WARP);
    return 0;
}
FAMILY("vote.sync", WARP, vote)

// value: 0 s32, 1 u32, 2 f32, 3 f32 with NaN; 0 add, 1 min, 2 max
static int reduce(Warp *w, const Instruction *i, u32 mask) {
    const u32 *x = used(w, i, 1, mask, "what is reduced"), *members = used(w, i, 2, mask, "the member mask");
    for (int l = 0; l < 32; l++) if (members[l] != (u32)FULL_WARP) FATAL(w, l, i, DIVERGENCE, "is one of a part of a warp, which is not known");
    u32 r = x[0];
    for (int l = 1; l < 32; l++) {
        const u32 a = x[l];
        const f32 f = as_f32(r), g = as_f32(a);
        if (i->value[0] == 3 && (f != f || g != g)) r = 0x7fffffff;
        else if (i->value[0] >= 2) r = bits_f32(i->value[1] == 1 ? fminf(f, g) : fmaxf(f, g));
        else if (i->value[1] == 0) r += a;
        else if ((i->value[0] ? a < r : (i32)a < (i32)r) == (i->value[1] == 1)) r = a;
    }
    for (int l = 0; l < 32; l++) ((u32 *)lanes(w, operand(i, 0)))[l] = r;
    define(w, i, operand(i, 0), FULL_WARP, FULL_WARP);
    return 0;
}
FAMILY("redux.sync", WARP, reduce)

static int warp_barrier(Warp *w, const Instruction *i, u32 mask) { return (void)i, (void)mask, w->sync++, 0; }
FAMILY("bar.warp.sync", WARP, warp_barrier)

// ---- ldmatrix, stmatrix: value: offset, matrices, transposed ----

static int load_matrix(Warp *w, const Instruction *i, u32 mask) {
    const u32 count = i->value[1], *address = used(w, i, count, mask, "the address");
    u16 m[4][8][8];
    for (u32 row = 0; row < 8 * count; row++) {
        const u32 at = address[row] + i->value[0];
        shared_read(w, row, i, at, 16);
        memcpy(m[row / 8][row % 8], shared_at(w->program, at), 16);
    }
    for (u32 k = 0; k < count; k++) {
        u32 *r = lanes(w, operand(i, k));
        for (int l = 0; l < 32; l++) {
            const int a = l / 4, b = 2 * (l % 4);
            r[l] = i->value[2] ? m[k][b][a] | (u32)m[k][b + 1][a] << 16 : m[k][a][b] | (u32)m[k][a][b + 1] << 16;
        }
        define(w, i, operand(i, k), FULL_WARP, FULL_WARP);
    }
    return 0;
}
FAMILY("ldmatrix", WARP, load_matrix)

static int store_matrix(Warp *w, const Instruction *i, u32 mask) {
    const u32 count = i->value[1], *address = used(w, i, 0, mask, "the address");
    u16 m[4][8][8];
    for (u32 k = 0; k < count; k++) {
        const u32 *x = used(w, i, 1 + k, mask, "what is stored");
        for (int l = 0; l < 32; l++)
            for (int half = 0; half < 2; half++) *(i->value[2] ? &m[k][2 * (l % 4) + half][l / 4] : &m[k][l / 4][2 * (l % 4) + half]) = x[l] >> 16 * half;
    }
    for (u32 row = 0; row < 8 * count; row++) {
        const u32 at = address[row] + i->value[0];
        shared_write(w, row, i, at, 16, (u8 *)m[row / 8][row % 8], 0);
        memcpy(shared_at(w->program, at), m[row / 8][row % 8], 16);
    }
    return 0;
}
FAMILY("stmatrix", WARP, store_matrix)

// ---- mma.sync: value: type, K, rows; operands: sums, registers of A, of B, sums. Each sum adds the products in order. ----

static f32 element(int type, u32 word, int half) {
    const u16 x = word >> 16 * half;
    return type == TF32 ? truncated_tf32(word) : type == BF16 ? from_bf16(x) : from_f16(x);
}
static f64 number(int type, const void *x, int l, int half) { return type == F64 ? ((f64 *)x)[l] : element(type, ((u32 *)x)[l], half); }
static int product(Warp *w, const Instruction *i, u32 mask) {
    const int type = i->value[0], K = i->value[1], rows = i->value[2], sums = rows / 4, per = type < TF32 ? 2 : 1, words = K / per / 4; // registers of a row, by four
    f64 a[16][16], b[16][8], sum[16][8];
    int o = sums;
    for (int q = 0; q < words; q++)
        for (int r = 0; r < rows; r += 8, o++) {
            const void *x = used(w, i, o, mask, "an operand");
            for (int l = 0; l < 32; l++)
                for (int h = 0; h < per; h++) a[r + l / 4][(4 * q + l % 4) * per + h] = number(type, x, l, h);
        }
    for (int q = 0; q < words; q++, o++) {
        const void *x = used(w, i, o, mask, "an operand");
        for (int l = 0; l < 32; l++)
            for (int h = 0; h < per; h++) b[(4 * q + l % 4) * per + h][l / 4] = number(type, x, l, h);
    }
    for (int k = 0; k < sums; k++, o++) {
        const void *x = used(w, i, o, mask, "an accumulator");
        for (int l = 0; l < 32; l++) sum[8 * (k / 2) + l / 4][2 * (l % 4) + k % 2] = type == F64 ? ((f64 *)x)[l] : ((f32 *)x)[l];
    }
    for (int row = 0; row < rows; row++)
        for (int k = 0; k < K; k++)
            for (int n = 0; n < 8; n++) sum[row][n] = fma(a[row][k], b[k][n], sum[row][n]);
    for (int k = 0; k < sums; k++) {
        void *r = lanes(w, operand(i, k));
        for (int l = 0; l < 32; l++) {
            const f64 x = sum[8 * (k / 2) + l / 4][2 * (l % 4) + k % 2];
            if (type == F64) ((f64 *)r)[l] = x;
            else ((f32 *)r)[l] = x;
        }
        define(w, i, operand(i, k), FULL_WARP, FULL_WARP);
    }
    return 0;
}
FAMILY("mma.sync", WARP, product)

// ---- operands in shared memory, read by the matrix unit ----

// Element (mn, k) of the operand of a matrix descriptor. swizzle: log2(bytes / 16).
static u32 descriptor_address(u64 descriptor, int swizzle, int mn_major, int mn, int k, int bytes) {
    const u32 start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
    const int chunk = 16 / bytes, width = 1 << swizzle;
    u32 at = start;
    if (!mn_major) at += mn % 8 * 16 * width + mn / 8 * stride + k % chunk * bytes + k / chunk * (swizzle ? 16 : leading);
    else {
        const int span = chunk * width;
        at += mn % span * bytes + k % 8 * 16 * width + (swizzle ? mn / span * leading + k / 8 * stride : mn / span * stride + k / 8 * leading);
    }
    return swizzle ? at ^ (at >> 7 & (width - 1)) << 4 : at;
}
// The operand as matrix[k][mn]; or, without a matrix, its bytes are checked for the product of this number.
typedef struct { u64 descriptor; int swizzle, mn_major, size, K, type; } Tile;
static void read_operand(Warp *w, const Instruction *i, Tile t, f32 (*matrix)[256], u32 group, u32 number) {
    const int bytes = t.type == TF32 ? 4 : 2, chunk = 16 / bytes;
    for (int k = 0; k < t.K; k++)
        for (int n = 0; n < t.size; n++) {
            const u32 at = descriptor_address(t.descriptor, t.swizzle, t.mn_major, n, k, bytes);
            if (number && (t.mn_major ? n : k) % chunk == 0) proxy_read(w, 0, i, at, 16, group, number);
            u32 word = 0;
            if (!matrix) continue;
            memcpy(&word, shared_at(w->program, at), bytes);
            matrix[k][n] = element(t.type, word, 0);
        }
}

// ---- wgmma: value: type, N, A in registers, A and B transposed; operands: N / 2 sums, A, B, whether to add ----

static int wgmma(Warp *w, const Instruction *i, u32 mask) {
    const int type = i->value[0], N = i->value[1], K = type == TF32 ? 8 : 16, in_registers = i->value[2], per = type == TF32 ? 1 : 2;
    static const int swizzles[4] = {0, 3, 2, 1};
    static f32 a[16][256], b[16][256];
    static f64 sums[256];
    Warp *group = w - w->index % 4;
    const int first_a = N / 2, first_b = first_a + (in_registers ? 4 : 1);
    const u32 number = w->group + 1;
    for (int v = 0; v < 4; v++) used(group + v, i, first_b, mask, "the descriptor"), used(group + v, i, first_b + 1, mask, "whether to add");
    const u64 from_b = *(u64 *)lanes(w, operand(i, first_b));
    const u32 add = *(u32 *)lanes(w, operand(i, first_b + 1)) & 1;
    read_operand(w, i, (Tile){from_b, swizzles[from_b >> 62], i->value[4], N, K, type}, b, w->index / 4, number);
    if (!in_registers) {
        used(w, i, first_a, mask, "the descriptor");
        const u64 from_a = *(u64 *)lanes(w, operand(i, first_a));
        read_operand(w, i, (Tile){from_a, swizzles[from_a >> 62], i->value[3], 64, K, type}, a, w->index / 4, number);
    }
    for (int v = 0; v < 4; v++) {
        Warp *x = group + v;
        for (int k = 0; in_registers && k < 4; k++) {
            const Operand *o = operand(i, first_a + k);
            const u32 *r = used(x, i, first_a + k, mask, "an operand");
            if (x->written[o->id] > x->wgmma_fence) report(x, 0, i, WGMMA, "an operand was written after the last wgmma.fence");
            for (int l = 0; l < 32; l++)
                for (int h = 0; h < per; h++) a[(4 * (k / 2) + l % 4) * per + h][16 * v + 8 * (k % 2) + l / 4] = element(type, r[l], h);
            make_busy(x, o, OPERAND | number);
        }
        for (int s = 0; s < N / 2; s++) {
            const Operand *o = operand(i, s);
            const u32 busy = x->busy[o->id] & ~(u32)GROUP;
            if (!busy && add) used(x, i, s, mask, "an accumulator");
            if (!busy && x->written[o->id] > x->wgmma_fence) report(x, 0, i, WGMMA, "an accumulator was written after the last wgmma.fence");
            make_busy(x, o, ACCUMULATOR | number);
        }
    }
    for (int row = 0; row < 64; row++) {
        Warp *x = group + row / 16;
        for (int n = 0; n < N; n++) {
            const int l = row % 8 * 4 + n % 8 / 2, s = 4 * (n / 8) + 2 * (row % 16 / 8) + n % 2;
            sums[n] = add ? ((f32 *)lanes(x, operand(i, s)))[l] : 0;
        }
        for (int k = 0; k < K; k++)
            for (int n = 0; n < N; n++) sums[n] += (f64)a[k][row] * b[k][n];
        for (int n = 0; n < N; n++) {
            const int l = row % 8 * 4 + n % 8 / 2, s = 4 * (n / 8) + 2 * (row % 16 / 8) + n % 2;
            ((f32 *)lanes(x, operand(i, s)))[l] = sums[n];
        }
    }
    return 0;
}
FAMILY("wgmma.mma_async", WARPGROUP, wgmma)

static int wgmma_fence(Warp *w, const Instruction *i, u32 mask) { return (void)i, (void)mask, w->wgmma_fence = M.time, 0; }
FAMILY("wgmma.fence.sync.aligned", WARP, wgmma_fence)

static int wgmma_commit(Warp *w, const Instruction *i, u32 mask) { return (void)i, (void)mask, w->group++, 0; }
FAMILY("wgmma.commit_group.sync.aligned", WARP, wgmma_commit)

// value: groups that may stay pending
static int wgmma_wait(Warp *w, const Instruction *i, u32 mask) {
    (void)mask;
    const i64 done = (i64)w->group - i->value[0];
    if (done > (i64)w->group_done) w->group_done = done;
    release_busy(w, ACCUMULATOR, OPERAND, w->group_done);
    return 0;
}
FAMILY("wgmma.wait_group.sync.aligned", WARP, wgmma_wait)
