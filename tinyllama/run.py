"""A run, resolved: what its settings and its data come to, before the first rank starts."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinyllama.args import PretrainArgs
from tinyllama.config import ModelConfig
from tinyllama.data.mixture import Mixture
from tinyllama.data.packed import PackedDataset
from tinyllama.schedule import lr_at


@dataclass(frozen=True)
class Run:
    """All that every rank knows alike."""

    args: PretrainArgs
    config: ModelConfig
    sources: list[PackedDataset]
    validation: list[PackedDataset]
    mixture: Mixture
    accumulation: int
    """micro-batches a rank passes through in one step"""
    max_steps: int
    ops: dict[str, str]
    """backend of each operation"""
    resume: Path | None
    """the step directory to go on from"""

    @property
    def out_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.args.out_dir)

    @property
    def tokens_per_step(self) -> int:
        """Tokens predicted in an optimizer step by the whole world."""
        return self.args.train.global_batch_size * self.config.block_size

    def lr_at(self, step: int) -> float:
        """Learning rate of the 0-based step."""
        optim = self.args.optim
        return lr_at(step, lr=optim.lr, min_lr=optim.min_lr, warmup_steps=optim.warmup_steps, max_steps=self.max_steps)

    def resolved(self) -> dict[str, Any]:
        """The settings with the model's sizes written out: what config.yaml holds."""
        return asdict(self.args) | {"model": asdict(self.config)}

    def data_facts(self) -> dict[str, Any]:
        """What fixes the model and the order of the samples: a resumed run must have the same."""
        sources: list[dict[str, Any]] = [
            {"weight": source.weight, "fingerprint": dataset.fingerprint}
            for source, dataset in zip(self.args.data.sources, self.sources, strict=True)
        ]
        data: dict[str, Any] = {"seed": self.args.data.seed, "sources": sources}
        if self.args.data.ramp_tokens is not None:
            data["ramp_tokens"] = self.args.data.ramp_tokens
            for facts, source in zip(sources, self.args.data.sources, strict=True):
                facts["final_weight"] = source.final_weight
        return {"data": data, "model": asdict(self.config)}

    def tokenizer_facts(self) -> dict[str, Any]:
        """What a converter has to know of the tokenizer."""
        dataset = self.sources[0]
        return {"tokenizer_sha256": dataset.tokenizer_sha256, "bos_id": dataset.bos_id, "eos_id": dataset.eos_id}
