"""The page of error messages is that of the sources, and every message is a sentence with a cure or a reason."""

from __future__ import annotations

from pathlib import Path

import yaml

from support import error_index

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_up_to_date() -> None:
    cure = "PYTHONPATH=tests python -m support.error_index --write docs/errors.md"
    assert (ROOT / "docs" / "errors.md").read_text() == error_index.page(), cure


def test_messages_are_found_in_every_form() -> None:
    texts = {text for rows in error_index.messages().values() for text, _ in rows}
    assert any(text.startswith("moe_kernels: true cannot be combined with") for text in texts)
    assert "its weights are stored as …." in texts, "through UnsupportedExperts.of"
    assert "The disk is full: …. What was finished is kept. Cure: free some space, and run this again." not in texts
    assert len(texts) > 80


def test_issue_templates_are_whole() -> None:
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    for path in folder.glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        if path.name != "config.yml":
            assert {"name", "description", "body"} <= set(form)
            assert all(part.get("id") for part in form["body"] if part["type"] != "markdown")
