"""The text encoder of Qwen-Image: the last hidden state of Qwen2.5-VL for a prompt in the template of its pipeline.

It runs in PyTorch by transformers, once over all captions (`dar_jax.prepare`) and over the prompts of `dar_jax.sample`.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dar_jax import files
from dar_jax.errors import UserError, require

# As in diffusers, pipelines/qwenimage/pipeline_qwenimage.py, character by character.
TEMPLATE = "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"  # noqa: E501
EMPTY_PROMPT = " "  # the negative prompt of the published examples
MAX_TOKENS = 1024  # of a prompt and of what follows it in the template; what is longer is cut, as there
PREFIX_TOKENS = 34  # of the template before the prompt, by the published tokenizer
PUBLISHED_SIZE = 3584  # features of the published encoder
_BATCH = 8  # prompts at a time
_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json")


class TextEncoder(NamedTuple):
    """The encoder with its tokenizer.

    Attributes:
      model: `Qwen2_5_VLForConditionalGeneration`.
      tokenizer: of transformers.
      prefix: tokens of the template before the prompt, which are read and then dropped.
      fingerprint: SHA-256 of the template, the weights, their config and the tokenizer.
    """

    model: Any
    tokenizer: Any
    prefix: int
    fingerprint: str

    @property
    def size(self) -> int:
        """Features of a token."""
        return self.model.config.get_text_config().hidden_size

    def encode(self, prompts: Sequence[str]) -> list[np.ndarray]:
        """The embedding of each prompt, float32 [n, size], n its true number of tokens without the prefix."""
        return [text for i in range(0, len(prompts), _BATCH) for text in self._encode(prompts[i : i + _BATCH])]

    def _encode(self, prompts: Sequence[str]) -> list[np.ndarray]:
        import torch

        texts, limit = [TEMPLATE.format(prompt) for prompt in prompts], MAX_TOKENS + self.prefix
        tokens = self.tokenizer(texts, max_length=limit, padding=True, truncation=True, return_tensors="pt")
        ids, mask = (tokens[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        with torch.no_grad():
            states = self.model.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        return [
            state[is_token.bool()][self.prefix :].cpu().numpy() for state, is_token in zip(states, mask, strict=True)
        ]


def load(directory: str, flag: str) -> TextEncoder:
    """Reads the encoder from the folder of Qwen-Image, with text_encoder and tokenizer in it, or that of Qwen2.5-VL.

    It runs on a GPU, if PyTorch has one.

    Args:
      directory: the folder.
      flag: what to call it in an error.

    Raises:
      UserError: the packages or files are missing, or the tokenizer does not suit the template.
    """
    try:
        import torch
        from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    except ImportError as error:
        raise UserError(f'{flag} needs PyTorch and transformers: pip install -e ".[t2i]" ({error}).') from error
    root = files.local(directory)
    folders = [root / name if (root / name).is_dir() else root for name in ("text_encoder", "tokenizer")]
    found = [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]
    if not (folders[0] / "config.json").is_file() or not found:
        raise UserError(
            f'{flag} = "{directory}" has no config.json and *.safetensors of a text encoder; name the folder of '
            "Qwen-Image or of Qwen2.5-VL-7B-Instruct."
        )
    found = dict.fromkeys(
        [*found, *(path for folder in folders for name in _FILES if (path := folder / name).is_file())]
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folders[1], local_files_only=True)
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folders[0], dtype="auto", local_files_only=True)
    except Exception as error:  # transformers raises what its readers happen to
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f'{flag} = "{directory}" cannot be read ({reason}); fetch it again.') from error
    prefix = len(tokenizer(TEMPLATE.partition("{}")[0])["input_ids"])
    size = model.config.get_text_config().hidden_size
    require(
        size != PUBLISHED_SIZE or prefix == PREFIX_TOKENS,
        f'{flag} = "{directory}" has a tokenizer that makes {prefix} tokens of the start of the template, and not the '
        f"{PREFIX_TOKENS} of Qwen-Image; fetch the tokenizer again.",
    )
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return TextEncoder(model, tokenizer, prefix, _fingerprint(list(found)))


def _fingerprint(paths: list) -> str:
    digest = hashlib.sha256(TEMPLATE.encode())
    for path, checksum in zip(paths, files.checksums(paths), strict=True):
        digest.update(f"{path.name} {checksum}\n".encode())
    return digest.hexdigest()
