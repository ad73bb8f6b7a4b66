"""The epilogue of the GEMMs of rows, in 16 bits and in fp8: bias, Z and its activation, and their stores by TMA."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from moe_kernels.activation import value
from moe_kernels.kernels.hopper.gluon_names import aggregate, tma_store
from moe_kernels.kernels.hopper.ring import CHUNK, Matrix, accumulator_layout, halves, pairs, put, write_chunk


@aggregate
class Epilogue:
    """What is written of a tile: its sums and a bias, or those as Z, with SAVE_Z, and the activation of them."""

    z: Matrix
    out: Matrix
    bias: gl.tensor  # (E, width of the sums): read if HAS_BIAS
    ACTIVATION: gl.constexpr  # "identity": the sums are what is written
    P0: gl.constexpr
    P1: gl.constexpr
    SAVE_Z: gl.constexpr
    INTERLEAVED: gl.constexpr  # the sums are [g0, u0, g1, u1, ...]
    HAS_BIAS: gl.constexpr

    @gluon.jit
    def biased(self, values, expert, col0, width):
        """values [rows, columns] of the sums' columns from col0 on, plus the bias."""
        if self.HAS_BIAS:
            layout: gl.constexpr = accumulator_layout(values.shape[1])
            values = gl.convert_layout(values, layout, assert_trivial=True)
            cols = col0 + gl.arange(0, values.shape[1], gl.SliceLayout(0, layout))
            bias = gl.load(self.bias + expert.to(gl.int64) * width + cols, mask=cols < width, other=0.0)
            values += bias.to(gl.float32)[None, :]
        return values

    @gluon.jit
    def activated(self, gate, up):
        """The activation, rounded."""
        return value(gate, up, self.ACTIVATION, self.P0, self.P1).to(self.out.descriptor.dtype)


@gluon.jit
def write_tile(left, right, buffers, epilogue, tile, row0, GATED: gl.constexpr):
    """The epilogue of a consumer's half tile from row0 on, whose sums are ``left`` and ``right`` [rows, columns].

    GATED: these are the sums of gate and of up; else those of neighbouring columns.
    """
    HALF: gl.constexpr = left.shape[1]
    expert, row_end = tile.expert, tile.row_end
    if epilogue.INTERLEAVED:
        _write_interleaved(left, right, buffers, epilogue, expert, row0, row_end, tile.n * HALF)
    elif GATED:
        _write_gated(left, right, buffers, epilogue, expert, row0, row_end, tile.n * HALF)
    elif epilogue.ACTIVATION == "identity":
        _write(left, right, buffers, epilogue, expert, row0, row_end, tile.n * (2 * HALF))
    else:
        col0 = tile.n * (2 * HALF)
        _write_ungated(left, buffers, epilogue, expert, row0, row_end, col0)
        _write_ungated(right, buffers, epilogue, expert, row0, row_end, col0 + HALF)


@gluon.jit
def _write(left, right, buffers, epilogue, expert, row0, row_end, col0):
    """Store two blocks of columns to (row0, col0); only rows < row_end and columns inside."""
    out = epilogue.out
    HALF: gl.constexpr = left.shape[1]
    tma.store_wait(0)  # the stores of the tile before are done: both buffers are free
    if HALF == CHUNK:
        left = epilogue.biased(left, expert, col0, out.width)
        _write_chunk(left, buffers.index(0), out, row0, row_end, col0)
        right = epilogue.biased(right, expert, col0 + HALF, out.width)
        _write_chunk(right, buffers.index(1), out, row0, row_end, col0 + HALF)
    else:
        left0, left1 = halves(left)
        right0, right1 = halves(right)
        left0 = epilogue.biased(left0, expert, col0, out.width)
        _write_chunk(left0, buffers.index(0), out, row0, row_end, col0)
        left1 = epilogue.biased(left1, expert, col0 + CHUNK, out.width)
        _write_chunk(left1, buffers.index(1), out, row0, row_end, col0 + CHUNK)
        right0 = epilogue.biased(right0, expert, col0 + HALF, out.width)
        _write_chunk(right0, buffers.index(0), out, row0, row_end, col0 + HALF)
        right1 = epilogue.biased(right1, expert, col0 + HALF + CHUNK, out.width)
        _write_chunk(right1, buffers.index(1), out, row0, row_end, col0 + HALF + CHUNK)


@gluon.jit
def _write_chunk(values, buffer, out, row0, row_end, col0):
    """The same for values [rows, CHUNK]."""
    if col0 >= out.width:  # widths are multiples of CHUNK, so a chunk is inside or outside as a whole
        tma.store_wait(0)
    elif row0 + values.shape[0] <= row_end:
        write_chunk(values, buffer, out.descriptor, row0, col0)
    else:
        # A partial tile: its rows from row_end on belong to the next expert.
        tma.store_wait(0)
        put(values, buffer)
        out.store_masked(buffer, row0, row_end, col0)


@gluon.jit
def _write_gated(gate, up, buffers, epilogue, expert, row0, row_end, col0):
    """Store gate and up [rows, two chunks], with SAVE_Z, and their activation.

    Two chunks share a fence, and the activation is computed while the stores before are in flight.
    """
    z, out = epilogue.z, epilogue.out
    N = out.width
    gate0, gate1 = halves(gate)
    up0, up1 = halves(up)
    gate0 = epilogue.biased(gate0, expert, col0, 2 * N)
    gate1 = epilogue.biased(gate1, expert, col0 + CHUNK, 2 * N)
    if epilogue.SAVE_Z:
        _write_pair(gate0, gate1, buffers, z, row0, row_end, col0, N)
    up0 = epilogue.biased(up0, expert, N + col0, 2 * N)
    up1 = epilogue.biased(up1, expert, N + col0 + CHUNK, 2 * N)
    a0 = epilogue.activated(gate0, up0)
    if epilogue.SAVE_Z:
        _write_pair(up0, up1, buffers, z, row0, row_end, N + col0, 2 * N)
    a1 = epilogue.activated(gate1, up1)
    _write_pair(a0, a1, buffers, out, row0, row_end, col0, N)


@gluon.jit
def _write_ungated(sums, buffers, epilogue, expert, row0, row_end, col0):
    """Store sums [rows, two chunks] of experts without a gate, with SAVE_Z, and their activation."""
    N = epilogue.out.width
    left, right = halves(sums)
    left = epilogue.biased(left, expert, col0, N)
    right = epilogue.biased(right, expert, col0 + CHUNK, N)
    if epilogue.SAVE_Z:
        _write_pair(left, right, buffers, epilogue.z, row0, row_end, col0, N)
    a_left, a_right = epilogue.activated(left, 1.0), epilogue.activated(right, 1.0)
    _write_pair(a_left, a_right, buffers, epilogue.out, row0, row_end, col0, N)


@gluon.jit
def _write_interleaved(left, right, buffers, epilogue, expert, row0, row_end, col0):
    """Store neighbouring blocks of pairs of gate and up columns, with SAVE_Z, and their activation."""
    z, N = epilogue.z, epilogue.out.width
    left = epilogue.biased(left, expert, 2 * col0, 2 * N)
    if epilogue.SAVE_Z:
        z0, z1 = halves(left)
        _write_pair(z0, z1, buffers, z, row0, row_end, 2 * col0, 2 * N)
    gate, up = pairs(left)
    a0 = epilogue.activated(gate, up)
    right = epilogue.biased(right, expert, 2 * (col0 + CHUNK), 2 * N)
    if epilogue.SAVE_Z:
        z2, z3 = halves(right)
        _write_pair(z2, z3, buffers, z, row0, row_end, 2 * (col0 + CHUNK), 2 * N)
    gate, up = pairs(right)
    a1 = epilogue.activated(gate, up)
    tma.store_wait(0)
    buffers.index(0).store(a0)
    buffers.index(1).store(a1)
    _send_pair(buffers, epilogue.out, row0, row_end, col0, N)


@gluon.jit
def _write_pair(left, right, buffers, out, row0, row_end, col0, col_end):
    """Store two neighbouring chunks to (row0, col0) of ``out``; only rows < row_end and columns < col_end."""
    tma.store_wait(0)
    put(left, buffers.index(0))
    put(right, buffers.index(1))
    _send_pair(buffers, out, row0, row_end, col0, col_end)


@gluon.jit
def _send_pair(buffers, out, row0, row_end, col0, col_end):
    """The same for what is in ``buffers``."""
    if col0 < col_end:
        two = col0 + CHUNK < col_end
        if row0 + buffers.shape[1] <= row_end:
            fence_async_shared()
            tma_store(out.descriptor, [row0, col0], buffers.index(0))
            if two:
                tma_store(out.descriptor, [row0, col0 + CHUNK], buffers.index(1))
        else:
            out.store_masked(buffers.index(0), row0, row_end, col0)
            if two:
                out.store_masked(buffers.index(1), row0, row_end, col0 + CHUNK)
