"""What every grouped GEMM shares: which tile a program works on, and how one operand block is loaded.

Device functions use: ``pid`` program index, ``BLOCK_M/N/K`` tile sizes, ``rows``/``cols`` index vectors.
"""

import triton
import triton.language as tl


@triton.jit
def swizzled_tile(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """Tile (m, n) of linear index ``pid``: GROUP_M row tiles walk all columns together, so weights stay in L2."""
    width = GROUP_M * num_n
    first_m = pid // width * GROUP_M
    size_m = tl.minimum(num_m - first_m, GROUP_M)
    in_group = pid % width
    return first_m + in_group % size_m, in_group // size_m


@triton.jit
def row_tile(m, tile_expert_ptr, tile_row_ptr, expert_start_ptr, BLOCK_M: tl.constexpr):
    """(expert, first row, rows (BLOCK_M,), their mask) of row tile ``m`` of the plan."""
    expert = tl.load(tile_expert_ptr + m)
    row0 = tl.load(tile_row_ptr + m)
    row_end = tl.load(expert_start_ptr + expert + 1)
    rows = row0 + tl.arange(0, BLOCK_M)
    return expert, row0, rows, rows < row_end


@triton.jit
def gathered_tokens(row_slot_ptr, rows, row_mask, TOP_K: tl.constexpr):
    """(slot, token as int64) of sorted rows. Masked rows read slot 0: a valid token whose result is never stored."""
    slot = tl.load(row_slot_ptr + rows, mask=row_mask, other=0)
    return slot, (slot // TOP_K).to(tl.int64)


@triton.jit
def load_weight_nk(w, expert, n0, k0, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, USE_TMA: tl.constexpr):
    """Block [BLOCK_N, BLOCK_K] at (n0, k0) of w[expert], stored (E, N, K); zero outside."""
    if USE_TMA:
        block = w.load([expert, n0, k0]).reshape(BLOCK_N, BLOCK_K)
    else:
        n = n0 + tl.arange(0, BLOCK_N)
        k = k0 + tl.arange(0, BLOCK_K)
        base = w + expert.to(tl.int64) * N * K
        offsets = n.to(tl.int64)[:, None] * K + k[None, :]
        block = tl.load(base + offsets, mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
    return block


@triton.jit
def load_weight_kn(w, expert, k0, n0, K, N, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, USE_TMA: tl.constexpr):
    """Block [BLOCK_K, BLOCK_N] at (k0, n0) of w[expert], stored (E, K, N); zero outside."""
    return load_weight_nk(w, expert, k0, n0, K, N, BLOCK_K, BLOCK_N, USE_TMA)


@triton.jit
def load_rows(
    base, token_or_row, row_mask, k0, K, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, MASK_ROWS: tl.constexpr
):
    """Block [rows, BLOCK_K] at column k0 of a (., K) tensor by pointers; zero outside.

    MASK_ROWS False reads masked rows too: right where the caller gave them a valid row and drops their result.
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
    """Store values [rows, BLOCK_N] at column col0 of a (., width) tensor; only the first col_limit columns."""
    n = tl.arange(0, BLOCK_N)
    pointers = base + rows.to(tl.int64)[:, None] * width + (col0 + n)[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=row_mask[:, None] & (n < col_limit)[None, :])
