"""The page of every message that this package can end with, read from its sources.

``PYTHONPATH=tests python -m support.error_index --write docs/errors.md``; a test compares the page with the sources.
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path

import moe_kernels

SOURCES = Path(moe_kernels.__file__).parents[1]
#: Raised by tests' helpers, or passed on to one of the others.
LEFT_OUT = ("moe_kernels/tools/check/", "moe_kernels/tools/compare/decode.py")
NOT_FOR_USERS = ("AssertionError", "AttributeError", "Exit", "KeyboardInterrupt", "Misfit")
AREAS = {
    "axolotl/": "While a run file is read, or in a training",
    "moe_kernels/integrations/": "While a model is loaded, or in its forward",
    "moe_kernels/telemetry/": "While a model is loaded, or in its forward",
    "moe_kernels/tools/compare/": "moe-kernels compare",
    "moe_kernels/tools/prepare/": "moe-kernels prepare",
    "moe_kernels/tools/bench/": "moe-kernels bench and tune",
    "moe_kernels/tools/": "Other commands",
    "moe_kernels/": "In fused_experts and the other functions",
}
HEAD = """# Error messages

Most messages that this package can end with: those that its sources raise with a literal text. Three dots stand for
what is filled in. What needs more words is in [Troubleshooting](troubleshooting.md).
`PYTHONPATH=tests python -m support.error_index --write docs/errors.md` writes this page.
"""


def messages() -> dict[str, list[tuple[str, str]]]:
    """(message, file) of every raise in the sources, by area, in the order of the text."""
    found: dict[str, set[tuple[str, str]]] = {}
    for path in sorted(SOURCES.rglob("*.py")):
        file = path.relative_to(SOURCES).as_posix()
        if file.startswith(LEFT_OUT) or not file.startswith(("axolotl/integrations/moe_kernels/", "moe_kernels/")):
            continue
        area = next(title for prefix, title in AREAS.items() if file.startswith(prefix))
        for node in ast.walk(ast.parse(path.read_text())):
            text = _message(node)
            if text:
                found.setdefault(area, set()).add((text, file))
    areas = [area for area in dict.fromkeys(AREAS.values()) if area in found]
    return {area: sorted(found[area], key=lambda pair: (pair[0].lower(), pair)) for area in areas}


def _message(node: ast.AST) -> str:
    """The message of a ``raise Error("...")`` or of an ``UnsupportedExperts.of(module, "...")``; else nothing."""
    if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
        return ""
    name = ast.unparse(node.exc.func)
    if name.rpartition(".")[2] in NOT_FOR_USERS or not node.exc.args:
        return ""
    text = "".join(_text(argument) for argument in node.exc.args)
    return " ".join(text.split()) if text.strip(" …") else ""


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return "…" if isinstance(node, ast.FormattedValue) else ""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for area, rows in messages().items():
        parts.append(f"\n## {area}\n\n| message | raised in |\n| --- | --- |")
        parts += [f"| {_cell(text)} | `{file}` |" for text, file in rows]
    return "\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("[", "\\[").replace("*", "\\*")


def main() -> int:
    """Print the page, or write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", type=Path)
    wanted = parser.parse_args()
    if wanted.write:
        wanted.write.write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
