"""A tiny configuration of each family: its real architecture, a few thousand weights.

Windows are shorter than the texts, heads no power of two where slopes depend on their number, and
layers of both kinds are there where a family mixes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

VOCAB = 128
CONTEXT = 256
_WINDOW = 24

_TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
_BLOCK = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    **_TOKENS,
}
_HEADS = {**_BLOCK, "head_dim": 16}
_GEMMA = {**_HEADS, "sliding_window": _WINDOW, "query_pre_attn_scalar": 32}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, **_TOKENS}
_FALCON = {"num_hidden_layers": 2, **_TOKENS}
_SIX_HEADS = {"hidden_size": 96, "num_attention_heads": 6}

FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("Llama", _BLOCK),
    "opt": ("OPT", {
        "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT, "word_embed_proj_dim": 64, **_TOKENS,
    }),
    "falcon (rotary)": ("Falcon", {
        **_FALCON, "hidden_size": 64, "num_attention_heads": 4, "num_kv_heads": 2,
        "new_decoder_architecture": True,
    }),
    "falcon (multi-query)": (
        "Falcon", {**_FALCON, "hidden_size": 64, "num_attention_heads": 4, "multi_query": True}
    ),
    "falcon (ALiBi)": ("Falcon", {
        **_FALCON, **_SIX_HEADS, "alibi": True, "multi_query": False, "parallel_attn": False,
    }),
    "mpt": ("Mpt", {"d_model": 96, "n_heads": 6, "n_layers": 2, "max_seq_len": CONTEXT, **_TOKENS}),
    "bloom": ("Bloom", {"hidden_size": 96, "n_layer": 2, "n_head": 6, **_TOKENS}),
    "starcoder2": ("Starcoder2", {**_BLOCK, "sliding_window": _WINDOW}),
    "gpt_bigcode": ("GPTBigCode", _GPT),
    "gpt2": ("GPT2", _GPT),
    "gptj": ("GPTJ", {**_GPT, "rotary_dim": 8}),
    "codegen": ("CodeGen", {**_GPT, "rotary_dim": 8}),
    "gpt_neo": ("GPTNeo", {
        "hidden_size": 64, "num_layers": 2, "num_heads": 4, "window_size": _WINDOW,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": CONTEXT,
        **_TOKENS,
    }),
    "gpt_neox": ("GPTNeoX", _BLOCK),
    "qwen2": ("Qwen2", _BLOCK),
    "qwen2 (mixed windows)": ("Qwen2", {
        **_BLOCK, "use_sliding_window": True, "sliding_window": _WINDOW, "max_window_layers": 1,
    }),
    "qwen3": ("Qwen3", _HEADS),
    "qwen3_moe": ("Qwen3Moe", {**_HEADS, **_MOE}),
    "mistral (window)": ("Mistral", {**_BLOCK, "sliding_window": _WINDOW}),
    "mixtral": ("Mixtral", {**_BLOCK, "num_local_experts": 4}),
    "gemma": ("Gemma", _HEADS),
    "gemma2": ("Gemma2", {**_GEMMA, "attn_logit_softcapping": 5.0}),
    "gemma3_text": (
        "Gemma3Text", {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]}
    ),
    "gpt_oss": ("GptOss", {
        **_HEADS, "sliding_window": _WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }),
    "phi": ("Phi", _BLOCK),
    "phi3": ("Phi3", {**_BLOCK, "sliding_window": _WINDOW}),
    "olmo": ("Olmo", _BLOCK),
    "olmo2": ("Olmo2", _BLOCK),
    "olmoe": ("Olmoe", {**_BLOCK, "num_experts": 4, "num_experts_per_tok": 2}),
    "cohere": ("Cohere", {**_BLOCK, "logit_scale": 0.5}),
    "granite": ("Granite", {**_BLOCK, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "glm4": ("Glm4", _HEADS),
    "stablelm": ("StableLm", _BLOCK),
    "nemotron": ("Nemotron", _BLOCK),
    "persimmon": ("Persimmon", _BLOCK),
    "smollm3": ("SmolLM3", _BLOCK),
    "mamba": ("Mamba", {"hidden_size": 64, "num_hidden_layers": 2, **_TOKENS}),
    "rwkv": ("Rwkv", {"hidden_size": 64, "num_hidden_layers": 2, **_TOKENS}),
    "recurrent_gemma": ("RecurrentGemma", {**_HEADS, "lru_width": 64}),
    "bart": ("Bart", {
        "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
        **_TOKENS,
    }),
    "bert": ("Bert", {**_BLOCK, "is_decoder": False}),
}  # fmt: skip
"""Names of configuration classes of transformers, and what they are given."""

REFUSED: Mapping[str, str] = {
    "mamba": "recurrent state",
    "rwkv": "recurrent state",
    "recurrent_gemma": "recurrent state",
    "bart": "causal",
    "bert": "causal",
}
"""Families that cannot be served, and a word of the reason."""

QUICK = (
    "opt", "falcon (ALiBi)", "falcon (rotary)", "mpt", "bloom", "mistral (window)",
    "qwen2 (mixed windows)", "gemma2", "gpt_oss", "gptj", "mamba",
)  # fmt: skip
"""One of each kind, for the tests that are always run."""


def make_config(family: str) -> Any:
    """The family's tiny configuration."""
    import transformers

    name, options = FAMILIES[family]
    make: Callable[..., Any] = getattr(transformers, f"{name}Config")
    return make(**options)
