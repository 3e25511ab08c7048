"""The typed configuration of a training job, its presets and the size of its model.

Nothing here needs torch. `fomoe_ext.config.io` reads and writes these classes (TOML, command line).
Field names are unique over all sections, so that every command-line flag is flat (`--num-layers`).
A `None` default means "decided elsewhere" and is left out of a saved file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from fomoe_ext.config.fault import FaultConfig, check_tolerant
from fomoe_ext.config.links import parse_link
from fomoe_ext.placement import wire
from fomoe_ext.placement.turns import check_turns, counts_tokens

GATED_ACTIVATIONS = ("swiglu", "geglu", "clamped_swiglu")


def _at_least(owner: str, low: float, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value >= low:
            raise ValueError(f"{owner}{name} must be >= {low}, got {value}")


def _inside(owner: str, low: float, high: float, **values: float) -> None:
    for name, value in values.items():
        if not low <= value <= high:
            raise ValueError(f"{owner}{name} must be in [{low}, {high}], got {value}")


@contextmanager
def _in_section(owner: str) -> Iterator[None]:
    """Puts the section before the field that an error names first."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{owner}{error}") from None


@dataclass(frozen=True)
class ModelConfig:
    """The language model: a decoder with RoPE attention and an MoE in every block."""

    vocab_size: int = 256
    """Number of token ids; grown to the tokenizer's when that is larger."""
    seq_len: int = 256
    """Tokens per training sequence."""
    hidden_size: int = 128
    """Width of the residual stream."""
    num_layers: int = 4
    """Number of blocks (attention + MoE)."""
    num_heads: int = 4
    """Attention heads; the head size hidden_size / num_heads must be even."""
    num_experts: int = 16
    """Routed experts per layer, over all sites."""
    expert_size: int = 128
    """Inner width of one routed expert."""
    top_k: int = 2
    """Experts chosen per token."""
    activation: Literal["swiglu", "geglu", "silu", "relu2", "gelu", "clamped_swiglu"] = "swiglu"
    """Activation of the experts; those with glu in their name are gated (two up projections)."""
    expert_bias: bool = False
    """Biases in the routed experts, as gpt-oss has them."""
    scoring: Literal["sigmoid", "softmax"] = "sigmoid"
    """How router logits become scores."""
    router_scope: Literal["global", "resident"] = "global"
    """global: choose among all experts, skip those not resident; resident: among those resident."""
    skipped_mass: Literal["drop", "rescale"] = "drop"
    """drop: a skipped expert's weight is lost; rescale: the token's computed experts share it."""
    renormalize: bool = False
    """Divide the chosen experts' scores by their sum."""
    routed_scale: float = 1.0
    """Factor on the chosen experts' scores."""
    num_groups: int = 1
    """Expert groups for group-limited choice."""
    groups_kept: int = 1
    """Groups a token may choose from."""
    shared_expert_size: int = 0
    """Inner width of an expert that every token uses and every site holds; 0 = none."""
    balance: Literal["none", "switch", "entropy", "bias"] = "bias"
    """Load balancing: an auxiliary loss (switch, entropy) or a learned selection bias, which each
    site moves by its own load and which is averaged at the end of a round (also with ddp)."""
    balance_coef: float = 0.01
    """Weight of the auxiliary balance loss."""
    z_loss_coef: float = 0.0
    """Weight of the router z-loss."""
    bias_update_rate: float = 4e-3
    """Step of the selection bias for balance = bias."""
    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm (without bias) or RMSNorm."""
    rope_base: float = 10000.0
    """Base of the rotary position angles."""
    depth_multiplier: float = 1.0
    """Factor on every block output before it joins the residual stream (CompleteP)."""

    def __post_init__(self) -> None:
        at = "model."
        _at_least(at, 1, vocab_size=self.vocab_size, seq_len=self.seq_len, top_k=self.top_k)
        _at_least(at, 1, hidden_size=self.hidden_size, num_layers=self.num_layers)
        _at_least(at, 1, num_heads=self.num_heads, num_experts=self.num_experts)
        _at_least(at, 1, expert_size=self.expert_size, num_groups=self.num_groups)
        _at_least(at, 0, shared_expert_size=self.shared_expert_size, z_loss_coef=self.z_loss_coef)
        _at_least(at, 0, balance_coef=self.balance_coef, bias_update_rate=self.bias_update_rate)
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            raise ValueError(
                f"model.num_heads must divide model.hidden_size into heads of even size, got "
                f"hidden_size {self.hidden_size} and num_heads {self.num_heads}"
            )
        if self.top_k > self.num_experts:
            raise ValueError(
                f"model.top_k must be <= model.num_experts, got {self.top_k} and {self.num_experts}"
            )
        if self.num_experts % self.num_groups:
            raise ValueError(
                f"model.num_groups must divide model.num_experts, got {self.num_groups} "
                f"and {self.num_experts}"
            )
        _inside(at, 1, self.num_groups, groups_kept=self.groups_kept)
        choosable = self.num_experts // self.num_groups * self.groups_kept
        if self.top_k > choosable:
            raise ValueError(
                f"model.top_k must be <= the {choosable} experts in groups_kept groups, got "
                f"{self.top_k}"
            )
        if not self.rope_base > 1:
            raise ValueError(f"model.rope_base must be > 1, got {self.rope_base}")
        if not (self.depth_multiplier > 0 and self.routed_scale > 0):
            raise ValueError(
                f"model.depth_multiplier and model.routed_scale must be > 0, got "
                f"{self.depth_multiplier} and {self.routed_scale}"
            )

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


class ParameterCounts(NamedTuple):
    """Parameters of a whole model by kind; `dense` is all that is neither expert nor router."""

    dense: int
    sparse: int
    router: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.dense + self.sparse + self.router

    @property
    def sparse_share(self) -> float:
        """Share of all parameters that sits in routed experts, 0..1."""
        return self.sparse / self.total


def expert_matrices(config: ModelConfig, expert_size: int | None = None) -> int:
    """Elements of the matrices of an expert, routed or (of another size) shared: G*N*D up and D*N
    down, G = 2 for gated activations.
    """
    size = config.expert_size if expert_size is None else expert_size
    return (_up_projections(config) + 1) * size * config.hidden_size


def _up_projections(config: ModelConfig) -> int:
    return 2 if config.activation in GATED_ACTIVATIONS else 1


def expert_parameters(config: ModelConfig) -> int:
    """Parameters of one routed expert: its matrices and, with biases, G*N + D more."""
    biases = _up_projections(config) * config.expert_size + config.hidden_size
    return expert_matrices(config) + (biases if config.expert_bias else 0)


def block_parameters(config: ModelConfig) -> int:
    """Parameters of a block but for router and routed experts: attention, norms, shared expert."""
    width, shared = config.hidden_size, expert_matrices(config, config.shared_expert_size)
    return 4 * width * width + 4 * width + shared


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Parameter counts of the whole model (every expert once), without allocating anything.

    Dense: tied embedding V*D, attention 4*D^2 per layer, norm gains (4 per layer and 2), shared
    experts. Without the norms the sum is the formula that reproduces the FoMoE paper's sizes,
    V*D + L*(4*D^2 + 2*D*N*E + D*E).
    """
    width, layers = config.hidden_size, config.num_layers
    dense = config.vocab_size * width + 2 * width + layers * block_parameters(config)
    return ParameterCounts(
        dense=dense,
        sparse=layers * config.num_experts * expert_parameters(config),
        router=layers * config.num_experts * width,
    )


@dataclass(frozen=True)
class DataConfig:
    """The text to train on."""

    data: tuple[str, ...] = ()
    """Files, folders and globs of text, .jsonl or .parquet; none = Python's standard library."""
    val_data: tuple[str, ...] = ()
    """Validation text; none = a part of the data, chosen by file."""
    validation_fraction: float = 0.05
    """Share of the files (or documents) kept for validation."""
    text_field: str = "text"
    """Field of a .jsonl line, or column of a parquet file, that holds the text."""
    tokenizer: Path | None = None
    """A tokenizer.json of the `tokenizers` library; none = bytes."""
    cache_dir: Path | None = None
    """Folder for token files; none = the user's cache folder."""

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"data.validation_fraction must be in (0, 1), got {self.validation_fraction}"
            )
        if not self.text_field:
            raise ValueError("data.text_field must not be empty")


@dataclass(frozen=True)
class SitesConfig:
    """How many sites there are and which experts each one holds."""

    sites: int = 4
    """Number of sites."""
    replication: int = 2
    """Number of sites that hold each expert, 1..sites."""
    placement: Literal["cyclic", "random", "together", "apart"] = "cyclic"
    """cyclic: fixed and evenly spread; random: drawn from the seed, anew at every reshuffle;
    together, apart: experts that tokens choose together (placement_by) on the same sites or not."""
    placement_by: Path | None = None
    """Run folder, or JSON table [layer][expert][expert], with how often a token chose both of two
    experts; for placement = together or apart."""
    placement_file: Path | None = None
    """JSON table [layer][expert] -> list of sites; overrides `placement`."""
    ranks_per_site: int = 1
    """Processes of each site: they share its batch, its experts and its dense parameters (FSDP)."""
    replicas: int = 1
    """Times that each site holds its experts: ranks_per_site / replicas ranks share a copy."""
    spread_by: Path | None = None
    """Run folder, or JSON table [layer][expert], with the load of experts: keeps the hot ones of a
    site on different ranks; none = ascending by id."""
    stale_experts: int = 0
    """Absent experts per layer of which each site computes a frozen copy, refreshed in meetings;
    -1 = all of them, so that nothing is skipped."""
    stale_by: Path | None = None
    """Run folder, or JSON table [layer][expert], with the load of experts: a site copies those of
    its absent experts that are chosen most; none = all are copied about as often."""
    reshuffle_rounds: int = 0
    """Draw a new random placement every so many rounds; 0 = never."""
    reshuffle_moments: Literal["reset", "carry"] = "reset"
    """AdamW moments of experts that move: start from zero, or travel along (twice the elements)."""
    reshuffle_warmup: int | None = None
    """Steps over which the learning rate of experts new to a site rises to its full value; none =
    8, or 0 where their moments travel along."""
    threads: int = 0
    """Threads per site; 0 = this machine's cores shared among its sites."""
    link: str | None = None
    """A slow link on this machine, such as 200mbit,50ms (what each site can send, and how long it
    takes to arrive): meetings take what they would on it; none = as fast as this machine is."""

    def __post_init__(self) -> None:
        at = "sites."
        _at_least(at, 1, sites=self.sites)
        _at_least(at, 0, reshuffle_rounds=self.reshuffle_rounds, threads=self.threads)
        _at_least(at, 0, reshuffle_warmup=self.reshuffle_warmup)
        _at_least(at, 1, ranks_per_site=self.ranks_per_site, replicas=self.replicas)
        if self.ranks_per_site % self.replicas:
            raise ValueError(
                f"sites.replicas must divide sites.ranks_per_site = {self.ranks_per_site}, got "
                f"{self.replicas}"
            )
        if self.reshuffle_rounds and self.ranks_per_site > 1:
            raise ValueError("sites.reshuffle_rounds needs sites.ranks_per_site = 1")
        if self.spread_by is not None and self.ranks_per_site == self.replicas:
            raise ValueError("sites.spread_by needs several ranks that share a site's experts")
        _inside(at, 1, self.sites, replication=self.replication)
        _at_least(at, -1, stale_experts=self.stale_experts)
        if self.stale_experts and (self.reshuffle_rounds or self.ranks_per_site > 1):
            raise ValueError(
                "sites.stale_experts needs sites.reshuffle_rounds = 0 and sites.ranks_per_site = "
                f"1, got {self.reshuffle_rounds} and {self.ranks_per_site}"
            )
        if self.stale_by is not None and self.stale_experts < 1:
            raise ValueError(
                f"sites.stale_by needs sites.stale_experts of 1 or more, got {self.stale_experts}"
            )
        if (self.placement in ("together", "apart")) != (self.placement_by is not None):
            raise ValueError(
                "sites.placement = together or apart and sites.placement_by need each other, got "
                f"{self.placement} and {self.placement_by}"
            )
        if self.link is not None:
            parse_link(self.link)
        if self.reshuffle_rounds and (self.placement != "random" or self.placement_file):
            raise ValueError("sites.reshuffle_rounds needs sites.placement = random and no table")

    @property
    def resolved_warmup(self) -> int:
        """`reshuffle_warmup`, or its default."""
        default = 0 if self.reshuffle_moments == "carry" else 8
        return default if self.reshuffle_warmup is None else self.reshuffle_warmup


@dataclass(frozen=True)
class InnerConfig:
    """The local steps of one site."""

    inner_optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimizer of the local steps."""
    batch_size: int = 2
    """Sequences per site and step."""
    inner_lr: float = 5e-3
    """Peak learning rate of the local steps."""
    warmup_steps: int = 32
    """Steps of linear warm-up to inner_lr."""
    schedule: Literal["constant", "cosine", "linear"] = "linear"
    """Course of the learning rate after the warm-up."""
    min_lr_ratio: float = 0.1
    """Learning rate at the last step as a share of inner_lr (cosine, linear)."""
    beta1: float = 0.9
    """AdamW decay of the first moment; momentum for sgd."""
    beta2: float = 0.95
    """AdamW decay of the second moment."""
    adam_eps: float = 1e-8
    """AdamW epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay on matrices (never on norm gains)."""
    grad_clip: float = 1.0
    """Largest gradient norm of one site; 0 = no clipping."""
    uneven_steps: bool = False
    """Slower sites take fewer local steps, so that nobody waits for them, and their deltas weigh as
    many tokens as they were trained on."""

    def __post_init__(self) -> None:
        at = "inner."
        _at_least(at, 1, batch_size=self.batch_size)
        _at_least(at, 0, warmup_steps=self.warmup_steps, weight_decay=self.weight_decay)
        _at_least(at, 0, grad_clip=self.grad_clip)
        _inside(at, 0, 1, min_lr_ratio=self.min_lr_ratio, beta1=self.beta1, beta2=self.beta2)
        if not (self.inner_lr > 0 and self.adam_eps > 0):
            raise ValueError(
                f"inner.inner_lr and inner.adam_eps must be > 0, got {self.inner_lr} "
                f"and {self.adam_eps}"
            )


@dataclass(frozen=True)
class OuterConfig:
    """The meeting of the sites at the end of a round.

    DiLoCo's published 0.7 and 0.9 (arXiv 2311.08105) are made for hundreds of rounds: over a few
    dozen the momentum overshoots. So jobs default to 1 and 0.2 with it; name both to have the
    published ones.
    """

    optimizer: Literal["diloco", "fedavg", "local-adamw", "ddp"] = "diloco"
    """diloco: Nesterov on the mean delta; fedavg: mean parameters; local-adamw: mean of parameters
    and both moments; ddp: mean of gradients at every step."""
    outer_lr: float | None = None
    """Learning rate of the outer step; none = 1."""
    outer_momentum: float | None = None
    """Nesterov momentum of the outer step; none = 0.2 for diloco, else 0."""
    codec: Literal[
        "fp32", "bf16", "int8", "int8-128", "int4", "int4-128", "int2", "int2-128", "topk"
    ] = "fp32"
    """How a delta travels: as floats; in 8, 4 or 2 bits with a scale per block of 64 (or 128)
    values; topk: the 64 largest of every 4096 values in 14 bits each."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How int8, int4 and int2 round; stochastic: right on average."""
    error_feedback: bool = True
    """Keep what encoding loses and send it with the next delta."""
    router_mean: Literal["holders", "all"] = "holders"
    """Which sites a router row is averaged over, with router_scope = global."""
    expert_mean: Literal["equal", "tokens"] = "equal"
    """tokens: an expert's deltas weigh as many tokens as each holder routed to it."""
    clip_delta: float = 0.0
    """Scale down deltas longer than so many times the median of all sites', and leave out a site
    whose delta is NaN: against accidents, no defence against a member that wants to do harm; 0 =
    neither, NaN ends the job."""
    rescale: bool = False
    """Multiply mean deltas by the square root of the number of sites they are of (DiPaCo)."""
    moment_periods: tuple[int, ...] = (1, 1)
    """local-adamw: rounds between averages of the first and the second moment (DES-LOC: 3 6)."""
    moment_codecs: tuple[str, ...] = ()
    """local-adamw: codecs of the two moments; none = fp32 with codec fp32, else bf16."""
    stale_codec: Literal["fp32", "bf16", "int8", "int4"] = "int8"
    """How copies of absent experts travel (sites.stale_experts); without error feedback."""
    stale_period: int = 1
    """Rounds between two refreshes of these copies."""
    fragments: int = 1
    """The model meets in so many parts, at steps spread over a round."""
    overlap: int = 0
    """Local steps that go on while a part is under way; 0 = sites wait for it."""
    overlap_alpha: float = 0.5
    """With overlap: the share of a parameter that stays the site's own when a part arrives."""
    expert_turns: int = 1
    """Experts take turns: each meets in one of so many meetings, the rest of the model in all."""
    turn_order: Literal["least-trained", "most-trained", "numbered"] = "least-trained"
    """With expert_turns: which experts go first, by the tokens routed to them."""
    on_mismatch: Literal["stop", "heal"] = "stop"
    """When holders differ after a meeting: stop, or take what the majority has."""
    bucket_bytes: int = 1 << 22
    """Size of the buckets in which tensors travel together, bytes of fp32."""
    in_flight: int = 8
    """Buckets under way at once in each direction."""
    timeout_s: float = 300.0
    """Seconds after which a meeting that does not complete is an error."""

    def __post_init__(self) -> None:
        at = "outer."
        _at_least(at, 4, bucket_bytes=self.bucket_bytes)
        _at_least(at, 1, in_flight=self.in_flight, stale_period=self.stale_period)
        with _in_section(at):
            wire.check_moments(self.moment_periods, self.resolved_moment_codecs)
            wire.check_staggering(self.optimizer, self.fragments, self.overlap, self.overlap_alpha)
            wire.check_clip_delta(self.clip_delta)
            check_turns(self.expert_turns, self.turn_order, self.optimizer, self.staggered)
        if not self.timeout_s > 0:
            raise ValueError(f"outer.timeout_s must be > 0, got {self.timeout_s}")
        if self.outer_lr is not None and not self.outer_lr > 0:
            raise ValueError(f"outer.outer_lr must be > 0, got {self.outer_lr}")
        if self.outer_momentum is not None:
            _inside(at, 0, 1, outer_momentum=self.outer_momentum)
        if self.expert_mean == "tokens" and self.optimizer == "ddp":
            raise ValueError("outer.expert_mean = tokens needs an optimizer that sends deltas")
        if self.clip_delta:
            self.require_whole("outer.clip_delta")

    @property
    def resolved_moment_codecs(self) -> tuple[str, ...]:
        """`moment_codecs`, or their default."""
        return wire.moment_codecs_of(self.codec, self.moment_codecs)

    @property
    def staggered(self) -> bool:
        """Whether meetings are spread over a round, or go on during its steps."""
        return wire.is_staggered(self.fragments, self.overlap)

    @property
    def apart(self) -> bool:
        """Whether sites' parameters differ after a meeting, and the anchor is what they share."""
        return self.staggered or self.expert_turns > 1

    @property
    def counts_tokens(self) -> bool:
        """Whether sites tell each other how many tokens they have routed to each expert."""
        return counts_tokens(self.expert_mean, self.expert_turns, self.turn_order)

    def require_whole(self, what: str) -> None:
        """Raises ValueError unless all of the model's parameters meet at the end of a round."""
        if self.apart or self.optimizer == "ddp":
            raise ValueError(
                f"{what} needs outer.fragments = 1, outer.overlap = 0, outer.expert_turns = 1 and "
                f"an outer.optimizer that is not ddp, got {self.fragments}, {self.overlap}, "
                f"{self.expert_turns} and {self.optimizer}"
            )

    @property
    def resolved_lr(self) -> float:
        """`outer_lr`, or its default."""
        return 1.0 if self.outer_lr is None else self.outer_lr

    @property
    def resolved_momentum(self) -> float:
        """`outer_momentum`, or its default for the chosen optimizer."""
        default = 0.2 if self.optimizer == "diloco" else 0.0
        return default if self.outer_momentum is None else self.outer_momentum


@dataclass(frozen=True)
class RunConfig:
    """Length, seed, files and device of the job."""

    seed: int = 0
    """Seed of the initial weights, the order of the data and random placements."""
    local_steps: int = 16
    """Steps every site takes between two meetings."""
    rounds: int = 48
    """Number of rounds."""
    steps: int | None = None
    """Steps of every site in all; sets `rounds` (rounded up) when given."""
    run_dir: Path | None = None
    """Folder of the run; none = runs/<preset>-<time>."""
    resume: str | None = None
    """Run folder or checkpoint to continue. auto or no value: the newest whole checkpoint of
    run_dir, or of the newest run in runs/; where there is none the job begins anew."""
    eval_rounds: int = 12
    """Validate every so many rounds, and at the end; 0 = only at the end."""
    eval_tokens: int = 65536
    """Validation tokens used before the end; at the end eight times as many."""
    probe_tokens: int = 0
    """Validation tokens that all sites route before and after every meeting, to measure how stable
    routing is (metrics.jsonl, report); 0 = none."""
    coactivation: bool = False
    """Tell in report.json how often a token chose both of two experts, also where that is more than
    2^18 numbers."""
    checkpoint_rounds: int = 0
    """Write a checkpoint every so many rounds, and at the end; 0 = only at the end."""
    keep_checkpoints: int = 0
    """Keep so many whole checkpoints, the newest; 0 = all."""
    async_checkpoints: bool = True
    """Write checkpoints while training goes on, from a copy in host memory of what a process
    writes, which is kept for the next; without it training waits, and there is no copy."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = cuda where there is one, else cpu."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: parameters in fp32, matrix products under autocast."""

    def __post_init__(self) -> None:
        at = "run."
        _at_least(at, 0, seed=self.seed, eval_rounds=self.eval_rounds)
        _at_least(at, 0, checkpoint_rounds=self.checkpoint_rounds, probe_tokens=self.probe_tokens)
        _at_least(at, 0, keep_checkpoints=self.keep_checkpoints)
        _at_least(at, 1, local_steps=self.local_steps, rounds=self.rounds, steps=self.steps)
        _at_least(at, 1, eval_tokens=self.eval_tokens)

    @property
    def resolved_rounds(self) -> int:
        """`rounds`, or the rounds that `steps` take."""
        return self.rounds if self.steps is None else -(-self.steps // self.local_steps)


@dataclass(frozen=True)
class TrainConfig:
    """A training job. Precedence: preset < TOML file < command line."""

    preset: str = "tiny"
    """Model size: tiny, 54m, 153m, 1.8b, 13.3b, 104b."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sites: SitesConfig = field(default_factory=SitesConfig)
    inner: InnerConfig = field(default_factory=InnerConfig)
    outer: OuterConfig = field(default_factory=OuterConfig)
    run: RunConfig = field(default_factory=RunConfig)
    fault: FaultConfig = field(default_factory=FaultConfig)

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        experts, sites = self.model.num_experts, self.sites
        if sites.placement_file is None and experts * sites.replication % sites.sites:
            raise ValueError(
                f"model.num_experts * sites.replication must be a multiple of sites.sites, so that "
                f"every site holds the same number of experts; got {experts} * "
                f"{sites.replication} over {sites.sites} sites"
            )
        if self.inner.batch_size % sites.ranks_per_site:
            raise ValueError(
                f"inner.batch_size, of a site, must be a multiple of sites.ranks_per_site = "
                f"{sites.ranks_per_site}, got {self.inner.batch_size}"
            )
        if self.outer.optimizer == "local-adamw" and self.inner.inner_optimizer != "adamw":
            raise ValueError("outer.optimizer = local-adamw needs inner.inner_optimizer = adamw")
        if sites.reshuffle_moments == "carry" and self.inner.inner_optimizer != "adamw":
            raise ValueError("sites.reshuffle_moments = carry needs inner.inner_optimizer = adamw")
        outer = self.outer
        if self.fault.tolerant:
            check_tolerant(self)
        if self.inner.uneven_steps:
            outer.require_whole("inner.uneven_steps")
        if outer.expert_turns > 1 and (sites.ranks_per_site > 1 or sites.reshuffle_rounds):
            raise ValueError(
                "outer.expert_turns > 1 needs sites.ranks_per_site = 1 and sites.reshuffle_rounds "
                f"= 0, got {sites.ranks_per_site} and {sites.reshuffle_rounds}"
            )
        if sites.stale_experts:
            self._check_stale()
        with _in_section("outer."):
            wire.check_staggering(
                outer.optimizer,
                outer.fragments,
                outer.overlap,
                outer.overlap_alpha,
                self.run.local_steps,
            )
        if outer.fragments > self.model.num_layers:
            raise ValueError(
                f"outer.fragments must be at most model.num_layers = {self.model.num_layers}, got "
                f"{outer.fragments}"
            )

    def _check_stale(self) -> None:
        absent = self.model.num_experts * (self.sites.sites - self.sites.replication)
        absent //= self.sites.sites
        if self.sites.stale_experts > absent:
            raise ValueError(
                f"sites.stale_experts must be at most the {absent} experts of a layer that a site "
                f"does not hold, or -1 for all, got {self.sites.stale_experts}"
            )
        if self.model.router_scope != "global":
            raise ValueError(
                f"sites.stale_experts needs model.router_scope = global, got "
                f"{self.model.router_scope}"
            )
        self.outer.require_whole("sites.stale_experts")

    def with_vocab(self, vocab_size: int) -> TrainConfig:
        """This configuration with the vocabulary grown to at least `vocab_size` token ids."""
        if vocab_size <= self.model.vocab_size:
            return self
        model = dataclasses.replace(self.model, vocab_size=vocab_size)
        return dataclasses.replace(self, model=model)


def _paper_model(hidden: int, layers: int, heads: int, experts: int, top_k: int) -> ModelConfig:
    """A size of the FoMoE paper (arXiv 2606.19025): V = 200,019, plain SiLU experts of size 128.

    The paper names a CompleteP depth multiplier on block outputs but not its base depth; we take
    the depth of its trained proxy, 4 layers.
    """
    return ModelConfig(
        vocab_size=200_019,
        seq_len=2048,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_experts=experts,
        expert_size=128,
        top_k=top_k,
        activation="silu",
        bias_update_rate=1e-3,
        depth_multiplier=4 / layers,
    )


# The paper's inner loop: AdamW 0.01, betas (0.9, 0.95), warm-up over 160 of 640 steps, constant.
_PAPER_INNER = InnerConfig(
    batch_size=16, inner_lr=0.01, warmup_steps=160, schedule="constant", min_lr_ratio=1.0
)
_PAPER_RUN = RunConfig(local_steps=32, rounds=20)
# What won in docs/claims.md: tokens choose among a site's own experts, deltas travel in int4, and
# the sites meet every 4 steps, for half the bytes of fp32 every 16.
_TINY_MODEL = ModelConfig(router_scope="resident")
_TINY_RUN = RunConfig(local_steps=4, rounds=192, eval_rounds=48)
_TINY_OUTER = OuterConfig(codec="int4")

PRESETS: dict[str, tuple[ModelConfig, InnerConfig, RunConfig]] = {
    "tiny": (_TINY_MODEL, InnerConfig(), _TINY_RUN),
    "54m": (_paper_model(256, 4, 4, 8, 2), _PAPER_INNER, _PAPER_RUN),
    "153m": (_paper_model(512, 16, 8, 16, 4), _PAPER_INNER, _PAPER_RUN),
    "1.8b": (_paper_model(1024, 128, 16, 32, 8), _PAPER_INNER, _PAPER_RUN),
    "13.3b": (_paper_model(2048, 256, 32, 64, 16), _PAPER_INNER, _PAPER_RUN),
    "104b": (_paper_model(4096, 512, 64, 128, 32), _PAPER_INNER, _PAPER_RUN),
}


def preset_config(name: str) -> TrainConfig:
    """The configuration of a preset. Raises ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    model, inner, run = PRESETS[name]
    outer = _TINY_OUTER if name == "tiny" else OuterConfig()
    return TrainConfig(preset=name, model=model, inner=inner, outer=outer, run=run)
