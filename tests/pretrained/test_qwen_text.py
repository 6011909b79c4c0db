"""The text encoder against diffusers' pipeline, with a tiny encoder of the same class and a tokenizer trained here."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from dar_jax.errors import UserError
from dar_jax.pretrained import qwen_text

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
PROMPTS = ["a red heart on snow", " ", "größe", "a tiger, " * 12, "x"]


def write_encoder(path, seed=0, size=32):
    """A folder in the form of Qwen2.5-VL: random weights of two layers, and a byte-level BPE of few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([qwen_text.TEMPLATE, *PROMPTS] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    fast.save_pretrained(path)
    ids = {name: fast.convert_tokens_to_ids(token) for name, token in zip("abcdef", SPECIAL, strict=True)}
    text = {
        "vocab_size": len(fast), "hidden_size": size, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "pad_token_id": ids["a"],
        "bos_token_id": ids["a"], "eos_token_id": ids["c"],
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": size}
    tokens = {"vision_start_token_id": ids["d"], "vision_end_token_id": ids["e"], "image_token_id": ids["f"]}
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.eval().save_pretrained(path)
    return model, fast


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder")
    return path, *write_encoder(path)


def test_template_and_limits_are_those_of_diffusers(written):
    _, model, tokenizer = written
    pipeline = QwenImagePipeline(None, None, model, tokenizer, None)
    assert pipeline.prompt_template_encode == qwen_text.TEMPLATE
    assert pipeline.prompt_template_encode_start_idx == qwen_text.PREFIX_TOKENS
    assert pipeline.tokenizer_max_length == qwen_text.MAX_TOKENS


@pytest.mark.parametrize("side", ["right", "left"])
def test_embeddings_are_those_of_diffusers(written, side):
    path, model, tokenizer = written
    encoder = qwen_text.load(str(path), "--text_encoder")
    assert encoder.size == 32
    encoder.tokenizer.padding_side = tokenizer.padding_side = side
    pipeline = QwenImagePipeline(None, None, model, tokenizer, None)
    # The number of dropped tokens is bound to the published tokenizer there, and this one makes another.
    assert encoder.prefix != qwen_text.PREFIX_TOKENS
    assert encoder.prefix == len(tokenizer(qwen_text.TEMPLATE[: qwen_text.TEMPLATE.index("{}")])["input_ids"]) > 10
    pipeline.prompt_template_encode_start_idx = encoder.prefix
    texts = encoder.encode(PROMPTS)
    with torch.no_grad():
        expected, mask = pipeline.encode_prompt(PROMPTS, device="cpu")
    assert [len(text) for text in texts] == mask.sum(1).tolist()
    assert len(set(map(len, texts))) >= 3
    for text, wanted, valid in zip(texts, expected.numpy(), mask.bool().numpy(), strict=True):
        np.testing.assert_allclose(text, wanted[valid], atol=2e-5)
        assert text.dtype == np.float32 and text.std() > 0.1
    # A long prompt is cut at the same place.
    (long,) = encoder.encode(["tiger " * 1500])
    assert len(long) == qwen_text.MAX_TOKENS


def test_the_fingerprint_tells_encoders_apart_and_not_their_places(written, tmp_path):
    path, *_ = written
    known = qwen_text.load(str(path), "--text_encoder").fingerprint
    (tmp_path / "qwen_image" / "tokenizer").mkdir(parents=True)
    shutil.copytree(path, tmp_path / "qwen_image" / "text_encoder")
    for file in (tmp_path / "qwen_image" / "text_encoder").glob("tokenizer*"):
        file.rename(tmp_path / "qwen_image" / "tokenizer" / file.name)
    assert qwen_text.load(str(tmp_path / "qwen_image"), "--text_encoder").fingerprint == known
    other = tmp_path / "other"
    shutil.copytree(path, other)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": "left"}))
    changed = qwen_text.load(str(other), "--text_encoder").fingerprint
    write_encoder(other, seed=1)
    assert len({known, changed, qwen_text.load(str(other), "--text_encoder").fingerprint}) == 3


def test_what_is_no_encoder(written, tmp_path, monkeypatch):
    path, *_ = written
    with pytest.raises(UserError, match=r"--text_encoder = .* has no config\.json and \*\.safetensors"):
        qwen_text.load(str(tmp_path), "--text_encoder")
    monkeypatch.setattr(qwen_text, "PUBLISHED_SIZE", 32)
    with pytest.raises(UserError, match=r"tokenizer that makes \d+ tokens .* not the 34 of Qwen-Image"):
        qwen_text.load(str(path), "--text_encoder")
    for file in path.glob("*.safetensors"):
        (tmp_path / file.name).write_bytes(file.read_bytes()[:1000])
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(path / name, tmp_path)
    with pytest.raises(UserError, match="cannot be read") as error:
        qwen_text.load(str(tmp_path), "--text_encoder")
    assert "\n" not in str(error.value)
