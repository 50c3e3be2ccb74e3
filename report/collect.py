"""Put the numbers of figures/*.json where people read them: report/numbers.tex and the tables of README.md.

    python report/collect.py

In the report \\num{vae_z20.result.test_elbo} is that value, rounded as `rounded` says; a key that no JSON has is an
error of the build that names it. In README.md what stands between <!-- NAME --> and <!-- /NAME --> is replaced, and
in a script's docstring the comment after its command.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "code"))

from experiment import UserError, exit_status, write  # noqa: E402

DECIMALS = {  # of a value whose key has this word, the first that fits
    "elbo": 2, "nll": 2, "gap": 2, "bpd": 3, "accuracy": 4, "fid": 1, "precision": 3, "recall": 3,
    "reconstruction": 1, "rarest": 1, "commonest": 1, "percent": 2, "carlo": 3, "bias": 3, "rms": 3,
    "ratio": 4, "posterior": 1, "loss": 3, "real": 3, "fake": 3,
}  # fmt: skip

COMMANDS = {  # script -> run -> command, as in the scripts' docstrings
    "code/vae.py": {"vae_z20": "code/vae.py", "vae_z2": "code/vae.py --z-dim 2"},
    "code/gan.py": {"gan": "code/gan.py"},
    "code/nf.py": {"nf": "code/nf.py"},
}
RUNS = [run for commands in COMMANDS.values() for run in commands]

SET = {"mu", "variance", "noise", "radius", "deviation"}  # last words of keys of what was not measured

COSTS = {"train_seconds": 0, "seconds_per_1000_samples": 3}  # key of a result -> decimals

# What the assignment's first solution reached on validation, from its curves: ELBO, bits per dimension.
ORIGINAL = {"vae_z20": -101.7, "vae_z2": -151.2}
ORIGINAL_BITS = 1.82
BAR = 1.85  # bits per dimension that the assignment asks for after 40 epochs


@exit_status
def main(argv: list[str] | None = None) -> None:
    """Write every generated file."""
    for path, text in collect(ROOT).items():
        write(path, text.encode())


def collect(root: Path) -> dict[Path, str]:
    """The generated files of a checkout with their contents. Raises UserError naming a key that a JSON lacks."""
    results = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((root / "figures").glob("*.json"))
    }
    files = {root / "report" / "numbers.tex": numbers_tex(results)}
    try:
        tables = {
            "results": results_table(results), "bits": bits_table(results), "judged": judged_table(results),
            "healthy": healthy_table(results), "game": game_table(results), "chosen": chosen_table(results),
            "flow": flow_table(results), "theory": theory_sentence(results), "gpu": gpu_table(results),
        }  # fmt: skip
        files[root / "README.md"] = between_markers(root / "README.md", tables)
        if "bench" in results:
            tables = {"ceiling": ceiling_table(results), "ladder": ladder_table(results["bench"])}
            tables |= {"tried": tried_table(results["bench"]), "growth": growth_table(results["bench"])}
            files[root / "docs" / "speed.md"] = between_markers(root / "docs" / "speed.md", tables)
        for script, commands in COMMANDS.items():
            source = (root / script).read_text(encoding="utf-8")
            for run, command in commands.items():
                if run in results:
                    pattern = rf"(?m)^( +python {re.escape(command)} +# ).*$"
                    source, found = re.subn(pattern, rf"\g<1>{claim(results[run])}", source)
                    if found != 1:
                        raise UserError(f"{script} must show 'python {command}  # ...' once in its docstring")
            files[root / script] = source
    except KeyError as error:
        raise UserError(f"a JSON in figures/ lacks the key {error}: train that run again") from None
    return files


def between_markers(path: Path, texts: dict[str, str]) -> str:
    """The file's content with each text between the markers of its name."""
    content = path.read_text(encoding="utf-8")
    for name, text in texts.items():
        parts = re.split(rf"(<!-- /?{name} -->)", content)
        if len(parts) != 5:
            raise UserError(f"{path.name} must have <!-- {name} --> and <!-- /{name} --> once each")
        content = f"{parts[0]}{parts[1]}\n{text}\n{parts[3]}{parts[4]}"
    return content


def claim(content: dict) -> str:
    """What a script's docstring says its command measured."""
    result = content["result"]
    if "test_elbo" in result:
        nll = result.get("test_nll_quadrature", result["test_nll"])
        measured = f"z of {content['config']['z_dim']}: test ELBO {result['test_elbo']:.2f} nats, -log p(x) {nll:.2f}"
    elif "test_bpd" in result:
        draws = f"{result['test_bpd_iw']:.3f} with {result['importance_samples']} draws of the noise"
        measured = f"test {result['test_bpd']:.3f} bits per dimension, {draws}"
    else:
        measured = (
            f"Frechet distance {result['fid']:.1f}, precision {result['precision']:.3f}, recall {result['recall']:.3f}"
        )
    return f"{measured}; {result['train_seconds']:.0f} s"


def rounded(key: str, value: float | int | str) -> str:
    """A value as it is printed, by what its key says it is."""
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    words = re.split(r"[._]", key)
    if "config" in words or key.rpartition(".")[2] in SET:
        return f"{value:g}"
    for word, decimals in DECIMALS.items():
        if word in words:
            return f"{value:,.{decimals}f}"
    if "difference" in words:  # of what should be equal
        return f"{value:.1g}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def entries(content: dict, prefix: str) -> Iterator[tuple[str, float | int | str]]:
    """Every value in nested dictionaries with its dotted key; of a history, some epochs' rows and the last."""
    for key, value in content.items():
        if key == "history":
            value = {row["epoch"]: row for row in value if row["epoch"] in (0, 1, 10)} | {"last": value[-1]}
        elif isinstance(value, list):
            value = {str(index): each for index, each in enumerate(value)}
        if isinstance(value, dict):
            yield from entries(value, f"{prefix}{key}.")
        elif value is not None and not isinstance(value, bool):
            yield f"{prefix}{key}", value


def numbers_tex(results: dict[str, dict]) -> str:
    """LaTeX definitions of every number, for \\num, and of where it was measured."""
    lines = ["% Generated by report/collect.py from figures/*.json."]
    for run, content in results.items():
        for key, value in entries(content, f"{run}."):
            if not isinstance(value, str):
                text = rounded(key, value).replace(",", "{,}")
                text = re.sub(r"^1e", "e", text)
                text = re.sub(r"^e(-?)0?(\d+)$", r"\\ensuremath{10^{\1\2}}", text)
                text = re.sub(r"e(-?)0?(\d+)$", r"\\ensuremath{\\,{\\cdot}\\,10^{\1\2}}", text)
                text = re.sub(r"^-", r"\\ensuremath{-}", text)
            elif ".environment." in key:
                text = re.sub(r"([_#%&$])", r"\\\1", value)
            else:
                continue
            lines.append(f"\\expandafter\\def\\csname num:{key}\\endcsname{{{text}}}")
    return "\n".join(lines) + "\n"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def results_table(results: dict[str, dict]) -> str:
    """README's table of the runs, and what their histories say."""
    rows, remarks = [], []
    for run, original in ORIGINAL.items():
        if run not in results:
            continue
        result, history = results[run]["result"], results[run]["history"]
        nll = f"{result['test_nll']:.2f} ± {result['test_nll_se']:.2f}"
        quadrature = f"{result['test_nll_quadrature']:.2f}" if "test_nll_quadrature" in result else "-"
        bound, seconds = f"{history[-1]['val_elbo']:.2f}", f"{result['train_seconds']:.0f} s"
        rows.append((f"`{run}`", bound, f"{result['test_elbo']:.2f}", nll, quadrature, seconds, str(original)))
        seeds = [results[run], *(content for name, content in results.items() if name.startswith(f"{run}_seed"))]
        if len(seeds) > 1:
            bounds = ", ".join(f"{seed['history'][-1]['val_elbo']:.2f}" for seed in seeds)
            nlls = ", ".join(f"{seed['result']['test_nll']:.2f}" for seed in seeds)
            remarks.append(f"`{run}` with {len(seeds)} seeds: validation ELBO {bounds}; test -log p(x) {nlls}.")
        passed = seconds_until(history, "val_elbo", lambda bound, original=original: bound > original)
        remarks.append(f"Validation of `{run}` passed the original's {original} (static) after {passed:.0f} s.")
    if "theory" in results:
        answer = results["theory"]["q1_4"]
        short = ", ".join(f"{answer[f'gap_{at}']:.2f}" for at in ("median", "percentile_90", "percentile_99"))
        both = f"{answer['nll_from_q_and_prior']:.2f} and {answer['nll_quadrature']:.2f}"
        remarks.append(
            "With z of 2, quadrature is the truth, and importance sampling falls short of it where the encoder's "
            "narrow Gaussian misses the posterior ([picture](figures/theory_posterior.png)): on "
            f"{answer['images']:,} test images, with {answer['draws']:,} samples of q, by {short} nats at the median, "
            f"the 90th and the 99th percentile. With half of the samples from the prior the two agree: {both} nats."
        )
    head = ("run", "validation ELBO", "test ELBO", "test -log p(x)", "by quadrature", "training", "original's, static")
    where = measured_on(results[run]["environment"] for run in ORIGINAL if run in results)
    return "\n\n".join([markdown(head, rows), "\n".join(f"- {remark}" for remark in (*remarks, where))])


def bits_table(results: dict[str, dict]) -> str:
    """README's table of the flows, and what the report's history says."""
    rows, remarks = [], []
    names = {"nf": "`nf`", "nf_affine": "the same, affine maps alone"}
    flows = {name: results[run] for run, name in names.items() if run in results}
    for name, flow in flows.items():
        result, last = flow["result"], flow["history"][-1]
        bits = (f"{value:.3f}" for value in (last["val_bpd"], result["test_bpd"], result["test_bpd_iw"]))
        minutes = f"{result['train_seconds'] / 60:.0f} minutes"
        rows.append((name, *bits, str(last["epoch"]), minutes, f"{result['parameters']:,}"))
    if "nf" in results:
        bar, original = (
            f"{seconds_until(results['nf']['history'], 'val_bpd', lambda bits, bound=bound: bits < bound):.0f} s"
            for bound in (BAR, ORIGINAL_BITS)
        )
        remarks = [
            f"Validation of `nf` was first measured below the assignment's bar of {BAR} after {bar}, "
            f"and below the original's end, {ORIGINAL_BITS} after 40 epochs, after {original}."
        ]
    draws = " and ".join(
        str(count) for count in sorted({flow["result"]["importance_samples"] for flow in flows.values()})
    )
    head = ("run", "validation", "test", f"test, {draws} draws", "epochs", "training", "parameters")
    where = measured_on(flow["environment"] for flow in flows.values())
    return "\n\n".join([markdown(head, rows), "\n".join(f"- {remark}" for remark in (*remarks, where))])


def judged_table(results: dict[str, dict]) -> str:
    """README's table of what the judge says of every model, and what its training and sampling cost."""
    judged = {f"`{run}`": results[run]["result"] for run in RUNS if run in results}
    if "gan" in results:
        judged["`gan`, weights not averaged"] = results["gan"]["result"]["unaveraged"]
    if "judge" in results:
        judged = {"real training images: the floor": results["judge"]["result"]["floor"], **judged}
    rows = []
    for name, each in judged.items():
        costs = (f"{each[key]:.{decimals}f} s" if key in each else "-" for key, decimals in COSTS.items())
        measures = (f"{each['fid']:.1f}", f"{each['precision']:.3f}", f"{each['recall']:.3f}")
        rows.append((name, *measures, class_range(each["class_counts"]), *costs))
    head = ("10,000 of", "Frechet distance", "precision", "recall", "rarest and commonest class")
    where = measured_on(results[run]["environment"] for run in RUNS if run in results)
    return f"{markdown((*head, 'training', '1,000 samples'), rows)}\n\n{where}"


def theory_sentence(results: dict[str, dict]) -> str:
    """README's sentence about how long the report's computations take."""
    if "theory" not in results:
        return ""
    seconds = results["theory"]["seconds"].values()
    times = f"{len(seconds)} computations took {sum(seconds):.0f} s, the longest {max(seconds):.0f} s."
    return f"The {times} {measured_on([results['theory']['environment']])}"


def gpu_table(results: dict[str, dict]) -> str:
    """README's table of the same runs on a GPU, from figures/<run>_cuda.json."""
    rows, totals, environments = [], [], []
    for run in RUNS:
        here, there = results.get(run), results.get(f"{run}_cuda")
        if here and here["environment"]["device"] != "cpu":  # trained wherever `--device auto` was
            here = None
        totals.append([each and each["result"]["train_seconds"] for each in (here, there)])
        reached = claim(there).rpartition(";")[0] if there else "-"
        rows.append((f"`{run}`", *map(measured_seconds, totals[-1]), reached))
        environments += [there["environment"]] if there else []
    sums = (sum(each) if all(each) else None for each in zip(*totals))
    rows.append(("all four", *map(measured_seconds, sums), "-"))
    table = markdown(("run", "training on the CPU", "on the GPU", "reached on the GPU"), rows)
    return f"{table}\n\n{measured_on(environments)}" if environments else table


def measured_seconds(value: float | None) -> str:
    """Seconds, or that there are none."""
    return "not measured" if value is None else f"{value:.0f} s"


def class_range(counts: list[int]) -> str:
    """The smallest and the largest share."""
    return f"{100 * min(counts) / sum(counts):.1f}% and {100 * max(counts) / sum(counts):.1f}%"


def healthy_table(results: dict[str, dict]) -> str:
    """README's table of what the VAEs' curves look like when all is well."""
    rows = []
    for epoch in (0, 1, 10, 40):
        found = [results[run]["history"][epoch]["val_elbo"] for run in ORIGINAL if run in results]
        rows.append((str(epoch), " ".join(f"({value:.1f})" if n else f"{value:.1f}" for n, value in enumerate(found))))
    return markdown(("after epoch", "validation ELBO, nats"), rows)


def game_table(results: dict[str, dict]) -> str:
    """README's table of what the GAN's losses and D's mean outputs look like when all is well."""
    history = results["gan"]["history"] if "gan" in results else []
    keys = ("loss_d", "loss_g", "d_real", "d_fake")
    shown = [row for row in history if row["epoch"] in (0, 1, 2, 8, 50, 100, 150, 200)]
    rows = [(str(row["epoch"]), *(f"{row[key]:.3f}" for key in keys)) for row in shown]
    if late := history[-50:]:
        ranges = (f"{min(row[key] for row in late):.3f} to {max(row[key] for row in late):.3f}" for key in keys)
        rows.append((f"the last {len(late)}", *ranges))
    return markdown(("epoch", "loss of D", "loss of G", "D on real images", "D on generated"), rows)


def flow_table(results: dict[str, dict]) -> str:
    """README's table of what the flow's curve looks like when all is well."""
    history = results["nf"]["history"] if "nf" in results else []
    rows = []
    for row in history:
        if "early_val_bpd" in row:
            rows.append(("1/4", "-", f"{row['early_val_bpd']:.3f}", "-"))
        if row["epoch"] in (0, 1, 10, 20, 40):
            norm = f"{row['gradient_norm']:.1f}" if "gradient_norm" in row else "-"
            rows.append((str(row["epoch"]), f"{row['train_bpd']:.3f}", f"{row['val_bpd']:.3f}", norm))
    if late := history[2:]:
        rows.append((f"2 to {late[-1]['epoch']}", "", "", f"at most {max(row['gradient_norm'] for row in late):.1f}"))
    return markdown(("after epoch", "training", "validation", "greatest norm of a gradient"), rows)


def chosen_table(results: dict[str, dict]) -> str:
    """README's table of the GAN's other settings."""
    trials = results["trials"]["gan"].values() if "trials" in results else []
    rows = []
    for each in trials:
        last = each["unaveraged"]
        measures = (f"{each['fid']:.0f}", f"{each['precision']:.2f}", f"{each['recall']:.2f}", f"{last['fid']:.0f}")
        rows.append((each["changed"], *measures, f"{each['d_real']:.2f}", f"{each['d_fake']:.2f}"))
    head = ("changed", "Frechet distance", "precision", "recall", "without averaging", "D on real", "D on generated")
    return markdown(head, rows)


def measured_on(environments: Iterable[dict]) -> str:
    """The sentence that names the machines."""
    machines = {
        (f"{each['cpu']}, {each['threads']} threads" if each["device"] in ("cpu", "mps") else each["device"])
        + f", torch {each['torch']}"
        for each in environments
    }
    return f"Measured on {'; '.join(sorted(machines))}."


def seconds_until(history: list[dict], key: str, passed: Callable[[float], bool]) -> float:
    """Seconds of the run until its history first shows a `key` that passed; infinite if it never did.

    A row may hold an earlier look, `early_<key>` after `early_seconds` of the run.
    """
    seconds = 0.0
    for row in history:
        if f"early_{key}" in row and passed(row[f"early_{key}"]):
            return row["early_seconds"]
        seconds += row["seconds"]
        if passed(row[key]):
            return seconds
    return math.inf


def ceiling_table(results: dict[str, dict]) -> str:
    """docs/speed.md's tables of how near the machine's limit training runs, and of where a step's time goes."""
    rates, shares = [], []
    measured = [(results[name], where) for name, where in (("bench", ""), ("bench_cuda", ", GPU")) if name in results]
    for bench, where in measured:
        for name, row in bench["models"].items():
            keys = ("images_per_second", "gflops", "ceiling_gflops", "percent_of_ceiling", "products_gflops")
            counts = (f"{row[key]:,}" for key in ("parameters", "calls_per_step"))
            rates.append((f"`{name}`{where}", *(f"{row[key]:,.0f}" for key in keys), *counts))
            parts = (f"{share:.0f}%" for share in row["percent_of_step"].values())
            shares.append((f"`{name}`{where}", *parts, f"{row['evaluation_percent_of_epoch']:.0f}%"))
    head = ("model", "images/s", "GFLOP/s", "ceiling, GFLOP/s", "% of ceiling", "its products alone", "parameters")
    head += ("library calls a step",)
    rest = ("model", "products", "data and noise", "optimizer", "elementwise and rest", "evaluation, of an epoch")
    where = measured_on(bench["environment"] for bench, _ in measured)
    where = f"Medians of {results['bench']['rounds']} rounds. {where}"
    if "bench_cuda" not in results:
        where += " On a GPU: not measured."
    return "\n\n".join([markdown(head, rates), "Of a step's time:", markdown(rest, shares), where])


def ladder_table(bench: dict) -> str:
    """docs/speed.md's table of the habits."""
    rows = []
    for name, row in bench["models"].items():
        ladder = row["ladder_images_per_second"]
        textbook = ladder["textbook loop"]
        rows += [(f"`{name}`", step, f"{rate:,.0f}", f"{rate / textbook:.2f}") for step, rate in ladder.items()]
    return markdown(("model", "loop", "images/s", "times the textbook loop"), rows)


def tried_table(bench: dict) -> str:
    """docs/speed.md's table of what the scripts do without."""
    rows = []
    for name, row in bench["models"].items():
        for variant, rate in row["tried_images_per_second"].items():
            extra = f" (after {row['compile_seconds']:.0f} s of compiling)" if "compiled" in variant else ""
            rows.append((f"`{name}`", variant + extra, f"{rate / row['images_per_second']:.2f}"))
    return markdown(("model", "variant", "times the script's images/s"), rows)


def growth_table(bench: dict) -> str:
    """docs/speed.md's table of how time and memory grow."""
    rows = []
    for what, scripts in bench["growth"].items():
        for name, points in scripts.items():
            times = ", ".join(f"{point['seconds_per_1000_images']:.3f}" for point in points.values())
            held = (point["memory_mib"] for point in points.values())
            memory = ", ".join("not measured" if each is None else f"{each:,.0f}" for each in held)
            values = ", ".join(f"{int(value):,}" for value in points)
            rows.append((what.replace("_", " "), f"`{name}`", values, times, memory))
    return markdown(("what grows", "model", "values", "seconds per 1,000 images", "memory, MiB"), rows)


if __name__ == "__main__":
    sys.exit(main())
