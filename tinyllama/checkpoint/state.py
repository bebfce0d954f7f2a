"""Where a run stands: plain numbers, the same on every rank and for every world size."""

from dataclasses import dataclass, field


@dataclass
class TrainState:
    """What has been done so far; all that a resumed run needs besides the tensors."""

    step: int = 0
    """optimizer steps done"""
    samples: int = 0
    """samples seen by the whole world: the position in the data"""
    tokens: int = 0
    """tokens predicted by the whole world"""
    validated: int = -1
    """the last step that was validated"""
    skipped: int = 0
    """steps that were kept from the weights, all in all"""
    skipped_in_a_row: int = 0
    """and how many of them were the last ones"""
    recent: list[list[float]] = field(default_factory=list)
    """loss and gradient norm of the last steps, which tell a spike (train.skip_spikes)"""
