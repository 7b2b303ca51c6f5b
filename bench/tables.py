"""Puts the latest results into the documents, between their markers; a test proves that they are there unchanged."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs/quality.md", ROOT / "docs/performance.md")
_PERFORMANCE = "performance.quick.json"  # until the whole bench is recorded
_PROFILES = ("near-lossless", "x8", "x16", "x32")
_OTHERS = {
    "paper": "the KVTC paper's pipeline, same layer groups",
    "pr418": "oMLX's PR #418",
    "one_layer": "ours, one layer a basis",
    "unweighted": "ours, without the metric",
    "int4": "mlx's quantised cache, best of all widths",
}


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


def profiles_table(quality: dict[str, Any]) -> str:
    """Our profiles, for the README."""
    header = ["profile", "compression", "KL, nats a token", "perplexity", "retrieval, points"]
    rows = [row for row in quality["rows"] if row["name"] in _PROFILES]
    return _markdown(header, [[row["name"], f"{row['compression']:.1f}x", *_losses(row)] for row in rows])


def rows_table(quality: dict[str, Any]) -> str:
    """All codecs, each at one setting."""
    header = ["codec", "bits a value", "compression", "as the paper counts", "KL, nats a token", "perplexity"]
    header += ["retrieval, points", "attention error, mean / worst", "Shannon bits", "MB/s in / out"]
    rows = []
    for row in quality["rows"]:
        shannon, speed = row["shannon_bits_per_value"], (row["encode_mb_s"], row["decode_mb_s"])
        rows.append(
            [
                row["name"],
                f"{row['bits_per_value']:.2f}",
                f"{row['compression']:.1f}x",
                f"{row['compression_paper_counting']:.1f}x",
                *_losses(row),
                f"{row['attention_error_mean']:.3f} / {row['attention_error_worst']:.3f}",
                "" if shannon is None else f"{shannon:.2f}",
                "" if None in speed else f"{speed[0]:.0f} / {speed[1]:.0f}",
            ]
        )
    return _markdown(header, rows)


def _losses(row: dict[str, Any]) -> list[str]:
    """KL, perplexity and retrieval with their intervals."""
    (kl_low, kl_high), ppl, found = (row["intervals"][n] for n in ("kl", "perplexity_delta", "retrieval_delta"))
    return [
        f"{row['kl']:.1e} ({kl_low:.1e} to {kl_high:.1e})" if row["kl"] else "0",
        f"{100 * row['perplexity_delta']:+.2f} % ({100 * ppl[0]:+.2f} to {100 * ppl[1]:+.2f})",
        f"{100 * row['retrieval_delta']:+.2f} ({100 * found[0]:+.2f} to {100 * found[1]:+.2f})",
    ]


def equal_table(quality: dict[str, Any]) -> str:
    """Our bytes over those of others at the KL of our profile."""
    rows = []
    for name, others in quality["bytes_at_equal_kl"].items():
        bounds = quality["bytes_at_equal_kl_intervals"][name]
        cells = [f"{others[o]:.2f} ({bounds[o][0]:.2f} to {bounds[o][1]:.2f})" if o in others else "" for o in _OTHERS]
        rows.append([name, *cells])
    return _markdown(["at the KL of", *_OTHERS.values()], rows)


def speed_table(quality: dict[str, Any]) -> str:
    """What the coder costs beside what it must do."""
    rows = [
        ["entropy sections over each component's empirical entropy, worst of x8 and x16", "entropy_overhead"],
        ["decode of a 7B-shaped block over its bare GEMMs, one core", "decode_over_gemm"],
        ["encode of the same over its bare GEMMs", "encode_over_gemm"],
    ]
    shown = {"entropy_overhead": "{:+.1%}", "decode_over_gemm": "{:.2f}", "encode_over_gemm": "{:.2f}"}
    measured = [[what, shown[key].format(quality[key])] for what, key in rows]
    found = quality["compaction"]
    large = found["shape_7b"]
    measured += [
        ["compaction to a quarter, one core", f"{found['compact_mb_s']:.0f} MB/s of source"],
        ["its share of the pool's work on such a block", f"{found['share_of_pool']:.0%}"],
        ["compacting and coding a block over coding alone", f"{found['over_coding_alone']:.1f}"],
        ["compaction of a 7B-shaped block", f"{large['seconds']:.1f} s, {large['mb_s']:.0f} MB/s"],
    ]
    return _markdown(["", "measured"], measured)


def compaction_table(quality: dict[str, Any]) -> str:
    """What is stored and restored, compacted or not."""
    header = ["fidelity", "compression", "KL, nats a token", "perplexity", "retrieval, points"]
    header += ["attention error, mean / worst", "bytes a token", "active bytes a token", "KL over coding alone"]
    over = quality["over_coding_alone"]
    rows = [
        [
            row["fidelity"],
            f"{row['compression']:.1f}x",
            *_losses(row),
            f"{row['attention_error_mean']:.3f} / {row['attention_error_worst']:.3f}",
            f"{row['bytes_per_token']:.0f}",
            f"{row['active_bytes_per_token']:.0f}",
            f"{over[row['fidelity']]:.2f}" if row["fidelity"] in over else "",
        ]
        for row in quality["rows"]
    ]
    return _markdown(header, rows)


def matching_table(quality: dict[str, Any]) -> str:
    """Compaction itself, against simpler ways."""
    ways = {
        "am_over_uniform_4x": "every fourth token, as PR #418 picked them",
        "am_over_equal_budgets_4x": "Attention Matching, all heads with equally many tokens",
        "am_over_no_bias_4x": "our rows without their biases",
        "compacted_50x_over_coding_alone": f"coding alone at the bytes of {quality['compacted_50x']}",
    }
    rows = []
    for key, what in ways.items():
        low, high = quality["intervals"][key]
        rows.append([what, f"{quality[key]:.2f} ({low:.2f} to {high:.2f})"])
    return _markdown(["our KL over that of", ""], rows)


def compacted_table(quality: dict[str, Any]) -> str:
    """Compaction to a quarter, for the README."""
    header = ["stored as", "compression", "cache in the engine", "KL, nats a token", "perplexity", "retrieval, points"]
    rows = {row["fidelity"]: row for row in quality["rows"]}
    exact = rows["exact"]["active_bytes_per_token"]
    shown = [(f"compacted-{p}", rows[f"compacted-4x on {p}"]) for p in ("x8", "x16")]
    cells = [
        [name, f"{r['compression']:.1f}x", f"{exact / r['active_bytes_per_token']:.1f}x smaller", *_losses(r)]
        for name, r in shown
    ]
    return _markdown(header, cells)


def decode_table(decode: dict[str, Any]) -> str:
    """What a smaller active cache does to decoding."""
    plain, compacted = (decode[f"{which}_tokens_per_second"] for which in ("plain", "compacted"))
    rows = [
        ["tokens a second on a plain cache", f"{plain:.0f}"],
        ["on a compacted one", f"{compacted:.0f} ({decode['ratio']:.2f} of it)"],
        ["bytes of the cache, plain over compacted", f"{decode['nbytes_ratio']:.2f}"],
    ]
    return _markdown(["", "measured"], rows)


def calibration_table(cost: dict[str, Any]) -> str:
    """What calibrating a 7B-shaped model takes beside running it."""
    groups, gib = cost["n_groups"], 1 << 30
    added = cost["add_seconds_per_1000_tokens"] * cost["fit_tokens"] / 1000
    rows = [
        ["moments and sensitivity", f"{added:.0f} s", f"{groups * added / 60:.1f} min"],
        ["fit of four profiles", f"{cost['fit_seconds']:.0f} s", f"{groups * cost['fit_seconds'] / 60:.1f} min"],
        ["memory at the peak", f"{cost['peak_bytes'] / gib:.1f} GiB", f"{cost['total_peak_bytes'] / gib:.1f} GiB"],
        [
            "the bundle's file",
            f"{cost['bundle_bytes'] / gib:.2f} GiB",
            f"{groups * cost['bundle_bytes'] / gib:.2f} GiB",
        ],
    ]
    return _markdown([f"{cost['fit_tokens']:,} tokens", "7 layers, measured", f"{groups} such groups, reckoned"], rows)


_WANTED = {
    "shm_over_inband": "at least 4",
    "shm_over_memcpy": "at least 0.5",
    "restore_over_codec": "at least 0.6",
    "two_workers_over_one": "at least 1.8",
    "restore_over_prefill": "at least 100",
    "exact_restore_over_load_prompt_cache": "at most 3",
    "put_cost_share": "at most 0.05",
    "decode_speed_with_offload": "at least 0.97",
    "match_1e6_over_1e3": "at most 3",
    "rss_growth": "at most 0.05",
    "fairness": "at most 2",
    "p99_get_seconds": "",
}


def performance_table(found: dict[str, Any]) -> str:
    """The ratios that were promised, met or not."""
    rows = [[f"`{key}`", _number(found[key]), wanted, _met(found[key], wanted)] for key, wanted in _WANTED.items()]
    scaling = found["pool"]["two_over_one"]
    rows += [
        [f"two processes over one, {kind} blocks", _number(scaling[f"{kind}_processes"]), "", ""]
        for kind in ("coded", "exact")
    ]
    return _markdown([f"{found['command']}, {found['date'][:10]}", "measured", "wanted", ""], rows)


def _met(value: float | None, wanted: str) -> str:
    if value is None or not wanted:
        return "" if value is not None else "not measured"
    bound = float(wanted.split()[-1])
    return "met" if (value >= bound if "least" in wanted else value <= bound) else "**missed**"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def performance_restore_table(found: dict[str, Any]) -> str:
    """Seconds, with quartiles."""
    restore, shapes = found["restore"], found["shapes"]
    rows = [["prefill", _ms(restore["prefill_seconds"]), _ms(restore["first_token_seconds"]["prefill"]), ""]]
    for name, seconds in restore["restore_seconds"].items():
        first = restore["first_token_seconds"].get(name)
        over = restore["restore_over_prefill_by_kind"].get(name)
        of_prefill = f"{over:.0f} times as fast as prefill" if over else ""
        label = f"restore, {name}" if first else f"from a file: {name}"
        rows.append([label, _ms(seconds), _ms(first) if first else "", of_prefill])
    for name in ("7B", "8B", "70B"):
        shape = shapes[name]
        against = f"prefill reckoned {shape['prefill_seconds']:.1f} s: {shape['prefill_over_restore']:.1f} times that"
        rows.append([f"restore, exact, {name}-shaped", _ms(shape["restore_seconds"]), "", against])
    header = [f"{restore['tokens']:,} tokens", "median (quartiles)", "to the first token", ""]
    return _markdown(header, rows)


def performance_clients_table(found: dict[str, Any]) -> str:
    """Latencies under mixed load."""
    rows = []
    for n, each in found["clients"]["clients"].items():
        for call, p in each["seconds"].items():
            rows.append([n, call, *(f"{1e3 * p[name]:.1f} ms" for name in ("p50", "p99", "p999")), str(p["n"])])
    return _markdown(["clients", "call", "p50", "p99", "p99.9", "calls"], rows)


def performance_match_table(found: dict[str, Any]) -> str:
    """Match and start-up by entries."""
    starts = found["match"]["start_seconds"]
    rows = [
        [f"{int(n):,}", _ms(each), f"{1e3 * each['p99']:.0f} ms", _ms(starts[n]) if n in starts else ""]
        for n, each in found["match"]["match_seconds"].items()
    ]
    rows.insert(0, ["0", "", "", _ms(starts["0"])])
    return _markdown(["blocks held", "Match of 1,000, median (quartiles)", "p99", "from start to first answer"], rows)


def _ms(each: dict[str, float]) -> str:
    return f"{1e3 * each['median']:.1f} ms ({1e3 * each['q1']:.1f} to {1e3 * each['q3']:.1f})"


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "demo": ("demo.json", demo_table),
    "bench": ("first_light.json", bench_table),
    "server": ("server.json", server_table),
    "profiles": ("codec.json", profiles_table),
    "rows": ("codec.json", rows_table),
    "equal": ("codec.json", equal_table),
    "compaction": ("quality.json", compaction_table),
    "compacted": ("quality.json", compacted_table),
    "matching": ("quality.json", matching_table),
    "decode": ("compacted_decode.json", decode_table),
    "speed": ("codec.json", speed_table),
    "calibration": ("calibration.json", calibration_table),
    "performance": (_PERFORMANCE, performance_table),
    "performance_restore": (_PERFORMANCE, performance_restore_table),
    "performance_clients": (_PERFORMANCE, performance_clients_table),
    "performance_match": (_PERFORMANCE, performance_match_table),
}


def filled(text: str) -> str:
    """A document with the tables of the latest results, where it has markers for them."""
    for name, (file, table) in TABLES.items():
        if f"<!-- {name} -->" not in text:
            continue
        content = table(json.loads((RESULTS / file).read_text()))
        pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = pattern.sub(lambda found, content=content: found[1] + content + found[2], text)  # type: ignore[misc]
    return text


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(filled(document.read_text()))
