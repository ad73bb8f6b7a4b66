"""The plugin: selects moe-kernels for the routed experts of the model that Axolotl loads.

The kernels are imported in ``pre_model_load``, not here: Axolotl merely logs an ImportError raised while a
plugin is loaded, and then trains without it, whereas an ImportError in a hook ends the run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.utils.logging import get_logger

from .args import mentioned, shards_experts, wraps_any_experts

if TYPE_CHECKING:
    from axolotl.utils.dict import DictDefault

    from moe_kernels.integrations.transformers import Served
    from moe_kernels.settings import ExpertsSettings

LOG = get_logger(__name__)
# Releases of Axolotl, from the first to below the last: those of `moe-kernels doctor` and pyproject.toml.
TRIED = ("0.19", "0.22")


class MoeOptimizedPlugin(BasePlugin):
    """Runs the routed experts on moe-kernels when the config says ``moe_kernels: true``."""

    expert_layers = 0
    awaits_adapter = False

    def get_input_args(self) -> str:
        return "axolotl.integrations.moe_kernels.args.MoeKernelsArgs"

    def register(self, cfg: DictDefault) -> None:
        """See the config as it is in the YAML, before it is validated.

        Raises:
            ValueError: ``axolotl merge-lora`` would lose the experts' part of the adapter.
        """
        loaded = [p for p in PluginManager.get_instance().plugins.values() if isinstance(p, MoeOptimizedPlugin)]
        if self in loaded[1:]:
            # By its entry point and in plugins:, or by two paths. From now on none of its hooks does anything.
            self.__class__ = BasePlugin
            return
        if cfg.get("merge_lora") and not hasattr(BasePlugin, "post_lora_merge"):
            from .merge import refuse_lossy_merge

            refuse_lossy_merge(cfg)
        if cfg.moe_kernels and cfg.adapter == "lora" and not shards_experts(cfg):
            # Axolotl names the implementation after it has loaded a model; mxfp4 is kept as it is loaded.
            cfg.model_kwargs = {"experts_implementation": "moe_kernels", **(cfg.model_kwargs or {})}
        if cfg.moe_kernels and shards_experts(cfg) and wraps_any_experts():
            # Axolotl's expert parallelism looks for the name to wrap in its pre_model_load, which is before ours.
            from axolotl.integrations.expert_parallel.experts_fn import get_local_implementation

            from moe_kernels.integrations.dispatch import register_wrapper
            from moe_kernels.integrations.transformers import register

            register()
            register_wrapper("expert_parallel", get_local_implementation)
            cfg.experts_implementation = cfg.experts_implementation or "moe_kernels"

    def post_lora_merge(self, cfg: DictDefault, adapter_path: str, output_path: str) -> None:
        """Raise if that was lost; Axolotl 0.19 does not ask, see ``register``."""
        if mentioned(cfg):
            from .merge import check_merge

            check_merge(cfg, adapter_path, output_path)

    def pre_model_load(self, cfg: DictDefault) -> None:
        """Register the experts function with the settings of the config, and select it.

        Raises:
            ValueError: the model is not in ``moe_kernel_models``, or no backend runs on this machine.
        """
        if not cfg.moe_kernels:
            experts = cfg.experts_implementation or "transformers' own choice"
            say = LOG.info if mentioned(cfg) else LOG.debug
            say(f"moe_kernels: loaded but inactive, moe_kernels is not true; experts run on {experts}")
            return
        allowed = cfg.moe_kernel_models
        if allowed and cfg.model_config_type not in allowed:
            raise ValueError(
                f"moe_kernel_models lists {', '.join(allowed)}, but {cfg.base_model} has model_type "
                f"{cfg.model_config_type!r}: add it to the list, or set moe_kernels: false."
            )
        from moe_kernels.integrations.transformers import register

        _warn_of_untried_axolotl()
        settings = _settings(cfg)
        backend, reason = _backend_here(cfg, settings)
        LOG.info(f"moe_kernels: backend {backend} because {reason}")
        if backend == "torch":
            LOG.warning(
                "moe_kernels: the plain-torch backend proves that a config works, not speed. Without a GPU, "
                "Trainer refuses bf16: set bf16: false and fp16: false."
            )
        register(
            group_size=settings.group_size,
            persistent=settings.persistent,
            recompute=settings.recompute,
            fp8_activations=bool(cfg.moe_fp8_activations),
        )
        # DeepSpeed's ZeRO-3 needs reentrance.
        if (
            cfg.gradient_checkpointing
            and (cfg.gradient_checkpointing_kwargs or {}).get("use_reentrant")
            and not cfg.deepspeed
        ):
            LOG.info(
                "moe_kernels: gradient_checkpointing_kwargs: {use_reentrant: false} would make a step shorter: "
                "the down projection is then not computed again, unless a shared expert comes after the routed ones."
            )
        if cfg.experts_implementation != "expert_parallel":  # which runs ours on the rows of each rank
            cfg.experts_implementation = "moe_kernels"

    def post_model_load(self, cfg: DictDefault, model: Any) -> None:
        """Raise UnsupportedExperts, before training, if not every expert layer would be served.

        Raises:
            ValueError: Axolotl would stop in the middle of the training, with these kernels or without.
        """
        # The trainers of preference and reinforcement learning add that loss themselves.
        if (cfg.moe_kernels or cfg.moe_router_telemetry) and not cfg.rl:
            from .telemetry import idle_balancing

            idle = idle_balancing(model)
            if idle:
                LOG.warning(f"moe_kernels: {idle}")
        if cfg.moe_fused_router:
            from moe_kernels.integrations.router import install_fused_router

            LOG.info(f"moe_kernels: fused router in {install_fused_router(model)} layers of {type(model).__name__}")
        if not cfg.moe_kernels:
            return
        served = _check(cfg, model)
        self.expert_layers = int(served)
        LOG.info(f"moe_kernels: serves the {self.expert_layers} expert layers of {type(model).__name__}")
        # With rl: dpo, ipo and kto Axolotl leaves the adapter to TRL's trainer, which puts it on as it is made.
        self.awaits_adapter = bool(cfg.adapter) and not hasattr(model, "peft_config")
        if self.awaits_adapter and cfg.lora_model_dir:
            raise ValueError(
                "rl: dpo, ipo and kto leave the adapter in lora_model_dir out: Axolotl hands the trainer the keys of "
                "a new one, with these kernels or without. Merge it first (axolotl merge-lora), name what was merged "
                "as base_model, and remove lora_model_dir."
            )
        if cfg.adapter and not self.awaits_adapter:
            _say_adapted(served)

    def post_trainer_create(self, cfg: DictDefault, trainer: Any) -> None:
        """Check the adapter that the trainer put on, as ``post_model_load`` does every other."""
        if cfg.moe_kernels and self.awaits_adapter:
            _say_adapted(_check(cfg, trainer.model))

    def add_callbacks_post_trainer(self, cfg: DictDefault, trainer: Any) -> list[Any]:
        callbacks: list[Any] = []
        if cfg.moe_kernels:
            from .callback import DispatchCallback

            callbacks.append(DispatchCallback(trainer, _settings(cfg), self.expert_layers))
        if cfg.moe_router_telemetry:
            from moe_kernels.telemetry.counter import RouterCounter

            from .telemetry import RouterCallback

            counter = RouterCounter(trainer.model)  # not of a reference model, which is loaded as well
            LOG.info(f"moe_kernels: router telemetry of {len(counter.layers)} expert layers")
            each_layer = cfg.moe_router_telemetry == "layers"
            callbacks.append(RouterCallback(trainer, counter, cfg.output_dir, each_layer))
        return callbacks


def _check(cfg: DictDefault, model: Any) -> Served:
    """The expert layers and the adapters of ``model``, of which nothing would be refused in the training."""
    from moe_kernels.integrations.transformers import check_model

    with _autocast(cfg, model):
        served = check_model(model, _lora_targets(cfg))
    if cfg.relora and served.lora_weights:
        raise ValueError(
            "relora: true ends at its first restart where LoRA is on expert weights: Axolotl's restart takes "
            "each adapter for that of a linear layer. Set relora: false, or leave the experts out of "
            "lora_target_parameters and lora_target_modules."
        )
    return served


def _say_adapted(served: Served) -> None:
    # Also without lora_target_parameters: PEFT makes some lora_target_modules into parameters.
    LOG.info(
        f"moe_kernels: LoRA of {served.lora_weights} expert weights runs inside the kernels; it trains "
        f"(parameters): {served.adapted}"
    )


def _lora_targets(cfg: DictDefault) -> list[str]:
    """What the run file names for LoRA, as modules and as parameters."""
    lists = (cfg.lora_target_modules, cfg.lora_target_parameters)
    named = [name for names in lists for name in ([names] if isinstance(names, str) else names or ())]
    return [*named, "all-linear"] if cfg.lora_target_linear else named


def _warn_of_untried_axolotl() -> None:
    from importlib.metadata import version

    from packaging.version import Version

    first, last = TRIED
    installed = version("axolotl")
    if not Version(first).release <= Version(installed).release < Version(last).release:
        LOG.warning(
            f"moe_kernels: Axolotl {installed} was not tried, {first} to below {last} were: if something fails, "
            f"pip install 'axolotl>={first},<{last}'."
        )


def _settings(cfg: DictDefault) -> ExpertsSettings:
    from moe_kernels.settings import ExpertsSettings

    asked = {
        "group_size": cfg.moe_group_size,
        "persistent": cfg.moe_persistent_kernel,
        "recompute": cfg.moe_recompute,
    }
    return ExpertsSettings(**{name: value for name, value in asked.items() if value is not None})


def _autocast(cfg: DictDefault, model: Any) -> Any:
    """As the Trainer runs the model: there two dtypes in one layer are both cast."""
    import torch

    from moe_kernels.integrations.probe import probe_device

    mixed = cfg.bf16 != "full" and bool(cfg.bf16 or cfg.bfloat16 or cfg.fp16)
    dtype = torch.float16 if cfg.fp16 and not cfg.bf16 else torch.bfloat16
    return torch.autocast(probe_device(model).type, dtype, enabled=mixed)


def _backend_here(cfg: DictDefault, settings: ExpertsSettings) -> tuple[str, str]:
    """The backend for this machine and dtype, and why. The model's sizes are judged when it runs."""
    import torch

    from moe_kernels.backends import Problem, device_capability, select

    device = torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu").device
    problem = Problem(
        device_type=device.type,
        capability=device_capability(device),
        dtype=cfg.torch_dtype or torch.float32,
        experts=8,
        top_k=2,
        hidden=1024,
        intermediate=1024,
        group_size=settings.group_size,
        persistent=settings.persistent,
    )
    return select(problem, settings.backend)
