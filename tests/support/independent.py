"""The drafter families in plain PyTorch, after their papers: a dense mask, no cache, no batch.

Shares no code with the product or with vLLM. `test_parity.py` compares it with transformers under
the same mask, and the product with it.
"""

import json
from pathlib import Path

import torch
from torch.nn import functional

LAYOUTS = {  # architecture: key of the block size, logit shift
    "Fast_dLLM_QwenForCausalLM": ("bd_size", 1),  # arXiv 2509.26328
    "SDARForCausalLM": ("block_size", 0),  # arXiv 2510.06303
    "SDARMoeForCausalLM": ("block_size", 0),
}


class IndependentDrafter:
    """A drafter as a full recompute of a whole sequence.

    Args:
        path: a checkpoint directory.
        num_draftable_tokens: ids below it may be drafted.
        dtype: of the weights and of every operation but the norms and the softmax.
    """

    def __init__(self, path, num_draftable_tokens, dtype=torch.float32):
        from safetensors.torch import load_file

        path = Path(path)
        config = json.loads((path / "config.json").read_text())
        block_size_key, self.logit_shift = LAYOUTS[config["architectures"][0]]
        self.block_size = config[block_size_key]
        self.mask_token_id = config["mask_token_id"]
        self.vocab_size = config["vocab_size"]
        self.num_draftable_tokens = num_draftable_tokens
        self.num_layers = config["num_hidden_layers"]
        self.num_heads = config["num_attention_heads"]
        self.num_kv_heads = config["num_key_value_heads"]
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.num_heads
        self.num_active_experts = config.get("num_experts_per_tok")
        self.norm_topk_prob = config.get("norm_topk_prob")
        self.eps = config["rms_norm_eps"]
        self.theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
        self.weights = {}
        for file in sorted(path.glob("*.safetensors")):
            self.weights.update({k: v.to(dtype) for k, v in load_file(file).items()})
        if config["tie_word_embeddings"]:
            self.weights["lm_head.weight"] = self.weights["model.embed_tokens.weight"]

    @torch.inference_mode()
    def layers(self, token_ids):
        """The residual stream after each layer, then the final norm: [num_tokens, hidden] each."""
        ids = torch.tensor(token_ids)
        ids = ids.masked_fill(ids >= self.vocab_size, self.mask_token_id)
        stream = self.weights["model.embed_tokens.weight"][ids]
        blocks = torch.arange(len(ids)) // self.block_size
        allowed = blocks[None, :] <= blocks[:, None]
        outputs = []
        for i in range(self.num_layers):
            name = f"model.layers.{i}."
            stream = stream + self._attend(name + "self_attn.", name, stream, allowed)
            stream = stream + self._feed_forward(name, stream)
            outputs.append(stream)
        return [*outputs, self._norm(stream, "model.norm")]

    def hidden_states(self, token_ids):
        return self.layers(token_ids)[-1]

    @torch.inference_mode()
    def logits(self, token_ids):
        return self._linear(self.hidden_states(token_ids), "lm_head")

    @torch.inference_mode()
    def best(self, token_ids):
        """The best token that each position predicts, and its probability; MASK never wins."""
        logits = self.logits(token_ids).double()[:, : self.num_draftable_tokens]
        if self.mask_token_id < self.num_draftable_tokens:
            logits[:, self.mask_token_id] = -torch.inf
        probabilities, ids = logits.softmax(-1).max(-1)
        return ids.tolist(), probabilities.tolist()

    def _linear(self, x, name):
        return functional.linear(
            x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        )

    def _norm(self, x, name):
        wide = x.float()
        wide = wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return wide.to(x.dtype) * self.weights[f"{name}.weight"]

    def _heads(self, x, name, count):
        """[num_tokens, count, head_dim], normalised per head where the family does so."""
        heads = self._linear(x, f"{name}_proj").unflatten(-1, (count, self.head_dim))
        return self._norm(heads, f"{name}_norm") if f"{name}_norm.weight" in self.weights else heads

    def _rotate(self, heads):
        """Rotary positions: the two halves of a head are the parts of a complex number."""
        half = self.head_dim // 2
        frequencies = self.theta ** (-torch.arange(half, dtype=torch.float32) / half)
        angles = torch.arange(len(heads))[:, None] * frequencies  # [num_tokens, half]
        cos, sin = (f(angles)[:, None].to(heads.dtype) for f in (torch.cos, torch.sin))
        real, imaginary = heads.split(half, dim=-1)
        return torch.cat((real * cos - imaginary * sin, imaginary * cos + real * sin), dim=-1)

    def _attend(self, name, layer, stream, allowed):
        x = self._norm(stream, layer + "input_layernorm")
        query = self._rotate(self._heads(x, name + "q", self.num_heads))
        key = self._rotate(self._heads(x, name + "k", self.num_kv_heads))
        value = self._linear(x, name + "v_proj").unflatten(-1, (self.num_kv_heads, self.head_dim))
        group = self.num_heads // self.num_kv_heads
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", query.float(), key.float()) / self.head_dim**0.5
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", weights, value.float()).to(stream.dtype)
        return self._linear(mixed.flatten(1), name + "o_proj")

    def _feed_forward(self, name, stream):
        x = self._norm(stream, name + "post_attention_layernorm")
        if f"{name}mlp.gate.weight" not in self.weights:
            return self._mlp(x, name + "mlp")
        router = self._linear(x, name + "mlp.gate").float().softmax(-1)
        shares, chosen = router.topk(self.num_active_experts)
        if self.norm_topk_prob:
            shares = shares / shares.sum(-1, keepdim=True)
        mixed = torch.zeros_like(x)
        for row in range(len(x)):
            for share, expert in zip(shares[row], chosen[row].tolist(), strict=True):
                mixed[row] += share.to(x.dtype) * self._mlp(x[row], f"{name}mlp.experts.{expert}")
        return mixed

    def _mlp(self, x, name):
        gate = functional.silu(self._linear(x, f"{name}.gate_proj"))
        return self._linear(gate * self._linear(x, f"{name}.up_proj"), f"{name}.down_proj")
