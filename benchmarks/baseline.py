"""The PyTorch baseline: the originals' models, built from `transformers`, with mmjax's weights.

MiniGPT-4 (minigpt4/models/minigpt4.py): the image tower and the Q-Former are frozen and run without gradients, LLaMA
is frozen and differentiated through, the projector is trained. ImageBind-LLM (imagebind_LLM/llama/llama_adapter.py):
the bind network, the query and a gate per head are trained, the features are precomputed. Attention is torch's
scaled_dot_product_attention, which the originals do not use; activations are saved, without checkpointing.

B rows   T tokens   F images a row   Q soft tokens an image   E projector input   D language model
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers.models.blip_2 import modeling_blip_2 as blip2
from transformers.models.llama import modeling_llama

from mmjax.convert import llama, minigpt4
from mmjax.convert.tables import Entry, backward

# The released names, as `mmjax.convert` writes them -> those of transformers' BLIP-2; all matches apply, in order.
RENAMED = (
    (r"^(cls_token|pos_embed|patch_embed|blocks|ln_vision)", r"vision.\1"),
    (r"^vision\.cls_token", "vision.embeddings.class_embedding"),
    (r"^vision\.pos_embed", "vision.embeddings.position_embedding"),
    (r"^vision\.patch_embed\.proj", "vision.embeddings.patch_embedding"),
    (r"^vision\.ln_vision", "vision.post_layernorm"),
    (r"^vision\.blocks\.(\d+)\.norm", r"vision.encoder.layers.\1.layer_norm"),
    (r"^vision\.blocks\.(\d+)\.attn\.proj", r"vision.encoder.layers.\1.self_attn.projection"),
    (r"^vision\.blocks\.(\d+)\.attn", r"vision.encoder.layers.\1.self_attn"),
    (r"^vision\.blocks", "vision.encoder.layers"),
    (r"^Qformer\.bert\.embeddings\.LayerNorm", "qformer.layernorm"),
    (r"^Qformer\.bert\.", "qformer."),
    (r"(attention)\.self\.", r"\1.attention."),
    (r"^llama_proj", "projector"),
    (r"^(model\.|lm_head)", r"llama.\1"),
)


def renamed(key: str) -> str:
    for pattern, name in RENAMED:
        key = re.sub(pattern, name, key)
    return key


def released(entries: list[Entry], params: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Returns mmjax's parameters as tensors by transformers' names; those without an entry are left out."""
    tensors = {key: torch.from_numpy(np.array(one.read())) for key, one in backward(entries, params).items()}
    for key in [key for key in tensors if key.endswith("attn.q_bias")]:
        q, v = tensors.pop(key), tensors.pop(key.replace("q_bias", "v_bias"))
        tensors[key.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
    return {renamed(key): tensor for key, tensor in tensors.items()}


def language_model(cfg: Any) -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=cfg.vocab, hidden_size=cfg.dim, intermediate_size=cfg.hidden, num_hidden_layers=cfg.depth,
        num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads, head_dim=cfg.head_dim, rms_norm_eps=cfg.eps,
        max_position_embeddings=cfg.max_positions, rope_parameters={"rope_type": "default", "rope_theta":
                                                                    cfg.rope_theta},
        tie_word_embeddings=cfg.tied, use_cache=False, attn_implementation="sdpa"))


def vision_config(cfg: Any) -> transformers.Blip2VisionConfig:
    return transformers.Blip2VisionConfig(
        hidden_size=cfg.dim, intermediate_size=cfg.hidden, num_hidden_layers=cfg.depth, num_attention_heads=cfg.heads,
        image_size=cfg.image_size, patch_size=cfg.patch, layer_norm_eps=cfg.eps, qkv_bias=True,
        attn_implementation="sdpa")


def vision_block(cfg: Any, params: Mapping[str, Any], dtype: str, device: str) -> nn.Module:
    """Returns the first block of an image tower."""
    prefix = "vision.encoder.layers.0."
    tensors = {key.removeprefix(prefix): tensor for key, tensor in released(minigpt4.vit_entries(cfg), params).items()
               if key.startswith(prefix)}
    block = blip2.Blip2EncoderLayer(vision_config(cfg))
    block.load_state_dict(tensors)
    return block.to(device, getattr(torch, dtype)).eval()


def labels(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.where(batch["loss_mask"], batch["tokens"], -100)


class MiniGPT4(nn.Module):
    """MiniGPT-4: the tensors of a batch -> the loss."""

    def __init__(self, cfg: Any):
        super().__init__()
        v, q = cfg.vit, cfg.qformer
        self.vision = blip2.Blip2VisionModel(vision_config(v))
        self.vision.post_layernorm.eps = minigpt4.LN_VISION_EPS
        self.qformer = blip2.Blip2QFormerModel(transformers.Blip2QFormerConfig(
            hidden_size=q.dim, num_hidden_layers=q.depth, num_attention_heads=q.heads, intermediate_size=q.hidden,
            cross_attention_frequency=q.cross_every, encoder_hidden_size=v.dim, layer_norm_eps=q.eps,
            use_qformer_text_input=False, attn_implementation="sdpa"))
        self.query_tokens = nn.Parameter(torch.zeros(1, q.queries, q.dim))
        self.projector = nn.Linear(q.dim, cfg.llm.dim)
        self.llama = language_model(cfg.llm)
        self.requires_grad_(False)
        self.projector.requires_grad_(True)
        self.eval()

    @staticmethod
    def tensors(cfg: Any, params: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Returns the state dict of this module for mmjax's parameters by path."""
        return released([*minigpt4.vit_entries(cfg.vit), *minigpt4.qformer_entries(cfg.qformer, cfg.vit.dim),
                         *minigpt4.projector_entries(cfg.soft_width, cfg.llm.dim), *llama.entries(cfg.llm)], params)

    @torch.no_grad()
    def feature(self, images: torch.Tensor) -> torch.Tensor:
        """[B·F,3,S,S] -> [B·F,Q,E]."""
        seen = self.vision(pixel_values=images).last_hidden_state
        return self.qformer(query_embeds=self.query_tokens.expand(len(seen), -1, -1),
                            encoder_hidden_states=seen).last_hidden_state

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        feature = batch["feature"] if "feature" in batch else self.feature(batch["images"])
        soft = self.projector(feature.to(self.projector.weight.dtype)).reshape(len(batch["tokens"]), -1,
                                                                               self.llama.config.hidden_size)
        embedded = self.llama.model.embed_tokens(batch["tokens"])
        index = batch["soft_index"]
        chosen = soft.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, soft.shape[-1]))
        x = torch.where(index[..., None] >= 0, chosen.to(embedded.dtype), embedded)
        return self.llama(inputs_embeds=x, attention_mask=batch["valid"].long(), position_ids=batch["positions"],
                          labels=labels(batch)).loss


class BindBlock(nn.Module):
    """imagebind_LLM's norm and FeedForward, with a residual connection."""

    def __init__(self, dim: int, hidden: int, eps: float):
        super().__init__()
        self.norm = modeling_llama.LlamaRMSNorm(dim, eps)
        self.gate, self.up = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(n)) * self.up(n))


class GatedAttention(modeling_llama.LlamaAttention):
    """LLaMA's attention plus attention to a single prompt (whose softmax is 1), with a gate per head."""

    def __init__(self, config: Any, layer: int):
        super().__init__(config, layer)
        self.heads_gate = nn.Parameter(torch.zeros(config.num_attention_heads))
        self.prompt = None

    def forward(self, hidden_states: torch.Tensor, position_embeddings: Any, attention_mask: Any, **_: Any) -> Any:
        B, T, _ = hidden_states.shape

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.view(B, -1, x.shape[-1] // self.head_dim, self.head_dim).transpose(1, 2)

        q, k, v = (heads(project(hidden_states)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = modeling_llama.apply_rotary_pos_emb(q, k, *position_embeddings)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask,
                                                         is_causal=attention_mask is None,
                                                         enable_gqa=self.num_key_value_groups > 1)
        read = heads(self.v_proj(self.prompt)).repeat_interleave(self.num_key_value_groups, 1)
        out = out + torch.tanh(self.heads_gate)[:, None, None].to(out.dtype) * read
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1)), None


class ImageBindLLM(nn.Module):
    """ImageBind-LLM: the tensors of a batch, with features [B,E] of length 1 -> the loss."""

    def __init__(self, cfg: Any):
        super().__init__()
        b, c = cfg.bind, cfg.llm
        self.proj = nn.Linear(b.inputs, b.dim)
        self.blocks = nn.ModuleList(BindBlock(b.dim, b.hidden, b.eps) for _ in range(b.depth))
        self.query = nn.Parameter(torch.zeros(c.depth, 1, c.dim))
        self.llama = language_model(c)
        for number, layer in enumerate(self.llama.model.layers):
            layer.self_attn = GatedAttention(self.llama.config, number)
        self.llama.requires_grad_(False)
        for layer in self.llama.model.layers:
            layer.self_attn.heads_gate.requires_grad_(True)
        self.eval()

    @staticmethod
    def tensors(cfg: Any, params: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        def tensor(path: str) -> torch.Tensor:
            return torch.from_numpy(np.array(params[path]))

        state = released(llama.entries(dataclasses.replace(cfg.llm, injection="")), params)
        state |= {"query": tensor("query"), "proj.weight": tensor("bind/proj/w").T, "proj.bias": tensor("bind/proj/b")}
        for number in range(cfg.bind.depth):
            ours, theirs = f"bind/block_{number + 1}", f"blocks.{number}"
            state[f"{theirs}.norm.weight"] = tensor(f"{ours}/norm/scale")
            state |= {f"{theirs}.{name}.weight": tensor(f"{ours}/{name}/w").T for name in ("gate", "up", "down")}
        gates = tensor("llm/layers/attn/gate")
        return state | {f"llama.model.layers.{layer}.self_attn.heads_gate": gate for layer, gate in enumerate(gates)}

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        bound = self.proj(batch["feature"].to(self.proj.weight.dtype))[:, None]
        for block in self.blocks:
            bound = block(bound)
        for query, layer in zip(self.query, self.llama.model.layers, strict=True):
            layer.self_attn.prompt = (bound + query).to(layer.self_attn.v_proj.weight.dtype)
        return self.llama(input_ids=batch["tokens"], attention_mask=batch["valid"].long(),
                          position_ids=batch["positions"], labels=labels(batch)).loss


def build(kind: type[nn.Module], cfg: Any, params: Mapping[str, Any], dtype: str, device: str) -> nn.Module:
    """Returns the module with mmjax's parameters by path, frozen ones in `dtype`, trained ones in float32.

    Raises RuntimeError listing parameters that only one side has.
    """
    with torch.device("meta"):
        module = kind(cfg)
    names = module.state_dict().keys()
    module.load_state_dict(kind.tensors(cfg, params), assign=True)
    trained = {name for name, one in module.named_parameters() if one.requires_grad}
    assert names == module.state_dict().keys()
    for name, one in module.named_parameters():
        one.data = one.data.to(device, torch.float32 if name in trained else getattr(torch, dtype))
    rotary = modeling_llama.LlamaRotaryEmbedding(module.llama.config)  # its buffers are computed, not loaded
    module.llama.model.rotary_emb = rotary.to(device)
    return module
