"""The command line. Each command's body lives in its own module and is imported when the command runs."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import click
import typer
from rich.console import Console
from typer.core import TyperGroup

import moe_kernels
from moe_kernels.tools.common.errors import CommandError, UsageError, failed_io, missing_module
from moe_kernels.tools.common.network import stay_offline

HELP = """Train Mixture-of-Experts models with fast expert layers, and see what they buy on this machine.

Exit codes: 0 all is well, 1 a check, a claim or a training failed, 2 wrong usage or configuration,
3 something is missing on this machine (the message names the cure)."""


@dataclass(frozen=True)
class Entry:
    """One command: where its body is, its line in the overview, and examples of its arguments."""

    body: str
    summary: str
    examples: tuple[str, ...]


COMMANDS: dict[str, Entry] = {
    "compare": Entry(
        "moe_kernels.tools.compare.command:compare",
        "Train a model pair with and without the kernels and write the side-by-side report.",
        (
            "compare mixtral",
            "compare all --fresh",
            "compare qwen3-moe --lora 64",
            "compare qwen3-moe --fp8",
            "compare gpt-oss --liger --set gradient_checkpointing_kwargs.use_reentrant=true",
            "compare qwen3-moe gpt-oss --size tiny",
            "compare baseline.yml optimized.yml",
        ),
    ),
    "prepare": Entry(
        "moe_kernels.tools.prepare.command:prepare",
        "Make the 1B (or tiny) models, the tokenizer and the data, offline.",
        ("prepare mixtral-1b", "prepare deepseek-v3-1b --size tiny"),
    ),
    "bench": Entry(
        "moe_kernels.tools.bench.command:bench",
        "Time one expert layer against other implementations, correctness first.",
        (
            "bench",
            "bench --shapes all --peers all --routing all --json bench.json --plots plots",
            "bench --shapes mixtral-1b --group-sizes 64,128,256,auto --persistent both",
            "bench --shapes qwen3-30b-a3b --form frozen,lora-16,fp8-lora-16",
        ),
    ),
    "tune": Entry(
        "moe_kernels.tools.bench.tune:tune",
        "Find and verify the fastest tiles for given layers on this GPU.",
        ("tune", "tune --shapes qwen3-30b-a3b,olmoe-7b --group-sizes 64,128"),
    ),
    "plan": Entry(
        "moe_kernels.tools.plan.command:plan",
        "Estimate memory, traffic and tokens/s on many GPUs from measured kernel rates.",
        ("plan --other-tflops 300", "plan --models deepseek-v3 --gpus 128,256 --network-link 50 --json"),
    ),
    "doctor": Entry(
        "moe_kernels.tools.doctor:doctor",
        "Say what will run on this machine, and why not more.",
        ("doctor", "doctor --json"),
    ),
    "verify": Entry(
        "moe_kernels.tools.verify:verify",
        "Check output and every gradient of every kernel configuration, of a model's layers or of hostile ones.",
        (
            "verify",
            "verify configs/moe/qwen3-30b-a3b-lora.yml",
            "verify --shapes mixtral-1b --dtype fp16",
            "verify --form lora-16,qlora-16",
        ),
    ),
}


class LazyCommand(click.Command):
    """Stands in for a command until it runs, so that `--help` imports neither torch nor transformers."""

    def __init__(self, name: str, entry: Entry) -> None:
        super().__init__(name, help=entry.summary, short_help=entry.summary)
        self.rich_help_panel = "Commands"
        self.entry = entry

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: object
    ) -> click.Context:
        module, _, function = self.entry.body.partition(":")
        body = getattr(importlib.import_module(module), function)
        examples = "\n\n".join(["Examples:", *(f"  $ moe-kernels {example}" for example in self.entry.examples)])
        one = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        # Joined lines: typer would break them where the source does, and at the terminal's edge as well.
        paragraphs = [" ".join(paragraph.split()) for paragraph in (body.__doc__ or "").split("\n\n")]
        one.command(self.name, help="\n\n".join(paragraphs), epilog=examples)(body)
        return typer.main.get_command(one).make_context(info_name, args, parent, **extra)


class Commands(TyperGroup):
    """Finds the commands by name, and turns an expected failure into a sentence and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get(cmd_name)
        return None if entry is None else LazyCommand(cmd_name, entry)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (CommandError, ModuleNotFoundError, OSError, ValueError) as error:
            failure = _expected(error)
            if failure is None:
                raise
            console = Console(stderr=True, highlight=False)
            console.print(str(failure), style="red", markup=False, soft_wrap=True)
            raise typer.Exit(failure.exit_code) from error


def _expected(error: Exception) -> CommandError | None:
    """The sentence and the exit code for a failure that a user can cure; None for a bug."""
    if isinstance(error, CommandError):
        return error
    if isinstance(error, ModuleNotFoundError):
        return missing_module(error)
    if isinstance(error, OSError):
        return failed_io(error)
    return UsageError(str(error)) if type(error).__module__.startswith("moe_kernels.") else None


app = typer.Typer(
    name="moe-kernels",
    cls=Commands,
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moe-kernels {moe_kernels.__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    """Options before the command."""


def main() -> None:
    """Entry point of the `moe-kernels` script and of `python -m moe_kernels`."""
    stay_offline()
    app()
