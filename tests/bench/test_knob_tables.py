"""The tables of YAML keys are those of the plugin's schema, and the schema has the values and defaults that run."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel, Field

import make_knob_tables as knobs
from moe_kernels.settings import GROUP_SIZES, ExpertsSettings

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "make_knob_tables.py"


def test_the_pages_are_up_to_date():
    subprocess.run([sys.executable, str(SCRIPT), "--check"], check=True, timeout=60)


@pytest.mark.parametrize("page", knobs.DOCUMENTS)
def test_a_stale_page_is_named_and_rewritten(page, tmp_path):
    for name in knobs.DOCUMENTS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    fresh = (tmp_path / page).read_text()
    (tmp_path / page).write_text(fresh.replace("| `moe_recompute` |", "| `moe_again` |"))
    command = [sys.executable, str(SCRIPT), "--root", str(tmp_path)]
    stale = subprocess.run([*command, "--check"], capture_output=True, text=True, timeout=60)
    assert stale.returncode == 1
    assert stale.stderr.startswith(f"{page} is out of date. Cure:")
    subprocess.run(command, check=True, timeout=60)
    assert (tmp_path / page).read_text() == fresh


def test_every_key_says_what_it_does_and_its_default():
    fields = knobs.schema().model_fields
    assert all(text and default for text, default in (knobs.meaning(*item) for item in fields.items()))

    class Bad(BaseModel):
        without: bool | None = None
        no_default: bool | None = Field(default=None, description="Does something.")

    for item in Bad.model_fields.items():
        with pytest.raises(SystemExit, match=rf'{item[0]} needs a description that ends with "Default: value\."'):
            knobs.meaning(*item)


def test_the_schema_has_the_values_and_defaults_of_the_settings():
    fields = knobs.schema().model_fields
    assert knobs.values(fields["moe_group_size"].annotation) == [str(size) for size in GROUP_SIZES]
    for key, argument in knobs.ARGUMENTS.items():
        assert knobs.meaning(key, fields[key])[1] == str(getattr(ExpertsSettings(), argument)).lower()
