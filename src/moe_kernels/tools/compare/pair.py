"""Which trainings a comparison runs, and how each differs from the user's YAML file."""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_kernels.shapes import ALL_FAMILIES, FAMILIES
from moe_kernels.tools.common.errors import UsageError
from moe_kernels.tools.common.options import shipped
from moe_kernels.tools.common.runfile import Config, base_model, check_values, dump_yaml, load_yaml

# Keys of the fused kernels around the experts that most people switch on; its experts class is not among them.
LIGER = dict.fromkeys(("liger_rms_norm", "liger_rope", "liger_fused_linear_cross_entropy"), True)
LIGER_PLUGIN = "axolotl.integrations.liger.LigerPlugin"
PLUGIN = "axolotl.integrations.moe_kernels.plugin.MoeOptimizedPlugin"
CONFIG_FOLDER = Path("configs") / "moe"
RUN_FOLDER = Path("artifacts") / "runs" / "compare"
# Bytes of a comparison's name, which becomes a file name with a suffix.
LONGEST_NAME = 150
# Keys of a run file that `compare` replaces with folders of its own.
FOLDERS = ("output_dir", "dataset_prepared_path")
# Keys that `compare` sets itself, with the option that changes them.
OWN_KEYS = {
    **dict.fromkeys(("base_model", "plugins", "moe_kernels", "experts_implementation"), "name two run files"),
    **dict.fromkeys(FOLDERS, "name two run files"),
    **{"max_steps": "--steps", "wandb_mode": "--wandb", "moe_router_telemetry": "--no-router"},
    **{"adapter": "--lora or --qlora", "lora_r": "--lora", "load_in_4bit": "--qlora"},
    **{"model_quantization_config": "--fp8, --mxfp4 or your run files", "moe_fp8_activations": "--fp8-activations"},
    # What runs the experts is what is compared.
    **dict.fromkeys(("use_scattermoe", "use_sonicmoe", "expert_backend"), "name two run files"),
    **dict.fromkeys(("liger_glu_activation", "liger_swiglu"), "name two run files"),
}
# What transformers loads with where our side keeps a checkpoint as it is.
QUANTIZERS = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}
ROLES = BASELINE, OPTIMIZED, EAGER = "baseline", "optimized", "eager"


@dataclass(frozen=True)
class RunSpec:
    """One training: the user's YAML file ``source`` with ``overrides``, which the report shows, is ``config``."""

    run_id: str  # <role>-<n>, unique within the comparison
    role: str  # one of ROLES
    source: Path
    overrides: Config
    config: Config
    folder: Path  # for the derived YAML, log, W&B files and result
    uses_kernels: bool  # whether it should call our experts

    @property
    def steps(self) -> int:
        """Optimizer steps of this training."""
        return int(self.config["max_steps"])


@dataclass(frozen=True)
class Pair:
    """One comparison: the trainings of a baseline and of an optimised YAML file."""

    name: str  # the family, or the two files' names
    family: str | None  # key of ALL_FAMILIES; None for two files of the user's own
    size: str  # "1b" or another of the family, or "own" for the user's own files
    runs: tuple[RunSpec, ...]  # in the order they are run
    warmup_steps: int  # steps at the start of each run that are not timed
    yaml_diff: str  # unified diff of the two YAML files, without comments

    @property
    def label(self) -> str:
        """Its name in reports."""
        return label(self.name, self.size)

    @property
    def folder(self) -> Path:
        """Where everything of this comparison is kept except the report."""
        return RUN_FOLDER / f"{self.name}-{self.size}"


@dataclass(frozen=True)
class Options:
    """Options of the command line that apply to every comparison."""

    size: str = "auto"  # the family's size for a GPU
    steps: int | None = None  # None keeps the YAML file's own number
    warmup_steps: int = 10
    repeats: int = 1
    noise: bool = True
    with_eager: bool = False
    wandb: str = "offline"
    router: bool = True  # record the load of every expert in the runs with our plugin
    lora: int = 0  # rank of an adapter on attention and expert weights, the base frozen; 0 leaves it to the run files
    qlora: bool = False  # keep that base in 4 bits
    packed: str = ""  # a base in the format of a published checkpoint, "fp8" or "mxfp4"
    fp8_activations: bool = False  # multiply a base in fp8 as it is, on our side
    liger: bool = False  # Liger's norms, rotary embedding and loss in every run
    settings: tuple[str, ...] = ()  # KEY=VALUE of every run, beside what the run files say


def lora_overrides(options: Options) -> Config:
    """The keys that make any run file of the three families train an adapter; the same in every run."""
    if not options.lora:
        return {}
    return {
        "adapter": "lora",
        "lora_dropout": 0.0,
        # PEFT takes those that the model has: of DeepSeek-V3 the last three.
        "lora_target_modules": ["q_proj", "k_proj", "v_proj", "q_a_proj", "q_b_proj", "o_proj"],
        "lora_target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        # Axolotl's default leaves the experts' part of the adapter out when it merges.
        "merge_method": "legacy",
        **rank_overrides(options),
    }


def rank_overrides(options: Options) -> Config:
    """The keys of every run with an adapter that the options decide."""
    return {
        **({"lora_r": options.lora, "lora_alpha": 2 * options.lora} if options.lora else {}),
        # Whether Axolotl fuses LoRA of the attention depends on its version, and is not what is compared.
        **dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False),
        **({"adapter": "qlora", "load_in_4bit": True, "quantize_moe_experts": True} if options.qlora else {}),
    }


def packed_overrides(options: Options, ours: bool) -> Config:
    """The keys for a base in few bits: our side names the checkpoint and no more, the baseline has transformers
    dequantise it, in which form alone stock kernels train over it."""
    if not options.packed:
        return {}
    if ours:
        return {"moe_fp8_activations": True} if options.fp8_activations else {}
    return {
        "model_quantization_config": QUANTIZERS[options.packed],
        "model_quantization_config_kwargs": {"dequantize": True},
    }


def read_settings(settings: Sequence[str]) -> list[tuple[list[str], Any]]:
    """Each ``KEY=VALUE`` as the parts of its key, which dots divide, and the value as YAML reads it.

    Raises:
        UsageError: no such pair, or a key that is the comparison's own.
    """
    import yaml

    found = []
    for text in settings:
        key, equals, value = text.partition("=")
        path = key.strip().split(".")
        if not (equals and all(path)):
            raise UsageError(f"--set {text!r:.60} is no KEY=VALUE. Cure: --set sequence_len=4096.")
        if path[0] in OWN_KEYS:
            raise UsageError(f"--set cannot change {path[0]}, which compare sets itself. Cure: {OWN_KEYS[path[0]]}.")
        try:
            found.append((path, yaml.safe_load(value)))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UsageError(f"--set {key}: {value!r:.60} is not valid YAML: {error}") from error
    return found


def settings_of(settings: Sequence[str], config: Config, ours: bool) -> Config:
    """The keys of ``config`` that ``settings`` change, whole; those of the kernels only in runs with them (``ours``).

    Raises:
        UsageError: see :func:`read_settings`; or a key is inside something that is no mapping.
    """
    changed: Config = {}
    for (first, *inner), value in read_settings(settings):
        if inner:
            place = changed[first] = copy.deepcopy(changed.get(first, config.get(first))) or {}
            for part in inner[:-1]:
                place = place.setdefault(part, {}) if isinstance(place, dict) else None
            if not isinstance(place, dict):
                raise UsageError(f"--set {'.'.join([first, *inner])}: {first} is no mapping of that depth.")
            place[inner[-1]] = value
        else:
            changed[first] = value
    check_values(changed, "--set")
    # In other runs keys of the kernels mean nothing, and our plugin refuses them.
    return {key: value for key, value in changed.items() if ours or not key.startswith("moe_")}


def family_pair(name: str, options: Options, tiny_overrides: Mapping[str, Any] | None = None) -> Pair:
    """The comparison of one family; ``tiny_overrides`` turns its files into runs for a CPU.

    Raises:
        UsageError: the family has no such size or format, or 4 bits are asked for without an adapter.
    """
    family = ALL_FAMILIES[name]
    if options.packed not in ("", family.packed):
        published = ", ".join(each.name for each in ALL_FAMILIES.values() if each.packed == options.packed)
        raise UsageError(
            f"--{options.packed} trains LoRA over a checkpoint as it is published, and {name} has none in "
            f"{options.packed}. Cure: leave --{options.packed} out, or compare {published}."
        )
    if options.qlora and not (options.lora or family.drawn):
        raise UsageError(
            f"--qlora keeps frozen weights in 4 bits, and the run files of {name} train all weights: add --lora 16."
        )
    size = family.large if options.size == "auto" else options.size
    if size not in family.sizes:
        raise UsageError(f"{name} has no size {size}: choose from {', '.join(family.sizes)}.")
    files = shipped(CONFIG_FOLDER / family.baseline), shipped(CONFIG_FOLDER / family.optimized)
    overrides = dict(tiny_overrides or {})
    if family.drawn:  # its run files train an adapter, of the checkpoint on the Hub
        base = f"artifacts/models/{family.model(size, bool(options.packed))}"
        overrides |= {"base_model": base, **rank_overrides(options)}
    else:
        overrides |= lora_overrides(options)
    return _pair(name + _suffix(options), files, options, overrides, name, size)


def files_pair(baseline: Path, optimized: Path, options: Options) -> Pair:
    """The comparison of two YAML files of the user's own.

    Raises:
        UsageError: the first uses our kernels already, or the second does not, or they are to get an adapter.
    """
    if options.lora or options.qlora or options.packed:
        option = "lora" if options.lora else options.packed or "qlora"
        raise UsageError(
            f"--{option} changes the run files of a family ({', '.join(ALL_FAMILIES)}). "
            f"Write the {'base model' if option == options.packed else 'adapter'} into your two run files."
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
    name = f"{baseline.stem}-vs-{optimized.stem}{_suffix(options)}"
    if (reason := why_no_name(name)) is not None:
        raise UsageError(f"{reason}. Cure: rename the run files.")
    return _pair(name, (baseline, optimized), options, {}, None, "own")


def report_name(pairs: list[Pair], options: Options) -> str:
    """The name of the report of ``pairs``, which tells every one of them: ``all`` is the three 1B families."""
    if len(pairs) == 1:
        return pairs[0].label
    families = [str(pair.family) for pair in pairs]
    name = "all" if set(families) == FAMILIES.keys() else "-".join(families)
    return label(name + _suffix(options), pairs[0].size)


def _suffix(options: Options) -> str:
    """What the options change of a family's run files, for the name of the comparison."""
    adapter = f"-{'qlora' if options.qlora else 'lora'}{options.lora or ''}" if options.lora or options.qlora else ""
    packed = f"-{options.packed}{'-activations' if options.fp8_activations else ''}" if options.packed else ""
    settings = "".join("-" + text.replace("=", "-") for text in options.settings)
    if not re.fullmatch(r"[\w.-]{,60}", settings) or any("-" in text for text in options.settings):
        settings = f"-set-{digest(options.settings)}"
    return adapter + packed + ("-liger" if options.liger else "") + settings


def label(name: str, size: str) -> str:
    """The name of a comparison in reports and files; tiny models get names of their own."""
    return f"{name}-{size}" if size == "tiny" else name


def why_no_name(name: str) -> str | None:
    """Why ``name`` cannot be a file name, or None if it can."""
    if not name or name in (".", "..") or any(letter in "/\\" or not letter.isprintable() for letter in name):
        return f"{name!r:.60} is no plain name of a file"
    return f"{name[:20]}... is too long for the name of a file" if len(name.encode()) > LONGEST_NAME else None


def digest(*parts: object) -> str:
    """A short hash of anything JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _pair(
    name: str, files: tuple[Path, Path], options: Options, base_overrides: Config, family: str | None, size: str
) -> Pair:
    sources = {BASELINE: files[0], OPTIMIZED: files[1], EAGER: files[0]}
    configs = {role: load_yaml(path) for role, path in sources.items()}
    # A B A B ..., so that a drift of the machine affects both sides alike; then the eager loop once.
    order = [(role, number) for number in range(1, options.repeats + 1) for role in (BASELINE, OPTIMIZED)]
    order += [(BASELINE, 2)] if options.noise and options.repeats == 1 else []
    order += [(EAGER, 1)] if options.with_eager else []
    runs: list[RunSpec] = []
    for role, number in order:
        own, run_id = configs[role], f"{role}-{number}"
        folder = RUN_FOLDER / f"{name}-{size}" / run_id
        overrides = {**base_overrides, **packed_overrides(options, _uses_kernels(own))}
        overrides |= {"output_dir": str(folder / "output"), "wandb_mode": options.wandb}
        if options.steps is not None:
            overrides["max_steps"] = options.steps
        if options.router and (PLUGIN in (own.get("plugins") or []) or _uses_kernels(own)):
            overrides["moe_router_telemetry"] = own.get("moe_router_telemetry") or True
        if options.liger:
            overrides |= {"plugins": [*(own.get("plugins") or []), LIGER_PLUGIN], **LIGER}
        overrides |= settings_of(options.settings, {**own, **overrides}, _uses_kernels(own))
        if role == EAGER:
            overrides["experts_implementation"] = "eager"
        overrides = {key: value for key, value in overrides.items() if own.get(key) != value}
        config = {**own, **overrides}
        runs.append(RunSpec(run_id, role, sources[role], overrides, config, folder, _uses_kernels(config)))
    for run in runs:
        _check_steps(run, options.warmup_steps)
    # Without comments, keys in order.
    before, after = (dump_yaml(dict(sorted(configs[role].items()))).splitlines() for role in (BASELINE, OPTIMIZED))
    diff = "\n".join(difflib.unified_diff(before, after, files[0].name, files[1].name, lineterm="", n=1))
    return Pair(name, family, size, tuple(runs), options.warmup_steps, diff)


def calls_per_step(config: Config) -> int:
    """Micro-batches in one optimizer step."""
    return int(config.get("gradient_accumulation_steps") or 1)


def chosen_experts(config: Config) -> str | None:
    """The experts implementation that a run file chooses; None leaves it to transformers."""
    for flag, name in {"use_scattermoe": "scattermoe", "use_sonicmoe": "sonicmoe"}.items():
        if config.get(flag):
            return name
    chosen = config.get("expert_backend") or config.get("experts_implementation")
    return str(chosen) if chosen else None


def lists_kernels_plugin(config: Config) -> bool:
    """Whether Axolotl's KernelsPlugin is listed, which without a chosen kernel runs the experts in the eager loop."""
    plugins = config.get("plugins")  # of a stored report, anything
    return isinstance(plugins, list) and any("integrations.kernels" in str(name) for name in plugins)


def _uses_kernels(config: Config) -> bool:
    return bool(config.get("moe_kernels")) or config.get("experts_implementation") == "moe_kernels"


def _check_steps(run: RunSpec, warmup: int) -> None:
    if not isinstance(run.config.get("max_steps"), int):
        raise UsageError(f"{run.source} sets no max_steps. Cure: add --steps 60.")
    if run.steps < warmup + 3:
        raise UsageError(
            f"{run.steps} steps leave less than the three to time after {warmup} warm-up steps. "
            f"Cure: --steps {warmup + 3} or more, or a smaller --warmup-steps."
        )
