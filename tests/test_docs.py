"""The README and the pages of docs/: links lead somewhere, commands parse, Python runs, numbers are those measured."""

import contextlib
import io
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import pytest

from fastp2p import cli
from fastp2p.commands.options import RunOptions
from fastp2p.models.pix2pix.options import Pix2PixConfig
from fastp2p.ops.objectives import OBJECTIVES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"(?:fastp2p|kernels|csrc|tests|benchmarks|docs)/[\w./-]*|[\w.-]+\.(?:md|txt|toml|in)|Makefile")
CPU = "2-cores-of-amd-epyc-family-25-model-17-2026-11-20.json"
H200 = "nvidia-h200-2026-11-27/tuned.json"
PROVIDERS = {
    "eager float32, as upstream": "eager float32",
    "eager, every public trick": "eager, every trick",
    "every public trick, as one CUDA graph": "graph of eager",
    "`torch.compile` of it": "torch.compile",
    "the official repository": "upstream",
    "fastp2p, `--engine layers`": "fastp2p layers",
    "fastp2p, float32": "fastp2p fp32",
    "fastp2p, bfloat16": "fastp2p bf16",
}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", page.read_text())


def blocks(page: Path, language: str = "") -> list[str]:
    return [text for kind, text in FENCE.findall(page.read_text()) if kind == language]


def section(page: Path, title: str) -> str:
    """What stands under a heading, up to the next one of its level."""
    level = title.partition(" ")[0]
    return re.split(rf"^#{{2,{len(level)}}} ", page.read_text().split(f"\n{title}\n")[1], flags=re.MULTILINE)[0]


# Links


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@every_page
def test_links_lead_somewhere(page: Path):
    links = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(page))
    for link in links:
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link} leads to nothing"
        assert target.is_relative_to(ROOT), f"{page.name}: {link} leads out of the repository"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link} names no heading of {target.name}"


def test_the_readme_leads_to_every_page():
    text = PAGES[0].read_text()
    assert all(f"]({page.relative_to(ROOT)})" in text for page in PAGES[1:])


def test_the_readme_stays_short():
    assert len(PAGES[0].read_text().splitlines()) <= 130


# Files and names


def named(text: str) -> str:
    """The text with an operator's name for the placeholder X."""
    return re.sub(r"(?<![A-Za-z])X(?![A-Za-z])", "patch_loss", text)


@every_page
def test_named_files_exist(page: Path):
    for code in CODE.findall(prose(page)):
        if FILE.fullmatch(code) and not re.search(r"MACHINE|requirements", code):
            assert (ROOT / named(code)).exists(), f"{page.name} names {code}, which is not there"


def tree() -> list[str]:
    """The paths in the file tree of docs/adding.md."""
    paths, folders = [], []
    for line in section(ROOT / "docs" / "adding.md", "## The files").split("```")[1].strip().splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        depth = len(indent) // 2
        folders[depth:] = [name]
        paths.append("".join(folders))
    return paths


def test_the_tree_names_what_is_there():
    paths = tree()
    assert len(paths) == len(set(paths)) > 80
    for path in paths:
        assert (ROOT / path).exists(), f"the tree of docs/adding.md names {path}, which is not there"
        assert (ROOT / path).is_dir() == path.endswith("/"), path


def test_the_tree_names_every_package_and_every_file_of_some_folders():
    paths = set(tree())
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    for package in packages:
        path = package.removeprefix("fastp2p.").replace(".", "/") if package == "fastp2p.kernels" else ""
        assert f"{path or package.replace('.', '/')}/" in paths, f"the tree of docs/adding.md lacks {package}"
    for folder in ("fastp2p", "fastp2p/ops", "benchmarks"):
        for file in (ROOT / folder).glob("*.py"):
            path = str(file.relative_to(ROOT))
            assert path in paths or file.name in ("__init__.py", "conftest.py"), f"the tree lacks {path}"


def test_the_lists_name_what_the_code_has():
    """Each name in a numbered list of docs/adding.md stands in a file that its item, or the one before, names."""
    text = named(prose(ROOT / "docs" / "adding.md").split("\n## An operator\n")[1])
    checked, before = 0, ""
    for item in re.findall(r"^(?:\d+\. |A further ).+\n(?:[ A-Za-z`].*\n)*", text, re.MULTILINE):
        codes = CODE.findall(item)
        content = "".join(content_of(ROOT / code) for code in codes if FILE.fullmatch(code))
        for code in codes:
            if re.fullmatch(r"[A-Za-z_][\w.]*", code) and not FILE.fullmatch(code):
                if code in ("patch_loss", "netG", "real_A"):
                    continue
                assert re.search(rf"\b{re.escape(code)}\b", content or before), f"{code}, in: {item}"
                checked += 1
        before = content or before
    assert checked > 40


def content_of(path: Path) -> str:
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    return "".join(file.read_text() for file in files)


# Commands


def commands(page: Path) -> list[str]:
    return [line for block in blocks(page) for line in block.splitlines() if line.startswith("fastp2p ")]


@every_page
def test_commands_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = tmp_path / "runs" / "DIR-001"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(Pix2PixConfig(data="DIR").as_dict()))
    monkeypatch.chdir(tmp_path)
    for command in commands(page):
        try:
            parsed = cli.parse(shlex.split(command, comments=True)[1:])
            assert not isinstance(parsed, RunOptions) or parsed.config
        except SystemExit:
            pytest.fail(f"{page.name}: {command}")


def test_there_are_commands():
    """The guide has a command of each kind."""
    given = {command.split()[1] for command in commands(ROOT / "docs" / "guide.md")}
    assert given == {name.lower() for name in (kind.__name__ for kind in get_args(cli.AnyCommand))}


@every_page
def test_scripts_and_targets_are_there(page: Path):
    targets = set(re.findall(r"^([\w-]+(?: [\w-]+)*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    targets = {name for line in targets for name in line.split()}
    for line in "\n".join(blocks(page)).splitlines():
        words = line.split()
        if words[:1] == ["make"]:
            assert words[1] in targets, f"{page.name}: {line}"
        elif words[:1] in (["python"], ["python3"], ["pytest"]) and "/" in words[1]:
            assert (ROOT / words[1]).exists(), f"{page.name}: {line}"


def test_plain_make_prints_each_target():
    printed = subprocess.run(["make"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    given = re.findall(r"^make ([\w-]+) +\S", printed, re.MULTILINE)
    phony = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert set(given) == set(phony[1].replace("\\\n", " ").split()) - {"floor-build", "floor-checkout"}
    assert "about five minutes on two CPU cores" in printed
    assert "about five minutes on two CPU" in " ".join((ROOT / "README.md").read_text().split())


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "guide.md"], ids=lambda page: page.name)
def test_named_options_are_there(page: Path):
    kinds = [get_origin(kind) or kind for kind in (Pix2PixConfig, *get_args(cli.AnyCommand))]
    names = {field.replace("_", "-") for kind in kinds for field in kind.__dataclass_fields__} | {"help"}
    for code in CODE.findall(prose(page)):
        if option := re.match(r"--(?:no-)?([\w-]+)", code):
            assert option[1] in names, f"{page.name} names {code}"


def test_defaults_of_the_guide():
    config = Pix2PixConfig(data="pairs").resolve("cpu", "fp32")
    checked = 0
    for names, values, _ in cells(section(ROOT / "docs" / "guide.md", "## The recipe and its options")):
        fields = [name.strip(" `-").replace("-", "_") for name in names.split(",")]
        if hasattr(config, fields[0]):
            expected = ", ".join(f"{getattr(config, field)}".removesuffix(".0") for field in fields)
            assert values.replace("`", "") == expected, names
            checked += len(fields)
    assert checked == 16


def test_balances_of_the_guide():
    rows = cells(section(ROOT / "docs" / "guide.md", "## Reading the losses"))
    given = {name.strip("`"): float(value.rpartition(" ")[2]) for name, value in rows[1:]}
    assert given == {name: round(objective.balance, 2) for name, objective in OBJECTIVES.items()}


# Python

# The blocks are of the full networks; the test runs them on the smallest.
SMALL = {
    "UnetGenerator()": "UnetGenerator(levels=3, ngf=4)",
    "PatchDiscriminator()": "PatchDiscriminator(ndf=4, n_layers=1)",
    "256": "32",
}


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "guide.md"], ids=lambda page: page.name)
def test_python_runs(page: Path):
    """Each block in turn, as in one session; what a block after "This prints:" shows is what was printed."""
    names: dict[str, Any] = {}
    printed = ""
    assert all(text in page.read_text() for text in SMALL)
    for kind, text in FENCE.findall(page.read_text()):
        if kind == "python":
            for full, small in SMALL.items():
                text = text.replace(full, small)
            with contextlib.redirect_stdout(io.StringIO()) as stream:
                exec(compile(text, f"{page.name}: {text.splitlines()[0]}", "exec"), names)
            printed = stream.getvalue()
        elif f"This prints:\n\n```\n{text}" in page.read_text():
            assert printed == text


# Numbers


class Number(NamedTuple):
    value: float
    tolerance: float  # half a unit of the last digit


def number(text: str) -> Number:
    digits = len(text.partition(".")[2])
    return Number(float(text), 0.501 * 10**-digits)


def cells(text: str) -> list[list[str]]:
    """The rows of the tables in a text, without the lines under their headers."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows if not re.fullmatch(r"[-|]+", "|".join(row))]


def assert_given(text: str, measured: float) -> None:
    given = number(text)
    assert measured == pytest.approx(given.value, abs=given.tolerance), f"{text} is given, {measured} was measured"


def measured(file: str) -> dict[tuple[str, str, str | None], dict[str, Any]]:
    """The rows of a file of results, by provider, case and dtype."""
    loaded = json.loads((RESULTS / file).read_text())
    return {(row["provider"], row["case"], row.get("dtype")): row for row in loaded["rows"]}


def tables(text: str) -> Iterator[tuple[str, list[list[str]]]]:
    """Each table, with the file of results that was linked last before it."""
    file = ""
    for part in re.split(r"((?:^\|.*\n)+)", text, flags=re.MULTILINE):
        if part.startswith("|"):
            yield file, cells(part)
        elif links := re.findall(r"\]\(\.\./benchmarks/results/([\w./-]+\.json)\)", part):
            file = links[-1]


def test_tables_of_the_steps():
    """Those of docs/benchmarks.md with a provider a row: to the digits that are given, and the ratios to ours."""
    checked = 0
    for file, (header, *rows) in tables((ROOT / "docs" / "benchmarks.md").read_text()):
        if rows[0][0] not in PROVIDERS:
            continue
        found = measured(file)
        for label, *values in rows:
            for title, cell in zip(header[1:], values, strict=True):
                case = title if "," in title else f"step, {title}"
                best = "fastp2p bf16" if ("fastp2p bf16", case, None) in found else "fastp2p fp32"
                row, ours = found[PROVIDERS[label], case, None], found[best, case, None]
                assert row["n"] == 9
                key = "s_per_epoch" if " s" in cell else "ms"
                value, ratio = re.fullmatch(r"\**([\d.]+)(?: s)?(?: \(([\d.]+)x\))?\**", cell).groups()
                assert_given(value, row[key])
                if ratio is not None:
                    assert_given(ratio, row[key] / ours[key])
                checked += 1
    assert checked == 30 + 10 + 16 + 12 + 9 + 9 + 12


def test_tables_of_the_operators_and_the_official_repository():
    text, found = (ROOT / "docs" / "benchmarks.md").read_text(), measured(CPU)
    for _, (header, *rows) in tables(text):
        for label, *values in rows:
            for title, cell in zip(header[1:], values, strict=True):
                if "→" in cell:
                    eager, ours, ratio = re.fullmatch(r"([\d.]+) → ([\d.]+) \(([\d.]+)x\)", cell).groups()
                    case = label if label.startswith("adam") else f"{label}, batch 1"
                    pair = [found[who, case, title.removeprefix("ours in ")] for who in ("eager", "fastp2p")]
                    assert {row["n"] for row in pair} == {7}
                    assert_given(eager, pair[0]["ms"])
                    assert_given(ours, pair[1]["ms"])
                    assert_given(ratio, pair[0]["ms"] / pair[1]["ms"])
                elif title in PROVIDERS:
                    value, _, ratio = cell.partition(" ")
                    row = found[PROVIDERS[title], f"upstream, {label}", None]
                    assert_given(value, row["ms"])
                    if ratio:
                        assert_given(
                            ratio.strip("(x)"), row["ms"] / found["fastp2p bf16", f"upstream, {label}", None]["ms"]
                        )


def test_table_of_the_roofline():
    checked = 0
    for row in cells(section(ROOT / "docs" / "benchmarks.md", "### Against the machine's limit"))[1:]:
        loaded = json.loads((RESULTS / re.search(r"results/([\w.-]+)\)", row[0])[1]).read_text())
        step, floor = loaded["measured"]["median_ms"], loaded["floor"]
        assert loaded["measured"]["n"] == 9
        assert_given(row[1], step)
        for cell, least in zip(row[2:], (floor["overlapped_ms"], floor["in_turn_ms"]), strict=True):
            value, ratio = re.fullmatch(r"(\d+) \(([\d.]+)x\)", cell).groups()
            assert_given(value, least)
            assert_given(ratio, step / least)
            checked += 1
    assert checked == 6


def test_table_of_the_readme():
    """Ours, eager float32, and the fastest of all others; each machine with its date and its versions."""
    file, checked = "", 0
    for machine, batch, eager, best, ours in cells(section(ROOT / "README.md", "## Speed"))[1:]:
        if machine:
            file = H200 if "H200" in machine else CPU
            loaded = json.loads((RESULTS / file).read_text())
            assert loaded["date"][:10] in machine
            assert f"torch {loaded['versions']['torch'].partition('+')[0]}" in machine
            assert "Triton" not in machine or f"Triton {loaded['versions']['triton']}" in machine
        step = {who: row["ms"] for (who, case, _), row in measured(file).items() if case == f"step, batch {batch}"}
        assert_given(eager, step["eager float32"])
        assert_given(best.partition(" ")[0], min(ms for who, ms in step.items() if not who.startswith("fastp2p")))
        assert_given(ours.strip("*"), step["fastp2p bf16"])
        checked += 1
    assert checked == 6


def test_figures_in_the_readme_s_text():
    text = " ".join((ROOT / "README.md").read_text().split())
    step, upstream = measured(H200), measured(CPU)
    assert f"{step['fastp2p bf16', 'step, batch 1', None]['ms']:.2f} ms on an H200" in text
    assert f"every trick takes {step['graph of eager', 'step, batch 1', None]['ms']:.2f} as one graph" in text
    for who in ("upstream", "fastp2p bf16"):
        assert re.search(rf" takes {upstream[who, 'upstream, batch 1', None]['ms']:.0f}\b", text)
