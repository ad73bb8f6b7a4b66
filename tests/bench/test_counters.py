"""benchmarks/counters.py, which needs a GPU whose counters may be read: its reading of ncu's page."""

import csv
import io

import pytest

import counters


def page(kernels, units=None):
    """What ncu prints with --csv --page raw: names, units, one kernel in each row."""
    metrics = [metric for metric, _ in counters.METRICS.values()]
    kinds = dict.fromkeys(metrics, "%") | {
        "gpu__time_duration.sum": "ns", "sm__cycles_elapsed.max": "cycle",
        **{metric: "byte" for metric in metrics if "bytes" in metric}, **(units or {}),
    }  # fmt: skip
    text = io.StringIO()
    table = csv.writer(text, quoting=csv.QUOTE_ALL)
    table.writerow(["ID", "Kernel Name", *metrics])
    table.writerow(["", "", *(kinds[metric] for metric in metrics)])
    for number in range(kernels):
        values = {"gpu__time_duration.sum": f"{1_500_000 + number:,}", "sm__cycles_elapsed.max": "3,000,000"}
        table.writerow([number, "hopper", *(values.get(metric, "2,000,000,000") for metric in metrics)])
    return "==PROF== Connected to process 1\n" + text.getvalue()


def test_a_row_for_each_step_in_milliseconds_and_gigabytes():
    rows = counters.parsed(page(len(counters.STEPS)))
    assert [row["step"] for row in rows] == list(counters.STEPS)
    assert rows[0]["ms"] == 1.5
    assert rows[0]["dram_read_gb"] == 2
    assert rows[0]["clock_ghz"] == 2


def test_another_number_of_kernels_and_other_units_are_refused():
    with pytest.raises(SystemExit, match="5 kernels, not the 6"):
        counters.parsed(page(5))
    with pytest.raises(SystemExit, match="in us"):
        counters.parsed(page(6, {"gpu__time_duration.sum": "us"}))
