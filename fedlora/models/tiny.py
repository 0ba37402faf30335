"""Random models of a few thousand parameters: toys, for tests and first tries."""

from __future__ import annotations

from collections import Counter
from functools import cache, partial
from typing import Any

from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

from fedlora.models.base import BaseModel, encode_images, text_model
from fedlora.options import Count
from fedlora.seeds import ambient
from fedlora.tasks.task import Objective
from fedlora.tasks.tweets import tweets

VOCABULARY = 1000


@cache
def tiny_tokenizer() -> Any:  # Any: transformers' tokenizers share no typed base class
    """Lower-cased words of the committed tweets, the most frequent thousand."""
    splitter = pre_tokenizers.BertPreTokenizer()
    words = Counter(
        word for text in tweets().train.texts for word, _ in splitter.pre_tokenize_str(text.lower())
    )
    ranked = sorted(words, key=lambda word: (-words[word], word))[: VOCABULARY - 2]
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *ranked])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def tiny_bert(
    label_count: int, objective: Objective, max_length: int, hidden: Count = 32, layers: Count = 2
) -> BaseModel:
    """A random BERT of 2 layers and hidden 32: a toy for tests and first tries."""
    tokenizer = tiny_tokenizer()
    with ambient(0, "tiny_bert"):
        module = BertForSequenceClassification(
            BertConfig(
                vocab_size=len(tokenizer),
                hidden_size=hidden,
                num_hidden_layers=layers,
                num_attention_heads=max(2, hidden // 32),
                intermediate_size=2 * hidden,
                max_position_embeddings=128,
                initializer_range=0.2,  # at the usual 0.02, hardly any gradient reaches the layers
                num_labels=label_count,  # type: ignore[call-arg]  # a field of the base
            )
        )
    return text_model(module, tokenizer, "classify", max_length)


def tiny_llama(label_count: int, objective: Objective, max_length: int) -> BaseModel:
    """A random Llama of 2 layers and hidden 32: a toy causal model."""
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        num_labels=max(label_count, 1),  # type: ignore[call-arg]  # a field of the base
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=None,
    )
    kind = LlamaForCausalLM if objective == "language" else LlamaForSequenceClassification
    with ambient(0, "tiny_llama"):
        module = kind(config)
    return text_model(module, tokenizer, objective, max_length)


def tiny_vit(label_count: int, objective: Objective, max_length: int) -> BaseModel:
    """A random vision transformer of 2 layers and hidden 32 for 28x28 images: a toy for tests."""
    config = ViTConfig(
        image_size=28,
        patch_size=7,
        num_channels=1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.2,  # as in tiny_bert
        num_labels=label_count,  # type: ignore[call-arg]  # a field of the base
    )
    with ambient(0, "tiny_vit"):
        module = ViTForImageClassification(config)
    encode = partial(encode_images, model="tiny_vit", shape=(1, 28, 28))
    return BaseModel(module, "classify", ("classifier",), None, encode)
