# SPDX-License-Identifier: MIT OR Apache-2.0
"""The lines, the totals and the JSON."""

import json
import os

ROW = "ROW "  # before a row's JSON, where rows are read from the output

MEASURED = ("downtime_ms", "arm_ms", "fault_p50_us", "fault_p99_us", "vcpu_thread_faults", "faults", "blocktime_ms")
# `arm_ms` is the part of the downtime in which the slots change. Of several rounds the values are
# the medians, and `range` has [lowest, highest].
KEYS = ("kernel", "mechanism", "case", "result", "completed", "verified", *MEASURED, "rounds", "range", "seconds", "reason")


def row(**known):
    return {key: known.get(key, False if key in ("completed", "verified") else None) for key in KEYS}


def median(values):
    """As that of `statistics`, which the small Python in an emulated machine lacks."""
    values, half = sorted(values), len(values) // 2
    return values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2


def merged(rounds):
    """One row of several of the same case and mechanism: the worst result, the medians."""
    worst = max(rounds, key=lambda r: ("PASS", "SKIP", "FAIL").index(r["result"]))
    if worst["result"] != "PASS":
        return worst
    found = dict(rounds[-1], rounds=len(rounds), seconds=round(sum(r["seconds"] for r in rounds), 1), range={})
    for key in MEASURED:
        values = [r[key] for r in rounds if r[key] is not None]
        if values:
            found[key] = round(median(values), 1)
            found["range"][key] = [min(values), max(values)]
    return found


def is_ratio(text):
    return text.startswith("# ") and " / qemu: p50 " in text


def ratios(rows):
    """Lines that compare each mechanism with QEMU's own path.

    Of the same kernel, the same case, the same run.
    """
    own = {(r["kernel"], r["case"]): r for r in rows if r["mechanism"] == "qemu"}
    for r in rows:
        base = own.get((r["kernel"], r["case"]))
        if base and r is not base and r["fault_p50_us"] and base["fault_p50_us"]:
            p50, p99 = (r[key] / base[key] for key in ("fault_p50_us", "fault_p99_us"))
            yield f"# {r['kernel']}, {r['case']}: {r['mechanism']} / qemu: p50 {p50:.2f}, p99 {p99:.2f} ({r['rounds']} rounds)"


def clear(r):
    """What QEMU's own path measured is not the mechanism's: a skipped row has no results."""
    keep = ("kernel", "mechanism", "case", "seconds")
    r.update({key: value for key, value in row().items() if key not in keep})


def line(r):
    """PASS qemu/postcopy[poison-trap] 12.3 what it measured, or why not"""
    text = f"{r['result']} qemu/{r['case']}[{r['mechanism']}] {r['seconds']:.1f}"
    if r["fault_p50_us"] is not None:
        text += f" faults {r['faults']:.0f}, p50 {r['fault_p50_us']:.0f} us, p99 {r['fault_p99_us']:.0f} us, downtime {r['downtime_ms']} ms"
    if r["arm_ms"] is not None:
        text += f" (slots {r['arm_ms']} ms)"
    if r["vcpu_thread_faults"] is not None:
        text += f", on vCPU threads {r['vcpu_thread_faults']:.0f}"
    return f"{text} {r['reason'] or ''}".rstrip()


def totals(rows):
    return "%d passed, %d failed, %d skipped" % tuple(sum(r["result"] == kind for r in rows) for kind in ("PASS", "FAIL", "SKIP"))


def logs(directory):
    """The lines of a case's logs that tell most, each behind a mark."""
    for file in sorted(directory.iterdir()):
        lines = file.read_text(errors="replace").splitlines()
        for text in lines[-20:] if file.suffix == ".stderr" else lines[-3:]:
            yield f"# {file.name}: {text[:300]}"


def write_json(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")
    os.replace(new, path)
