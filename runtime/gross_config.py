"""The configuration's section for `anabranch gross`. The defaults are the paper's numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GrossConfig:
    """`[gross]`: training and search of all group sizes. The full network is trained as the other sections say."""

    full: str = ""
    """Folder of a finished `anabranch train` of the network, to decompose its newest checkpoint; empty: it is trained
    first, as the other sections say. (Such a training saw the samples that are kept out here: accuracies on these are
    too high then, for all configurations alike.)"""
    sizes: tuple[int, ...] = ()
    """Group sizes of the series, each dividing the next; a layer has those up to its input channels, which the last
    must divide. Empty: all powers of two that divide them. All choices, one a layer, may be 100,000."""
    temperature: float = 4.0
    """Sampling temperature: 0 draws all group sizes alike, larger values the small ones more often."""
    validation_fraction: float = 0.2
    """Part of the training samples that is kept out of training, to choose configurations by."""
    reconstruct_epochs: int = 30
    """Epochs of response reconstruction, of the series and of each fixed configuration."""
    reconstruct_lr: float = 1e-4
    """Learning rate of the series' response reconstruction."""
    reconstruct_milestones: tuple[int, ...] = (20,)
    """Epochs at which response reconstruction divides its learning rate by ten."""
    tune_epochs: int = 150
    """Epochs of the series' finetuning, with group sizes drawn anew at every step."""
    tune_lr: float = 1e-4
    """Learning rate of the series' finetuning."""
    tune_milestones: tuple[int, ...] = (80, 120)
    """Epochs at which it is divided by ten."""
    fixed_reconstruct_lr: float = 0.01
    """Learning rate of a fixed configuration's response reconstruction."""
    fixed_tune_epochs: int = 100
    """Epochs of a fixed configuration's finetuning."""
    fixed_tune_lr: float = 0.001
    """Learning rate of a fixed configuration's finetuning."""
    fixed_tune_milestones: tuple[int, ...] = (80,)
    """Epochs at which it is divided by ten."""
    baselines: tuple[int, ...] = (16, 4)
    """Group sizes of the fixed configurations to beat (a layer with fewer channels has its largest). The search finds,
    for each, more accurate configurations of at most its multiply-adds."""
    max_macs: int = 0
    """Another limit of multiply-adds to search under; 0: those of the baselines only."""
    winners: int = 2
    """Configurations found under each limit that are decomposed and tuned alone."""
    repeats: int = 1
    """Times each fixed configuration is tuned, with other seeds; the table has mean and deviation (the paper: 5)."""
