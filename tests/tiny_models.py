"""Small language models with random weights, written as anyone has them on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import overhaul
from vocabulary import byte_level_bpe

MakeTiny = Callable[..., Path]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny(directory: Path, dtype: str, tie: bool, bias: bool, architecture: str) -> None:
    """A causal language model of two layers and its tokenizer, random but the same in every run."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = _tiny_tokenizer()
    config = _tiny_config(architecture, bias)
    config.tie_word_embeddings = tie
    config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():  # norms of one and biases of zero would hide that somebody lost them
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.normal_(1.0 if "weight" in name else 0.0, 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _tiny_config(architecture: str, bias: bool) -> Any:
    from transformers import GPT2Config, LlamaConfig, OPTConfig

    match architecture:
        case "llama" | "llama-ungrouped":
            groups = 2 if architecture == "llama" else 4
            heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": groups}
            sizes: dict[str, Any] = {
                "hidden_size": 64,
                "intermediate_size": 128,
                "max_position_embeddings": 512,
            }
            return LlamaConfig(num_hidden_layers=2, attention_bias=bias, mlp_bias=bias, **heads, **sizes)
        case "gpt2":  # its layers always have biases
            return GPT2Config(n_layer=2, n_embd=64, n_inner=128, n_head=4, n_positions=512)
        case "opt":
            widths: dict[str, Any] = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128}
            shape: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4}
            return OPTConfig(max_position_embeddings=512, enable_bias=bias, **shape, **widths)
        case _:
            raise ValueError(f"no tiny {architecture}")


def _tiny_tokenizer() -> Any:
    """A byte-level BPE of 512 tokens; padding is the end token, as in many released models."""
    from transformers import PreTrainedTokenizerFast

    files = sorted((Path(overhaul.__file__).parent / "texts").rglob("*.txt"))
    bpe = byte_level_bpe((file.read_text(encoding="utf-8") for file in files), 512, ["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )
