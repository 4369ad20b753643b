"""What README.md and docs/ say is so: every code block is run, or checked, or says why not; every setting is listed.

A comment right above a fence says what is done with it; without one, commands and Python are run, YAML is read as a
config, and anything else is an error:

    <!-- test: KEY=VALUE ... -->   settings added to the block's commands, so that they end in seconds
    <!-- test: check -->           commands, options and settings are parsed and validated, nothing is run
    <!-- test: file NAME -->       written to the page's folder under that name, for the commands after it
    <!-- test: output -->          every word of it is printed by the commands of the page
    <!-- test: files -->           every file that it names exists
    <!-- test: no, REASON -->      neither
"""

import ast
import contextlib
import importlib
import io
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from PIL import Image

from dino_sd import cli, config, evaluator_config, recipe
from dino_sd.data.source import open_source
from dino_sd.errors import UserError
from dino_sd.settings import Settings, fields, read_pairs
from dino_sd.term import term_module
from dino_sd.train import train

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
SHORT = {  # settings of train that end in a second, over those of the page
    "epochs": "null", "images": "null", "steps": "2", "batch_size": "4", "optim.warmup": "0", "device": "cpu",
    "precision": "fp32", "workers": "0", "report.every": "null",
}  # fmt: skip
TINY_VIT = [
    "model_args={embed_dim: 32, depth: 2, num_heads: 2}", "terms.dino.prototypes=64", "terms.dino.hidden=32",
    "views.global.size=64", "views.local.size=32",
]  # fmt: skip
PLANNED = {"batch_size": "4", "device": "cpu", "workers": "0"}
ALONE = ["device=cpu", "workers=0"]
QUICK = {  # settings of the other commands
    "linear": ["epochs=2", *ALONE],
    "inspect": ["workers=0"],
    "attention": ["device=cpu"],
    "pca": ["device=cpu"],
} | dict.fromkeys(
    ["knn", "logistic", "retrieval", "segmentation", "ranks", "evaluate", "embed", "neighbours", "map", "prototypes"],
    ALONE,
)
TRAINS = ("train", "plan", "generations")
LAUNCHERS = ("torchrun", "srun", "sbatch")
SHELL = ("ls", "cat", "head", "tail")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    directive: str
    text: str

    @property
    def where(self) -> str:
        return f"{name_of_page(self.page)}:{self.line}"

    @property
    def excused(self) -> bool:
        return self.directive.startswith("no,")


def name_of_page(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def blocks(page: Path) -> list[Block]:
    found, inside, above = [], None, ""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if inside is None and (fence := re.fullmatch(r"\s*```(\w*)\s*", line)):
            said = re.fullmatch(r"\s*<!-- test: (.+?) -->\s*", above)
            inside = (number, fence[1], said[1] if said else "", [])
        elif inside is not None and line.strip() == "```":
            start, language, directive, lines = inside
            found.append(Block(page, start, language, directive, "\n".join(lines) + "\n"))
            inside = None
        elif inside is not None:
            inside[3].append(line)
        above = line
    assert inside is None, f"{page.name}: a fence is not closed"
    return found


def commands(block: Block) -> list[list[str]]:
    """Its lines, those that go on joined, as words; comments and VARIABLE=VALUE in front taken off."""
    lines = block.text.replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    for words in split:
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
    return [words for words in split if words]


def inner(words: list[str]) -> list[str] | None:
    """The words after `dino-sd` of a command that starts it, however; None for other commands."""
    if words[0] == "dino-sd":
        return words[1:]
    if words[:3] == ["python", "-m", "dino_sd"]:
        return words[3:]
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        asked = get_args_parser().parse_args(words[1:])
        assert asked.module and asked.training_script == "dino_sd", words
        return asked.training_script_args
    if words[0] == "srun":
        return words[words.index("dino-sd") + 1 :]
    if words[0] == "sbatch":
        return ["train", *words[words.index("tools/slurm.sh") + 1 :]]
    return None


class Workspace:
    """A folder where the commands of one page are run: images, and runs made before."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, printed: str):
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys
        self.printed = printed  # by the runs made before, and by every command since
        monkeypatch.chdir(folder)
        monkeypatch.setenv("DINO_SD_CACHE", str(folder / "cache"))

    def path(self, text: str) -> str:
        """The page's paths and sets as those of this folder."""
        text = re.sub(r"fashion-mnist(-mini)?:(train|test)", str(self.folder / "mini.csv"), text)
        return re.sub(r"/(my|labelled)/(?=\w)", str(self.folder) + r"/\1/", text)

    def program(self, *arguments: str) -> None:
        self.monkeypatch.setattr("sys.argv", ["dino-sd", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = self.capsys.readouterr()
        self.printed += out + err
        assert stop.value.code in (0, None), f"dino-sd {shlex.join(arguments)}\n{out}{err}"

    def run(self, words: list[str], extra: list[str]) -> None:
        """In this process, with settings that make it short."""
        arguments = [self.path(word) for word in words]
        command = arguments[0]
        if command in TRAINS and "--help" not in arguments:
            tree = recipe.read_recipe(Path(arguments[1]))
            before = [f"evaluate.{each}={self.folder / 'mini.csv'}" for each in ("train", "test")]
            before += TINY_VIT if tree["model"].startswith("vit_small") else []
            arguments[2:2] = before
            arguments += [f"{key}={value}" for key, value in (PLANNED if command == "plan" else SHORT).items()]
        with self.monkeypatch.context() as patched:
            patched.setattr("dino_sd.export.verify", not_verified)
            self.program(*arguments, *(QUICK.get(command, []) if "--help" not in arguments else []), *extra)

    def check(self, words: list[str]) -> None:
        """As far as the function that would do the work: that is given its arguments, and not run."""
        words = [word if "=" in word else word.strip("[]") for word in words]  # [--option]: may be left out
        done: list[tuple] = []
        with self.monkeypatch.context() as patched:
            for module, function in workers():
                patched.setattr(f"dino_sd.{module}.{function}", lambda *given, **named: done.append(given))
            self.program(*words)
        assert len(done) == 1 or "--help" in words, words
        lists = (each for given in done for each in given if isinstance(each, list))
        for pairs in (each for each in lists if all("=" in pair for pair in each)):
            chosen = read_pairs([pair for pair in pairs if pair.startswith("config=")]).get("config", "quickstart")
            recipe.load_config(chosen, [pair for pair in pairs if not pair.startswith("config=")])

    def python(self, code: str) -> None:
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 10))
        given = {"student": network, "parent": network, "images": torch.rand(4, 3, 8, 8), "labels": torch.arange(4)}
        exec(compile(self.path(code), "<block>", "exec"), given)
        self.printed += "".join(self.capsys.readouterr())


def not_verified(folder: Path, exported: Any, formats: dict) -> tuple[dict[str, dict[str, float]], list[str]]:
    """In place of the fresh processes that exports are read back in, which take most of a minute and have own tests."""
    assert any(folder.iterdir())
    return {name: {"nobody, features, no size, no batch": 0.0} for name in formats}, []


@cache
def workers() -> list[tuple[str, str]]:
    """(module, function) that the commands in cli.py hand their work to."""
    found = []
    for command in ast.parse((ROOT / "dino_sd/cli.py").read_text()).body:
        if isinstance(command, ast.FunctionDef):
            imports = [node for node in ast.walk(command) if isinstance(node, ast.ImportFrom) and node.module]
            found += [(str(node.module).removeprefix("dino_sd."), name.name) for node in imports for name in node.names]
    found += [(module, f"evaluate_{name}") for name, (module, _) in getattr(cli, "EVALUATORS", {}).items()]
    passive = ("dino_sd", "config", "evaluator_config", "recipe", "settings")
    found = [(module, name) for module, name in dict.fromkeys(found) if module not in passive]
    for module, _ in found:
        importlib.import_module(f"dino_sd.{module}")  # before any is patched: they import each other's functions
    return found


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """Images of every kind that the pages name."""
    folder = tmp_path_factory.mktemp("docs")
    sets = {"my/images": 6, "my/classes": 2, "my/test": 1, "labelled/train": 12, "labelled/test": 6}
    for part, per_class in sets.items():
        for label, colour in (("cat", 40), ("dog", 160)):
            (folder / part / label).mkdir(parents=True)
            for i in range(per_class):
                noise = torch.randint(0, 90, (60, 80, 3), generator=torch.Generator().manual_seed(i + colour))
                Image.fromarray((noise + colour).byte().numpy()).save(folder / part / label / f"{i}.jpg")
    halves = torch.arange(64).repeat(64, 1) // 32  # a scene: its left half is of one class, its right half of another
    for path in (folder / "my/scenes" / part / str(i) for part in ("train", "test") for i in range(2)):
        for kind, pixels in (("images", torch.stack([halves * 90, halves * 60, halves * 200], -1)), ("masks", halves)):
            (path.parent / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.byte().numpy()).save(path.parent / kind / f"{path.name}.png")
    mini = open_source("fashion-mnist-mini:train", 1)
    labels, lines = mini.labels(), []
    assert labels is not None and mini.classes is not None
    (folder / "mini").mkdir()
    for label, name in enumerate(mini.classes):
        for i in (labels == label).nonzero()[0][:2].tolist():
            Image.fromarray(mini.image(i)[0].numpy()).save(folder / "mini" / f"{i}.png")
            lines.append(f"mini/{i}.png,{name}")
    (folder / "mini.csv").write_text("\n".join(lines) + "\n")
    for each in ("configs", "tools", "docs"):
        (folder / each).symlink_to(ROOT / each)
    return folder


@pytest.fixture(scope="session")
def runs(prepared: Path, tmp_path_factory) -> Path:
    """The runs that pages speak of without training them, and what they printed."""
    folder, printed = tmp_path_factory.mktemp("runs"), io.StringIO()
    labelled = [f"evaluate.{each}={prepared / 'labelled' / each}" for each in ("train", "test")]
    mini = [f"evaluate.{each}={prepared / 'mini.csv'}" for each in ("train", "test")]
    short = [f"{key}={value}" for key, value in SHORT.items()]
    with contextlib.redirect_stderr(printed):
        mine = [f"data={prepared / 'my/images'}", *TINY_VIT, *labelled, "evaluate.every=1.0", *short]
        train(recipe.load_config("own_images", [*mine, f"out={folder / 'mine'}"]))
        train(recipe.load_config("supervised", [*mini, *short, f"out={folder / 'teacher'}"]))
    (folder / "printed.txt").write_text(printed.getvalue())
    return folder


@pytest.fixture
def workspace(prepared: Path, runs: Path, request, monkeypatch, capsys, tmp_path: Path) -> Workspace:
    for each in prepared.iterdir():
        (tmp_path / each.name).symlink_to(each)
    made = "".join(block.text for block in blocks(request.param))
    shutil.copytree(runs / "mine", tmp_path / "runs/other")
    for run in ("mine", "teacher"):
        if not re.search(rf"out=runs/{run}\b", made):
            shutil.copytree(runs / run, tmp_path / "runs" / run)
    return Workspace(tmp_path, monkeypatch, capsys, (runs / "printed.txt").read_text())


@pytest.mark.parametrize("workspace", PAGES, ids=name_of_page, indirect=True)
def test_code_blocks(workspace: Workspace, request):
    for block in blocks(request.node.callspec.params["workspace"]):
        if block.excused:
            continue
        try:
            try_block(workspace, block)
        except BaseException as error:
            raise AssertionError(f"{block.where}: {error}") from error


def try_block(workspace: Workspace, block: Block) -> None:
    if block.directive.startswith("file "):
        (workspace.folder / block.directive.removeprefix("file ")).write_text(workspace.path(block.text))
    elif block.directive == "files":
        for name in re.findall(r"[\w./]+\.(?:py|md|yaml)", block.text):
            assert list(ROOT.glob(f"**/{name}")), f"there is no {name}"
    elif block.directive == "output":
        for word in re.findall(r"[A-Za-z][\w-]+", block.text):
            assert word in workspace.printed, f"'{word}' is not printed: {workspace.printed[-2000:]}"
    elif block.language == "python":
        workspace.python(block.text)
    elif block.language == "yaml":
        (workspace.folder / "block.yaml").write_text(block.text)
        recipe.load_config("block.yaml", [])
    else:
        assert block.language == "bash", "what is to be done with it? see tests/test_docs.py"
        for words in commands(block):
            try_command(workspace, words, block.directive)


def try_command(workspace: Workspace, words: list[str], directive: str) -> None:
    program = inner(words)
    if program is not None and (directive == "check" or words[0] in LAUNCHERS):
        workspace.check(program)
    elif program is not None:
        workspace.run(program, shlex.split(directive))
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), f"no target {words[1]}"
    elif words[0] == "python" and words[1].startswith("tools/"):
        script = (ROOT / words[1]).read_text()
        for name in (word.split("=")[0] for word in words[2:]):
            assert re.search(rf"\b{re.escape(name)}\b", script), f"{words[1]} knows no {name}"
    elif words[:2] == ["pip", "install"]:
        extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)
        asked = re.search(r"\[(.+)\]", words[2])
        assert words[2] == "." or (asked and {*asked[1].split(",")} <= {*extras}), words
    elif words[0] in SHELL:
        done = subprocess.run(words, cwd=workspace.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        workspace.printed += done.stdout
    else:
        raise AssertionError(f"no way to test {words[0]}")


@pytest.mark.parametrize("workspace", [DOCS / "README.md"], indirect=True, ids=name_of_page)
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("dino-sd train quickstart optim.learning_rate=1", "did you mean 'optim.lr'"),
        ("dino-sd train quickstarts", "quickstarts does not exist"),
        ("dino-sd views /my/images --number 3", "No such option"),
        ("dino-sd views /my/images views.flop=0", "'views.flip'"),
        ("torchrun --nproc-per-node 2 -m dino_sd knn runs/mine train=a tset=b", "unknown key 'tset'"),
        ("make quick", "no target quick"),
        ("python tools/compare.py sedes=3", "knows no sedes"),
        ("pip install 'dino-sd[onix]'", "onix"),
        ("curl example.org", "no way to test curl"),
    ],
)
def test_a_wrong_line_is_found(workspace: Workspace, wrong: str, said: str):
    with pytest.raises((AssertionError, UserError), match=re.escape(said)):
        try_block(workspace, Block(DOCS / "README.md", 1, "bash", "check", wrong))


@pytest.mark.parametrize("workspace", [DOCS / "README.md"], indirect=True, ids=name_of_page)
def test_commands_of_recipes(workspace: Workspace):
    """Every recipe says the command that it is for."""
    for path in (ROOT / "configs").rglob("*.yaml"):
        lines = [line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("# ")]
        commands = [line for line in lines if line.startswith(("dino-sd ", *(f"{each} " for each in LAUNCHERS)))]
        assert commands, path
        for command in commands:
            try:
                try_block(workspace, Block(path, 1, "bash", "check", command))
            except BaseException as error:
                raise AssertionError(f"{path.name}: {command}: {error}") from error


@pytest.mark.parametrize("page", PAGES, ids=name_of_page)
def test_every_block_is_run_or_checked_or_says_why_not(page: Path):
    for block in blocks(page):
        if block.excused:
            assert len(block.directive.removeprefix("no,").split()) >= 2, f"{block.where}: give a reason"
        else:
            known = block.language in ("bash", "python", "yaml") or re.match("output|files|file ", block.directive)
            assert known, f"{block.where}: say how it is tested, or why not"


def listed(page: Path) -> dict[str, dict[str, str]]:
    """{command or term: {setting: default}} of a page's tables, headed | setting of NAME, ... | default | ... |."""
    found: dict[str, dict[str, str]] = {}
    owners: list[dict[str, str]] = []
    for line in page.read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not cells:
            owners = []
        elif cells[0].startswith("setting of "):
            owners = [found.setdefault(name, {}) for name in re.findall(r"`([\w.]+)`", cells[0])]
        elif owners and not set(cells[0]) <= {"-", ":"}:
            keys = re.findall(r"`([^`]+)`", cells[0])
            defaults = re.split(r", (?![^\[]*\])", cells[1]) if len(keys) > 1 else [cells[1]]
            assert len(defaults) in (1, len(keys)), f"{page.name}: {line}"
            for key, default in zip(keys, defaults * (len(keys) // len(defaults)), strict=True):
                for rows in owners:
                    assert key not in rows, f"{page.name} lists {key} twice"
                    rows[key] = default
    return found


def shown(field: Any) -> str:
    """A default as the tables have it."""
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Settings):
        curve = value.model_dump()
        if curve["start"] == curve["end"]:
            return f"{curve['start']:g}"
        return f"{curve['start']:g} to {curve['end']:g}, {curve['shape']}"
    value = list(value) if isinstance(value, tuple) else value
    return "null" if value is None else str(value).replace("'", "")


def settings_of(name: str) -> dict[str, Any]:
    """Of a command, or of a term as `terms.NAME`."""
    if name == "train":
        return dict(cli.train_settings()) | settings_of("terms.dino")
    if name.startswith("terms."):
        module = term_module(name.removeprefix("terms."))
        return {f"{name}.{key}": field for key, field in fields(module.Settings, {})}
    classes = {"evaluate": "AccuracySettings"}
    return dict(cli.class_settings(classes.get(name, f"{name.title().replace(' ', '')}Settings")))


TABLES = {name: rows for page in PAGES[1:] for name, rows in listed(page).items()}


@pytest.mark.parametrize("name", sorted(TABLES))
def test_tables_of_settings(name: str):
    """Each names every setting with its default, and none besides."""
    known, rows = settings_of(name), TABLES[name]
    assert not (gone := rows.keys() - known.keys()), f"{name} has no {sorted(gone)}: take it out of docs/"
    assert not (left := known.keys() - rows.keys()), f"docs/ does not list {sorted(left)} of {name}: add a row"
    for key, field in known.items():
        cell = rows[key].strip("`")
        same = cell == shown(field) or read_pairs([f"x={cell}"]) == read_pairs([f"x={shown(field)}"])
        assert same, f"docs/ says {key}={cell}, its default is {shown(field)}"


def test_every_command_and_term_has_its_table():
    terms = {path.stem for path in (ROOT / "dino_sd/terms").glob("[a-z]*.py")}
    classes = {name for module in (config, evaluator_config) for name in vars(module) if name.endswith("Settings")}
    passive = {"Settings", "LookSettings", "SetSettings", "FrozenSettings", "CacheSettings", "JudgeSettings"}
    passive |= {"EvaluatorSettings"}
    of_classes = {name.removesuffix("Settings").lower() for name in classes - passive}
    listed = {{"evaluate": "accuracy"}.get(name, name) for name in TABLES}
    assert listed == {"train", *of_classes, *(f"terms.{term}" for term in terms - {"dino"})}


@cache
def literals() -> list[str]:
    """Every text in the code; what an f-string fills in is a tab."""
    found = []
    for path in (ROOT / "dino_sd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\t" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


MESSAGES = re.findall(r"^\| `([^`]+)` \|", (DOCS / "errors.md").read_text(), re.M)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.replace("…", "_")[:60])
def test_quoted_messages_are_the_codes(message: str):
    """Each part of a quoted message between its gaps (…) stands in one text of the code, in that order."""
    pattern = ".*".join(re.escape(part) for part in message.replace(r"\|", "|").split("…"))
    assert any(re.search(pattern, literal, re.S) for literal in literals()), f"no such message in dino_sd: {message}"


def test_settings_that_others_become_exist():
    """The last column of the tables in coming_from.md holds settings of train, commands, or nothing."""
    known = settings_of("train").keys() | {"base"}
    known |= {key for name in TABLES if name.startswith("terms.") for key in TABLES[name]}
    groups = {key.rsplit(".", 1)[0] for key in known if "." in key}
    for line in (DOCS / "coming_from.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        for name in re.findall(r"`([^`]+)`", cells[-1] if cells else ""):
            key = name.split("=")[0].removesuffix(".over").removesuffix(".start").removesuffix(".end")
            assert key in known | groups or name.startswith("dino-sd "), f"coming_from.md: {name} is no setting"


@pytest.mark.parametrize("page", PAGES[1:], ids=name_of_page)
def test_pages_are_short_and_their_links_lead_somewhere(page: Path):
    text = page.read_text()
    assert len(text.splitlines()) <= 150 and "\N{EM DASH}" not in text
    assert page.name == "README.md" or f"({page.name})" in (DOCS / "README.md").read_text(), "not in the index"
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links to {link}"
        heads = re.findall(r"^#+ (.+)$", target.read_text(), re.M) if anchor else []
        slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
        assert not anchor or anchor in slugs, f"{page.name} links to {link}"
