"""`fomoe plan`: jobs side by side, flags, fits and pictures."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from planned_job import config_of

import fomoe_ext
from fomoe_ext import cli
from fomoe_ext.config.io import parse_args
from fomoe_ext.placement.wire import Link
from fomoe_ext.plan import args as plan_args
from fomoe_ext.plan import cost as plan_cost
from fomoe_ext.plan import jobs as plan_jobs
from fomoe_ext.plan import memory as plan_memory
from fomoe_ext.plan import traffic as plan
from fomoe_ext.plan.command import parse_gpu, parse_memory
from fomoe_ext.plan.report import make_plan

LINK = Link(1e9, 0.05)
SPEED = 989e12 * 0.4


def told(capsys, *arguments: str) -> dict:
    assert cli.main(["plan", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


# ---- side by side --------------------------------------------------------------------------------


def test_large_models_are_not_limited_by_buckets(capsys):
    """13.3 billion parameters at 8 sites: buckets of 4 MiB take five times as long for topk."""
    job = ["--preset", "13.3b", "--sites", "8", "--replication", "2"]
    jobs = told(capsys, *job)["jobs"]
    small = told(capsys, *job, "--bucket-bytes", str(4 << 20))["jobs"]
    for name, cost in jobs.items():
        assert cost["limit"] == "bandwidth", name
        assert cost["meeting_s"] <= small[name]["meeting_s"]
        assert cost["meeting_memory"] < cost["memory"] / 50
    assert jobs["FoMoE, topk"]["meeting_s"] < 8.2 and small["FoMoE, topk"]["meeting_s"] > 41
    assert small["FoMoE, topk"]["limit"] == "latency x buckets"
    assert cli.main(["plan", *job]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "by none" not in shown and "max 98." in shown  # int8, for 99 %
    assert "Limited by bandwidth: the link is full;" in shown


def test_the_plan_of_a_chosen_overlap_says_why(capsys):
    job = ["--preset", "54m", "--codec", "int4", "--local-steps", "64", "--overlap", "auto"]
    planned = told(capsys, *job)
    own = planned["jobs"][planned["job"]]
    steps = own["meeting_s"] / own["local_s"] * 64
    assert own["overlap"] == math.ceil(1.25 * steps + 1) < 64
    assert own["hidden_s"] == own["meeting_s"]
    assert cli.main(["plan", *job]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"overlap {own['overlap']}: the exchange takes {steps:.1f} steps; more" in shown


def test_jobs_side_by_side():
    planned = make_plan(config_of("13.3b", outer={"codec": "int4"}), LINK, SPEED)
    jobs = planned["jobs"]
    assert list(jobs) == [
        *("DDP", "full replica", "SPES-style", "FoMoE", "FoMoE, bf16", "FoMoE, int8"),
        *("FoMoE, int4", "FoMoE, int2", "FoMoE, topk"),
    ]
    assert planned["job"] == "FoMoE, int4"
    sent = {name: job["bytes_sent"] for name, job in jobs.items()}
    of_codecs = [sent[name] for name in jobs if name != "SPES-style"]
    assert of_codecs == sorted(of_codecs, reverse=True)
    for codec, bits in (("bf16", 16), ("int8", 8.25), ("int4", 4.25), ("int2", 2.25)):
        assert sent["FoMoE"] == pytest.approx(32 / bits * sent[f"FoMoE, {codec}"], rel=1e-3)
    assert jobs["FoMoE"]["memory"] < jobs["full replica"]["memory"]
    flops = planned["flops_per_token"]
    assert flops["this job"]["experts"] == flops["full replica"]["experts"] / 2


def test_the_job_of_a_plan_is_the_job_that_trains():
    """Also with options that others beside it cannot have."""
    config = config_of(
        model={"router_scope": "resident"},
        sites={"ranks_per_site": 2},
        outer={"codec": "int8-128", "fragments": 2, "overlap": 3, "moment_codecs": ()},
    )
    jobs = plan_jobs.compared_jobs(config)
    assert jobs["FoMoE, int8-128"] is config
    own = plan_jobs.job_cost(config, LINK, SPEED)
    placement = plan.job_placement(config)
    assert own.sent_by_all == sum(plan.meeting_bytes(config, placement, s) for s in range(4))
    tokens = 4 * config.inner.batch_size * config.model.seq_len * config.run.local_steps
    assert own.bytes_per_token == own.sent_by_all / tokens
    assert own.rank_memory == max(
        m.total for s in range(4) for m in plan_memory.rank_memories(config, placement, s)
    )
    assert jobs["DDP"].outer.fragments == 1 and jobs["DDP"].sites.replication == 4
    assert jobs["SPES-style"].model.router_scope == "global"


def test_figures_are_those_of_the_functions():
    config = config_of("54m", outer={"codec": "int8"})
    planned = make_plan(config, LINK, SPEED)
    placement = plan.job_placement(config)
    sent = [plan_cost.sent_bytes(config, placement, site) for site in range(4)]
    site = sent.index(max(sent))
    cost = plan_cost.round_cost(config, placement, LINK, SPEED, site)
    job = planned["jobs"][planned["job"]]
    assert {name: job[name] for name in cost._fields} == cost._asdict()
    assert job["seconds"] == cost.local_s + cost.meeting_s - cost.hidden_s
    assert (job["hidden_s"], job["utilization"]) == (cost.hidden_s, cost.utilization)
    memory = plan_memory.job_memory(config, placement, site)
    assert job["memory_parts"] == memory._asdict() and job["memory"] == memory.total
    for text, needed in job["bandwidth_needed"].items():
        share = int(text.rstrip("%")) / 100
        assert needed == plan_cost.bandwidth_needed(cost, share, LINK.latency)
        if needed is not None:
            assert cost.over(Link(needed, LINK.latency)).utilization == pytest.approx(share)
    counts = plan_jobs.sizes_of(config.model).counts
    assert planned["parameters"] == {
        "total": counts.total,
        "dense": counts.dense,
        "experts": counts.sparse,
        "routers": counts.router,
    }
    full = planned["jobs"]["full replica"]["bytes_sent"]
    fp32 = dataclasses.replace(config, outer=dataclasses.replace(config.outer, codec="fp32"))
    assert full == plan.full_replica_bytes(fp32, 1)


def test_spes_stores_and_computes_all_and_trains_its_own():
    """By hand, for sites that own 4 of 16 experts per layer."""
    planned = make_plan(config_of(), LINK, SPEED)
    spes, ddp, mine = (planned["jobs"][n] for n in ("SPES-style", "DDP", "FoMoE"))
    model, counts = config_of().model, planned["parameters"]
    trained = counts["dense"] + counts["routers"] + counts["experts"] // 4
    parts = spes["memory_parts"]
    assert parts["parameters"] == parts["gradients"] == parts["anchor"] == 4 * trained
    assert parts["inner_state"] == 8 * trained and parts["outer_state"] == 0
    assert parts["stale_copies"] == 3 * counts["experts"]  # three quarters of them, fp32
    # All is computed; of three quarters of the experts' work there is no weight gradient.
    flops = planned["flops_per_token"]["full replica"]
    per_token = flops["training"] - 0.75 * flops["experts"]
    assert spes["flops"] == pytest.approx(per_token * planned["tokens_per_round"])
    assert mine["flops"] < spes["flops"] < ddp["flops"]
    # A ring's worth of what all train, and every own expert to each of three others.
    dense = counts["dense"] + counts["routers"]
    own = model.num_layers * 4 * 3 * model.intermediate_size * model.hidden_size
    assert spes["bytes_sent"] == pytest.approx(4 * (1.5 * dense + 3 * own), rel=2e-3)


def test_copies_from_a_single_owner_are_counted_in_closed_form():
    from fomoe_ext.placement import stale

    config = plan_jobs.compared_jobs(config_of())["SPES-style"]
    placement = plan.job_placement(config)
    wanted = stale.wanted_copies(placement, -1)
    sends = stale.copy_transfers(placement, wanted)
    size = stale.copy_bytes("fp32", plan_jobs.sizes_of(config.model).expert)
    for site in range(4):
        counted = size * sum(t.source == site for t in sends)
        assert plan.copied_bytes(config, placement, site) == counted
    assert plan.copies_per_layer(config) == len(wanted[0][0])


def test_uneven_owners_have_no_spes():
    config = config_of(sites={"sites": 8, "replication": 4}, model={"num_experts": 12, "top_k": 2})
    assert "SPES-style" not in plan_jobs.compared_jobs(config)


# ---- flags ---------------------------------------------------------------------------------------


def test_the_link_and_the_gpu(capsys):
    planned = told(capsys, "--preset", "54m", "--link", "200mbit", "--gpu-peak", "100")
    assert planned["link"] == {"bandwidth": 2e8, "latency": 0.05}
    assert planned["flops_per_s"] == pytest.approx(100e12 * 0.4)
    gpu = ["--mfu", "0.5", "--gpu-peak", "H200", "--ranks-per-site", "2"]
    planned = told(capsys, "--link", "2gbit,10ms", *gpu)
    assert planned["link"] == {"bandwidth": 2e9, "latency": 0.01}
    assert planned["flops_per_s"] == pytest.approx(989e12 * 0.5 * 2)
    assert told(capsys)["link"] == {"bandwidth": 1e9, "latency": 0.05}
    assert told(capsys, "--link", "1gbit,0ms")["link"]["latency"] == 0
    for bad in (["--gpu-peak", "v100"], ["--mfu", "1.5"], ["--fit", "80 apples"], ["--no-such"]):
        with pytest.raises(SystemExit):
            cli.main(["plan", *bad])
    for text in ("0", "nan", "inf", "-3", "h300"):
        with pytest.raises(ValueError, match="gpu_peak"):
            parse_gpu(text)


def test_the_link_of_a_file_is_the_planned_one(tmp_path, capsys):
    (tmp_path / "job.toml").write_text('[sites]\nlink = "100mbit,5ms"\n')
    planned = told(capsys, "--config", str(tmp_path / "job.toml"))
    assert planned["link"] == {"bandwidth": 1e8, "latency": 0.005}


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80e9), ("79GiB", 79 * 2**30), ("1.5 tb", 1.5e12), ("7B", 7)]
)
def test_memory_sizes(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["80", "GB", "0GB", "-1GB", "80GBit", "1e3GB"])
def test_wrong_memory_sizes(text):
    with pytest.raises(ValueError, match="fit must be a size"):
        parse_memory(text)


def test_one_site_sends_nothing(capsys):
    planned = told(capsys, "--sites", "1", "--replication", "1")
    assert {job["bytes_sent"] for job in planned["jobs"].values()} == {0}
    assert planned["paper"]["payload_ratio"] == 1
    assert cli.main(["plan", "--sites", "1", "--replication", "1"]) == 0


def test_tables(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["plan", "--sites=8", "--replication=4", "--ranks-per-site=2"]) == 0
    shown = capsys.readouterr().out.replace("\n", " ")
    for text in ("full replica", "SPES-style", "FoMoE, int4 *", "fullest rank", "By the formulas"):
        assert text in shown


FLAGS = [
    [],
    ["--preset", "54m", "--sites=8", "--replication", "2", "--codec", "int4", "--link", "1gbit"],
    ["--expert-bias", "--no-tensorboard", "--inner-lr", "1e-3", "--grad-clip=0", "--seed", "7"],
    ["--config", "job.toml", "--outer-momentum", "0.5", "--spread-by", "x", "--ranks-per-site=2"],
    ["--moment-periods", "3", "6", "--optimizer", "local-adamw"],
    ["--resume", "--rounds", "5"],
    ["--overlap", "auto", "--local-steps", "8"],
    ["--overlap=3", "--local-steps", "8", "--bucket-bytes", "0"],
    ["--weight-decay", ".1", "--outer-lr", "None", "--router_scope", "resident"],
]


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_mean_what_they_mean_to_train(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("job.toml").write_text("preset = '54m'\n[run]\nrounds = 3\n[outer]\ncodec = 'int2'\n")
    assert plan_args.parse_job(flags) == parse_args(flags)


def test_plain_flags_are_read_without_tyro(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)  # importing it raises
    assert told(capsys, *FLAGS[1])["sites"] == 8
    with pytest.raises(ImportError):
        cli.main(["plan", "--sites", "many"])


def test_every_flag_is_read():
    """Every kind of field has a plain form, but for lists."""
    config = config_of("153m", outer={"outer_lr": 0.5, "outer_momentum": 0.1})
    for section in ("model", "sites", "inner", "outer", "run", "data"):
        for field in dataclasses.fields(getattr(config, section)):
            value = getattr(getattr(config, section), field.name)
            if value is None or isinstance(value, tuple):
                continue
            flag = "--" + field.name.replace("_", "-")
            args = [flag, str(value)]
            if isinstance(value, bool):
                args = [flag if value else "--no-" + flag[2:]]
            preset = ["--preset", "153m", "--outer-lr=0.5", "--outer-momentum=0.1"]
            assert plan_args._plain_job([*preset, *args]) == config, args


def test_planning_needs_no_torch():
    code = """
import sys
sys.path.insert(0, sys.argv[1])
from fomoe_ext.cli import main
code = main(["plan", "--preset", "104b", "--json", "--fit", "4TB"])
loaded = {"torch", "numpy", "transformers", "matplotlib", "tyro"} & set(sys.modules)
sys.exit(f"loaded: {loaded}" if loaded else code)
"""
    home = str(Path(fomoe_ext.__file__).parent.parent)
    result = subprocess.run(
        [sys.executable, "-P", "-c", code, home], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


# ---- what fits -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "scope"), [(1, "global"), (2, "resident")])
def test_fit_chooses_what_trying_all_chooses(ranks, scope, capsys):
    flags = ["--preset", "54m", "--sites", "4", "--router-scope", scope]
    flags += ["--ranks-per-site", str(ranks), "--codec", "int8-128", "--link", "1gbit"]
    tried = []
    for replication in (4, 3, 2, 1):
        for codec in ("fp32", "bf16", "int8", "int4", "int2", "int8-128"):
            job = parse_args([*flags, "--replication", str(replication), "--codec", codec])
            cost = plan_jobs.job_cost(job, LINK, SPEED * ranks)
            tried.append((cost.round.seconds, replication, codec, cost.peak_memory))
    sizes = sorted({memory for *_, memory in tried})
    assert len(sizes) >= 8
    for limit in (sizes[0], sizes[len(sizes) // 2], sizes[-1]):
        best = None
        for row in tried:
            if row[3] <= limit and (best is None or row[0] < best[0]):
                best = row
        planned = told(capsys, *flags, "--fit", f"{limit}B")
        fit = planned["fit"]
        names = ("seconds", "replication", "codec", "memory")
        assert tuple(fit["choice"][name] for name in names) == best
        found = [tuple(candidate[name] for name in names) for candidate in fit["candidates"]]
        assert found == tried
        assert [c["fits"] for c in fit["candidates"]] == [row[3] <= limit for row in tried]
        assert (planned["replication"], planned["codec"]) == best[1:3]


def test_fit_shows_the_candidates(capsys):
    assert cli.main(["plan", "--preset", "54m", "--fit", "1.375GB"]) == 0
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if "chosen" in line]
    assert len(lines) == 1 and "What fits into 1.38 GB" in shown


def test_nothing_fits(capsys):
    assert cli.main(["plan", "--preset", "54m", "--fit", "1GB"]) == 1
    output = capsys.readouterr()
    assert "nothing fits into 1 GB: the least is 1.37 GB, with replication 1" in output.err
    assert "chosen" not in output.out
    assert cli.main(["plan", "--preset", "54m", "--fit", "1GB", "--json"]) == 1
    fit = json.loads(capsys.readouterr().out)["fit"]
    assert fit["choice"] is None
    assert fit["smallest_memory"] == min(c["memory"] for c in fit["candidates"])


def test_a_given_table_has_one_replication(tmp_path):
    config = config_of()
    table = plan.job_placement(config).to_dict()["owners"]
    (tmp_path / "table.json").write_text(json.dumps(table))
    fixed = config_of(sites={"placement_file": tmp_path / "table.json"})
    assert plan_jobs.possible_replications(fixed) == [2]
    assert plan_jobs.possible_replications(config) == [1, 2, 3, 4]
    twelve = config_of(sites={"sites": 8, "replication": 2}, model={"num_experts": 12})
    assert plan_jobs.possible_replications(twelve) == [2, 4, 6, 8]


# ---- pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ending", "sites"), [("svg", "4"), ("png", "2")])
def test_plot(ending, sites, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file = tmp_path / f"plan.{ending}"
    assert cli.main(["plan", "--codec", "int4", "--sites", sites, "--plot", str(file)]) == 0
    content = file.read_bytes()
    if ending == "png":
        assert content.startswith(b"\x89PNG")
    else:
        assert b"</svg>" in content
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_plots_that_cannot_be(tmp_path, monkeypatch, capsys):
    assert cli.main(["plan", "--plot", str(tmp_path / "plan.pdf")]) == 2
    assert "plot must end in .svg or .png" in capsys.readouterr().err
    assert cli.main(["plan", "--plot", str(tmp_path / "none" / "plan.svg")]) == 2
    assert "does not exist" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["plan", "--plot", str(tmp_path / "plan.svg")]) == 2
    assert "fomoe-ext[plot]" in capsys.readouterr().err


def test_bandwidths_of_the_picture_reach_from_little_to_all():
    from fomoe_ext.plan.plot import bandwidths

    # Sites so slow that the range does not end at a tenth of the link.
    costs = dict(plan_jobs.compared_costs(config_of(), LINK, 1e9))
    rates = bandwidths(costs, LINK)
    assert rates == sorted(rates) and rates[0] < LINK.bandwidth < rates[-1]
    leanest = min(costs.values(), key=lambda cost: cost.round.bytes_sent)
    assert 8 * leanest.round.bytes_sent / rates[0] > 9 * leanest.round.local_s
