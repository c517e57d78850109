"""Text from a model: encode prompts, generate block by block over the cache, decode."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bdtrain.config import RunConfig
from bdtrain.data.shards import CorpusIndex
from bdtrain.data.tokenizer import Tokenizer, TokenizerInfo
from bdtrain.diffusion.keyed import NoiseKey, Purpose
from bdtrain.diffusion.sampler import generate
from bdtrain.errors import DataError
from bdtrain.model.cache import as_denoiser
from bdtrain.model.transformer import TwoStreamTransformer
from bdtrain.validation.evaluate import load_saved
from bdtrain.validation.whole import whole_model


@dataclass(frozen=True)
class SampledText:
    """One continuation.

    Attributes:
        prompt: the text it continues.
        text: the continuation, without the prompt; empty for synthetic data, which have no text.
        tokens: ids of the continuation.
        network_calls: forward passes that this row took part in.
        stopped_by: what ended it: eos, length or entropy.
    """

    prompt: str
    text: str
    tokens: list[int]
    network_calls: int
    stopped_by: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def tokenizer_path(config: RunConfig) -> Path | None:
    """The tokenizer of a run's corpus; None for synthetic data."""
    return None if config.data.kind == "synthetic" else Path(str(config.data.path)) / "tokenizer.model"


def sample_texts(
    model: TwoStreamTransformer,
    config: RunConfig,
    info: TokenizerInfo,
    tokenizer: Tokenizer | None,
    *,
    prompts: list[str],
    max_tokens: int,
    key: NoiseKey,
    starts_with_bos: bool,
    method: str = "ancestral",
    steps: int | None = None,
    threshold: float = 0.9,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> list[SampledText]:
    """Continue prompts with a model.

    Args:
        model: the two-stream transformer, whole.
        config: of the run that trained it.
        info: special ids.
        tokenizer: None for synthetic data, which allow no prompt.
        prompts: one per row; rows of the same prompt differ by their number.
        max_tokens: tokens to generate per row at most.
        key: of purpose SAMPLE.
        starts_with_bos: documents of the training text begin with BOS.
        method: ancestral, first_hitting, confidence or static.
        steps: per block; None is one per token.
        threshold: of ``confidence``.
        temperature: 0 takes the best token.
        top_p: nucleus.

    Raises:
        DataError: if a prompt cannot be encoded.
    """
    if tokenizer is None and any(prompts):
        raise DataError(
            "this model was trained on synthetic data: it has no tokenizer, so leave the prompt empty"
        )
    autoregressive = config.diffusion.algo == "ar"
    encoded = []
    for prompt in prompts:
        ids = [info.bos_id] if starts_with_bos else []
        if prompt and tokenizer is not None:
            ids += tokenizer.encode(prompt).tolist()
        encoded.append(ids or (_first_token(info, tokenizer) if autoregressive else []))
    samples = generate(
        as_denoiser(model),
        encoded,
        block_size=config.diffusion.block_size,
        max_tokens=max_tokens,
        mask_id=info.mask_id,
        eos_id=info.eos_id,
        key=key,
        method=method,
        steps=steps,
        schedule=config.diffusion.schedule,
        temperature=temperature,
        top_p=top_p,
        threshold=threshold,
        autoregressive=autoregressive,
    )
    return [
        SampledText(
            prompt=prompt,
            text="" if tokenizer is None else tokenizer.decode(sample.tokens),
            tokens=sample.tokens,
            network_calls=sample.network_calls,
            stopped_by=sample.stopped_by,
        )
        for prompt, sample in zip(prompts, samples, strict=True)
    ]


def _first_token(info: TokenizerInfo, tokenizer: Tokenizer | None) -> list[int]:
    """What AR, which predicts no first token, starts from without prompt or BOS: a newline."""
    return [info.sep_id + 1] if tokenizer is None else tokenizer.encode("\n").tolist()


def documents_start_with_bos(config: RunConfig) -> bool:
    """Whether the documents of a run's data begin with BOS."""
    return config.data.kind == "corpus" and CorpusIndex.load(Path(str(config.data.path))).bos


class RunSampler:
    """The sample that a run writes at each validation.

    Args:
        config: the run.
        info: special ids of its data.
    """

    def __init__(self, config: RunConfig, info: TokenizerInfo) -> None:
        self._config, self._info = config, info
        self.starts_with_bos = documents_start_with_bos(config)
        path = tokenizer_path(config)
        self._tokenizer = None if path is None else Tokenizer.load(path)

    def sample(self, model: TwoStreamTransformer, step: int) -> SampledText | None:
        """One continuation of ``validation.sample_prompt``. Every rank must call it.

        Data-parallel ranks make the same text: with weights that ZeRO splits they need each other for it.

        Args:
            model: this rank's part of the two-stream transformer.
            step: keys the draws.

        Returns:
            None when no tokens are asked for, and on all but the first pipeline stage.
        """
        settings = self._config.validation
        whole = whole_model(model) if settings.sample_tokens else None
        if whole is None:
            return None
        (sample,) = sample_texts(
            whole,
            self._config,
            self._info,
            self._tokenizer,
            prompts=[settings.sample_prompt],
            max_tokens=settings.sample_tokens,
            key=NoiseKey(seed=self._config.run.seed, purpose=Purpose.SAMPLE, step=step),
            starts_with_bos=self.starts_with_bos,
            method=settings.sample_method,
            steps=settings.sample_steps,
        )
        return sample


def sample_saved(
    checkpoint: Path,
    *,
    prompts: list[str],
    max_tokens: int,
    method: str,
    steps: int | None,
    threshold: float,
    temperature: float,
    top_p: float,
    seed: int,
) -> list[SampledText]:
    """Continue prompts with a saved model; see ``sample_texts``.

    Raises:
        BdtrainError: for a damaged checkpoint, or a prompt that it cannot take.
    """
    saved, model = load_saved(checkpoint)
    facts = dict(saved.facts["tokenizer"])
    return sample_texts(
        model,
        saved.config,
        TokenizerInfo(**facts),
        None if saved.tokenizer is None else Tokenizer.load(saved.tokenizer),
        prompts=prompts,
        max_tokens=max_tokens,
        key=NoiseKey(seed=seed, purpose=Purpose.SAMPLE),
        starts_with_bos=bool(saved.facts["starts_with_bos"]),
        method=method,
        steps=steps,
        threshold=threshold,
        temperature=temperature,
        top_p=top_p,
    )
