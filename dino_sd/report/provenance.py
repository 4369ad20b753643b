"""What runs were made with, and the commands that make them again."""

import shlex

import yaml

from dino_sd.report.folder import Run, changed, flat
from dino_sd.report.markup import Html, folded, setting, table, tag


def settings_section(runs: list[Run]) -> list[Html]:
    parts = []
    if len(runs) > 1:
        parts.append(tag("div", _compared(runs), class_="card"))
    for run in runs:
        rows = [(key, setting(value), "–" if default is None else setting(default))
                for key, value, default in changed(run)]  # fmt: skip
        whole = folded("The whole config", tag("pre", yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)))
        differing = table(["setting", "this run", "default"], rows, numbers=False)
        if not rows:
            differing = tag("p", "No setting is known." if not run.config else "Everything is at its default.")
        if len(runs) > 1:
            differing = folded(f"{len(rows)} settings that differ from the defaults", differing)
        title = [tag("h3", run.name)] if len(runs) > 1 else []
        parts.append(tag("div", *title, differing, whole, class_="card part settings"))
    return parts


def _compared(runs: list[Run]) -> Html:
    trees = [dict(flat(run.config)) for run in runs]
    keys = list(dict.fromkeys(key for tree in trees for key in tree if key != "out"))
    rows = [
        [key, *(setting(tree[key]) if key in tree else "–" for tree in trees)]
        for key in keys
        if any(tree.get(key) != trees[0].get(key) for tree in trees)
    ]
    if not rows:
        return tag("p", "The runs have the same settings, but for their folders.")
    return table(["setting", *(run.name for run in runs)], rows, "What differs between the runs", numbers=False)


def again_section(runs: list[Run]) -> list[Html]:
    """Commands that run it again, and what it ran on."""
    parts = []
    for run in runs:
        title = [tag("h3", run.name)] if len(runs) > 1 else []
        commands: list[Html] = []
        for why, line in _commands(run):
            commands += [tag("p", why), tag("pre", line, class_="command")]
        known = [(key, setting(value)) for key, value in run.environment.items() if key != "command"]
        system = [folded("What it ran on", table(["", ""], known, numbers=False))] if known else []
        parts.append(tag("div", *title, *commands, *system, class_="card part"))
    return parts


def _commands(run: Run) -> list[tuple[str, str]]:
    config, about = shlex.quote(str(run.folder / "config.yaml")), run.environment
    ranks = about.get("ranks")
    many = isinstance(ranks, int) and ranks > 1
    program = f"torchrun --nproc-per-node {ranks} -m dino_sd" if many else "dino-sd"
    again = shlex.quote(f"{run.folder}_again")
    found = [("The same run into another folder:", f"{program} train {config} out={again}")]
    command = about.get("command")
    if isinstance(command, list) and len(command) > 1:
        found.append(("How it was started:", f"{program} {shlex.join(str(part) for part in command[1:])}"))
    names = [name for name in ("torch", "torchvision", "timm") if isinstance(about.get(name), str)]
    pins = [shlex.quote(f"{name}=={about[name].partition('+')[0]}") for name in names]  # without a build's "+cu130"
    if pins:
        found.append(("With the same versions:", f"pip install {' '.join(pins)}"))
    if isinstance(about.get("commit"), str):
        commit = about["commit"].removesuffix("-dirty")
        changed_since = ", plus changes that were not committed" if about["commit"].endswith("-dirty") else ""
        found.append((f"And the same code{changed_since}:", f"git checkout {shlex.quote(commit)}"))
    found.append(("This page again:", f"dino-sd report {shlex.quote(str(run.folder))}"))
    return found
