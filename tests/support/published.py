"""`config.json` of the published drafters, field by field.

Read on the hub's pages: JetLM/SDAR-4B-Chat whole, Efficient-Large-Model/Fast_dLLM_v2_7B (revision
refs/pr/3) up to `rms_norm_eps`. The files of the others could not be read: each says what of it is
known and what is inferred.
"""

# The last nine fields are inferred, as in Qwen2.5-7B-Instruct.
FAST_DLLM_7B = {
    "architectures": ["Fast_dLLM_QwenForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration.Fast_dLLM_QwenConfig",
        "AutoModel": "modeling.Fast_dLLM_QwenModel",
        "AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM",
    },
    "bd_size": 32,
    "bos_token_id": 151643,
    "conplemenrary_mask": True,  # so spelt; of training
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "layer_types": ["full_attention"] * 28,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "Fast_dLLM_Qwen",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pad_token_id": 151645,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
# Inferred: the fields of the 7B, less its extra one, in the sizes of Qwen2.5-1.5B-Instruct.
FAST_DLLM_1_5B = {
    **{key: value for key, value in FAST_DLLM_7B.items() if key != "conplemenrary_mask"},
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "max_window_layers": 21,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
SDAR_4B = {  # no `block_size` and no `mask_token_id`
    "architectures": ["SDARForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_sdar.SDARConfig",
        "AutoModel": "modeling_sdar.SDARModel",
        "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
    },
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_implementation": "flex_attention",
    "bos_token_id": 151643,
    "debug": False,
    "eos_token_id": 151643,
    "ep_size": 1,
    "fuse_cross_entropy": True,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 9728,
    "max_position_embeddings": 32768,
    "max_window_layers": 36,
    "micro_forward": False,
    "model_type": "sdar",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "skip_checkpoint": False,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.52.4",
    "use_cache": False,
    "use_deepep": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# Inferred: the sizes of Qwen3-1.7B with an output head of its own (4.06 GB on the hub), and which
# fields of training are left out: so it has the 932 bytes that the hub lists, as the 4B has its
# 1.09 kB. That of -b32 is not known to differ (-b8: 934 bytes).
TRAINING_ONLY = (
    "attn_implementation",
    "debug",
    "ep_size",
    "micro_forward",
    "skip_checkpoint",
    "use_deepep",
)
SDAR_1_7B = {
    **{key: value for key, value in SDAR_4B.items() if key not in TRAINING_ONLY},
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
}
# Inferred: the sizes of Qwen3-8B, which 16.4 GB on the hub fit.
SDAR_8B = {**SDAR_4B, "hidden_size": 4096, "intermediate_size": 12288}
# Gen-Verse/TraDo. Known: the type "sdar" and `configuration_sdar.py` on the page of the 8B, its
# 16.4 GB, blocks of 4 and MASK 151669 in the authors' own runs (Gen-Verse/dLLM-RL, `sample/` and
# `configs/`). Inferred: the fields, as of the SDAR checkpoints that they were trained from.
TRADO_4B, TRADO_8B = SDAR_4B, SDAR_8B
# Known: the names of the architecture, the type and the configuration's file, and 6144 and 2048 as
# the class's defaults. Inferred: all fields of experts, as in Qwen3-30B-A3B, which it was trained
# from, and the tensors' names, as of Qwen3-MoE.
SDAR_30B_A3B = {
    **SDAR_4B,
    "architectures": ["SDARMoeForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_sdar_moe.SDARMoeConfig",
        "AutoModel": "modeling_sdar_moe.SDARMoeModel",
        "AutoModelForCausalLM": "modeling_sdar_moe.SDARMoeForCausalLM",
    },
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "sdar_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
