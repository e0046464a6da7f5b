"""Family models: a family's name -> a random model of it with a few narrow layers of every kind it has."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

LAYERS = 4
_LARGEST = 20_000_000

# Sizes by what an attribute is called, the first that fits.
_SIZES: tuple[tuple[str, Any], ...] = (
    (r"vocab_size(_per_layer_input)?", 101),
    (
        r"(hidden_size|d_model|n_embd|embed_dim|dim|emb_dim|word_embed_proj_dim|word_embed_size|lru_width|embedding_size)",
        64,
    ),
    (r"(attention_hidden_size|projection_size|input_embedding_size)", 64),
    (r"hidden_size_per_layer_input|attention_head_size|laurel_rank|adapter_rank|.*_lora_rank|time_step_rank", 16),
    (r"(head_dim|attention_head_dim|global_head_dim|v_head_dim|index_head_dim|linear_.*_head_dim|swa_head_dim)", 16),
    (r"(qk_rope_head_dim|qk_nope_head_dim|rotary_dim|mamba_dt_rank)", 8),
    (
        r"(moe_|shared_expert_|shared_)?(intermediate_size|ffn_dim)|(en|de)coder_ffn_dim|d_ff|n_inner|.*ffn_hidden_size",
        96,
    ),
    (r"mlp_hidden_size|feed_forward_size", 96),
    (r"(num_hidden_layers|num_layers|n_layers?|decoder_layers|num_blocks|num_decoder_layers)", LAYERS),
    (r"encoder_layers|num_encoder_layers", 1),
    (r"(num_attention_heads|n_heads?|num_heads|(en|de)coder_attention_heads|num_(en|de)coder_attention_heads)", 4),
    (r"(num_key_value_heads|num_kv_heads|num_global_key_value_heads|num_attention_groups|num_query_groups)", 2),
    (r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|seq_length|max_(target|source)_positions)", 512),
    (r"(num_experts|num_local_experts|n_routed_experts|moe_num_experts)", 4),
    (r"(num_experts_per_tok|moe_topk|moe_k|top_k_experts)", 2),
    (r"(n_group|topk_group|n_shared_experts|num_shared_experts|first_k_dense_replace|moe_layer_start_index)", 1),
    (r"zero_expert_num|num_nextn_predict_layers|num_mtp_layers", 0),
    (r"(index_n_heads|linear_num_.*_heads|altup_num_inputs)", 2),
    (
        r"(index_topk|sliding_window|attention_window|local_attention|attention_chunk_size|chunk_size|mamba_chunk_size)",
        16,
    ),
    (r"window_size", 16),
    (r"(mamba_num_heads|mamba_n_heads|n_mamba_heads)", 4),
    (r"(mamba_d_head|mamba_head_dim|mamba_headdim)", 32),
    (r"(mamba_d_state|ssm_state_size|state_size)", 16),
    (r"(mamba_n_groups|n_groups|mamba_ngroups|num_mem_blocks)", 1),
    (r"(mamba_expand|expand)", 2),
    (r"mamba_d_ssm", 128),
    (r"num_kv_shared_layers", 2),
    (r"initializer_range", 0.2),
)
_OPTIONAL = {"sliding_window", "attention_chunk_size", "q_lora_rank", "attention_window"}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_AS_DECODER = {"is_decoder": True, "is_encoder_decoder": False, "add_cross_attention": False}

_LINEAR_AND_FULL = ["linear_attention", "full_attention"] * (LAYERS // 2)
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_INDEXED = {"n_heads": 2, "kv_heads": 1, "head_dim": 16, "budget": 32, "compress_ratio": 4}
_LEAVE = object()

# What no rule above can tell, family by family: attributes that depend on one another.
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0}},
    "deepseek_v4": {"mlp_layer_types": ["moe"] * LAYERS},
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "granitemoehybrid": {"layer_types": _LINEAR_AND_FULL},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "longcat_flash": {"num_layers": 2, "num_hidden_layers": LAYERS, "head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "prophetnet": {"num_hidden_layers": _LEAVE, "num_encoder_layers": LAYERS},
    "qwen4_exp": {f"indexer_{name}": size for name, size in _INDEXED.items()} | {"ngram_vocab_size_base": 101},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local"] * LAYERS, "local_attn_chunk_length": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * (LAYERS // 2),
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zaya": {"num_experts_per_tok": 1},
}
_OWN["zamba2"] = _OWN["zamba"] | {"hybrid_layer_ids": [1, 3]}
# Numbers that are better left to a family, where they go with others; tried in turn.
_LEFT_OUT: tuple[tuple[str, ...], ...] = (
    *((), ("head_dim",), ("layer_types",), ("v_head_dim",), ("num_key_value_heads",), ("head_dim", "layer_types")),
    *(("q_lora_rank",), ("mlp_layer_types",)),
)


class NotBuilt(Exception):
    """No small model of a family could be made; says why."""


def build(family: str) -> PreTrainedModel:
    """A small random model of a family.

    Raises:
        NotBuilt: where none can be made.
    """
    reasons = []
    for attempt in (_shrunk, _fewest_changes):
        for left_out in _LEFT_OUT:
            try:
                return _made(attempt(family, left_out), family)
            except Exception as error:  # whatever a family's own code raises
                said = str(error).strip().splitlines() or [""]
                reasons.append(f"{type(error).__name__}: {said[0][:120]}")
    raise NotBuilt(reasons[0].split("\n")[0])


def _made(config: PretrainedConfig, family: str) -> PreTrainedModel:
    config.use_cache = True
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > _LARGEST:
        raise ValueError(f"it still has {count / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    # Does it work at all?
    model.generate(torch.arange(3, 24)[None], max_new_tokens=2, do_sample=False)
    return model


def _shrunk(family: str, left_out: tuple[str, ...]) -> PretrainedConfig:
    """Its usual configuration with small numbers and few layers."""
    whole = AutoConfig.for_model(family)
    plain = whole.get_text_config(decoder=True)
    options = sizes(plain) | _kinds(plain) | _decoder(plain) | _OWN.get(family.removesuffix("_text"), {})
    return type(plain)(**_without(options, left_out))


def _fewest_changes(family: str, left_out: tuple[str, ...]) -> PretrainedConfig:
    """The same, for a model whose own configuration is of several parts: each small."""
    whole = AutoConfig.for_model(family)
    parts = {name: _part(getattr(whole, name), left_out) for name in getattr(whole, "sub_configs", {})}
    options = sizes(whole) | _kinds(whole) | _OWN.get(family, {})
    return type(whole)(**_without(options, left_out) | parts)


def _part(part: Any, left_out: tuple[str, ...]) -> Any:
    if not isinstance(part, PretrainedConfig):
        return part
    return type(part)(**_without(sizes(part) | _kinds(part), left_out))


def _without(options: dict[str, Any], left_out: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in left_out and value is not _LEAVE}


def sizes(config: PretrainedConfig) -> dict[str, Any]:
    """Small numbers for all of its attributes that have a known name."""
    found = {}
    for name in {*config.to_dict(), *getattr(config, "attribute_map", {})}:
        size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)
        # Where a family leaves these out by default, they make another kind of model of it.
        if size is not None and (name not in _OPTIONAL or _get(config, name)):
            found[name] = size
    if _get(config, "num_key_value_heads") == _get(config, "num_attention_heads") and "num_key_value_heads" in found:
        found["num_key_value_heads"] = 4
    rope = _get(config, "rope_parameters") or {}
    if isinstance(rope, dict) and rope.get("mrope_section"):
        found["rope_parameters"] = {**rope, "mrope_section": [2, 3, 3]}
    return found | _TOKENS


def _kinds(config: PretrainedConfig) -> dict[str, Any]:
    """Kinds of the layers: one that is not full attention and full attention, in turn, where there are both."""
    found: dict[str, Any] = {}
    for name in ("layer_types", "layers_block_type"):
        kinds = _get(config, name)
        if isinstance(kinds, list) and kinds and name not in config.attribute_map and _settable(config, name):
            full = next((kind for kind in kinds if kind in ("full_attention", "attention", "hybrid")), kinds[-1])
            other = next((kind for kind in kinds if kind != full), full)
            found[name] = [other, full] * (LAYERS // 2)
    if isinstance(_get(config, "mlp_layer_types"), list):
        found["mlp_layer_types"] = ["dense"] + ["sparse"] * (LAYERS - 1)
    return found


def _decoder(config: PretrainedConfig) -> dict[str, Any]:
    return {name: value for name, value in _AS_DECODER.items() if hasattr(config, name)}


def _settable(config: PretrainedConfig, name: str) -> bool:
    of_class = getattr(type(config), name, None)
    return not isinstance(of_class, property) or of_class.fset is not None


def _get(config: PretrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # it differs from layer to layer
        return None
