"""Which trainings one comparison consists of, and exactly how each differs from the user's YAML file."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_kernels.shapes import FAMILIES, LayerShape
from moe_kernels.tools.common.errors import UsageError
from moe_kernels.tools.common.options import shipped
from moe_kernels.tools.common.runfile import Config, base_model, dump_yaml, load_yaml, tokens_per_micro_batch

PLUGIN = "axolotl.integrations.moe_kernels.plugin.MoeOptimizedPlugin"
CONFIG_FOLDER = Path("configs") / "moe"
RUN_FOLDER = Path("artifacts") / "runs" / "compare"
ADAPTER_FOLDER = Path("artifacts") / "adapters"
# Of a name that becomes a file's, with room for what is added to it.
LONGEST_NAME = 150
# Keys of a run file that name folders, which `compare` replaces with its own.
FOLDERS = ("output_dir", "dataset_prepared_path")
ROLES = BASELINE, OPTIMIZED, EAGER = "baseline", "optimized", "eager"


@dataclass(frozen=True)
class RunSpec:
    """One training: a YAML file of the user's plus a few overrides that the report shows.

    Attributes:
        run_id: ``<role>-<n>``, unique within the comparison.
        role: ``"baseline"``, ``"optimized"`` or ``"eager"``.
        source: the user's YAML file.
        overrides: keys that differ from it; nothing else does.
        config: the YAML file with the overrides.
        folder: everything of this run: derived YAML, log, W&B files, result.
        uses_kernels: whether this run is meant to call our experts.
    """

    run_id: str
    role: str
    source: Path
    overrides: Config
    config: Config
    folder: Path
    uses_kernels: bool

    @property
    def steps(self) -> int:
        """Optimizer steps of this training."""
        return int(self.config["max_steps"])


@dataclass(frozen=True)
class Plan:
    """One comparison of two YAML files.

    Attributes:
        name: family, or the two files' names.
        family: key of ``FAMILIES``, or None for two files of the user's own.
        size: ``"1b"``, ``"tiny"``, or ``"own"`` for the user's own files.
        runs: in the order they are run.
        warmup_steps: steps at the start of each run that no time is taken from.
        layer: the expert layer of this model at one micro-batch's tokens; None where it is not known.
        moe_layers: expert layers of the model; None where it is not known.
        yaml_diff: unified diff of the two YAML files, without comments.
    """

    name: str
    family: str | None
    size: str
    runs: tuple[RunSpec, ...]
    warmup_steps: int
    layer: LayerShape | None
    moe_layers: int | None
    yaml_diff: str

    @property
    def label(self) -> str:
        """Its name in reports."""
        return label(self.name, self.size)

    @property
    def folder(self) -> Path:
        """Everything of this comparison but the report."""
        return RUN_FOLDER / f"{self.name}-{self.size}"

    @property
    def baseline(self) -> RunSpec:
        """The first run with the stock kernels."""
        return next(run for run in self.runs if run.role == BASELINE)


@dataclass(frozen=True)
class Options:
    """What the command line asks of every comparison.

    ``steps`` None keeps the YAML file's own number; ``router`` records the load of every expert in the runs with
    our plugin. ``lora``: rank of an adapter on attention and expert weights in all runs, the base frozen; 0 trains
    every parameter. ``qlora`` keeps that base in 4 bits.
    """

    size: str = "1b"
    steps: int | None = None
    warmup_steps: int = 10
    repeats: int = 1
    noise: bool = True
    with_eager: bool = False
    wandb: str = "offline"
    router: bool = True
    lora: int = 0
    qlora: bool = False


def lora_overrides(options: Options, base_model: str) -> Config:
    """What makes any run file of the three families train an adapter: the same keys in every run of a comparison."""
    if not options.lora:
        return {}
    return {
        "adapter": "qlora" if options.qlora else "lora",
        "lora_r": options.lora,
        "lora_alpha": 2 * options.lora,
        "lora_dropout": 0.0,
        # Those that the model has; DeepSeek-V3 has only the last, and two of its own.
        "lora_target_modules": ["q_proj", "k_proj", "v_proj", "q_a_proj", "q_b_proj", "o_proj"],
        "lora_target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        # Axolotl draws an adapter before it sets the seed: without this, no two runs start alike.
        "lora_model_dir": str(ADAPTER_FOLDER / f"{Path(base_model).name}-r{options.lora}"),
        # Axolotl's fused LoRA of the attention comes and goes with versions and is not what is compared.
        **dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False),
        # Axolotl's default leaves the experts' part of the adapter out when it merges.
        "merge_method": "legacy",
        **({"load_in_4bit": True, "quantize_moe_experts": True} if options.qlora else {}),
    }


def plan_family(name: str, options: Options, tiny_overrides: Mapping[str, Any] | None = None) -> Plan:
    """The comparison of one family; ``tiny_overrides`` turns its 1B files into runs for a CPU."""
    family = FAMILIES[name]
    shape = family.sizes[options.size]
    files = shipped(CONFIG_FOLDER / family.baseline), shipped(CONFIG_FOLDER / family.optimized)
    overrides = dict(tiny_overrides or {})
    overrides |= lora_overrides(options, overrides.get("base_model") or load_yaml(files[0])["base_model"])
    full = name + (f"-{'qlora' if options.qlora else 'lora'}{options.lora}" if options.lora else "")
    return _plan(full, files, options, overrides, name, options.size, shape.moe_layers)


def plan_files(baseline: Path, optimized: Path, options: Options) -> Plan:
    """The comparison of two YAML files of the user's own.

    Raises:
        UsageError: the first uses our kernels already, or the second does not, or they are to get an adapter.
    """
    if options.lora:
        raise UsageError(
            "--lora is for mixtral, qwen2-moe and deepseek-v3. Write the adapter into your two run files."
        )
    before, after = load_yaml(baseline), load_yaml(optimized)
    for config, path in ((before, baseline), (after, optimized)):
        base_model(config, path)
    if _uses_kernels(before):
        raise UsageError(f"{baseline} already trains with moe-kernels. Name the run file without it first.")
    if not _uses_kernels(after):
        raise UsageError(
            f"{optimized} does not use moe-kernels. Add moe_kernels: true and the plugin, as in {CONFIG_FOLDER}."
        )
    name = f"{baseline.stem}-vs-{optimized.stem}"
    if (reason := why_no_name(name)) is not None:
        raise UsageError(f"{reason}. Cure: rename the run files.")
    return _plan(name, (baseline, optimized), options, {}, None, "own", None)


def label(name: str, size: str) -> str:
    """The name of a comparison in reports, and of its files: those of tiny models never replace the 1B models'."""
    return f"{name}-{size}" if size == "tiny" else name


def why_no_name(name: str) -> str | None:
    """None if ``name`` can be a file's, inside the folder that it is meant for, else what is wrong with it."""
    if not name or name in (".", "..") or any(letter in "/\\" or not letter.isprintable() for letter in name):
        return f"{name!r:.60} is no plain name of a file"
    return f"{name[:20]}... is too long for the name of a file" if len(name.encode()) > LONGEST_NAME else None


def config_diff(before: Config, after: Config, before_name: str, after_name: str) -> str:
    """Unified diff of two run files as settings, so that comments and the order of keys do not matter."""
    one, two = (dump_yaml(dict(sorted(config.items()))).splitlines() for config in (before, after))
    return "\n".join(difflib.unified_diff(one, two, before_name, after_name, lineterm="", n=1))


def digest(*parts: object) -> str:
    """A short hash of anything JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _plan(
    name: str,
    files: tuple[Path, Path],
    options: Options,
    base_overrides: Config,
    family: str | None,
    size: str,
    moe_layers: int | None,
) -> Plan:
    sources = {BASELINE: files[0], OPTIMIZED: files[1], EAGER: files[0]}
    configs = {role: load_yaml(path) for role, path in sources.items()}
    runs: list[RunSpec] = []
    for role, number in _order(options):
        run_id = f"{role}-{number}"
        folder = RUN_FOLDER / f"{name}-{size}" / run_id
        overrides = {**base_overrides, "output_dir": str(folder / "output"), "wandb_mode": options.wandb}
        if options.steps is not None:
            overrides["max_steps"] = options.steps
        if options.router and (PLUGIN in (configs[role].get("plugins") or []) or _uses_kernels(configs[role])):
            overrides["moe_router_telemetry"] = configs[role].get("moe_router_telemetry") or True
        if role == EAGER:
            overrides["experts_implementation"] = "eager"
        overrides = {key: value for key, value in overrides.items() if configs[role].get(key) != value}
        config = {**configs[role], **overrides}
        runs.append(RunSpec(run_id, role, sources[role], overrides, config, folder, _uses_kernels(config)))
    for run in runs:
        _check_steps(run, options.warmup_steps)
    return Plan(
        name=name,
        family=family,
        size=size,
        runs=tuple(runs),
        warmup_steps=options.warmup_steps,
        layer=FAMILIES[family].sizes[size].layer(tokens_per_micro_batch(runs[0].config)) if family else None,
        moe_layers=moe_layers,
        yaml_diff=config_diff(configs[BASELINE], configs[OPTIMIZED], files[0].name, files[1].name),
    )


def calls_per_step(config: Config) -> int:
    """Micro-batches in one optimizer step."""
    return int(config.get("gradient_accumulation_steps") or 1)


def chosen_experts(config: Config) -> str | None:
    """What a run file says that the experts run on; None leaves it to transformers."""
    flags = {"use_scattermoe": "scattermoe", "use_sonicmoe": "sonicmoe"}
    named = [name for flag, name in flags.items() if config.get(flag)]
    chosen = next(iter(named), None) or config.get("expert_backend") or config.get("experts_implementation")
    return str(chosen) if chosen else None


def lists_kernels_plugin(config: Config) -> bool:
    """Whether Axolotl's KernelsPlugin is listed: without a kernel chosen it sets the experts to the eager loop."""
    plugins = config.get("plugins")  # of a stored report, anything
    return isinstance(plugins, list) and any("integrations.kernels" in str(name) for name in plugins)


def _uses_kernels(config: Config) -> bool:
    return bool(config.get("moe_kernels")) or config.get("experts_implementation") == "moe_kernels"


def _order(options: Options) -> list[tuple[str, int]]:
    """A B A B ..., so that a drift of the machine meets both sides alike; then the eager loop once."""
    order = [(role, n) for n in range(1, options.repeats + 1) for role in (BASELINE, OPTIMIZED)]
    if options.noise and options.repeats == 1:
        order.append((BASELINE, 2))
    if options.with_eager:
        order.append((EAGER, 1))
    return order


def _check_steps(run: RunSpec, warmup: int) -> None:
    if not isinstance(run.config.get("max_steps"), int):
        raise UsageError(f"{run.source} sets no max_steps. Cure: add --steps 60.")
    if run.steps < warmup + 3:
        raise UsageError(
            f"{run.steps} steps leave nothing to time after {warmup} warm-up steps. "
            f"Cure: --steps {warmup + 20}, or a smaller --warmup-steps."
        )
