"""DINOv2 and DINOv3 of transformers with random weights, and these weights under the names of the published files."""

import re

import numpy as np
import torch
import transformers

KINDS = {
    "dinov2": (transformers.Dinov2Config, transformers.Dinov2Model),
    "dinov2-registers": (transformers.Dinov2WithRegistersConfig, transformers.Dinov2WithRegistersModel),
    "dinov3": (transformers.DINOv3ViTConfig, transformers.DINOv3ViTModel),
}
SIZES = {"S": (384, 12), "B": (768, 12), "L": (1024, 24)}  # width, depth


def make(kind, width, depth, device="cpu"):
    """The network as published, but for its width and depth; on the device "meta" it has names and shapes alone."""
    config, network = KINDS[kind]
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": width // 64}
    if kind == "dinov3":
        sizes |= {"intermediate_size": 4 * width, "num_register_tokens": 4}
    else:
        sizes |= {"patch_size": 14, "image_size": 518}
    with torch.device(device):
        model = network(config(**sizes)).eval()
    return model if device == "meta" else _randomise(model)


def _randomise(model):
    """Random weights that keep activations of order one, in place; every kind of tensor matters for the output."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if name.endswith("weight") and parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif "lambda" in name:
                parameter.copy_(0.5 + 0.2 * noise)
            else:
                parameter.copy_(0.3 * noise)
    return model


def tokens(model, images):
    """[B, H, W, 3] -> patch tokens [B, T, D], numpy arrays."""
    with torch.no_grad():
        out = model(torch.tensor(images).permute(0, 3, 1, 2)).last_hidden_state
    return out[:, 1 + getattr(model.config, "num_register_tokens", 0) :].numpy()


def published(model):
    """The names of the files of facebook/dinov2-* and facebook/dinov3-*, which differ from those of the classes."""
    names = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}
    names["o_proj"] = "output.dense"

    def rename(key):
        if key.startswith("encoder."):
            return re.sub("[qkvo]_proj", lambda match: names[match[0]], key)
        return key.removeprefix("model.")

    return {rename(key): tensor for key, tensor in model.state_dict().items()}


META = (  # of dinov2_vitb14_reg4_pretrain.pth and dinov3_vitb16_pretrain_lvd1689m.pth, by the names of transformers
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^(?:encoder|model)\.layer\.", "blocks."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.layer_scale(.)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.up_proj\.", ".mlp.fc1."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
)


def meta(model):
    """The same weights as Meta's own files hold them."""
    is_v3 = isinstance(model, transformers.DINOv3ViTModel)
    rest, renamed = dict(model.state_dict()), {}
    for block in range(model.config.num_hidden_layers):
        start = f"{'model' if is_v3 else 'encoder'}.layer.{block}.attention."
        weights = [rest.pop(f"{start}{part}_proj.weight") for part in "qkv"]
        # In training DINOv3 moves its bias of keys too, and the mask hides it.
        noise = torch.ones_like(rest[f"{start}q_proj.bias"])
        biases = [rest.pop(f"{start}{part}_proj.bias", noise) for part in "qkv"]
        renamed[f"blocks.{block}.attn.qkv.weight"] = torch.cat(weights)
        renamed[f"blocks.{block}.attn.qkv.bias"] = torch.cat(biases)
        if is_v3:
            mask = torch.cat([noise, 0 * noise, noise])
            renamed[f"blocks.{block}.attn.qkv.bias_mask"] = mask
    for key, tensor in rest.items():
        for pattern, name in META:
            key = re.sub(pattern, name, key)
        key = re.sub(r"^embeddings\.register_tokens$", "storage_tokens" if is_v3 else "register_tokens", key)
        renamed[key] = tensor
    if is_v3:
        renamed["mask_token"] = renamed["mask_token"][0]
        renamed["rope_embed.periods"] = torch.tensor(100.0 ** (np.arange(16) / 16)).bfloat16()
    return renamed


def chunked(state_dict):
    """Meta's names in the chunks of two blocks in which large models are trained."""
    return {re.sub(r"^blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}", k): x for k, x in state_dict.items()}
