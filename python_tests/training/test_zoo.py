"""Tiny random models of other packages: right by every engine, or refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l2rw_ext import NotExactError, Reweighter
from support.models import CLASSES, ENGINE_OPTIONS, cross_entropy, model_of
from support.oracle import assert_exact

TOLERANCE = 1e-6
"""Some of these models normalise and rotate in float32 whatever the dtype of their parameters."""

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]

TRANSFORMERS = ["Bert", "DistilBert", "Albert", "Electra", "Roberta", "GPT2", "GPTNeoX", "Llama"]
SIZES = {
    "vocab_size": 11,
    "embedding_size": 8,
    "hidden_size": 8,
    "dim": 8,
    "n_embd": 8,
    "num_hidden_layers": 1,
    "n_layers": 1,
    "n_layer": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_heads": 2,
    "n_head": 2,
    "intermediate_size": 12,
    "hidden_dim": 12,
    "num_labels": CLASSES,
    "pad_token_id": 0,
}
TIMM = [
    "resnet10t",
    "mobilenetv3_small_050",
    "vit_tiny_patch16_224",
    "convnext_atto",
    "mixer_s32_224",
]


def _text(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**SIZES)
    return getattr(transformers, f"{name}ForSequenceClassification")(config).eval()


def _adapted(name: str) -> nn.Module:
    peft = pytest.importorskip("peft")
    kinds = {"lora": peft.LoraConfig, "ia3": peft.IA3Config, "prompt": peft.PromptTuningConfig}
    options = {"num_virtual_tokens": 2} if name == "prompt" else {}
    return peft.get_peft_model(_text("Bert"), kinds[name](task_type="SEQ_CLS", **options))


def _tokens(n: int) -> tuple[Tensor, Tensor]:
    return torch.randint(1, 11, (n, 5)), torch.randint(CLASSES, (n,))


def _image(name: str) -> nn.Module:
    timm = pytest.importorskip("timm", exc_type=Exception)
    size = {} if name.startswith(("res", "mob", "conv")) else {"img_size": 32}
    return timm.create_model(name, num_classes=CLASSES, **size).eval()


def _images(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, 32, 32, dtype=torch.float64), torch.randint(CLASSES, (n,))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, Tensor]]]] = {
    **{name: (functools.partial(_text, name), _tokens) for name in TRANSFORMERS},
    **{name: (functools.partial(_adapted, name), _tokens) for name in ("lora", "ia3", "prompt")},
    **{name: (functools.partial(_image, name), _images) for name in TIMM},
}


@pytest.mark.parametrize("engine", ENGINE_OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, engine: Any) -> None:
    make, batch = MODELS[name]
    inner = make()
    model = model_of(lambda s, x: getattr(out := s.inner(x), "logits", out), inner=inner)
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    for _ in range(2):
        try:
            assert_exact(
                model, cross_entropy, batch(4), batch(3), reweighter=reweighter, tolerance=TOLERANCE
            )
        except NotExactError as error:
            if engine == "auto":
                raise
            pytest.skip(str(error))
