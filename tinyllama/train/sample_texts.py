"""Continue fixed prompts greedily at each validation (eval.samples), to show what the model has learned."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tinyllama import InputError
from tinyllama.config.args import EvalArgs
from tinyllama.config.model import ModelConfig
from tinyllama.convert.tokenizer_files import matching_tokenizer
from tinyllama.tokenizer import Tokenizer

NEW_TOKENS = 64


def open_sample_texts(args: EvalArgs, config: ModelConfig, trained_with: str | None) -> "SampleTexts | None":
    """Return what continues the prompts of ``eval.samples``; None if there are none.

    ``trained_with`` is the hash of the data's tokenizer. Raises InputError if a prompt cannot be continued.
    """
    if not args.samples:
        return None
    assert args.tokenizer is not None  # check() has seen to it
    return SampleTexts(args.samples, matching_tokenizer(args.tokenizer, trained_with, config), config)


class SampleTexts:
    """Continues prompts greedily; raises InputError for a prompt that is empty or fills the context.

    Nothing is random. Collectives and compiled blocks need the same passes on every rank, so each pass reads the whole
    context, and the number of passes does not depend on the tokens.
    """

    def __init__(self, prompts: Sequence[str], tokenizer: Tokenizer, config: ModelConfig) -> None:
        self._tokenizer, self._config = tokenizer, config
        self._prompts: list[tuple[str, list[int]]] = []
        for prompt in prompts:
            ids = tokenizer.encode(prompt)
            if not 0 < len(ids) < config.block_size:
                hint = f"give one of 1 to {config.block_size - 1:,}, fewer than model.block_size"
                raise InputError(f"eval.samples: {prompt!r:.60} has {len(ids):,} tokens: {hint}")
            self._prompts.append((prompt, ids))

    @torch.no_grad()
    def texts(
        self, model: Callable[[Tensor], Tensor], device: torch.device, stop: Callable[[], bool]
    ) -> list[tuple[str, str]] | None:
        """Collective. Return each prompt and its continuation, up to the document's end; None if ``stop`` ended it."""
        found = []
        for prompt, ids in self._prompts:
            context = torch.zeros(1, self._config.block_size, dtype=torch.int64, device=device)
            context[0, : len(ids)] = torch.tensor(ids)
            end = min(len(ids) + NEW_TOKENS, self._config.block_size)
            for position in range(len(ids), end):
                if stop():
                    return None
                logits = model(context)[0, position - 1, : self._config.vocab_size]  # what follows is not looked at
                context[0, position] = logits.argmax()
            new = context[0, len(ids) : end].tolist()
            if self._tokenizer.eos_id in new:
                new = new[: new.index(self._tokenizer.eos_id)]
            whole, begun = self._tokenizer.decode(ids + new), self._tokenizer.decode(ids)
            found.append((prompt, whole.removeprefix(begun)))
        return found
