"""Sizes of transformers' models from their config.json, for plans. Needs neither torch nor
transformers.

Families that `fomoe_ext.hf` knows: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V3 and gpt-oss.
An option that a file lacks has the default of transformers' configuration class; most sizes must be
there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from fomoe_ext.files.json_values import loads
from fomoe_ext.plan.sizes import ModelSizes, Weight

_MOST = 2**40
"""Upper limit for each size, so that products and sums of sizes stay reasonable."""
_MOST_LAYERS = 100_000
"""Upper limit for the number of layers, each of which takes memory here."""


class _Keys:
    """The keys of a config.json, checked as they are read."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self.values = path, values

    def number(self, key: str, default: int | None = None) -> int:
        """A whole number > 0, or the default if the key is absent or null. Else ValueError."""
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise ValueError(f"{self.path}: {key} must be a whole number > 0, got {value!r}")
        if value > _MOST:
            raise ValueError(f"{self.path}: {key} must be at most {_MOST}, got {value}")
        return value

    def experts(self, key: str) -> int:
        """The number of routed experts per layer, which newer files call num_local_experts."""
        return self.number(key if self.values.get(key) is not None else "num_local_experts")

    def count(self, key: str, default: int) -> int:
        """As `number`, but 0 is allowed."""
        return 0 if self.values.get(key) == 0 else self.number(key, default)

    def flag(self, key: str, default: bool) -> bool:
        """true or false, or the default if the key is absent or null. Else ValueError."""
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not bool:
            raise ValueError(f"{self.path}: {key} must be true or false, got {value!r}")
        return value

    def entries(self, key: str) -> list[Any] | None:
        """A list, or None if the key is absent or null. Else ValueError."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, list):
            raise ValueError(f"{self.path}: {key} must be a list, got {value!r}")
        return value


class _Model:
    """Collects the tensors of a model, part by part."""

    def __init__(self, keys: _Keys) -> None:
        self.keys = keys
        self.width = keys.number("hidden_size")
        self.layers = keys.number("num_hidden_layers")
        if self.layers > _MOST_LAYERS:
            raise ValueError(
                f"{keys.path}: num_hidden_layers must be at most {_MOST_LAYERS}, got {self.layers}"
            )
        self.heads = keys.number("num_attention_heads")
        self.dense_layers: frozenset[int] = frozenset()
        self.dense: list[Weight] = []
        # FLOPs of scores and weighted sums, in one layer, per token and token attended to.
        self.scores = 0

    @property
    def moe_layers(self) -> int:
        return self.layers - len(self.dense_layers)

    def everywhere(self, part: Any, rows: int, row_size: int, bias: bool = False) -> None:
        """Adds a tensor to every block, perhaps with one bias per row."""
        for times, in_block in ((self.moe_layers, True), (len(self.dense_layers), False)):
            self.dense.append(Weight(part, rows, row_size, times, in_block))
            if bias:
                self.dense.append(Weight("other", rows, 1, times, in_block))

    def mlp(self, size: int, times: int, in_block: bool) -> None:
        """Adds `times` gated MLPs: gate, up and down projection."""
        self.dense.append(Weight("shared", size, self.width, 2 * times, in_block))
        self.dense.append(Weight("shared", self.width, size, times, in_block))

    def grouped_attention(
        self,
        kv_heads: int,
        head: int,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        norms: tuple[int, ...] = (),
    ) -> None:
        """Adds grouped-query attention. `norms`: sizes of the norms of queries and keys, if any."""
        queries, shared = self.heads * head, kv_heads * head
        self.everywhere("attention", queries, self.width, qkv_bias)
        self.everywhere("attention", shared, self.width, qkv_bias)
        self.everywhere("attention", shared, self.width, qkv_bias)
        self.everywhere("attention", self.width, queries, out_bias)
        for size in norms:
            self.everywhere("other", size, 1)
        self.scores = 2 * queries * 2

    def latent_attention(self) -> None:
        """Adds multi-head latent attention, as in DeepSeek-V3 (arXiv 2412.19437)."""
        keys, width, heads = self.keys, self.width, self.heads
        bias = keys.flag("attention_bias", False)
        rope, plain = keys.number("qk_rope_head_dim", 64), keys.number("qk_nope_head_dim", 128)
        value, rank = keys.number("v_head_dim", 128), keys.number("kv_lora_rank", 512)
        queries = heads * (rope + plain)
        if "q_lora_rank" in keys.values and keys.values["q_lora_rank"] is None:
            self.everywhere("attention", queries, width)
        else:
            low = keys.number("q_lora_rank", 1536)
            self.everywhere("attention", low, width, bias)
            self.everywhere("other", low, 1)
            self.everywhere("attention", queries, low)
        self.everywhere("attention", rank + rope, width, bias)
        self.everywhere("other", rank, 1)
        self.everywhere("attention", heads * (plain + value), rank)
        self.everywhere("attention", width, heads * value, bias)
        self.scores = 2 * heads * (rope + plain + value)

    def finish(
        self,
        num_experts: int,
        intermediate_size: int,
        seq_len: int,
        router_scope: Literal["global", "resident"],
        *,
        windows: list[int | None] | None = None,
        expert_bias: bool = False,
    ) -> ModelSizes:
        """Adds norms, embedding and head, and returns the sizes of the model. `windows`: number of
        tokens that each layer attends to, None = all."""
        keys, width = self.keys, self.width
        if not self.moe_layers:
            raise ValueError(
                f"{keys.path}: at least one of the {self.layers} layers must have experts, got none"
            )
        self.everywhere("other", width, 1)
        self.everywhere("other", width, 1)
        vocab = keys.number("vocab_size")
        tied = keys.flag("tie_word_embeddings", False)
        self.dense.append(Weight("unembedding", vocab, width, 1, in_block=False))
        self.dense += [] if tied else [Weight("other", vocab, width, 1, in_block=False)]
        self.dense.append(Weight("other", width, 1, 1, in_block=False))
        matrices = 3 * width * intermediate_size
        attended = sum(_attended(seq_len, window) for window in windows or [None] * self.layers)
        return ModelSizes(
            num_layers=self.moe_layers,
            num_experts=num_experts,
            top_k=self._top_k(num_experts),
            seq_len=seq_len,
            hidden_size=width,
            dense=tuple(weight for weight in self.dense if weight.elements),
            router_row=width + expert_bias,
            expert=matrices + (2 * intermediate_size + width if expert_bias else 0),
            expert_matrices=matrices,
            attention_scores=self.scores * attended,
            router_scope=router_scope,
        )

    def _top_k(self, num_experts: int) -> int:
        top_k = self.keys.number("num_experts_per_tok")
        if top_k > num_experts:
            raise ValueError(
                f"{self.keys.path}: num_experts_per_tok must be at most the {num_experts} experts, "
                f"got {top_k}"
            )
        return top_k

    def read_dense_layers(self) -> None:
        """Reads which layers of a Qwen model have a dense MLP, and adds their MLPs."""
        step = self.keys.number("decoder_sparse_step", 1)
        named = self.keys.entries("mlp_only_layers") or []
        self.dense_layers = frozenset(
            layer for layer in range(self.layers) if layer in named or (layer + 1) % step
        )
        if self.dense_layers:
            self.mlp(self.keys.number("intermediate_size"), len(self.dense_layers), False)

    def sliding(self, window: int, default: list[bool]) -> list[int | None]:
        """The attention window of each layer: by layer_types, or by `default` without them."""
        types = self.keys.entries("layer_types")
        if types is not None and len(types) != self.layers:
            raise ValueError(
                f"{self.keys.path}: layer_types must have {self.layers} entries, got {len(types)}"
            )
        slides = default if types is None else [kind == "sliding_attention" for kind in types]
        return [window if yes else None for yes in slides]


def _attended(seq_len: int, window: int | None) -> float:
    """Mean number of tokens that a token of a causal sequence attends to."""
    window = min(window or seq_len, seq_len)
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len


# ------------------------------------------------------------------------------------- families

_Maker = Callable[[_Keys, int, Literal["global", "resident"]], ModelSizes]


def _mixtral(keys: _Keys, seq_len: int, scope: Literal["global", "resident"]) -> ModelSizes:
    model = _Model(keys)
    head = keys.number("head_dim", model.width // model.heads)
    model.grouped_attention(keys.number("num_key_value_heads", model.heads), head)
    window = None if keys.values.get("sliding_window") is None else keys.number("sliding_window")
    windows = [window] * model.layers
    experts, size = keys.experts("num_local_experts"), keys.number("intermediate_size")
    return model.finish(experts, size, seq_len, scope, windows=windows)


def _qwen2_moe(keys: _Keys, seq_len: int, scope: Literal["global", "resident"]) -> ModelSizes:
    model = _Model(keys)
    model.read_dense_layers()
    head = keys.number("head_dim", model.width // model.heads)
    kv_heads = keys.number("num_key_value_heads", model.heads)
    model.grouped_attention(kv_heads, head, qkv_bias=keys.flag("qkv_bias", True))
    model.mlp(keys.number("shared_expert_intermediate_size"), model.moe_layers, True)
    model.dense.append(Weight("shared", 1, model.width, model.moe_layers))
    windows: list[int | None] = [None] * model.layers
    if keys.flag("use_sliding_window", False):
        most = keys.number("max_window_layers", 28)
        slides = [layer % 2 == 0 and layer < most for layer in range(model.layers)]
        windows = model.sliding(keys.number("sliding_window", 4096), slides)
    experts, size = keys.experts("num_experts"), keys.number("moe_intermediate_size")
    return model.finish(experts, size, seq_len, scope, windows=windows)


def _qwen3_moe(keys: _Keys, seq_len: int, scope: Literal["global", "resident"]) -> ModelSizes:
    model = _Model(keys)
    model.read_dense_layers()
    head = keys.number("head_dim", model.width // model.heads)
    bias = keys.flag("attention_bias", False)
    kv_heads = keys.number("num_key_value_heads", 4)
    model.grouped_attention(kv_heads, head, qkv_bias=bias, out_bias=bias, norms=(head, head))
    slides = keys.flag("use_sliding_window", False)
    window = keys.number("sliding_window", 4096) if slides else None
    experts, size = keys.experts("num_experts"), keys.number("moe_intermediate_size")
    return model.finish(experts, size, seq_len, scope, windows=[window] * model.layers)


def _olmoe(keys: _Keys, seq_len: int, scope: Literal["global", "resident"]) -> ModelSizes:
    model = _Model(keys)
    head, bias = model.width // model.heads, keys.flag("attention_bias", False)
    kv_heads = keys.number("num_key_value_heads", model.heads)
    norms = (model.width, head * kv_heads)
    model.grouped_attention(kv_heads, head, qkv_bias=bias, out_bias=bias, norms=norms)
    experts, size = keys.experts("num_experts"), keys.number("intermediate_size")
    return model.finish(experts, size, seq_len, scope)


def _deepseek_v3(keys: _Keys, seq_len: int, scope: Literal["global", "resident"]) -> ModelSizes:
    model = _Model(keys)
    model.dense_layers = frozenset(range(min(model.layers, keys.count("first_k_dense_replace", 3))))
    if model.dense_layers:
        model.mlp(keys.number("intermediate_size"), len(model.dense_layers), False)
    model.latent_attention()
    size = keys.number("moe_intermediate_size")
    shared = size * keys.number("n_shared_experts", 1)
    model.mlp(shared, model.moe_layers, True)
    return model.finish(keys.experts("n_routed_experts"), size, seq_len, scope)


def _gpt_oss(keys: _Keys, seq_len: int, scope: Literal["global", "resident"]) -> ModelSizes:
    model = _Model(keys)
    bias, head = keys.flag("attention_bias", True), keys.number("head_dim", 64)
    kv_heads = keys.number("num_key_value_heads", 8)
    model.grouped_attention(kv_heads, head, qkv_bias=bias, out_bias=bias)
    model.everywhere("other", model.heads, 1)  # attention sinks
    slides = [layer % 2 == 0 for layer in range(model.layers)]
    windows = model.sliding(keys.number("sliding_window", 128), slides)
    experts, size = keys.experts("num_local_experts"), keys.number("intermediate_size")
    return model.finish(experts, size, seq_len, scope, windows=windows, expert_bias=True)


FAMILIES: dict[str, _Maker] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
}
"""The function that reads a configuration, by `model_type`."""


def read_hf_config(
    path: Path, seq_len: int, router_scope: Literal["global", "resident"] = "global"
) -> ModelSizes:
    """The sizes of a transformers model, from its config.json or the folder that holds it.

    `seq_len`: length of the training sequences, which may be below the model's limit. Raises
    FileNotFoundError for a missing file. Raises ValueError, naming the file and the key, if the
    file is not a JSON object, for a `model_type` that is not in `FAMILIES`, and for wrong values.
    """
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    try:
        values = loads(path.read_bytes(), nan=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"hf_config {path} does not exist") from None
    except ValueError as error:
        raise ValueError(f"hf_config must be a JSON file, got {path}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"hf_config {path} must hold a JSON object, got {type(values).__name__}")
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"{path}: model_type must be one of {', '.join(FAMILIES)}, got {kind!r}")
    return FAMILIES[kind](_Keys(path, values), seq_len, router_scope)
