"""Tokenizers and text encoders of a few thousand parameters, made without files or network."""

import string

import torch

_ENDS = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
_LETTERS = [c for c in string.printable if not c.isspace()]


def clip_tokenizer():
    """One token per character, plain and at the end of a word."""
    from transformers import CLIPTokenizer

    tokens = [*_LETTERS, *(c + "</w>" for c in _LETTERS), *_ENDS.values()]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=16)


def clip_encoder(width: int, projection: int | None = None):
    """A CLIP text encoder of two layers; with a projection it is the class that has one."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(1)
    end = 2 * len(_LETTERS) + 1
    config = CLIPTextConfig(
        vocab_size=end + 1,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=projection or width,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
    )
    return (CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config).eval()


def t5_tokenizer():
    """One token per character."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {t: i for i, t in enumerate(["<pad>", "</s>", "<unk>", *_LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )


def t5_encoder(width: int, kind: str = "T5"):
    """The encoder of a T5 or UMT5 of two layers."""
    import transformers

    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=3 + len(_LETTERS),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return getattr(transformers, f"{kind}EncoderModel")(config).eval()
