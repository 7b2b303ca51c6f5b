"""One row of the codec bench for each codec, and bytes at equal loss between a codec and another one's rate sweep.

bench = Bench(n_documents=6, n_probes=500)
row = bench.measure("int4", Affine(4))
sweep = [bench.measure(str(c), c, probe=False) for c in int_family()]
bytes_at_equal_kl(row, sweep)     ours over theirs, with its interval
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from baselines import Affine, Pr418
from calibration import Calibration, calibrate, shannon_bits
from loss import HeldOut, Interval, Loss, interval, resampled
from paper_codec import Paper, PaperTables
from reference_model import ReferenceModel
from retrieval import Probes
from under_test import SOURCE_BITS, Codec

PAPER_COMPRESSIONS = (3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
PR418_COMPONENTS = (64, 48, 32, 24, 16, 8, 4)
INT_BITS, INT_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64)
N_TIMED_BLOCKS = 24
_NO_LOSS = 1e-12  # in place of a KL of 0, which has no logarithm


class Bench:
    """The reference model with its held-out documents and probes; exact runs are made once."""

    def __init__(self, n_documents: int = 24, n_probes: int = 2000) -> None:
        self.model, self.n_documents = ReferenceModel(), n_documents
        self.calibration = calibrate(self.model)
        self.held_out = HeldOut(self.model, n_documents)
        self.probes = Probes(self.model, n_probes)
        self._spectra = [self.calibration.keys.basis(slice(None))[1], self.calibration.values.basis(slice(None))[1]]

    def measure(self, name: str, codec: Codec, *, probe: bool = True) -> "Row":
        """Runs all documents, and all probes unless told otherwise, through a codec."""
        loss = self.held_out.loss(codec)
        mean, worst = loss.attention_error()
        figures = {
            "kl": loss.mean_kl(),
            "perplexity_delta": loss.perplexity_delta(),
            "attention_error_mean": mean,
            "attention_error_worst": worst,
        }
        if probe:
            found = self.probes.retrieval(codec)
            figures |= {"retrieval": found.accuracy(), "retrieval_delta": found.delta()}
        encode, decode = self._speeds(codec) if probe else (None, None)
        return Row(
            name=name,
            bits_per_value=loss.bits / loss.n_values,
            compression=SOURCE_BITS * loss.n_values / loss.bits,
            compression_paper_counting=SOURCE_BITS * loss.paper_values / loss.paper_bits,
            shannon_bits_per_value=self._shannon(loss),
            encode_mb_s=encode,
            decode_mb_s=decode,
            intervals={figure: (measured.low, measured.high) for figure, measured in figures.items()},
            loss=loss,
            **{figure: measured.value for figure, measured in figures.items()},
        )

    def _shannon(self, loss: Loss) -> float | None:
        """Bits that a Gaussian of the calibration text's spectra, all layers together, needs for the same error."""
        lost = loss.squared_errors.mean(0)
        if not lost.all():
            return None
        return float(np.mean([shannon_bits(spectrum, d) for spectrum, d in zip(self._spectra, lost, strict=True)]))

    def _speeds(self, codec: Codec) -> tuple[float | None, float | None]:
        """MB of source a second, to encode and to decode, on one core: medians over blocks that come one at a time."""
        seconds = []
        for keys, values, first_position in self.held_out.blocks(N_TIMED_BLOCKS):
            coded = codec(keys, values, first_position)
            if coded.seconds is None:
                return None, None
            seconds.append([(keys.nbytes + values.nbytes) / 1e6 / s for s in coded.seconds])
        encode, decode = np.median(seconds, axis=0).tolist()
        return encode, decode


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured of a codec; intervals by the name of their field. None: not measured, or without meaning."""

    name: str
    bits_per_value: float  # every stored byte but the calibration
    compression: float
    compression_paper_counting: float
    perplexity_delta: float  # part of the exact cache's: 0.01 is 1 %
    kl: float  # nats a token
    attention_error_mean: float
    attention_error_worst: float
    shannon_bits_per_value: float | None  # at the same squared error of keys and of values
    encode_mb_s: float | None
    decode_mb_s: float | None
    intervals: dict[str, tuple[float, float]]
    loss: Loss = field(repr=False, compare=False)
    retrieval: float | None = None  # part of the probes answered
    retrieval_delta: float | None = None  # above the exact cache's

    def as_json(self) -> dict[str, Any]:
        """Everything but the stretches that it was computed from."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "loss"}


def bytes_at_equal_kl(ours: Row, theirs: Sequence[Row]) -> Interval:
    """Our bytes over theirs at the KL of our row; bits are interpolated on their sweep against log KL.

    Rows of the sweep that another one beats in both bytes and KL are left out.

    Raises:
        ValueError: our KL lies outside the sweep; nothing is extrapolated.
    """
    sweep = _front(theirs)
    kl = np.array([row.kl for row in sweep])
    if not kl[-1] <= ours.kl <= kl[0]:
        raise ValueError(f"{ours.name} has a KL of {ours.kl:.2g}, the sweep goes from {kl[-1]:.2g} to {kl[0]:.2g}")
    bits = np.array([row.bits_per_value for row in sweep])
    again = zip(resampled(ours.loss.kl), np.stack([resampled(row.loss.kl) for row in sweep], axis=1), strict=True)
    ratios = np.array([ours.bits_per_value / _bits_at(mine, other, bits) for mine, other in again])
    return interval(ours.bits_per_value / _bits_at(ours.kl, kl, bits), ratios)


def int_family() -> list[Affine]:
    """mlx's quantised cache at all widths."""
    return [Affine(bits, group_size) for group_size in INT_GROUPS for bits in INT_BITS]


def paper_family(
    calibration: Calibration, layers_per_group: int, compressions: Sequence[float] = PAPER_COMPRESSIONS
) -> list[Paper]:
    """The paper's pipeline at many compressions, as it counts them."""
    tables = PaperTables(calibration, layers_per_group)
    return [tables.codec(compression) for compression in compressions]


def pr418_family(calibration: Calibration) -> list[Pr418]:
    """PR #418 with its window and sinks, at different numbers of components."""
    return [Pr418(calibration, n_components) for n_components in PR418_COMPONENTS]


def _front(rows: Sequence[Row]) -> list[Row]:
    """Rows that no other one beats, from the fewest bits to the most."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.bits_per_value, row.kl)):
        if not front or row.kl < front[-1].kl:
            front.append(row)
    return front


def _bits_at(kl: float, sweep_kl: Any, bits: Any) -> float:
    falling = np.minimum.accumulate(np.maximum(sweep_kl, _NO_LOSS))  # a resample may disturb the order
    return float(np.interp(np.log(max(kl, _NO_LOSS)), np.log(falling[::-1]), bits[::-1]))
