"""The plugin's YAML keys and hooks in one process: what is refused, in which words, and what is passed on."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_kernels import backends
from support.models import tiny_config, tiny_model

# find_spec, not import: Axolotl takes many seconds to import, and collecting must not.
if importlib.util.find_spec("axolotl") is None or importlib.util.find_spec("axolotl.utils") is None:
    pytest.skip("axolotl is not installed: needs the extra [axolotl]", allow_module_level=True)

PLUGIN = "axolotl.integrations.moe_kernels.plugin.MoeOptimizedPlugin"
OTHER_PATH = "axolotl.integrations.moe_kernels.MoeOptimizedPlugin"
ON: dict[str, Any] = {"moe_kernels": True, "plugins": [PLUGIN]}
AXOLOTL = tuple(map(int, importlib.metadata.version("axolotl").split(".")[:2]))
ENTRY_POINTS = AXOLOTL >= (0, 21)  # Axolotl loads the plugins of installed packages by itself
SOURCE = Path(__file__).parents[2]


def validate(**data: Any) -> Any:
    from axolotl.integrations.moe_kernels.args import MoeKernelsArgs

    return MoeKernelsArgs(**data)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"moe_kernels": False},
        ON,
        ON | {"experts_implementation": "moe_kernels"},
        *(ON | {"moe_group_size": size} for size in (64, 128, 256, "auto")),
        ON | {"moe_recompute": True, "gradient_checkpointing": False},
        ON | {"moe_fp8_activations": True, "torch_compile": False},
        ON | {"moe_persistent_kernel": False, "moe_kernel_models": ["mixtral", "qwen2_moe"]},
        # Off on purpose, the rest left in place for the next run.
        {"moe_kernels": False, "moe_group_size": 64, "experts_implementation": "grouped_mm"},
        ON | {"liger_rms_norm": True, "expert_parallel_size": 1, "quantize_moe_experts": False},
        ON | {"quantize_moe_experts": True, "load_in_4bit": True},
        {"moe_grouped_backend": "auto", "moe_dequant_chunk_size": 4, "moe_bnb_fast": True},
        {"moe_fused_router": True},
        ON | {"moe_fused_router": True},
        # Nothing of it is ours, and Axolotl 0.21 shows us every config.
        {"moe_of_somebody_else": 3, "use_scattermoe": True, "expert_parallel_size": 2},
        {"plugins": 5},
        {"plugins": ["axolotl.integrations.kernels.KernelsPlugin"], "experts_implementation": "eager"},
    ],
    ids=str,
)
def test_accepted(data: dict[str, Any]) -> None:
    args = validate(**data)
    for key in ("moe_kernels", "moe_group_size", "moe_persistent_kernel", "moe_kernel_models"):
        assert getattr(args, key) == data.get(key)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"moe_kernels": "yes please"}, ["moe_kernels", "valid boolean"]),
        ({"moe_kernels": 1}, ["moe_kernels", "valid boolean"]),
        (ON | {"moe_group_size": 100}, ["moe_group_size", "64, 128, 256 or 'auto'"]),
        (ON | {"moe_group_size": "128"}, ["moe_group_size", "64, 128, 256 or 'auto'"]),
        (ON | {"moe_group_size": True}, ["moe_group_size", "64, 128, 256 or 'auto'"]),
        (ON | {"moe_group_size": 64.0}, ["moe_group_size", "64, 128, 256 or 'auto'"]),
        (ON | {"moe_persistent_kernel": "on"}, ["moe_persistent_kernel", "valid boolean"]),
        (ON | {"moe_recompute": True, "gradient_checkpointing": True}, ["moe_recompute", "remove one of them"]),
        (ON | {"moe_fp8_activations": True, "torch_compile": True}, ["torch_compile", "remove one of them"]),
        (ON | {"moe_fp8_activations": "fp8"}, ["moe_fp8_activations", "valid boolean"]),
        ({"moe_recompute": True}, ["moe_recompute without moe_kernels", "add moe_kernels: true"]),
        (ON | {"moe_fused_router": "yes"}, ["moe_fused_router", "valid boolean"]),
        (ON | {"moe_kernel_models": "mixtral"}, ["moe_kernel_models", "valid list"]),
        (ON | {"moe_kernel_models": []}, ["moe_kernel_models", "at least 1 item"]),
        (ON | {"moe_kernel_models": [7]}, ["moe_kernel_models", "valid string"]),
        (ON | {"moe_groupsize": 64}, ["unknown key 'moe_groupsize'", "moe_group_size"]),
        ({"moe_kernel": True}, ["unknown key 'moe_kernel'", "moe_kernels"]),
        ({"moe_of_somebody_else": 3, "moe_fused_router": True}, ["unknown key 'moe_of_somebody_else'"]),
        ({"moe_of_somebody_else": 3, "plugins": [OTHER_PATH]}, ["unknown key 'moe_of_somebody_else'"]),
        ({"moe_group_size": 64}, ["moe_group_size without moe_kernels", "add moe_kernels: true"]),
        ({"moe_persistent_kernel": False}, ["moe_persistent_kernel without moe_kernels"]),
        ({"experts_implementation": "moe_kernels"}, ["needs moe_kernels: true"]),
        ({"moe_kernels": False, "experts_implementation": "moe_kernels"}, ["needs moe_kernels: true"]),
        (
            ON | {"experts_implementation": "eager"},
            ["contradicts experts_implementation: eager", "remove it"],
        ),
        (ON | {"experts_implementation": "deepgemm"}, ["contradicts experts_implementation: deepgemm"]),
        (ON | {"use_scattermoe": True}, ["use_scattermoe", "remove it"]),
        (ON | {"use_sonicmoe": True}, ["use_sonicmoe", "remove it"]),
        (ON | {"expert_backend": "sonicmoe"}, ["expert_backend", "remove it"]),
        (
            ON | {"plugins": [PLUGIN, "axolotl.integrations.kernels.KernelsPlugin"]},
            ["KernelsPlugin", "remove it from plugins"],
        ),
        (
            ON | {"plugins": ["axolotl.integrations.kernels.plugin.KernelsPlugin", PLUGIN]},
            ["KernelsPlugin", "remove it from plugins"],
        ),
        (
            ON | {"plugins": ["axolotl.integrations.kernels:KernelsPlugin", PLUGIN]},
            ["KernelsPlugin", "remove it from plugins"],
        ),
        (ON | {"liger_glu_activation": True}, ["liger_glu_activation", "set it to false"]),
        (ON | {"liger_swiglu": True}, ["liger_swiglu", "set it to false"]),
        (ON | {"quantize_moe_experts": True, "load_in_8bit": True}, ["quantize_moe_experts", "load_in_4bit: true"]),
        (
            ON | {"quantize_moe_experts": True, "load_in_4bit": True, "nf4_backend": "torchao"},
            ["quantize_moe_experts", "nf4_backend: bitsandbytes"],
        ),
    ],
    ids=str,
)
def test_refused_with_the_cure(data: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  pydantic's ValidationError is one; words are checked
        validate(**data)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("wraps", [False, True])
def test_expert_parallelism_where_axolotl_runs_any_kernel(wraps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from axolotl.integrations.moe_kernels import args

    assert args.wraps_any_experts() is (AXOLOTL >= (0, 20))
    monkeypatch.setattr(args, "wraps_any_experts", lambda: wraps)
    if wraps:
        assert validate(**ON, expert_parallel_size=2).moe_kernels
        return
    with pytest.raises(ValueError, match=r"expert_parallel_size.*Install axolotl 0\.21, or set expert_parallel_size"):
        validate(**ON, expert_parallel_size=2)


def test_every_key_is_described_in_the_schema() -> None:
    from axolotl.integrations.moe_kernels.args import OWN_KEYS, MoeKernelsArgs

    properties = MoeKernelsArgs.model_json_schema()["properties"]
    assert tuple(properties) == OWN_KEYS
    assert all("Default:" in properties[key]["description"] for key in OWN_KEYS)


def test_keys_of_other_plugins_pass() -> None:
    """A key with our prefix that another listed plugin declares is not misspelt."""
    from axolotl.integrations.moe_kernels.args import MoeKernelsArgs

    class Both(MoeKernelsArgs):
        moe_of_another_plugin: int | None = None

    assert Both(moe_of_another_plugin=3).moe_of_another_plugin == 3


def axolotl_config(**changes: Any) -> Any:
    from axolotl.utils.dict import DictDefault

    base = {"base_model": "nobody/nothing", "learning_rate": 1e-3, "micro_batch_size": 1}
    base |= {"gradient_accumulation_steps": 1, "datasets": [{"path": "x.jsonl", "type": "completion"}]}
    return DictDefault(base | changes)


@pytest.fixture(autouse=True)
def manager(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Axolotl's list of plugins, which lives as long as the process, empty again."""
    from axolotl.integrations.base import PluginManager

    monkeypatch.setattr(PluginManager, "_instance", None)
    return PluginManager


def axolotl_validate(**changes: Any) -> Any:
    from axolotl.utils.config import prepare_plugins, validate_config

    cfg = axolotl_config(**changes)
    prepare_plugins(cfg)
    return validate_config(cfg)


def test_axolotl_itself_finds_and_validates_the_keys() -> None:
    cfg = axolotl_validate(**ON, moe_group_size="auto", moe_kernel_models=["mixtral"])
    assert (cfg.moe_kernels, cfg.moe_group_size, cfg.moe_kernel_models) == (True, "auto", ["mixtral"])
    with pytest.raises(ValueError, match="64, 128, 256 or 'auto'"):
        axolotl_validate(**ON, moe_group_size=100)
    liger = {"plugins": [PLUGIN, "axolotl.integrations.liger.LigerPlugin"], "moe_kernels": True}
    assert axolotl_validate(**liger, liger_rms_norm=True).liger_rms_norm is True
    with pytest.raises(ValueError, match="liger_glu_activation: set it to false"):
        axolotl_validate(**liger, liger_glu_activation=True)
    # Axolotl renames this one before our validator or after it; both must end here.
    with pytest.raises(ValueError, match=r"liger_(glu_activation|swiglu): set it to false"):
        axolotl_validate(**liger, liger_swiglu=True)


KERNELS = ("axolotl.integrations.kernels.KernelsPlugin", "axolotl.integrations.kernels.plugin.KernelsPlugin")


@pytest.mark.parametrize("theirs", KERNELS)
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"use_scattermoe": True},
        {"use_sonicmoe": True},
        {"expert_backend": "scattermoe"},
        {"experts_implementation": "moe_kernels"},
        {"experts_implementation": "deepgemm"},
    ],
    ids=str,
)
def test_axolotls_own_kernels_are_refused(keys: dict[str, Any], order: int, theirs: str) -> None:
    """Whichever validators run first, and whatever KernelsPlugin's make of the keys before ours."""
    plugins = [PLUGIN, theirs][::order]
    words = r"moe_kernels: true cannot be combined with .*: remove it|has no backward pass"
    with pytest.raises(ValueError, match=words):
        axolotl_validate(plugins=plugins, moe_kernels=True, **keys)


def test_kernels_plugin_in_a_run_without_us() -> None:
    """It may use its own keys, and moe_kernels: false leaves it alone."""
    assert axolotl_validate(plugins=[KERNELS[0], PLUGIN], use_scattermoe=True, moe_kernels=False).use_scattermoe


@pytest.mark.parametrize("listed", [[PLUGIN], [OTHER_PATH], [PLUGIN, OTHER_PATH], [OTHER_PATH, PLUGIN]], ids=str)
def test_listed_twice_is_registered_once(listed: list[str], manager: Any) -> None:
    for _ in range(2):  # a second config in the same process
        cfg = axolotl_validate(plugins=listed, moe_kernels=True, moe_group_size=64)
        assert cfg.moe_group_size == 64
        plugins = list(manager.get_instance().plugins.values())
        assert [type(plugin).__name__ for plugin in plugins].count("MoeOptimizedPlugin") == 1
        keys = [name for name in manager.get_instance().get_input_args() if name.endswith(".MoeKernelsArgs")]
        assert len(keys) == 1


BY_ENTRY_POINT = """
import json, sys, axolotl.utils.config as config
from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault
results = []
for changes in json.loads(sys.argv[1]):
    PluginManager._instance = None
    base = {"base_model": "n/n", "learning_rate": 1e-3, "micro_batch_size": 1, "gradient_accumulation_steps": 1}
    base["datasets"] = [{"path": "x.jsonl", "type": "completion"}]
    cfg = DictDefault(base | changes)
    config.prepare_plugins(cfg)
    names = [type(plugin).__name__ for plugin in PluginManager.get_instance().plugins.values()]
    try:
        cfg = config.validate_config(cfg)
        PluginManager.get_instance().pre_model_load(cfg)
        answer = [cfg.moe_kernels, cfg.moe_group_size, cfg.experts_implementation]
    except ValueError as error:
        answer = str(error)
    imported = [name for name in sys.modules if name == "moe_kernels" or name.startswith("moe_kernels.")]
    results.append([names.count("MoeOptimizedPlugin"), answer, bool(imported)])
print("\\n" + json.dumps(results))
"""


def installed(folder: Path) -> dict[str, str]:
    """The environment of a process in which this package is installed, as a wheel of it would be."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((SOURCE / "pyproject.toml").read_text())["project"]
    metadata = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"]["axolotl.plugins"].items()
    lines = ["[axolotl.plugins]", *(f"{name} = {value}" for name, value in points)]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    path = os.pathsep.join([str(folder), str(SOURCE / "src"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path}


def test_entry_point(tmp_path: Path) -> None:
    """From 0.21 on the keys are validated without ``plugins:``; a config without them does not import the kernels."""
    keys = {"moe_kernels": True, "moe_group_size": 64}
    configs = [{}, keys | {"moe_group_size": 100}, {"moe_kernel": True}, keys, keys | {"plugins": [OTHER_PATH]}]
    command = [sys.executable, "-c", BY_ENTRY_POINT, json.dumps(configs)]
    done = subprocess.run(command, env=installed(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    nothing, bad_value, misspelt, ours, listed = json.loads(done.stdout.splitlines()[-1])
    once = int(ENTRY_POINTS)
    assert nothing == [once, [None, None, None], False]
    assert "loaded but inactive" not in done.stdout + done.stderr
    assert listed == [1, [True, 64, "moe_kernels"], True]
    if ENTRY_POINTS:
        assert bad_value[0] == 1
        assert "64, 128, 256 or 'auto'" in bad_value[1]
        assert "unknown key 'moe_kernel'" in misspelt[1]
        assert ours == [1, [True, 64, "moe_kernels"], True]
        assert not bad_value[2], "a config that is refused does not import the kernels either"
    else:  # Axolotl drops the keys of a plugin that is not listed
        assert [bad_value, misspelt, ours] == [[0, [None, None, None], False]] * 3


@pytest.mark.parametrize("folder", ["plugin.py", "args.py", "__init__.py"])
def test_nothing_heavy_at_the_top(folder: str) -> None:
    """Axolotl swallows an ImportError here and trains the baseline, so only hooks may import the kernels."""
    import axolotl.integrations.moe_kernels as package

    tree = ast.parse((Path(package.__file__).parent / folder).read_text())
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    allowed = {"pydantic", "axolotl.integrations.base", "axolotl.utils.logging", ".args", ".plugin"}
    assert {name for name in names if name.partition(".")[0] not in sys.stdlib_module_names} <= allowed


# The hooks


@pytest.fixture
def plugin() -> Any:
    from axolotl.integrations.moe_kernels import MoeOptimizedPlugin

    backends.reset_dispatch_counts()
    return MoeOptimizedPlugin()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    logging.getLogger("axolotl").propagate = True
    caplog.set_level(logging.INFO)
    return caplog


def test_inactive_plugin_says_so(plugin: Any, log: pytest.LogCaptureFixture) -> None:
    cfg = axolotl_config(plugins=[PLUGIN])
    plugin.pre_model_load(cfg)
    plugin.post_model_load(cfg, torch.nn.Linear(1, 1))
    assert plugin.add_callbacks_post_trainer(cfg, None) == []
    assert cfg.experts_implementation is None
    assert "loaded but inactive" in log.text


def test_a_config_that_does_not_mention_the_plugin_hears_nothing(plugin: Any, log: pytest.LogCaptureFixture) -> None:
    cfg = axolotl_config()
    before = cfg.to_dict()
    plugin.register(cfg)
    plugin.pre_model_load(cfg)
    plugin.post_model_load(cfg, torch.nn.Linear(1, 1))
    assert plugin.add_callbacks_post_trainer(cfg, None) == []
    plugin.post_lora_merge(cfg, "an adapter that is not there", "a model that is not there")
    # Axolotl itself names each plugin that it loads.
    assert not [record for record in log.records if record.name.startswith("axolotl.integrations.moe_kernels")]
    assert cfg.to_dict() == before


def test_the_tried_axolotls_are_those_of_the_doctor() -> None:
    from axolotl.integrations.moe_kernels.plugin import TRIED
    from moe_kernels.tools.doctor import TESTED

    assert TESTED["axolotl"] == TRIED


@pytest.mark.parametrize(
    ("version", "warned"), [("0.18.2", True), ("0.19.0", False), ("0.21.3", False), ("0.22.0", True)]
)
def test_an_axolotl_that_was_not_tried(
    version: str, warned: bool, plugin: Any, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "axolotl" else real(name))
    plugin.pre_model_load(axolotl_config(**ON, torch_dtype=torch.float32))
    words = f"Axolotl {version} was not tried, 0.19 to below 0.22 were: if something fails, pip install 'axolotl>="
    assert (words in log.text) is warned


@pytest.mark.skipif(AXOLOTL < (0, 20), reason="the expert parallelism of axolotl before 0.20 has a list of kernels")
@pytest.mark.parametrize("named", [{}, {"experts_implementation": "moe_kernels"}], ids=str)
def test_axolotls_expert_parallelism_wraps_ours(named: dict[str, str], manager: Any) -> None:
    """Its plugin runs first, and looks for the name before ours has seen the validated config."""
    from moe_kernels.integrations.transformers import UnsupportedExperts, check_model

    fsdp = {
        "fsdp_version": 2,
        "fsdp_config": {"state_dict_type": "FULL_STATE_DICT", "transformer_layer_cls_to_wrap": "MixtralDecoderLayer"},
    }
    cfg = axolotl_validate(**ON, **named, **fsdp, expert_parallel_size=2, expert_parallel_backend="torch")
    manager.get_instance().pre_model_load(cfg)
    assert cfg.experts_implementation == "expert_parallel"
    from axolotl.integrations.expert_parallel import experts_fn

    assert experts_fn.get_local_implementation() == "moe_kernels"
    model = tiny_model(tiny_config("mixtral"))
    model.set_experts_implementation(cfg.experts_implementation)
    assert check_model(model) == 2
    experts_fn.set_local_implementation("grouped_mm")
    with pytest.raises(UnsupportedExperts, match="runs experts_implementation='expert_parallel', not moe_kernels"):
        check_model(model)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, True),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}, False),
        ({"gradient_checkpointing": False, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, False),
        (
            {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": True},
                "deepspeed": "z3",
            },
            False,
        ),
    ],
)
def test_the_shorter_way_of_checkpointing_is_named(
    plugin: Any, log: pytest.LogCaptureFixture, settings: dict[str, Any], said: bool
) -> None:
    plugin.pre_model_load(axolotl_config(**ON, **settings))
    assert ("use_reentrant: false" in log.text) == said


def test_pre_model_load_selects_the_experts(plugin: Any, log: pytest.LogCaptureFixture) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    cfg = axolotl_config(**ON, torch_dtype=torch.float32, model_config_type="mixtral")
    plugin.pre_model_load(cfg)
    assert cfg.experts_implementation == "moe_kernels"
    assert "moe_kernels" in ALL_EXPERTS_FUNCTIONS
    expected = "triton because CUDA" if torch.cuda.is_available() else "torch because tensors are on cpu"
    assert f"moe_kernels: backend {expected}" in log.text


def test_unsupported_gpu_fails_before_loading(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(problem: Any, name: str) -> Any:
        raise backends.UnsupportedProblem("compute capability 7.0 is below 8.0.")

    monkeypatch.setattr(backends, "select", unsupported)
    with pytest.raises(backends.UnsupportedProblem, match=r"below 8\.0"):
        plugin.pre_model_load(axolotl_config(**ON))


def test_model_outside_the_allow_list(plugin: Any) -> None:
    cfg = axolotl_config(**ON, moe_kernel_models=["mixtral", "olmoe"], model_config_type="qwen2_moe")
    with pytest.raises(ValueError, match="lists mixtral, olmoe, but nobody/nothing has model_type 'qwen2_moe'"):
        plugin.pre_model_load(cfg)


def test_fused_router_is_installed_or_refused(plugin: Any, log: pytest.LogCaptureFixture) -> None:
    from moe_kernels.integrations.router import UnsupportedRouter

    model = tiny_model(tiny_config("mixtral"))
    plugin.post_model_load(axolotl_config(moe_fused_router=True), model)
    assert "fused router in 2 layers of MixtralForCausalLM" in log.text
    assert all("forward" in vars(layer.mlp.gate) for layer in model.model.layers)
    plain = tiny_model(tiny_config("mixtral"))
    plugin.post_model_load(axolotl_config(moe_fused_router=False), plain)
    assert not any("forward" in vars(layer.mlp.gate) for layer in plain.model.layers)
    with pytest.raises(UnsupportedRouter, match="Set moe_fused_router: false"):
        plugin.post_model_load(axolotl_config(moe_fused_router=True), torch.nn.Linear(1, 1))


def test_model_without_experts(plugin: Any) -> None:
    with pytest.raises(ValueError, match="Linear has no experts module"):
        plugin.post_model_load(axolotl_config(**ON), torch.nn.Linear(1, 1))


class FakeTrainer:
    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def store_metrics(self, metrics: dict[str, float], train_eval: str) -> None:
        assert train_eval == "train"
        self.metrics.append(metrics)


def steps(callback: Any, calls: list[int]) -> None:
    for step, count in enumerate(calls, start=1):
        state = SimpleNamespace(global_step=step)
        callback.on_step_begin(None, state, None)
        for _ in range(count):
            backends.count_dispatch("torch")
        callback.on_step_end(None, state, None)


def make_callback(plugin: Any, trainer: Any) -> Any:
    plugin.expert_layers = 2
    [callback] = plugin.add_callbacks_post_trainer(
        axolotl_config(**ON, moe_group_size=256, moe_persistent_kernel=False), trainer
    )
    return callback


def test_callback_reports_step_one_and_counts_every_step(plugin: Any, log: pytest.LogCaptureFixture) -> None:
    trainer = FakeTrainer()
    problem = backends.Problem("cpu", None, torch.float32, 4, 2, 8, 8)
    backends.select.cache_clear()
    backends.select(problem)
    steps(make_callback(plugin, trainer), [2, 4, 0])
    assert [metric["moe/expert_calls"] for metric in trainer.metrics] == [2, 4, 0]
    lines = [record.message for record in log.records if "dispatched in step" in record.message]
    assert lines == [
        "moe_kernels: backend=torch (tensors are on cpu, Triton kernels need an NVIDIA GPU), 2 expert calls "
        "dispatched in step 1, group_size=256, persistent=False, 2 expert layers"
    ]


def test_callback_fails_if_nothing_was_dispatched(plugin: Any) -> None:
    with pytest.raises(RuntimeError, match=r"step 1 dispatched no expert call.*set moe_kernels: false"):
        steps(make_callback(plugin, FakeTrainer()), [0])


def test_trainer_without_metrics(plugin: Any) -> None:
    backends.select(backends.Problem("cpu", None, torch.float32, 4, 2, 8, 8))
    steps(make_callback(plugin, SimpleNamespace()), [2, 2])
