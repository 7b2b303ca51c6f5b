"""What a calibration may say of compaction: how budgets are shared, and what heads weigh."""

import numpy as np
import pytest
from support import tiny_spec

from kvcached import border
from kvcached.errors import InvalidRequestError
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.tensors import Arrays, describe, nbytes

SPEC = tiny_spec(block_size=16)  # 2 layers of 2 KV heads and 8 dims
METRIC = np.broadcast_to(np.eye(8, dtype=np.float32), (2, 2, 8, 8))


def check(arrays: Arrays) -> None:
    described = describe(arrays)
    header = pb.CalibrateHeader(tensors=described, data_bytes=nbytes(described))
    border.check_piece(header, SPEC, 1 << 20)
    border.check_piece_values(arrays)


def weights(*, worst: float = 1.0, shape: tuple[int, ...] = (2, 2)) -> np.ndarray:
    found = np.ones(shape, np.float32)
    found.flat[-1] = worst
    return found


def test_heads_may_be_weighed_beside_the_metric() -> None:
    check({"output_metric": METRIC, "head_weights": weights(worst=1e-6)})
    check({"output_metric": METRIC})


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"output_metric": METRIC, "head_weights": weights(shape=(2, 4))}, r"'head_weights': \('float32', \(2, 2\)\)"),
        ({"output_metric": METRIC, "head_weights": weights().astype(np.float64)}, "got .*'float64'"),
        ({"head_weights": weights()}, "a piece of text is to fit"),
        ({"output_metric": METRIC, "head_weights": weights(worst=np.nan)}, "head_weights must be finite"),
        ({"output_metric": METRIC, "head_weights": weights(worst=0)}, "head_weights must be above 0, got 0"),
        ({"output_metric": METRIC, "head_weights": weights(worst=-2)}, "head_weights must be above 0, got -2"),
    ],
)
def test_weights_that_are_none_are_refused(arrays: Arrays, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        check(arrays)


def test_budgets_are_shared_by_what_is_known_and_by_curves_if_nobody_says() -> None:
    for asked, expected in (("", "curves"), ("curves", "curves"), ("entropy", "entropy"), ("uniform", "uniform")):
        assert border.calibration_budgets(pb.CalibrateStart(budgets=asked)) == expected
    with pytest.raises(InvalidRequestError, match="by curves, entropy, uniform, or empty for curves, got 'luck'"):
        border.calibration_budgets(pb.CalibrateStart(budgets="luck"))
