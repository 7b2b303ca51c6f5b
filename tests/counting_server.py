"""`counting_server.py FILE plain|offloading ARGUMENTS...`: mlx_lm.server, or ours, that counts its tokens.

Each call of the model is a line in FILE: how many tokens it was fed. The count is taken where the model is called.
"""

import sys
from pathlib import Path
from typing import Any

from mlx_lm import server as plain
from mlx_lm.models import qwen3

from kvcached_mlx import server as offloading

calls, kind, *arguments = sys.argv[1:]
compute = qwen3.Model.__call__


def count(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    with Path(calls).open("a") as file:
        file.write(f"{inputs.shape[-1]}\n")
    return compute(self, inputs, *args, **kwargs)


qwen3.Model.__call__ = count
if kind == "plain":
    sys.argv = ["mlx_lm.server", *arguments]
    plain.main()
else:
    offloading.main(arguments)
