"""Tuned tiles: which line of a table serves which GEMM, what is read, what is refused, and how lines come about."""

import dataclasses
import functools
import itertools
import json
import logging

import pytest
import torch
import triton
from typer.testing import CliRunner

import moe_kernels
from moe_kernels.backends.triton import TritonBackend
from moe_kernels.kernels.tiles import config, tuned
from moe_kernels.kernels.tiles.config import select_config, use_config
from moe_kernels.kernels.tiles.table import GemmConfig, table
from moe_kernels.kernels.triton import grouped_gemm, up, wgrad
from moe_kernels.shapes import LAYERS, LayerShape
from moe_kernels.tools.app import app
from moe_kernels.tools.bench import tiles, tune
from moe_kernels.tools.check.problems import Case, make_inputs, run
from moe_kernels.tools.common import machine

CPU = torch.device("cpu")
SHAPE = LayerShape("tiny", 48, 64, 48, 4, 2)
SIZES = tiles.sizes_of("down", SHAPE)
TILE = GemmConfig(64, 32, 64, 4, 2)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty cache."""
    monkeypatch.setenv(tuned.CACHE_VARIABLE, str(tmp_path / "cache"))
    config.forget_tuned_tiles()
    yield tuned.cache_file(CPU)
    monkeypatch.undo()
    config.forget_tuned_tiles()


def entry(kernel="down", group_size=64, loads="tma", sizes=SIZES, tile=TILE, **changes):
    key = tuned.Key(kernel, group_size, loads, tuned.bucket(sizes))
    return {**key._asdict(), **dataclasses.asdict(tile), **changes}


def write(file, *entries, **changes):
    header = {"device": "cpu", "capability": [0, 0], "triton": triton.__version__} | changes
    tune.write(file, header, list(entries))
    config.forget_tuned_tiles()


def select(kernel="down", dtype=torch.bfloat16, group_size=64, tma=True, sizes=SIZES):
    return select_config(kernel, CPU, dtype, group_size, tma, sizes)


def default(kernel="down", dtype=torch.bfloat16, group_size=64, tma=True):
    return table(None, dtype, tma)[kernel, group_size]


def test_a_tuned_tile_serves_its_bucket_alone(cache):
    assert select() == default() != TILE
    write(cache, entry())
    assert select() == TILE
    assert select(dtype=torch.float16) == TILE
    same, other = SIZES._replace(width=SIZES.width + 16), SIZES._replace(width=4096)
    assert tuned.bucket(same) == tuned.bucket(SIZES) != tuned.bucket(other)
    assert select(sizes=same) == TILE
    for missed in ({"sizes": other}, {"sizes": None}, {"kernel": "up"}, {"group_size": 128}, {"tma": False},
                   {"dtype": torch.float32}):  # fmt: skip
        assert select(**missed) == default(**{k: v for k, v in missed.items() if k != "sizes"}), missed


def test_measuring_comes_before_the_table(cache):
    write(cache, entry())
    measured = dataclasses.replace(TILE, block_n=128)
    with use_config("down", measured):
        assert select() == measured
        with use_config("down", TILE), use_config("up", measured):
            assert (select(), select("up")) == (TILE, measured)
        assert (select(), select("up")) == (measured, default("up"))
    assert select() == TILE


def test_files_are_read_once(cache, monkeypatch):
    write(cache, entry())
    reads = []
    real = tuned.read
    monkeypatch.setattr(tuned, "read", lambda file: reads.append(file) or real(file))
    for rows in range(100):
        select(sizes=SIZES._replace(rows_per_expert=rows))
    assert reads == [cache]


def test_tiles_of_another_compiler_are_not_used(cache, caplog):
    write(cache, entry(), triton="1.0")
    with caplog.at_level(logging.WARNING, "moe_kernels"):
        assert select() == default()
    assert "verified with triton 1.0" in caplog.text
    assert "moe-kernels tune" in caplog.text


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[:50], "cannot be read"),
        (lambda text: "[" * 100_000, "cannot be read"),
        (lambda text: text.replace('"kind": "tiles"', '"kind": "bench"'), "holds no tuned tiles of this version"),
        (lambda text: text.replace('"schema": 1', '"schema": 0'), "holds no tuned tiles of this version"),
        (lambda text: text.replace('"capability"', '"skill"'), "lacks capability"),
        (lambda text: text.replace('"block_n": 32', '"block_n": 64'), "was changed after its tiles were verified"),
    ],
)
def test_a_damaged_file_is_refused(cache, spoil, message):
    write(cache, entry())
    text = cache.read_text()
    assert spoil(text) != text
    cache.write_text(spoil(text))
    config.forget_tuned_tiles()
    with pytest.raises(tuned.TunedTilesError, match=f"(?s){message}.*Remove the file, or write it again"):
        select()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": "sideways"}, "no such kernel"),
        ({"group_size": 96}, "no such group size"),
        ({"kernel": "wgrad"}, "no such group size"),
        ({"block_m": 128}, "block_m=128 is not the group size"),
        ({"block_n": 48}, "block_n=48 is no power of two from 16 to 512"),
        ({"block_k": 512}, "block_k=512 is no power of two from 16 to 256"),
        ({"num_warps": "4"}, "num_warps='4' is no power of two"),
        ({"num_stages": 0}, "num_stages=0 is not from 1 to 8"),
        ({"num_stages": True}, "num_stages=True is not from 1 to 8"),
        ({"programs_per_sm": 9}, "programs_per_sm=9 is not from 1 to 4"),
        ({"flatten": 1}, "flatten=1 is no truth value"),
    ],
    ids=str,
)
def test_a_tile_that_cannot_be_is_refused(cache, changes, message):
    write(cache, entry(**changes))
    with pytest.raises(tuned.TunedTilesError, match=message):
        select()
    lacking = entry()
    del lacking["num_warps"]
    assert tuned.why_invalid(lacking) == "an entry lacks num_warps"
    assert tuned.why_invalid(entry()) is None


def test_every_measured_layer_has_a_bucket_for_each_gemm():
    for shape, call in itertools.product(LAYERS.values(), tiles.CALLS):
        assert tuned.bucket(tiles.sizes_of(call, shape)).count(",") == 2
    few = tiles.sizes_of("up", LAYERS["deepseek-v3"])
    assert (few, tuned.bucket(few)) == ((256, 2048, 7168), "few rows, medium, deep")


def test_results_name_the_tiles_they_were_measured_with(cache):
    assert machine.environment()["tuned_tiles"] is None
    write(cache, entry())
    first = machine.tuned_tiles()
    assert tuned.read(cache)["digest"].startswith(first)
    write(cache, entry(tile=dataclasses.replace(TILE, block_n=128)))
    assert machine.tuned_tiles() != first


def test_the_cache_is_where_the_user_wants_it(monkeypatch, tmp_path):
    assert tuned.cache_file(CPU) == tmp_path / "cache" / "tiles-cpu.json"
    monkeypatch.delenv(tuned.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuned.cache_file(CPU) == tmp_path / "xdg" / "moe-kernels" / "tiles-cpu.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuned.cache_file(CPU) == tmp_path / ".cache" / "moe-kernels" / "tiles-cpu.json"
    monkeypatch.setattr(tuned, "device_name", lambda device: "NVIDIA H200")
    assert tuned.cache_file(CPU).name == "tiles-nvidia-h200.json"


@pytest.mark.parametrize("fault", ["a folder that nobody may look into", "no home"])
def test_a_cache_out_of_reach_holds_no_tiles(monkeypatch, cache, caplog, fault):
    """Tuned tiles are an extra: a training runs without, and the log says why."""
    write(cache, entry())
    if fault == "no home":
        for variable in (tuned.CACHE_VARIABLE, "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    else:
        monkeypatch.setattr(tuned.Path, "exists", lambda path: (_ for _ in ()).throw(PermissionError(13, "denied")))
    config.forget_tuned_tiles()
    with caplog.at_level(logging.WARNING, logger="moe_kernels"):
        assert select() == default()
    assert "no tuned tiles are used" in caplog.text
    assert machine.tuned_tiles() is None


@pytest.fixture
def seen(monkeypatch):
    """(kernel, sizes) of every GEMM launched."""
    calls = []

    def spy(kernel, device, dtype, group_size, tma, sizes):
        calls.append((kernel, sizes))
        return select_config(kernel, device, dtype, group_size, tma, sizes)

    for module in (up, grouped_gemm, wgrad):
        monkeypatch.setattr(module, "select_config", spy)
    return calls


def test_what_is_tuned_is_what_a_layer_launches(seen, device):
    inputs = make_inputs(Case(48, 2, 4, 64, 48, torch.bfloat16), device)
    leaves = [t.requires_grad_() for t in (inputs.x, inputs.topk_weights, inputs.gate_up, inputs.down)]
    x, weights, gate_up, down = leaves
    moe_kernels.fused_experts(x, inputs.topk_ids, weights, gate_up, down, backend="triton").sum().backward()
    expected = {(kernel, tuple(tiles.sizes_of(call, SHAPE))) for call, kernel in tiles.CALLS.items()}
    assert set(seen) == expected
    seen.clear()
    tiles.gemms(SHAPE, 64, device)["wgrad (dW2)"]()
    assert set(seen) <= expected


def test_variants_with_more_in_shared_memory_keep_the_shipped_tile(seen, device):
    for changes in ({"bias": True}, {"lora_rank": 4}, {"transposed": True}, {"interleaved": True}, {"gated": False}):
        inputs = make_inputs(Case(12, 2, 3, 32, 16, torch.bfloat16, **changes), device)
        seen.clear()
        run(functools.partial(moe_kernels.fused_experts, backend="triton"), inputs)
        ups = [sizes for kernel, sizes in seen if kernel == "up"]
        assert set(ups) == {None}, changes
        if set(changes) & {"bias", "lora_rank", "transposed"}:
            assert ("down", None) in seen, changes


GOOD, WRONG, LATE = (dataclasses.replace(TILE, block_n=n) for n in (32, 64, 128))


@pytest.fixture
def few_candidates(monkeypatch):
    """Three tiles for `down` and none for the others; one gives a wrong result, one only when rows are left over."""
    monkeypatch.setattr(tiles, "candidates", lambda kernel, group: [GOOD, WRONG, LATE] if kernel == "down" else [])
    monkeypatch.setattr(tiles, "VERIFY_SHAPES", (LayerShape("ragged", 21, 32, 16, 3, 2),))
    monkeypatch.setattr(tiles, "VERIFY_ROUTINGS", ("random",))
    monkeypatch.setattr(tiles, "VERIFY_TOKENS", 16)
    real = TritonBackend.down

    def broken(self, rows, *args, **kwargs):
        out, used = real(self, rows, *args, **kwargs), config._overrides["down"].choice
        if used == WRONG or (used == LATE and rows.shape[0] == 42):
            out[0] *= 1.5
        return out

    monkeypatch.setattr(TritonBackend, "down", broken)
    times = {GOOD: 0.8, WRONG: 0.1, LATE: 0.5}

    def median_ms(call):
        (used,) = filter(None, (override.choice for override in config._overrides.values()))
        return times.get(used, 1.0)

    monkeypatch.setattr(tiles, "median_ms", median_ms)


def test_a_wrong_tile_is_never_used_and_is_reported(few_candidates, cache, capsys):
    timings = tiles.time_shape(SHAPE, 64, CPU, lambda message: None)
    by_tile = {timing.config: timing for timing in timings}
    assert set(by_tile) == {GOOD, WRONG, LATE}
    assert (by_tile[WRONG].ms, by_tile[WRONG].wrong) == (None, True)
    assert (by_tile[GOOD].ms, by_tile[LATE].ms) == (0.8, 0.5)

    (result,) = tune.conclude(timings, [SHAPE], CPU, None, False)
    assert result.config == GOOD
    assert result.ratio == pytest.approx(0.8)
    assert [tile for tile, _ in result.refused] == [LATE]
    assert select() == GOOD
    tune.show([result], timings)
    output = " ".join(capsys.readouterr().out.split())
    assert f"wrong, not used: down {tiles.describe(WRONG)} on tiny: differs" in output
    assert f"refused, not used: down {tiles.describe(LATE)}: ragged:" in output
    (line,) = tuned.read(cache)["tiles"]
    assert line["measured"] == [{"shape": "tiny", "gemm": "down", "ms": 0.8, "default_ms": 1.0}]


def timing(ms, shape="tiny", call="down", tile=GOOD):
    key = tuned.Key("down", 64, "tma", tuned.bucket(SIZES))
    return tiles.Timing(shape, call, key, tile, ms, 1.0)


def test_a_tile_must_pay_on_the_whole_bucket():
    assert tiles.ranking([timing(0.5)])[timing(1).key] == [(0.5, GOOD)]
    assert tiles.ranking([timing(0.99)])[timing(1).key] == [], "two per cent are noise"
    both = [timing(0.5), timing(1.2, shape="other")]
    assert tiles.ranking(both)[timing(1).key][0][0] == pytest.approx(0.6**0.5)
    assert tiles.ranking([timing(0.5), timing(None, shape="other")])[timing(1).key] == [], "it failed on the other"
    faster = timing(0.4, tile=LATE)
    assert [tile for _, tile in tiles.ranking([timing(0.5), faster])[faster.key]] == [LATE, GOOD]


def test_other_lines_stay_unless_fresh(few_candidates, cache):
    other = entry(sizes=SIZES._replace(width=4096), measured=[])
    write(cache, other, entry(tile=LATE, measured=[]))
    timings = [timing(0.8)]
    tune.conclude(timings, [SHAPE], CPU, None, False)
    lines = tuned.read(cache)["tiles"]
    assert lines[0] == other
    assert [line["block_n"] for line in lines] == [other["block_n"], GOOD.block_n]
    # A line whose tile no longer pays goes.
    tune.conclude([timing(1.5)], [SHAPE], CPU, None, False)
    assert tuned.read(cache)["tiles"] == [other]
    tune.conclude(timings, [SHAPE], CPU, None, True)
    assert len(tuned.read(cache)["tiles"]) == 1
    write(cache, other, triton="1.0")
    tune.conclude(timings, [SHAPE], CPU, None, False)
    assert len(tuned.read(cache)["tiles"]) == 1


def test_a_tile_that_does_not_fit_the_gpu_is_a_fault_not_an_error(few_candidates, monkeypatch):
    def too_large():
        raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")

    def compiler_fails():
        raise RuntimeError("PassManager::run failed")

    def something_else():
        raise RuntimeError("an illegal memory access was encountered")

    fault = tiles.attempt(too_large, "down", GOOD)
    assert fault.startswith("does not fit: out of resource: shared memory")
    assert tiles.attempt(compiler_fails, "down", GOOD) == "Triton's compiler fails on it"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tiles.attempt(something_else, "down", GOOD)


def test_relative_difference_of_rows_and_of_stacked_gradients():
    for size in ((6, 4), (3, 6, 4)):
        expected = torch.randn(*size)
        result = expected * 1.01
        assert tiles.relative_difference(result, expected) == pytest.approx(0.01, rel=1e-4)
        result.view(-1)[-1] = float("nan")
        assert not tiles.relative_difference(result, expected) <= 1


def test_candidates_are_valid_tiles():
    for kernel, group in itertools.product(("up", "down", "dgrad", "wgrad"), tuned.TILE_ROWS):
        found = tiles.candidates(kernel, group)
        assert len(set(found)) == len(found) > 3
        for tile in found:
            key = tuned.Key(kernel, None if kernel == "wgrad" else group, "tma", "")
            assert tuned.why_invalid({**key._asdict(), **dataclasses.asdict(tile)}) is None


def test_command_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["tune"])
    assert result.exit_code == 3
    assert "Cure: see `moe-kernels doctor`" in " ".join(result.output.split())
    for wrong in (["--shapes", "x"], ["--group-sizes", "100"]):
        result = CliRunner().invoke(app, ["tune", *wrong])
        assert result.exit_code == 2
        assert "choose from" in result.output


def test_measurements_are_written(few_candidates, tmp_path):
    timings = tiles.time_shape(SHAPE, 64, CPU, lambda message: None)
    tune._write_measurements(tmp_path / "timings.json", timings)
    report = json.loads((tmp_path / "timings.json").read_text())
    assert report["kind"] == "timings"
    assert {row["call"] for row in report["rows"]} == {"down"}
    assert report["rows"][0]["key"]["kernel"] == "down"
