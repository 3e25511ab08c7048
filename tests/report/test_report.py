"""The report of a run: what it says of what was counted."""

from __future__ import annotations

import math

import pytest
from report_samples import full_report, sample_records, sample_report

from fomoe_ext.placement.overlap import reason
from fomoe_ext.report.course import Course, course_of, loss_table, read_course, sparkline
from fomoe_ext.report.report import markdown, report_tables
from fomoe_ext.report.spent import time_parts


def table_of(report, title, course=None):
    (table,) = [table for table in report_tables(report, course) if table.title == title]
    return table


def test_report_says_what_was_counted():
    text = markdown(sample_report())
    for line in (
        "| validation bits per byte | 2.160 |",
        "| tokens/s, all sites | 90 in rounds, 75 overall |",
        "| meetings, site 0 | 1 kB | 1 kB | 2.5 kB | 40 kB | 2.50x | 40.00x |",
        "| validation, site 0 | 5 B |  |  |  |  |  |",
        "| site / full | 50.0% | 50.0% | - | 50.0% |",
        "| site 0 | 1.0 s | 9.0 s | 1.0 s | 0.5 s | 0.5 s | 12.0 s |",
        "| site 0 | 100 | 90.0% | 4.0 s | 75.0% | 25.0% |",
        "| expert 3 | 2.00 | 1.60 |",
        "Counted and predicted equal.",
    ):
        assert line in text, text
    assert "(none without overlap)" in text and "Link:" not in text and "restored" not in text
    report = sample_report()
    report["run"] |= {"sites": 2, "link": "1 Mbit/s: counted delays", "overlap": 4}
    report["sites"][0] |= {"bytes_sent": 1024, "healed": 2}
    text = markdown(report)
    assert "Counted and predicted differ by 24 bytes" in text and "| 1.02 kB | 1 kB |" in text
    assert "| same bits on all holders | after 3 meetings |" in text
    assert "| tensors restored from a majority | 2 |" in text
    assert "(1 fragments, 4 steps of overlap). Link: 1 Mbit/s: counted delays." in text
    report["run"]["overlap_reason"] = reason(4, 3.2, 16)
    assert (
        "4 steps of overlap). Chosen: overlap 4: the exchange takes 3.2 steps; more would only "
        "make deltas older. Link:"
    ) in markdown(report)


def test_equal_sites_have_one_row_and_others_their_own():
    equal = report_tables(sample_report(num_sites=4))
    labels = [row[0] for table in equal for row in table.rows if "site" in row[0]]
    assert not [label for label in labels if label.startswith("site ") and label[5].isdigit()]
    assert labels.count("each site") == 3  # memory, time, training
    report = sample_report(num_sites=4)
    report["sites"][2]["local_s"] = 20.0
    times = [row[0] for row in table_of(report, "Time").rows]
    assert times == ["sites 0-1, 3", "site 2"]
    bytes_ = table_of(report, "Bytes sent").rows
    assert [row[:2] for row in bytes_] == [
        ("meetings, each site", "1 kB"),
        ("validation, each site", "5 B"),
        ("all sites together", "4.02 kB"),
    ]


def test_what_did_not_happen_has_no_column():
    report = sample_report(num_sites=2)
    for site in report["sites"]:
        site |= {"skipped_share": 0.0, "exchange_s": 0.0, "validation_bytes": 0}
    assert table_of(report, "Training").columns == ("", "tokens/s", "training share")
    assert "kipped" not in markdown(report)
    assert [row[0] for row in table_of(report, "Bytes sent").rows][1:] == ["all sites together"]
    assert "moved" in markdown(full_report())


def test_the_parts_of_the_time_are_the_whole():
    site = sample_report()["sites"][0]
    assert time_parts(site)["checkpoints and other"] == pytest.approx(0.5)
    assert sum(time_parts(site).values()) == pytest.approx(site["wall_s"])
    before = {key: value for key, value in site.items() if key not in ("startup_s", "wall_s")}
    assert sum(time_parts(before).values()) == 10.5  # a report of an earlier version


def test_loads_of_many_layers_are_summed_up():
    table = report_tables(sample_report(num_experts=4, num_layers=30))[-1]
    assert table.columns == ("", "least", "most", "spread") and len(table.rows) == 30
    assert table.rows[0] == ("layer 0", "0.00", "2.00", "0.75")


# ---- the loss ------------------------------------------------------------------------------------


def test_the_course_of_the_loss_stands_beside_uniform_guessing():
    course = course_of(sample_records())
    table = loss_table(sample_report(), course)
    assert table is not None
    uniform, training, validation = table.rows
    assert uniform == ("uniform guessing", "5.5452", "", "", f"{math.log(256) * 1.44:.3f}")
    assert training[1] == "5.0300" and training[3] == "1.5077" and len(training[2]) == 40
    assert training[2][0] > training[2][10] > training[2][-1]  # bars fall with the loss
    assert validation[2] == "▃▁▁▁▁" and validation[3] == "1.4077"
    assert table.note.startswith("First: the training of round 1 and the validation of round 10.")
    assert "Loss, nats per token" in markdown(sample_report(), course)
    assert loss_table(sample_report(), Course([], [])) is None


def test_a_course_adds_up_tokens_and_bytes_and_knows_its_sites():
    course = course_of(sample_records(rounds=3, sites=2))
    assert [point.tokens for point in course.training] == [5000, 10_000, 15_000]
    assert [point.sent for point in course.training] == [1000, 2000, 3000]
    first, second, _ = course.training
    assert first.high - first.low == pytest.approx(0.1)
    assert second.high == second.low  # the other site's was no number
    old = [{"kind": "round", "round": 1, "step": 5, "loss": 2.0, "bytes_sent": 7}]
    (point,) = course_of(old).training
    assert (point.tokens, point.sent, point.low, point.high) == (None, 7, 2.0, 2.0)


def test_bars_are_means_and_show_what_is_no_number():
    assert sparkline([0.0, 1.0, 2.0, math.nan], 0.0, 2.0) == "▁▅█·"
    assert sparkline([0.0, 2.0] * 40, 0.0, 2.0, width=40) == "▅" * 40
    assert sparkline([1.0], 1.0, 1.0) == "▁" and sparkline([], 0.0, 1.0) == ""


def test_a_folder_without_metrics_has_no_course(tmp_path):
    assert read_course(tmp_path) == Course([], [])
