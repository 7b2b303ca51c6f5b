"""Puts the latest results into the README, between its markers; a test proves that they are there unchanged."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results"
README = ROOT / "README.md"


def demo_table(demo: dict[str, Any]) -> str:
    """What `make demo` printed."""
    return _markdown(
        ["one run of `make demo`", ""],
        [
            ["tokens", f"{demo['tokens']:,}"],
            ["restored / computed tokens of the prompt", f"{demo['restored_tokens']:,} / {demo['computed_tokens']:,}"],
            ["source / stored bytes", f"{demo['source_bytes']:,} / {demo['stored_bytes']:,}"],
            ["compression, lossless", f"{demo['source_bytes'] / demo['stored_bytes']:.2f}x"],
            ["prefill, to the first token", f"{demo['prefill_seconds']:.2f} s"],
            ["restore", f"{demo['restore_seconds']:.3f} s"],
            ["restore and the rest of the prompt, to the first token", f"{demo['first_token_seconds']:.2f} s"],
            ["continuation identical", "yes" if demo["identical"] else "no"],
        ],
    )


def bench_table(bench: dict[str, Any]) -> str:
    """What `make bench` measured."""
    rates, restore = bench["throughput"], bench["restore"]
    compression = bench["lossless_compression"]
    over_load = f"{restore['restore_over_mlx_load']:.1f} x `load_prompt_cache` of a file in memory"
    rows = [
        [
            "put, committed",
            f"{rates['put_mb_per_second']:.0f} MB/s",
            f"{rates['put_over_bare_encode']:.2f} of bare encoding",
        ],
        ["get", f"{rates['get_mb_per_second']:.0f} MB/s", f"{rates['get_over_bare_decode']:.2f} of bare decoding"],
        *(
            [
                f"Match of 64 blocks among {match['n_blocks']:,}",
                f"{match['p50_ms']:.2f} ms (p99 {match['p99_ms']:.2f})",
                f"{match['p50_over_empty_call']:.1f} x an empty call",
            ]
            for match in bench["match"]
        ),
        [
            f"restore of {restore['tokens']:,} tokens",
            f"{1e3 * restore['restore_seconds']['median']:.0f} ms",
            f"{restore['restore_over_prefill']:.4f} of prefill; {over_load}",
        ],
        [
            "bytes on disk for it",
            f"{restore['stored_bytes']:,}",
            f"{restore['stored_over_mlx_file']:.2f} of mlx-lm's `save_prompt_cache` file",
        ],
        [
            "lossless compression",
            ", ".join(f"{n} {x:.2f}x" for n, x in compression.items()),
            "whole frames; the others are the float16 cache, cast",
        ],
    ]
    return _markdown(["", "measured", "against, in the same run (bare codec: one core)"], rows)


def server_table(server: dict[str, Any]) -> str:
    """What `make bench` measured on servers."""
    plain, ours = server["plain"], server["offloading"]
    seconds = [f"{kind['first_token_seconds']['median']:.2f} s" for kind in (plain, ours)]
    computed = [f"{kind['computed_tokens']:,}" for kind in (plain, ours)]
    answers = "the same" if server["answers_equal"] else "different"
    rows = [
        ["to the first token, median", *seconds, f"{server['first_token_ratio']:.2f}"],
        [f"computed of {server['prompt_tokens']:,} prompt tokens", *computed, f"{server['computed_tokens_ratio']:.2f}"],
        ["answers", "", answers, ""],
    ]
    return _markdown([f"{server['turns']} turns after a restart", "mlx_lm.server", "with kvcached", "ratio"], rows)


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "demo": ("demo.json", demo_table),
    "bench": ("first_light.json", bench_table),
    "server": ("server.json", server_table),
}


def filled(text: str) -> str:
    """The README with the tables of the latest results."""
    for name, (file, table) in TABLES.items():
        content = table(json.loads((RESULTS / file).read_text()))
        pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = pattern.sub(lambda found, content=content: found[1] + content + found[2], text)  # type: ignore[misc]
    return text


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
