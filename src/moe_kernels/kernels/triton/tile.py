"""What every grouped GEMM shares: which tile a program works on, and how one operand block is loaded.

Device functions use: ``pid`` program index, ``BLOCK_M/N/K`` tile sizes, ``rows``/``cols`` index vectors.
"""

import triton
import triton.language as tl


@triton.jit
def swizzled_tile(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """Tile (m, n) of linear index ``pid``. GROUP_M row tiles are visited for each block of columns, so that the
    weights of that block are read from L2."""
    width = GROUP_M * num_n
    first_m = pid // width * GROUP_M
    size_m = tl.minimum(num_m - first_m, GROUP_M)
    in_group = pid % width
    return first_m + in_group % size_m, in_group // size_m


@triton.jit
def row_tile(m, tile_expert_ptr, tile_row_ptr, expert_start_ptr, BLOCK_M: tl.constexpr):
    """(expert, first row, rows (BLOCK_M,), mask of the expert's own rows) of row tile ``m`` of the plan."""
    expert = tl.load(tile_expert_ptr + m)
    row0 = tl.load(tile_row_ptr + m)
    row_end = tl.load(expert_start_ptr + expert + 1)
    rows = row0 + tl.arange(0, BLOCK_M)
    return expert, row0, rows, rows < row_end


@triton.jit
def gathered_tokens(row_slot_ptr, rows, row_mask, TOP_K: tl.constexpr):
    """(slot, token as int64) of sorted rows. Masked rows read slot 0: a valid token, whose result is never stored."""
    slot = tl.load(row_slot_ptr + rows, mask=row_mask, other=0)
    return slot, (slot // TOP_K).to(tl.int64)


@triton.jit
def load_weight(
    w,
    expert,
    n0,
    k0,
    N,
    K,
    STRIDE,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    W_IS_KN: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Block [BLOCK_K, BLOCK_N] at (k0, n0) of w[expert], stored (E, N, K), or (E, K, N) if W_IS_KN; zero outside.

    STRIDE: elements from the start of one expert's matrix to the start of the next.
    """
    if W_IS_KN:
        block = _load_matrix(w, expert, k0, n0, K, N, STRIDE, BLOCK_K, BLOCK_N, USE_TMA)
    else:
        block = _load_matrix(w, expert, n0, k0, N, K, STRIDE, BLOCK_N, BLOCK_K, USE_TMA).T
    return block


@triton.jit
def _load_matrix(
    w, expert, row0, col0, ROWS, COLS, STRIDE, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, USE_TMA: tl.constexpr
):
    """Block [BLOCK_R, BLOCK_C] at (row0, col0) of the matrix w[expert], stored (E, ROWS, COLS); zero outside."""
    if USE_TMA:
        block = w.load([expert, row0, col0]).reshape(BLOCK_R, BLOCK_C)
    else:
        r = row0 + tl.arange(0, BLOCK_R)
        c = col0 + tl.arange(0, BLOCK_C)
        base = w + expert.to(tl.int64) * STRIDE
        offsets = r.to(tl.int64)[:, None] * COLS + c[None, :]
        block = tl.load(base + offsets, mask=(r < ROWS)[:, None] & (c < COLS)[None, :], other=0.0)
    return block


@triton.jit
def multiply_add(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b.

    Exact float32 products run on the CUDA cores. One accumulator for all of K would have several times the rounding
    error of torch.mm, which splits the sum. So each k block is summed separately and then added. The two minus signs
    keep the compiler from fusing the block's sum and the total into one accumulator again.
    """
    if PRECISION == "ieee" and a.dtype == tl.float32:
        result = total - tl.dot(-a, b, input_precision=PRECISION)
    else:
        result = tl.dot(a, b, total, input_precision=PRECISION)
    return result


@triton.jit
def add_low_rank(
    total,
    low_ptr,  # (R, RANK)
    factor_ptr,  # (E, N, RANK), or (E, RANK, N) if IS_KN
    expert,
    rows,
    row_mask,
    n0,
    N,
    RANK: tl.constexpr,
    IS_KN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """total [rows, BLOCK_N] + low[rows] @ factor[expert] at column n0: the low-rank part of a weight."""
    r = tl.arange(0, RANK)
    low_rows = rows.to(tl.int64)[:, None] * RANK
    low = tl.load(low_ptr + low_rows + r[None, :], mask=row_mask[:, None], other=0.0)
    factor = load_weight(factor_ptr, expert, n0, 0, N, RANK, N * RANK, BLOCK_N, RANK, IS_KN, False)
    return tl.dot(low, factor, total, input_precision=PRECISION)


@triton.jit
def add_bias(total, bias_ptr, expert, n0, N, BLOCK_N: tl.constexpr):
    """total [rows, BLOCK_N] + bias (E, N)[expert] at column n0."""
    n = n0 + tl.arange(0, BLOCK_N)
    bias = tl.load(bias_ptr + expert.to(tl.int64) * N + n, mask=n < N, other=0.0)
    return total + bias.to(tl.float32)[None, :]


@triton.jit
def load_rows(
    base, token_or_row, row_mask, k0, K, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, MASK_ROWS: tl.constexpr
):
    """Block [rows, BLOCK_K] at column k0 of a (., K) tensor by pointers; zero outside.

    MASK_ROWS False also reads masked rows. The caller must give them valid row numbers and drop their results.
    """
    k = k0 + tl.arange(0, BLOCK_K)
    pointers = base + token_or_row[:, None] * K + k[None, :]
    if MASK_ROWS:
        if EVEN_K:
            block = tl.load(pointers, mask=row_mask[:, None], other=0.0)
        else:
            block = tl.load(pointers, mask=row_mask[:, None] & (k < K)[None, :], other=0.0)
    elif EVEN_K:
        block = tl.load(pointers)
    else:
        block = tl.load(pointers, mask=(k < K)[None, :], other=0.0)
    return block


@triton.jit
def store_tile(base, rows, row_mask, col0, width, values, BLOCK_N: tl.constexpr, col_limit):
    """Store the first col_limit columns of values [rows, BLOCK_N] to column col0 of a (., width) tensor."""
    n = tl.arange(0, BLOCK_N)
    pointers = base + rows.to(tl.int64)[:, None] * width + (col0 + n)[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=row_mask[:, None] & (n < col_limit)[None, :])
