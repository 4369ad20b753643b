"""Recipes: a YAML file, the one it is based on, and `key=value` from the command line -> a typed config."""

import difflib
from pathlib import Path
from typing import Any

from dino_sd.config import Config
from dino_sd.errors import UserError
from dino_sd.settings import (
    Settings,
    check_keys,
    complete_curves,
    merge,
    parse,
    plain,
    read_pairs,
    read_yaml,
    spell_out,
)
from dino_sd.term import term_module

LENGTHS = {"epochs", "steps", "images"}


def recipes() -> Path:
    """The folder of recipes: beside the package in a clone, inside it in a wheel."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def load_config(path: str | Path, pairs: list[str]) -> Config:
    """A YAML file (or the name of a recipe) with `key=value` over it. Every mistake is a UserError with its place."""
    if "=" in Path(path).name and not Path(path).exists():
        raise UserError(f"command line: the config file or recipe comes first, then key=value; found {path} first")
    from_file, from_line = read_recipe(Path(path)), spell_out(read_pairs(pairs), Config)
    tree = override(from_file, from_line)
    groups = term_settings(tree.get("terms") or {"dino": {}})
    check_keys(from_file, Config, str(path), groups)
    check_keys(from_line, Config, "the command line", groups)
    return finish(complete_curves(tree, Config, groups))


def read_recipe(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file's settings over those of its `base`, another recipe; its terms take the place of the base's.

    path: a file, beside the recipe that names it or anywhere, or a recipe's name.
    """
    places = [*(file.parent / path for file in above[-1:]), path]
    if path.parent == Path("."):
        places.append(recipes() / f"{path.name}.yaml")
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        names = sorted(recipe.stem for recipe in recipes().glob("*.yaml"))
        near = difflib.get_close_matches(path.stem, names, n=1, cutoff=0.6) or names
        raise UserError(f"config: {path} does not exist; recipes that come with dino_sd: {', '.join(near)}")
    if file in above:
        raise UserError(f"config: {file} is its own base; name another recipe there")
    tree = spell_out(read_yaml(file), Config)
    if (base := tree.pop("base", None)) is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"config: base={base!r} in {file}: expected the name of a recipe, or a file")
    below = read_recipe(Path(base), (*above, file))
    if "terms" in tree:
        below.pop("terms", None)
    return override(below, tree)


def override(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` wins, key by key. A length takes the place of any other, and another model leaves model_args behind."""
    dropped = LENGTHS if LENGTHS & above.keys() else set()
    if above.get("model", below.get("model")) != below.get("model"):
        dropped = dropped | {"model_args"}
    return merge({key: value for key, value in below.items() if key not in dropped}, above)


def finish(tree: dict[str, Any]) -> Config:
    """The typed config with the settings of its terms filled in."""
    parsed: Config = parse(Config, tree)
    filled = {
        name: plain(parse(term_module(name).Settings, parsed.terms[name] or {}, f"terms.{name}."))
        for name in parsed.terms
    }
    return parsed.model_copy(update={"terms": filled})


def term_settings(chosen: dict[str, Any]) -> dict[str, type[Settings]]:
    if not isinstance(chosen, dict) or not chosen:
        raise UserError("config: terms should be a mapping such as {dino: {prototypes: 4096}} with at least one term")
    return {f"terms.{name}": term_module(name).Settings for name in chosen}
