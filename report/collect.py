"""Put the numbers of figures/*.json where people read them: report/numbers.tex, the tables of README.md and docs/.

    python report/collect.py

In the report \\num{vae_z20.result.test_elbo} is that value, rounded as `rounded` says, and
\\seeds{vae_z20.seeds.test_elbo} mean and range over figures/vae_z20.json and vae_z20_seed*.json; a minus before a key
turns the value's sign. numbers.tex holds what the report uses and nothing else, and a key that no JSON has is an error.
\\seeds{judge.floor.fid} is mean and range over the draws of real images, \\seeds{gan.over_seeds_and_noise.fid} over
seeds and draws of noise. In README.md and docs/ what stands between <!-- NAME --> and <!-- /NAME --> is replaced, and
in a script's docstring the comment after its command.
"""

import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "code"))

from cli import Parser, UserError, exit_status  # noqa: E402
from experiment import write  # noqa: E402

DECIMALS = {  # of a value whose key has this word, the first that fits
    "elbo": 2, "nll": 2, "gap": 2, "bpd": 3, "accuracy": 4, "fid": 1, "precision": 3, "recall": 3,
    "reconstruction": 1, "excess": 1, "percent": 2, "carlo": 3, "bias": 3, "rms": 3,
    "posterior": 1, "loss": 3, "real": 3, "fake": 3, "median": 2, "percentile": 2,
    "own": 3, "jsd": 4,
}  # fmt: skip

COMMANDS = {  # script -> run -> command, as in the scripts' docstrings
    "code/vae.py": {
        "vae_z20": "code/vae.py", "vae_z2": "code/vae.py --z-dim 2", "vae_best": "code/vae.py --best"
    },
    "code/gan.py": {"gan": "code/gan.py"},
    "code/nf.py": {"nf": "code/nf.py"},
}  # fmt: skip
NAMES = {
    "vae_z20": "VAE, z of 20", "vae_z2": "VAE, z of 2", "vae_best": "VAE, flow prior", "gan": "GAN", "nf": "flow"
}  # fmt: skip

# Run -> what stands below it in README's table, if it was run: other run, what differs, its command, and what it has in
# place of minutes.
VARIANTS = {
    "nf": [
        ("nf_uniform", "flow, uniform noise", "code/nf.py --noise uniform --epochs 43", "about as many"),
        ("nf_affine", "flow, affine maps alone", "code/nf.py --components 0 --epochs 46", "about as many"),
        ("nf_best", "flow, larger", "code/nf.py --best", "partly on a GPU"),
    ],
}

SET = {"mu", "variance", "noise", "radius", "deviation"}  # last words of keys of what was not measured

MEASURES = {"fid": 1, "precision": 3, "recall": 3}  # the judge's, and their decimals
UNNAMED = {"epochs", "fresh_epochs"}  # flags that the table of trials does not name
OFF = {"growth": 1}  # what a trial did that is older than this flag

# What the assignment's first solution reached on validation, from its curves: ELBO, bits per dimension.
ORIGINAL = {"vae_z20": -101.7, "vae_z2": -151.2, "nf": 1.82}


@exit_status
def main(argv: list[str] | None = None) -> None:
    """Write every generated file."""
    Parser(__doc__).parse_args(argv)
    for path, text in collect(ROOT).items():
        write(path, text.encode())


def collect(root: Path) -> dict[Path, str]:
    """The generated files of a checkout with their contents. Raises UserError naming a key that a JSON lacks."""
    tables = {
        "README.md": {
            "results": results_table, "healthy": healthy_table, "game": game_table, "flow": flow_table,
        },
        "docs/evidence.md": {"theory": theory_sentence},
        "docs/gan.md": {"fresh": fresh_table, "nearest": nearest_table, "chosen": chosen_table},
        "docs/speed.md": {
            "ceiling": ceiling_table, "races": races_table, "growth": growth_table, "beside": beside_table,
            "gpu": gpu_table,
        },
    }  # fmt: skip
    try:
        results = measured(root / "figures")
        report = (root / "report" / "report.tex").read_text(encoding="utf-8")
        files = {root / "report" / "numbers.tex": numbers_tex(results, report)}
        for path, made in tables.items():
            files[root / path] = between_markers(root / path, {name: table(results) for name, table in made.items()})
        for script, commands in COMMANDS.items():
            source = (root / script).read_text(encoding="utf-8")
            for run, command in commands.items():
                pattern = rf"(?m)^( +python {re.escape(command)} +# ).*$"
                source, found = re.subn(pattern, rf"\g<1>{claim(results[run])}", source)
                setup = f"    ({setting([results[each] for each in commands])})"
                source, where = re.subn(r"(?ms)^    \(seed.*?\)$", setup, source)
                if found != 1 or where != 1:
                    raise UserError(f"{script} must show 'python {command}  # ...' and '    (seed ...)' once each")
            files[root / script] = source
    except KeyError as error:
        raise UserError(f"figures/ has no run or key {error}: make that run again, with a judge") from None
    return files


def measured(figures: Path) -> dict[str, dict]:
    """Every run's JSON by its name, "trials" being those of the trials, with means and ranges over seeds and draws."""
    results = read(figures) | {"trials": read(figures / "trials")}
    for run, content in results.items():
        if "history" in content:
            same = [each for name, each in results.items() if re.fullmatch(rf"{run}(_seed\d+)?", name)]
            content["seeds"] = over_seeds(same)
    for floor in ("floor", "floor_validation"):
        results["judge"][floor] = ranges(results["judge"]["result"][floor]["draws"])
    game, games = results["gan"], game_runs(results)
    for content in (*games, *results["trials"].values()):
        if draws := content["result"].get("over_noise"):
            content["over_noise"] = ranges(draws)
    game["over_seeds_and_noise"] = ranges([draw for each in games for draw in each["result"]["over_noise"]])
    return results


def read(folder: Path) -> dict[str, dict]:
    """Every JSON of a folder by its name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def game_runs(results: dict[str, dict]) -> list[dict]:
    """The GAN's runs at the report's settings, of all seeds."""
    return [content for run, content in results.items() if re.fullmatch(r"gan(_seed\d+)?", run)]


def over_seeds(contents: list[dict]) -> dict:
    """Mean, least and greatest of every number of the result, and of the last validation, over a run's seeds."""
    results = [
        content["result"] | {key: value for key, value in content["history"][-1].items() if key.startswith("val_")}
        for content in contents
    ]
    return ranges(results)


def ranges(results: list[dict]) -> dict:
    """Mean, least and greatest of every number that these dictionaries hold, and how many they are."""
    numbers = [key for key, value in results[0].items() if isinstance(value, int | float)]
    columns = {key: [result[key] for result in results] for key in numbers}
    of_key = {key: {"mean": statistics.mean(c), "min": min(c), "max": max(c)} for key, c in columns.items()}
    return of_key | {"count": len(results)}


def spread(content: dict, key: str, decimals: int, over: str = "seeds") -> str:
    """A result's mean over the run's seeds, or another of its `ranges`, and the range if there are several values."""
    values = content[over][key]
    mean, least, most = (f"{values[name]:.{decimals}f}" for name in ("mean", "min", "max"))
    return mean if content[over]["count"] == 1 else f"{mean} ({least} to {most})"


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
    mean = {key: values["mean"] for key, values in content["seeds"].items() if key != "count"}
    if "test_elbo" in result:
        nll = mean.get("test_nll_quadrature", mean["test_nll"])
        measured = f"z of {content['config']['z_dim']}: test ELBO {mean['test_elbo']:.2f} nats, -log p(x) {nll:.2f}"
    elif "test_bpd" in result:
        draws = f"{mean['test_bpd_iw']:.3f} with {result['importance_samples']} draws of the noise"
        measured = f"test {mean['test_bpd']:.3f} bits per dimension, {draws}"
    else:
        measured = f"Frechet distance {mean['fid']:.1f}, precision {mean['precision']:.3f}, recall {mean['recall']:.3f}"
    return f"{measured}; {result['train_seconds']:.0f} s"


def setting(contents: Sequence[dict]) -> str:
    """Seeds, hardware and torch's version of a script's runs; a line for each machine."""
    count = contents[0]["seeds"]["count"]
    seeds = f"seed {contents[0]['config']['seed']}" if count == 1 else f"seeds 0 to {count - 1}, means; times of seed 0"
    where = machines(each["environment"] for each in contents).replace("; ", ";\n    ")
    return f"{seeds}; {where}"


def rounded(key: str, value: float | int) -> str:
    """A value as it is printed, by what its key says it is."""
    if isinstance(value, int):
        return f"{value:,}"
    words = re.split(r"[._]", key)
    if "config" in words or key.rpartition(".")[2] in SET:
        return f"{value:g}"
    for word, decimals in DECIMALS.items():
        if word in words:
            return f"{value:,.{decimals if abs(value) < 1000 else 0}f}"
    if "difference" in words:  # of what should be equal
        return f"{value:.1g}"
    if abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def entries(content: dict, prefix: str) -> Iterator[tuple[str, float | int | str]]:
    """Every value in nested dictionaries with its dotted key; of a history each epoch's row, and the last."""
    for key, value in content.items():
        if key == "history":
            value = {row["epoch"]: row for row in value} | {"last": value[-1]}
        elif isinstance(value, list):
            value = {str(index): each for index, each in enumerate(value)}
        if isinstance(value, dict):
            yield from entries(value, f"{prefix}{key}.")
        elif value is not None and not isinstance(value, bool):
            yield f"{prefix}{key}", value


def numbers_tex(results: dict[str, dict], report: str) -> str:
    """LaTeX definitions of every number that the report uses by \\num or, with its range, by \\seeds.

    Raises KeyError for one that no JSON has.
    """
    values = {key: value for run, content in results.items() for key, value in entries(content, f"{run}.")}
    values |= {f"-{key}": -value for key, value in values.items() if isinstance(value, float)}
    lines = ["% Generated by report/collect.py from figures/*.json."]
    body = report.partition(r"\begin{document}")[2]
    texts = {key: tex(key, values[key]) for key in re.findall(r"\\num\{(-?[\w.]+)\}", body)}
    for key in re.findall(r"\\seeds\{(-?[\w.]+)\}", body):
        order = ("mean", "max", "min") if key.startswith("-") else ("mean", "min", "max")
        mean, least, most = (tex(key, values[f"{key}.{each}"]) for each in order)
        texts[key] = mean if least == most else f"{mean} ({least} to {most})"
    lines += (f"\\expandafter\\def\\csname num:{key}\\endcsname{{{text}}}" for key, text in sorted(texts.items()))
    return "\n".join(lines) + "\n"


def tex(key: str, value: float | int | str) -> str:
    """A value in LaTeX, rounded by what its key says it is."""
    if isinstance(value, str):
        return re.sub(r"([_#%&$])", r"\\\1", value)
    text = rounded(key, value).replace(",", "{,}")
    text = re.sub(r"^1e", "e", text)
    text = re.sub(r"^e(-?)0?(\d+)$", r"\\ensuremath{10^{\1\2}}", text)
    text = re.sub(r"e(-?)0?(\d+)$", r"\\ensuremath{\\,{\\cdot}\\,10^{\1\2}}", text)
    return re.sub(r"^-", r"\\ensuremath{-}", text)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def results_table(results: dict[str, dict]) -> str:
    """README's table of the models, and its footnotes."""
    rows = []
    commands = {run: command for of_script in COMMANDS.values() for run, command in of_script.items()}
    for own in commands:
        others = [each for each in VARIANTS.get(own, ()) if each[0] in results]
        for run, name, command, untimed in ((own, NAMES[own], commands[own], ""), *others):
            content, result = results[run], results[run]["result"]
            minutes, sampling = f"{result['train_seconds'] / 60:.1f}", f"{result['seconds_per_1000_samples']:.3f} s"
            if untimed:
                minutes, sampling = untimed, ""
            measures = (spread(content, key, decimals) for key, decimals in MEASURES.items())
            rows.append((name, f"`{command}`", minutes, likelihood(content), *measures, sampling))
    floor = (spread(results["judge"], key, decimals, "floor") for key, decimals in MEASURES.items())
    rows.append(("real images", "", "", "", *floor, ""))
    head = ("model", "command", "minutes", "likelihood", "Frechet distance", "precision", "recall", "1,000 samples")
    return "\n\n".join([markdown(head, rows), "\n".join(f"- {remark}" for remark in remarks(results))])


def likelihood(content: dict) -> str:
    """A model's likelihood on the test set, in its own unit."""
    units = {"test_bpd_iw": (3, "bits/dim"), "test_nll_quadrature": (2, "nats"), "test_nll": (2, "nats")}
    for key, (decimals, unit) in units.items():
        if key in content["result"]:
            return f"{spread(content, key, decimals)} {unit}"
    return "has none"


def remarks(results: dict[str, dict]) -> list[str]:
    """The footnotes of README's table."""
    z20, z2, best = (results[run] for run in ("vae_z20", "vae_z2", "vae_best"))
    flow, every = results["nf"]["result"], spread(results["gan"], "fid", MEASURES["fid"], "over_seeds_and_noise")
    larger = f", the larger flow's {spread(results['nf_best'], 'test_bpd', 3)}" if "nf_best" in results else ""
    first = (
        passed(z20, "val_elbo", ORIGINAL["vae_z20"]),
        passed(z2, "val_elbo", ORIGINAL["vae_z2"]),
        passed(results["nf"], "val_bpd", ORIGINAL["nf"]),
    )
    return [
        f"In brackets the range over {z20['seeds']['count']} seeds, after their mean; all else, with all times, is of "
        f"seed 0. {measured_on(results[run]['environment'] for run in NAMES)}",
        "Nats: -log p(x) of a test image, its pixels binarised *dynamically*; z of 20 by "
        f"{z20['result']['importance_samples']:,} importance samples, z of 2 by quadrature, the flow prior (z of "
        f"{best['config']['z_dim']}) by {best['result']['importance_samples']:,} (standard errors over images, "
        f"of z of 20 and the flow prior: {z20['result']['test_nll_se']:.2f}, {best['result']['test_nll_se']:.2f}). "
        f"Test ELBO {spread(z20, 'test_elbo', 2)}, {spread(z2, 'test_elbo', 2)}, "
        f"{spread(best, 'test_elbo', 2)}.",
        f"Bits per dimension of the 8-bit grey values, {flow['importance_samples']} draws of the noise; with one "
        f"{spread(results['nf'], 'test_bpd', 3)}{larger}. They do not compare with nats of binary pixels.",
        "Frechet distance, precision and recall are of 10,000 samples (the VAE's: decoder means) against the test "
        "images, by `code/judge.py`, and can be compared only with values from the same judge. Real images: mean and "
        f"range of {results['judge']['floor']['count']} random draws of 10,000 training images.",
        "The GAN's distance is of one draw of noise per seed. Over "
        f"{results['gan']['over_noise']['count']} draws per seed it is {every}; smaller differences mean nothing.",
        f"Validation values of the assignment's first solution, and when ours passed them: z of 20 {first[0]}, z of 2 "
        f"{first[1]}, the flow {first[2]}. Its VAEs' images were binarised *statically*, once for all: "
        "not quite comparable.",
    ]


def passed(content: dict, key: str, mark: float) -> str:
    """A mark, and when a run's validation passed it: bits from above, nats of an ELBO from below."""
    seconds = seconds_until(content["history"], key, lambda value: value < mark if "bpd" in key else value > mark)
    return f"{mark} after {seconds:.0f} s" if seconds < math.inf else f"{mark} never"


def theory_sentence(results: dict[str, dict]) -> str:
    """How long the report's computations take."""
    seconds = results["theory"]["seconds"].values()
    times = f"{len(seconds)} computations took {sum(seconds):.0f} s of processor time, the longest {max(seconds):.0f}."
    return f"The {times} {measured_on([results['theory']['environment']])}"


def gpu_table(results: dict[str, dict]) -> str:
    """docs/speed.md's table of the same runs on a GPU, from figures/<run>_cuda.json."""
    rows, totals, environments = [], [], []
    for run in NAMES:
        here, there = results[run], results.get(f"{run}_cuda")
        if here["environment"]["device"] != "cpu":  # trained wherever `--device auto` was
            here = None
        totals.append([each and each["result"]["train_seconds"] for each in (here, there)])
        reached = claim(there).rpartition(";")[0] if there else "-"
        rows.append((f"`{run}`", *map(measured_seconds, totals[-1]), reached))
        environments += [there["environment"]] if there else []
    sums = (sum(each) if all(each) else None for each in zip(*totals))
    rows.append(("all", *map(measured_seconds, sums), "-"))
    table = markdown(("run", "training on the CPU", "on the GPU", "reached on the GPU"), rows)
    return f"{table}\n\n{measured_on(environments)}" if environments else table


def measured_seconds(value: float | None) -> str:
    """Seconds, or that there are none."""
    return "not measured" if value is None else f"{value:.0f} s"


def healthy_table(results: dict[str, dict]) -> str:
    """README's table of what the VAEs' curves look like when all is well."""
    rows = []
    for epoch in (0, 1, 10, 40):
        bounds = (f"{results[run]['history'][epoch]['val_elbo']:.1f}" for run in ("vae_z20", "vae_z2"))
        rows.append((str(epoch), *bounds))
    return markdown(("VAE, after epoch", "validation ELBO, z of 20", "z of 2"), rows)


def game_table(results: dict[str, dict]) -> str:
    """README's table of what the GAN's losses and D's mean outputs look like when all is well."""
    history, keys = results["gan"]["history"], ("loss_d", "loss_g", "d_real", "d_fake")
    shown = [row for row in history if row["epoch"] in (0, 1, 8)]
    rows = [(str(row["epoch"]), *(f"{row[key]:.3f}" for key in keys)) for row in shown]
    late = history[-50:]
    ranges = (f"{min(row[key] for row in late):.3f} to {max(row[key] for row in late):.3f}" for key in keys)
    rows.append((f"the last {len(late)}", *ranges))
    return markdown(("GAN, epoch", "loss of D", "loss of G", "D on real images", "D on generated"), rows)


def fresh_table(results: dict[str, dict]) -> str:
    """docs/gan.md's table of the new discriminator's losses, and what the last of them bounds."""
    of_runs = {"this run": results["gan"], "the assignment's settings": results["trials"]["gan_assignment_200"]}
    fresh = {name: run["result"]["fresh_discriminator"] for name, run in of_runs.items()}
    rows = [(name, *(f"{loss:.3f}" for loss in each["loss"])) for name, each in fresh.items()]
    table = markdown(("its loss after epochs", *map(str, range(len(fresh["this run"]["loss"])))), rows)
    bounds = " and ".join(
        f"{each['jsd_at_least']:.3f} (standard error {each['jsd_se']:.4f})" for each in fresh.values()
    )
    own = " and ".join(f"{each['own']:.3f}" for each in fresh.values())
    return (
        f"{table}\n\nSo the divergences are at least {bounds} nats, of log 2 = 0.693 at most. On the same images the "
        f"games' own discriminators have losses of {own}."
    )


def nearest_table(results: dict[str, dict]) -> str:
    """docs/gan.md's table of distances to the nearest training image, in grey values."""
    nearest = results["gan"]["result"]["nearest"]
    rows = [(name.replace("_", " "), f"{of['mean']:.0f}", f"{of['median']:.0f}") for name, of in nearest.items()]
    return markdown(("distance to the nearest training image", "mean", "median"), rows)


def flow_table(results: dict[str, dict]) -> str:
    """README's table of what the flow's curve looks like when all is well."""
    rows = []
    for row in results["nf"]["history"]:
        if "early_val_bpd" in row:
            rows.append(("1/4", "-", f"{row['early_val_bpd']:.3f}", "-"))
        if row["epoch"] in (0, 1, 10, 40):
            norm = f"{row['gradient_norm']:.1f}" if "gradient_norm" in row else "-"
            rows.append((str(row["epoch"]), f"{row['train_bpd']:.3f}", f"{row['val_bpd']:.3f}", norm))
    return markdown(("flow, after epoch", "training bits", "validation bits", "greatest norm of a gradient"), rows)


def chosen_table(results: dict[str, dict]) -> str:
    """docs/gan.md's table of the GAN's settings, each named by the flags that differ from the assignment's run.

    Its first row has what random draws of real images get.
    """
    base, rows = OFF | results["trials"]["gan_assignment_200"]["config"], []
    runs = [*game_runs(results), *results["trials"].values()]
    for run in runs:
        config, verdict, last = OFF | run["config"], run["result"]["validation"], run["history"][-1]
        changed = [key for key in base if key not in UNNAMED and config[key] != base[key]]
        flags = " ".join(f"--{key.replace('_', '-')} {words(config[key])}" for key in changed)
        unseen = spread(run, "fid", 1, "over_noise") if "over_noise" in run else ""
        measures = (f"{verdict['fid']:.1f}", f"{verdict['precision']:.2f}", f"{verdict['recall']:.2f}", unseen)
        named = f"`{flags}`" if flags else "none"
        rows.append((str(config["epochs"]), named, *measures, *(f"{last[key]:.2f}" for key in ("d_real", "d_fake"))))
    head = ("epochs", "flags", "distance to validation images", "precision", "recall", "distance to test images")
    where = measured_on(run["environment"] for run in runs)
    rows.sort(key=lambda row: (-int(row[0]), row[1] != "none", row))
    validation, test = (spread(results["judge"], "fid", 1, floor) for floor in ("floor_validation", "floor"))
    shares = (f"{results['judge']['floor_validation'][key]['mean']:.2f}" for key in ("precision", "recall"))
    rows.insert(0, ("", "real images", validation, *shares, test, "", ""))
    return f"{markdown((*head, 'D on real', 'D on generated'), rows)}\n\n{where}"


def words(value: object) -> str:
    """A setting as it is typed after its flag."""
    return " ".join(f"{each:g}" for each in (value if isinstance(value, list) else [value]))


def machine(environment: dict) -> str:
    """Hardware and torch's version."""
    threads = f"{environment['cpu']}, {environment['threads']} thread{'s' * (environment['threads'] > 1)}"
    return (
        f"{threads if environment['device'] in ('cpu', 'mps') else environment['device']}, torch {environment['torch']}"
    )


def measured_on(environments: Iterable[dict]) -> str:
    """The sentence that names the machines."""
    return f"Measured on {machines(environments)}."


def machines(environments: Iterable[dict]) -> str:
    """Every `machine` of these environments, once."""
    return "; ".join(sorted({machine(each) for each in environments}))


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
    """docs/speed.md's table of how near the machine's limit training runs, and how far from a textbook loop."""
    rows = []
    measured = [(results[name], where) for name, where in (("bench", ""), ("bench_cuda", ", GPU")) if name in results]
    for bench, where in measured:
        for name, row in bench["models"].items():
            keys = ("images_per_second", "gflops", "ceiling_gflops", "percent_of_ceiling", "products_gflops")
            rates = (f"{row[key]:,.0f}" for key in (*keys, "products_percent_of_step"))
            textbook = (f"{row['textbook_images_per_second']:,.0f}", f"{row['times_textbook']:.2f}")
            rows.append((f"`{name}`{where}", *rates, *textbook))
    head = (
        "model",
        "images/s",
        "GFLOP/s",
        "ceiling, GFLOP/s",
        "% of ceiling",
        "products alone, GFLOP/s",
        "% of a step",
    )
    head += ("textbook loop, images/s", "times the textbook")
    slower = results["bench"]["models"]["vae_best"]["times_normal_prior"]
    where = (
        f"Medians of {results['bench']['rounds']} rounds. The couplings of the flow prior make a step of `vae_best` "
        f"{slower:.2f} times as long. {measured_on(bench['environment'] for bench, _ in measured)}"
    )
    return f"{markdown(head, rows)}\n\n{where}"


def races_table(results: dict[str, dict]) -> str:
    """docs/speed.md's table of how soon the textbook's models and the scripts' pass the same marks."""
    rows = []
    for name, runners in results["bench"]["races"].items():
        textbook, script = runners["textbook"], runners["script"]
        for mark in script["passed"]:
            theirs, ours = textbook["passed"][mark], script["passed"][mark]
            rows.append(
                (
                    f"`{name}`",
                    f"{mark} nats" if name == "vae" else f"{-float(mark)} bits",
                    *(raced(runner, mark) for runner in (textbook, script)),
                    f"{theirs / ours:.1f}" if theirs and ours else "-",
                )
            )
    table = markdown(("model", "validation passes", "textbook", "script", "ratio"), rows)
    return f"{table}\n\n{measured_on([results['bench']['environment']])}"


def raced(runner: dict, mark: str) -> str:
    """After how many seconds a runner passed the mark, or what it had reached when it left the race."""
    if seconds := runner["passed"][mark]:
        return f"{seconds:.0f} s"
    reached = "diverged" if runner["reached"] is None else f"then {abs(runner['reached']):.2f}"
    return f"not in {runner['seconds']:.0f} s ({reached})"


def growth_table(results: dict[str, dict]) -> str:
    """docs/speed.md's table of how time and memory grow."""
    rows = []
    for what, scripts in results["bench"]["growth"].items():
        for name, points in scripts.items():
            times = ", ".join(f"{point['seconds_per_1000_images']:.3f}" for point in points.values())
            held = (point["memory_mib"] for point in points.values())
            memory = ", ".join("not measured" if each is None else f"{each:,.0f}" for each in held)
            values = ", ".join(f"{int(value):,}" for value in points)
            rows.append((what.replace("_", " "), f"`{name}`", values, times, memory))
    return markdown(("what grows", "model", "values", "seconds per 1,000 images", "memory, MiB"), rows)


def beside_table(results: dict[str, dict]) -> str:
    """docs/speed.md's table of training beside other work."""
    measured = results["bench"]["beside"]
    cores = results["bench"]["environment"]["threads"]
    shares = {"nothing": 1.0, "a busy process": cores / (cores + 1), "another training": 0.5}
    quiet = measured["nothing"]["as OpenMP's default"]
    rows = [
        (other, *(f"{each:,.0f}" for each in speeds.values()), f"{shares[other] * quiet:,.0f}")
        for other, speeds in measured.items()
    ]
    return markdown(("beside it", "OpenMP's default", "the scripts' setting", "a fair share"), rows)


if __name__ == "__main__":
    sys.exit(main())
