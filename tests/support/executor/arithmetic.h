// Instructions that each lane executes by itself, one line each, under their full names: what is not listed does not exist.
// Rounding is to nearest even; approximations (ex2.approx, div.full, ...) are computed as exactly as float32 allows.

#define IN(type, k) const type *const x##k = lanes(w, operand(i, k))
#define RESULT(R) R *const r = lanes(w, operand(i, 0))
#define STORE(EXPR) for (int l = 0; l < 32; l++) { r[l] = mask >> l & 1 ? (EXPR) : r[l]; }
#define STORE_BITS(EXPR) { u32 bits = 0; for (int l = 0; l < 32; l++) bits |= (u32)(EXPR) << l; *r = (*r & ~mask) | (bits & mask); }
#define OK(k) defined(w, i, operand(i, k), mask)
#define DEFINE(OK) define(w, i, operand(i, 0), mask, OK)

// An operation of one to three operands; where there are fewer, the last is given again.
#define OP1(NAME, R, A, EXPR) OP(__COUNTER__, NAME, 1, 1, 1, R, A, A, A, EXPR)
#define OP2(NAME, R, A, B, EXPR) OP(__COUNTER__, NAME, 2, 2, 2, R, A, B, B, EXPR)
#define OP3(NAME, R, A, B, C, EXPR) OP(__COUNTER__, NAME, 3, 2, 3, R, A, B, C, EXPR)
#define OP(N, ...) OP_(N, __VA_ARGS__)
#define OP_(N, NAME, INPUTS, SECOND, THIRD, R, A, B, C, EXPR) \
    static inline R CAT(f_, N)(A a, B b, C c) { return EXPR; } \
    RUN(N) { RESULT(R); IN(A, 1); const B *const x2 = lanes(w, operand(i, SECOND)); const C *const x3 = lanes(w, operand(i, THIRD)); \
             STORE(CAT(f_, N)(x1[l], x2[l], x3[l])) DEFINE(OK(1) & (INPUTS > 1 ? OK(2) : FULL_WARP) & (INPUTS > 2 ? OK(3) : FULL_WARP)); return 0; } \
    REGISTER(N, NAME, CAT(run_, N), LANES, 1, INPUTS, {sizeof(R), sizeof(A), sizeof(B), sizeof(C)})

// Comparisons, each the set of what is between the two values where it is true. A predicate's size is given as 1.
enum { LT = 1, EQ = 2, GT = 4, UNORDERED = 8 };
#define IS(SET, a, b) (((SET) & LT && (a) < (b)) | ((SET) & EQ && (a) == (b)) | ((SET) & GT && (a) > (b)) | ((SET) & UNORDERED && ((a) != (a) || (b) != (b))))
#define SETP(NAME, A, VALUE, SET) SETP_(__COUNTER__, NAME, A, VALUE, SET)
#define SETP_(N, NAME, A, VALUE, SET) \
    RUN(N) { RESULT(u32); IN(A, 1); IN(A, 2); STORE_BITS(IS(SET, VALUE(x1[l]), VALUE(x2[l]))) DEFINE(OK(1) & OK(2)); return 0; } \
    REGISTER(N, NAME, CAT(run_, N), LANES, 1, 2, {1, sizeof(A), sizeof(A)})
#define EQUAL(T, A, VALUE) SETP("setp.eq." T, A, VALUE, EQ) SETP("setp.ne." T, A, VALUE, LT | GT)
#define COMPARE(T, A, VALUE) EQUAL(T, A, VALUE) SETP("setp.lt." T, A, VALUE, LT) SETP("setp.le." T, A, VALUE, LT | EQ) \
    SETP("setp.gt." T, A, VALUE, GT) SETP("setp.ge." T, A, VALUE, GT | EQ)
#define COMPARE_FLOAT(T, A, VALUE) COMPARE(T, A, VALUE) SETP("setp.equ." T, A, VALUE, EQ | UNORDERED) SETP("setp.neu." T, A, VALUE, LT | GT | UNORDERED) \
    SETP("setp.ltu." T, A, VALUE, LT | UNORDERED) SETP("setp.leu." T, A, VALUE, LT | EQ | UNORDERED) SETP("setp.gtu." T, A, VALUE, GT | UNORDERED) \
    SETP("setp.geu." T, A, VALUE, GT | EQ | UNORDERED) SETP("setp.num." T, A, VALUE, LT | EQ | GT) SETP("setp.nan." T, A, VALUE, UNORDERED)
COMPARE("s16", i16, ) COMPARE("u16", u16, ) COMPARE("s32", i32, ) COMPARE("u32", u32, ) COMPARE("s64", i64, ) COMPARE("u64", u64, )
EQUAL("b16", u16, ) EQUAL("b32", u32, ) EQUAL("b64", u64, )
COMPARE_FLOAT("f32", f32, ) COMPARE_FLOAT("f64", f64, ) COMPARE_FLOAT("f16", u16, from_f16) COMPARE_FLOAT("bf16", u16, from_bf16)

// Both halves of a word compared: two predicates.
#define SETP_PAIR(NAME, VALUE) SETP_PAIR_(__COUNTER__, NAME, VALUE)
#define SETP_PAIR_(N, NAME, VALUE) \
    RUN(N) { const u32 ok = OK(2) & OK(3); IN(u32, 2); IN(u32, 3); \
        for (int half = 0; half < 2; half++) { \
            u32 *const r = word(w, i, half); \
            STORE_BITS(VALUE(x2[l] >> 16 * half) < VALUE(x3[l] >> 16 * half)) define(w, i, operand(i, half), mask, ok); } \
        return 0; } \
    REGISTER(N, NAME, CAT(run_, N), LANES, 2, 2, {1, 1, 4, 4})
SETP_PAIR("setp.lt.f16x2", from_f16) SETP_PAIR("setp.lt.bf16x2", from_bf16)

#define SELECT(NAME, A) SELECT_(__COUNTER__, NAME, A)
#define SELECT_(N, NAME, A) \
    RUN(N) { RESULT(A); IN(A, 1); IN(A, 2); const u32 p = *word(w, i, 3); STORE(p >> l & 1 ? x1[l] : x2[l]) \
             DEFINE(OK(3) & ((p & OK(1)) | (~p & OK(2)))); return 0; } \
    REGISTER(N, NAME, CAT(run_, N), LANES, 1, 3, {sizeof(A), sizeof(A), sizeof(A), 1})
#define MOVE(NAME, A) MOVE_(__COUNTER__, NAME, A)
#define MOVE_(N, NAME, A) \
    RUN(N) { RESULT(A); IN(A, 1); STORE(x1[l]) define_alike(w, i, operand(i, 0), operand(i, 1), mask); return 0; } \
    REGISTER(N, NAME, CAT(run_, N), LANES, 1, 1, {sizeof(A), sizeof(A)})
#define MOVE_AND_SELECT(T, A) MOVE("mov." T, A) SELECT("selp." T, A)
MOVE_AND_SELECT("b16", u16) MOVE_AND_SELECT("u16", u16) MOVE_AND_SELECT("s16", u16) MOVE_AND_SELECT("b32", u32) MOVE_AND_SELECT("u32", u32)
MOVE_AND_SELECT("s32", u32) MOVE_AND_SELECT("f32", u32) MOVE_AND_SELECT("b64", u64) MOVE_AND_SELECT("u64", u64) MOVE_AND_SELECT("s64", u64) MOVE_AND_SELECT("f64", u64)

#define PREDICATE(NAME, INPUTS, EXPR) PREDICATE_(__COUNTER__, NAME, INPUTS, EXPR)
#define PREDICATE_(N, NAME, INPUTS, EXPR) \
    RUN(N) { const u32 a = *word(w, i, 1), b = *word(w, i, INPUTS), bits = EXPR; RESULT(u32); (void)b; \
             *r = (*r & ~mask) | (bits & mask); DEFINE(OK(1) & OK(INPUTS)); return 0; } \
    REGISTER(N, NAME, CAT(run_, N), LANES, 1, INPUTS, {1, 1, 1})
PREDICATE("mov.pred", 1, a) PREDICATE("not.pred", 1, ~a) PREDICATE("and.pred", 2, a & b) PREDICATE("or.pred", 2, a | b) PREDICATE("xor.pred", 2, a ^ b)

#define BITWISE(T, A) OP2("and." T, A, A, A, a & b) OP2("or." T, A, A, A, a | b) OP2("xor." T, A, A, A, a ^ b) OP1("not." T, A, A, ~a) \
    OP2("shl." T, A, A, u32, b >= 8 * sizeof(A) ? 0 : a << b)
BITWISE("b16", u16) BITWISE("b32", u32) BITWISE("b64", u64)
#define SHIFT_RIGHT(BITS, U, S) OP2("shr.b" BITS, U, U, u32, b >= 8 * sizeof(U) ? 0 : a >> b) OP2("shr.u" BITS, U, U, u32, b >= 8 * sizeof(U) ? 0 : a >> b) \
    OP2("shr.s" BITS, S, S, u32, a >> (b >= 8 * sizeof(U) ? 8 * sizeof(U) - 1 : b))
SHIFT_RIGHT("16", u16, i16) SHIFT_RIGHT("32", u32, i32) SHIFT_RIGHT("64", u64, i64)

#define INTEGER(BITS, U, S, UWIDE, SWIDE) \
    OP2("add.s" BITS, U, U, U, a + b) OP2("add.u" BITS, U, U, U, a + b) OP2("sub.s" BITS, U, U, U, a - b) OP2("sub.u" BITS, U, U, U, a - b) \
    OP2("mul.lo.s" BITS, U, U, U, (u64)a * b) OP2("mul.lo.u" BITS, U, U, U, (u64)a * b) OP1("neg.s" BITS, U, U, -a) OP1("abs.s" BITS, S, S, a < 0 ? -(u64)a : (u64)a) \
    OP2("mul.hi.s" BITS, S, S, S, (SWIDE)a * b >> 8 * sizeof(S)) OP2("mul.hi.u" BITS, U, U, U, (UWIDE)a * b >> 8 * sizeof(U)) \
    OP3("mad.lo.s" BITS, U, U, U, U, (u64)a * b + c) OP3("mad.lo.u" BITS, U, U, U, U, (u64)a * b + c) \
    OP2("min.s" BITS, S, S, S, a < b ? a : b) OP2("min.u" BITS, U, U, U, a < b ? a : b) OP2("max.s" BITS, S, S, S, a > b ? a : b) \
    OP2("max.u" BITS, U, U, U, a > b ? a : b)
INTEGER("16", u16, i16, u32, i32) INTEGER("32", u32, i32, u64, i64) INTEGER("64", u64, i64, unsigned __int128, __int128)
#define WIDE(BITS, U, S, UWIDE, SWIDE) \
    OP2("mul.wide.s" BITS, SWIDE, S, S, (SWIDE)a * b) OP2("mul.wide.u" BITS, UWIDE, U, U, (UWIDE)a * b) \
    OP3("mad.wide.s" BITS, UWIDE, S, S, UWIDE, (UWIDE)((SWIDE)a * b) + c) OP3("mad.wide.u" BITS, UWIDE, U, U, UWIDE, (UWIDE)a * b + c)
WIDE("16", u16, i16, u32, i32) WIDE("32", u32, i32, u64, i64)

// A division by zero gives what hardware gives for unsigned numbers, all ones; PTX leaves it open.
#define DIVIDE(BITS, U, S) OP2("div.u" BITS, U, U, U, b ? a / b : (U)-1) OP2("rem.u" BITS, U, U, U, b ? a % b : a) \
    OP2("div.s" BITS, S, S, S, b == 0 ? -1 : b == -1 ? (S)(0 - (U)a) : a / b) OP2("rem.s" BITS, S, S, S, b == 0 || b == -1 ? 0 : a % b)
DIVIDE("16", u16, i16) DIVIDE("32", u32, i32) DIVIDE("64", u64, i64)

static inline u64 low_bits(u32 n) { return n >= 64 ? ~0ull : (1ull << n) - 1; }
static inline i64 extract_signed(i64 v, u32 position, u32 length, u32 width) {
    const u32 end = position + length > width ? width : position + length;
    if (!length) return 0;
    return position >= width ? v >> 63 : (i64)((u64)v << (64 - end)) >> (64 - end + position);
}
OP3("bfe.u32", u32, u32, u32, u32, (b & 255) >= 32 ? 0 : (a >> (b & 255)) & low_bits(c & 255))
OP3("bfe.u64", u64, u64, u32, u32, (b & 255) >= 64 ? 0 : (a >> (b & 255)) & low_bits(c & 255))
OP3("bfe.s32", i32, i32, u32, u32, extract_signed(a, b & 255, c & 255, 32)) OP3("bfe.s64", i64, i64, u32, u32, extract_signed(a, b & 255, c & 255, 64))
OP1("popc.b32", u32, u32, __builtin_popcount(a)) OP1("clz.b32", u32, u32, a ? __builtin_clz(a) : 32)
OP3("shf.l.wrap.b32", u32, u32, u32, u32, (((u64)b << 32 | a) << (c & 31)) >> 32) OP3("shf.r.wrap.b32", u32, u32, u32, u32, ((u64)b << 32 | a) >> (c & 31))
static inline u32 permute(u32 a, u32 b, u32 selector) {
    const u64 bytes = (u64)b << 32 | a;
    u32 result = 0;
    for (int k = 0; k < 4; k++) {
        const u32 s = selector >> 4 * k, byte = bytes >> 8 * (s & 7) & 255;
        result |= (s & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * k;
    }
    return result;
}
// LLVM packs truth values as bytes, and leaves undefined those that it does not take out again.
PROPAGATING("prmt.b32 4 = 4 4 4", LANES) {
    RESULT(u32); IN(u32, 1); IN(u32, 2); IN(u32, 3);
    const u32 selector = x3[first_lane(mask)], both = OK(3) & OK(1) & OK(2);
    u32 differ = 0, ok[4];
    EACH(l, mask) differ |= x3[l] ^ selector;
    for (int k = 0; k < 4; k++) {
        const u32 s = selector >> 4 * k & 7;
        ok[k] = differ ? both : OK(3) & part_defined(w, i, operand(i, 1 + s / 4), mask, s % 4, 4);
    }
    STORE(permute(x1[l], x2[l], x3[l]))
    define_parts(w, i, operand(i, 0), mask, 4, ok);
    return 0;
}

#define CONVERT(TO, R, FROM, A) OP1("cvt." TO "." FROM, R, A, a)
#define CONVERT_INTEGERS(FROM, A) CONVERT("u16", u16, FROM, A) CONVERT("s16", i16, FROM, A) CONVERT("u32", u32, FROM, A) CONVERT("s32", i32, FROM, A) \
    CONVERT("u64", u64, FROM, A) CONVERT("s64", i64, FROM, A) \
    OP1("cvt.rn.f32." FROM, f32, A, (f32)a) OP1("cvt.rn.f64." FROM, f64, A, (f64)a)
CONVERT_INTEGERS("u16", u16) CONVERT_INTEGERS("s16", i16) CONVERT_INTEGERS("u32", u32) CONVERT_INTEGERS("s32", i32) CONVERT_INTEGERS("u64", u64) CONVERT_INTEGERS("s64", i64)
// Of a register the low part.
OP1("cvt.s64.s32", i64, u64, (i32)a) OP1("cvt.u64.u32", u64, u64, (u32)a) OP1("cvt.u32.u16", u32, u32, (u16)a) OP1("cvt.s32.s16", i32, u32, (i16)a)
OP1("cvt.s16.s8", i16, i16, (i8)a) OP1("cvt.u16.u8", u16, u16, (u8)a) OP1("cvt.s32.s8", i32, u32, (i8)a)
OP1("cvt.f32.bf16", f32, u16, from_bf16(a)) OP1("cvt.f32.f16", f32, u16, from_f16(a)) OP1("cvt.f64.f32", f64, f32, a) OP1("cvt.rn.f32.f64", f32, f64, (f32)a)
OP1("cvt.rn.bf16.f32", u16, f32, to_bf16(a)) OP1("cvt.rn.f16.f32", u16, f32, to_f16(a))
OP2("cvt.rn.bf16x2.f32", u32, f32, f32, (u32)to_bf16(a) << 16 | to_bf16(b)) OP2("cvt.rn.f16x2.f32", u32, f32, f32, (u32)to_f16(a) << 16 | to_f16(b))
OP1("cvt.rna.tf32.f32", u32, u32, (a & 0x7fffffff) < 0x7f800000 ? (a + 0x1000) & 0xffffe000u : a)
OP1("cvt.rn.tf32.f32", u32, u32, (a & 0x7fffffff) < 0x7f800000 ? (a + 0xfff + (a >> 13 & 1)) & 0xffffe000u : a)
OP1("cvt.rni.f32.f32", f32, f32, rintf(a)) OP1("cvt.rmi.f32.f32", f32, f32, floorf(a)) OP1("cvt.rpi.f32.f32", f32, f32, ceilf(a)) OP1("cvt.rzi.f32.f32", f32, f32, truncf(a))
static inline i32 to_i32(f64 x) { return x != x ? 0 : x < -0x1p31 ? INT32_MIN : x >= 0x1p31 ? INT32_MAX : (i32)x; }
OP1("cvt.rzi.s32.f32", i32, f32, to_i32(a)) OP1("cvt.rni.s32.f32", i32, f32, to_i32(rintf(a)))

#define FLOAT(T, A, FMA, ABS, MIN, MAX) \
    OP2("add." T, A, A, A, a + b) OP2("sub." T, A, A, A, a - b) OP2("mul." T, A, A, A, a * b) OP2("add.rn." T, A, A, A, a + b) OP2("sub.rn." T, A, A, A, a - b) \
    OP2("mul.rn." T, A, A, A, a * b) OP3("fma.rn." T, A, A, A, A, FMA(a, b, c)) OP2("div.rn." T, A, A, A, a / b) OP1("neg." T, A, A, -a) OP1("abs." T, A, A, ABS(a)) \
    OP2("min." T, A, A, A, MIN(a, b)) OP2("max." T, A, A, A, MAX(a, b)) OP1("rcp.rn." T, A, A, 1 / a)
FLOAT("f32", f32, fmaf, fabsf, fminf, fmaxf) FLOAT("f64", f64, fma, fabs, fmin, fmax)
OP2("max.NaN.f32", f32, f32, f32, a != a || b != b ? NAN : fmaxf(a, b)) OP2("min.NaN.f32", f32, f32, f32, a != a || b != b ? NAN : fminf(a, b))
OP3("max.f32", f32, f32, f32, f32, fmaxf(fmaxf(a, b), c)) OP3("min.f32", f32, f32, f32, f32, fminf(fminf(a, b), c))
OP3("max.NaN.f32", f32, f32, f32, f32, a != a || b != b || c != c ? NAN : fmaxf(fmaxf(a, b), c))
// .ftz: subnormal operands and results are zeros of their sign.
#define FTZ(x) (fabsf(x) < 0x1p-126f ? copysignf(0, x) : (x))
OP2("div.full.f32", f32, f32, f32, a / b) OP2("div.approx.f32", f32, f32, f32, a / b) OP1("rcp.approx.f32", f32, f32, 1 / a) OP1("rcp.approx.ftz.f32", f32, f32, FTZ(1 / FTZ(a)))
OP3("fma.rn.ftz.f32", f32, f32, f32, f32, FTZ(fmaf(FTZ(a), FTZ(b), FTZ(c)))) OP2("mul.rn.ftz.f32", f32, f32, f32, FTZ(FTZ(a) * FTZ(b)))
OP1("sqrt.rn.f64", f64, f64, sqrt(a)) OP1("sqrt.approx.f32", f32, f32, sqrtf(a)) OP1("sqrt.approx.ftz.f32", f32, f32, FTZ(sqrtf(FTZ(a))))
OP1("rsqrt.approx.ftz.f32", f32, f32, FTZ((f32)(1 / sqrt(FTZ(a))))) OP1("rcp.approx.ftz.f64", f64, f64, 1 / a)
OP1("ex2.approx.f32", f32, f32, (f32)exp2(a)) OP1("ex2.approx.ftz.f32", f32, f32, FTZ((f32)exp2(FTZ(a)))) OP1("lg2.approx.f32", f32, f32, (f32)log2(a)) OP1("tanh.approx.f32", f32, f32, (f32)tanh(a))
OP1("sqrt.rn.f32", f32, f32, sqrtf(a)) OP1("rsqrt.approx.f32", f32, f32, (f32)(1 / sqrt(a)))
OP1("abs.ftz.f32", f32, f32, fabsf(FTZ(a)))
OP2("add.rn.f32.bf16", f32, u16, f32, from_bf16(a) + b) OP2("add.rn.f32.f16", f32, u16, f32, from_f16(a) + b) OP2("add.f32.bf16", f32, u16, f32, from_bf16(a) + b)
OP2("add.f32.f16", f32, u16, f32, from_f16(a) + b) OP2("sub.f32.bf16", f32, u16, f32, from_bf16(a) - b) OP2("sub.f32.f16", f32, u16, f32, from_f16(a) - b)
OP3("fma.rn.f32.bf16", f32, u16, u16, f32, fmaf(from_bf16(a), from_bf16(b), c)) OP3("fma.rn.f32.f16", f32, u16, u16, f32, fmaf(from_f16(a), from_f16(b), c))
OP2("sub.rn.f32.bf16", f32, u16, f32, from_bf16(a) - b) OP2("sub.rn.f32.f16", f32, u16, f32, from_f16(a) - b)
// A fused product and sum in float32 to odd: towards zero, with a last bit that says whether anything is lost. To round that again is
// to round once.
static f32 fma_to_odd(f32 a, f32 b, f32 c) {
    const f64 product = (f64)a * b, sum = product + c, part = sum - product, lost = (product - (sum - part)) + (c - part);
    const f32 nearest = (f32)sum;
    const f64 rest = (sum - nearest) + lost;
    if (rest == 0 || rest != rest) return nearest;
    return as_f32((bits_f32(nearest) - (nearest != 0 && (rest < 0) != (nearest < 0))) | 1);
}
OP3("fma.rn.bf16", u16, u16, u16, u16, to_bf16(fma_to_odd(from_bf16(a), from_bf16(b), from_bf16(c))))
OP3("fma.rn.f16", u16, u16, u16, u16, to_f16(fma_to_odd(from_f16(a), from_f16(b), from_f16(c))))
OP1("abs.f16", u16, u16, a & 0x7fff) OP1("abs.bf16", u16, u16, a & 0x7fff) OP1("neg.f16", u16, u16, a ^ 0x8000) OP1("neg.bf16", u16, u16, a ^ 0x8000)
OP2("add.bf16", u16, u16, u16, to_bf16(from_bf16(a) + from_bf16(b))) OP2("add.f16", u16, u16, u16, to_f16(from_f16(a) + from_f16(b)))

// Two numbers in a register of 64 bits, of which one alone may be defined.
typedef struct { f32 half[2]; } f32x2;
#define PAIRS(NAME, INPUTS, EXPR) PAIRS_(__COUNTER__, NAME, INPUTS, EXPR)
#define PAIRS_(N, NAME, INPUTS, EXPR) \
    RUN(N) { RESULT(f32x2); IN(f32x2, 1); IN(f32x2, 2); const f32x2 *const x3 = lanes(w, operand(i, INPUTS)); \
        u32 ok[2] = {FULL_WARP, FULL_WARP}; \
        for (int h = 0; h < 2; h++) { \
            for (int k = 1; k <= INPUTS; k++) ok[h] &= part_defined(w, i, operand(i, k), mask, h, 2); \
            for (int l = 0; l < 32; l++) { const f32 a = x1[l].half[h], b = x2[l].half[h], c = x3[l].half[h]; (void)c; \
                r[l].half[h] = mask >> l & 1 ? EXPR : r[l].half[h]; } } \
        define_parts(w, i, operand(i, 0), mask, 2, ok); return 0; } \
    REGISTER(N, NAME, CAT(run_, N), LANES, 1, INPUTS, {8, 8, 8, 8})
PAIRS("add.f32x2", 2, a + b) PAIRS("sub.f32x2", 2, a - b) PAIRS("mul.f32x2", 2, a * b)
PAIRS("add.rn.f32x2", 2, a + b) PAIRS("mul.rn.f32x2", 2, a * b) PAIRS("fma.rn.f32x2", 3, fmaf(a, b, c))
