"""Pages that are generated from the code: methods, reference, configs, notebooks and benchmarks."""

from __future__ import annotations

import base64
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import yaml
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent

from lkd.cli.catalogue import SECTIONS, choices, homes_of
from lkd.cli.class_help import settings
from lkd.cli.help import HELP, OWN_HELP, SETTINGS, settings_help
from tests import method_table

PACKAGES = {
    "lkd": "Top-level names",
    "lkd.losses": "Losses",
    "lkd.functional": "Losses as functions",
    "lkd.modules": "Modules",
    "lkd.tasks": "Tasks",
    "lkd.datamodules": "Data modules",
    "lkd.models": "Networks",
    "lkd.callbacks": "Callbacks",
    "lkd.schedules": "Schedules",
    "lkd.features": "Features",
    "lkd.compare": "Compare",
    "lkd.export": "Export",
}
"""Packages whose public names are documented, with the titles of their pages."""


def write(target: Path) -> None:
    """Write the generated pages.

    Args:
        target: Folder of the sources.
    """
    for path, content in _pages():
        file = target / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")


def public_names() -> list[str]:
    """Return the names that the reference must document."""
    return [name for package in PACKAGES for name in _names(package)]


def is_described(name: str) -> bool:
    """Return whether a public class or function has a docstring of its own, rather than that of a base class."""
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute)
    if inspect.isclass(found):
        return bool(vars(found).get("__doc__"))
    return not inspect.isroutine(found) or bool(found.__doc__)


def _pages() -> Iterator[tuple[str, str]]:
    yield from _method_pages()
    yield from _reference_pages()
    yield from _notebook_pages()
    yield from _benchmark_pages()
    for page, file in (
        ("changelog", "CHANGELOG.md"),
        ("contributing", "CONTRIBUTING.md"),
        ("guides/security", "SECURITY.md"),
        ("guides/inputs", "examples/README.md"),
    ):
        yield f"{page}.md", _with_links((ROOT / file).read_text(), (ROOT / file).parent, page.count("/"))


def _with_links(text: str, folder: Path, depth: int = 1) -> str:
    """Adapt the links of a file of the repository: files other than benchmarks and images are only named.

    Args:
        text: Content of the file.
        folder: Its folder.
        depth: Depth of its page below the documentation's root.
    """

    def link(found: re.Match[str]) -> str:
        title, target = found.groups()
        if (folder / target).parent == ROOT / "benchmarks" and target.endswith(".md"):
            return f"[{title}]({'../' * depth}benchmarks/{Path(target).name})"
        return found[0] if "://" in target or target.startswith("#") or target.endswith(".svg") else title

    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", link, text)


def _method_pages() -> Iterator[tuple[str, str]]:
    ideas = yaml.safe_load((Path(__file__).parent / "methods.yaml").read_text())
    found = dict(sorted(method_table.methods().items(), key=lambda item: item[0].lower()))
    if missing := found.keys() ^ ideas.keys():
        raise ValueError(f"docs/methods.yaml and the methods differ: {', '.join(sorted(missing))}")
    yield "methods/index.md", f"# Methods\n\n{method_table.table(link='{name}.md')}\n\n{_contents(found)}"
    for name, kind in found.items():
        yield f"methods/{name}.md", _method_page(name, kind, ideas[name])


def _method_page(name: str, kind: type, text: dict[str, object]) -> str:
    overlays = method_table.configs(name)
    lines = [
        f"# {name}: {text['title']}",
        method_table.paper(kind),
        f"**Idea.** {text['idea']}",
        "| | |\n|---|---|\n" + "\n".join(f"| {label} | {value} |" for label, value in _facts(name, kind).items()),
        "## Use it",
    ]
    shown: list[str] = []
    if overlays:
        shown = [overlays[0], *(other for other in overlays[1:] if other == f"{overlays[0]}_segmentation")]
        for overlay in shown:
            lines += [
                f"```console\n{_command(overlay)}\n```",
                f"`configs/{overlay}.yaml`:",
                f"```yaml\n{(ROOT / 'configs' / f'{overlay}.yaml').read_text()}```",
            ]
    else:
        lines.append(f"From Python: `lkd.DistillModule(student, teacher, criterion=lkd.losses.{name}(...))`.")
    if others := [f"`{overlay}`" for overlay in overlays if overlay not in shown]:
        lines.append(f"Other configs: {', '.join(others)}.")
    if text["differences"]:
        lines += ["## Differences and caveats", "\n".join(f"- {line}" for line in text["differences"])]  # type: ignore[attr-defined]
    lines += ["## API", *(_object(path) for path in _paths(name, kind))]
    return "\n\n".join(lines) + "\n"


def _facts(name: str, kind: type) -> dict[str, str]:
    facts = {"Reads": method_table.reads(kind)}
    if hasattr(kind, "needs_build"):
        facts["Adapters"] = "built from the shapes of the features" if kind.needs_build is True else "none"
    if hasattr(kind, "num_views"):
        facts["Views of each image"] = str(kind.num_views) if isinstance(kind.num_views, int) else "as the criterion"
    facts["Several processes"] = method_table.processes(kind)
    facts["Equal to the original"] = method_table.equal(name)
    return facts


def _command(overlay: str) -> str:
    if overlay.startswith("methods/") and method_table.is_for_segmentation(overlay):
        return f"lkd fit --config shapes/kd --config {overlay}"
    if overlay.startswith("methods/"):
        return f"lkd fit --config data/cifar100 --config pairs/resnet56_resnet20_100 --config {overlay}"
    return f"lkd fit --config {overlay}"


def _paths(name: str, kind: type) -> list[str]:
    """The class, and the functions of its file that `lkd.functional` exports."""
    functions = importlib.import_module("lkd.functional")
    own = [each for each in functions.__all__ if getattr(functions, each).__module__ == kind.__module__]
    home = "lkd.losses" if kind.__module__.startswith("lkd.losses") else "lkd.modules"
    same_file = [each for each, other in method_table.methods().items() if other.__module__ == kind.__module__]
    return [f"{home}.{name}", *(f"lkd.functional.{each}" for each in own if same_file[0] == name)]


def _object(path: str) -> str:
    """Document a class, function or constant from its docstring."""
    home, _, name = path.rpartition(".")
    value = getattr(importlib.import_module(home), name)
    kind = "class" if inspect.isclass(value) else "function" if inspect.isroutine(value) else "data"
    members = "\n   :members:" if kind == "class" else ""
    return f"```{{eval-rst}}\n.. auto{kind}:: {path}{members}\n```"


def _reference_pages() -> Iterator[tuple[str, str]]:
    links = [f"- [{title}]({_file(package)}): `{package}`" for package, title in PACKAGES.items()]
    more = "- [Command line](cli.md)\n- [Settings](settings.md)\n- [Config files](configs.md)"
    pages = [*(_file(package).removesuffix(".md") for package in PACKAGES), "cli", "settings", "configs"]
    yield "reference/index.md", "# Reference\n\n" + "\n".join(links) + f"\n{more}\n\n{_contents(pages)}"
    elsewhere = {path for name, kind in method_table.methods().items() for path in _paths(name, kind)}
    for package, title in PACKAGES.items():
        names = _names(package)
        own = [_object(name) for name in names if name not in elsewhere]
        others = [f"- {{py:obj}}`{name}`" for name in names if name in elsewhere]
        more = "\n\n## Documented with their methods\n\n" + "\n".join(others) if others else ""
        yield f"reference/{_file(package)}", f"# {title}\n\n" + "\n\n".join(own) + more + "\n"
    yield "reference/cli.md", _cli_page()
    yield "reference/settings.md", _settings_page()
    yield "reference/configs.md", _configs_page()


def _file(package: str) -> str:
    return f"{package.replace('.', '_')}.md"


def _names(package: str) -> list[str]:
    """The public names of a package; those of `lkd` itself that no other package has."""
    module: ModuleType = importlib.import_module(package)
    if package == "lkd":
        types = [f"lkd.types.{name}" for name in ("Batch", "Mixed", "Normalization", "Outputs", "Probe")]
        return ["lkd.loading.load_run", "lkd.loading.Trained", *types]
    if package == "lkd.features":
        return ["lkd.features.extractor.FeatureExtractor", "lkd.features.layers.resolve_layers"]
    names = getattr(module, "__all__", ["export"])
    return [f"{package}.{name}" for name in names if name != "main"]


def _cli_page() -> str:
    texts = {"lkd": HELP, **{f"lkd {name} --help": settings_help(name) for name in SETTINGS}}
    texts |= {f"lkd {name} --help": text for name, text in OWN_HELP.items()}
    return (
        "# Command line\n\n" + "\n\n".join(f"## `{name}`\n\n```text\n{text}```" for name, text in texts.items()) + "\n"
    )


def _settings_page() -> str:
    classes = {section: path for section, path in SECTIONS.items() if path.startswith("lkd.")}
    lines = ["# Settings", "All settings of lkd's own sections, modules and data modules, generated from the code. "]
    lines[1] += "`lkd fit --trainer.help` lists the settings of Lightning's trainer."
    for section, path in classes.items():
        lines += [f"## `{section}`", _settings_table(path, f"{section}.")]
    for key in ("model", "data"):
        for path in (f"{home}.{name}" for home in homes_of(key) for name in choices(home)):
            lines += [f"## `{key}`: `{path}`", _settings_table(path, f"{key}.init_args.")]
    return "\n\n".join(lines) + "\n"


def _settings_table(path: str, prefix: str) -> str:
    home, _, name = path.rpartition(".")
    rows = ["| Setting | Type | Default | |", "|---|---|---|---|"]
    kind = getattr(importlib.import_module(home), name)
    for one in settings(kind):
        default = one.default and f"`{one.default}`"
        text = re.sub(r"\.\. (note|warning)::", lambda found: f"{found[1].capitalize()}:", one.description)
        cells = (f"`{prefix}{one.name}`", f"`{one.type}`", default, text.replace("``", "`"))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def _configs_page() -> str:
    folder = ROOT / "configs"
    lines = [
        "# Config files",
        "`--config NAME` finds these configs wherever lkd is installed; later files override earlier ones.",
    ]
    for path in sorted(folder.rglob("*.yaml"), key=lambda path: (path.parent, path.name)):
        name = path.relative_to(folder).with_suffix("")
        lines += [f"## `{name}`", f"```yaml\n{path.read_text()}```"]
    return "\n\n".join(lines) + "\n"


def _notebook_pages() -> Iterator[tuple[str, str]]:
    exporter = MarkdownExporter()
    links = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text, resources = exporter.from_filename(str(path))
        for name, data in resources["outputs"].items():
            text = text.replace(f"({name})", f"({_data_uri(name, data)})")
        text = re.sub(
            r"```python\n(?=(?:(?!```)[\s\S])*?^[!%])", "```text\n", text, flags=re.MULTILINE
        )  # shell commands
        title = re.search(r"^# (.*)$", text, re.MULTILINE)
        links.append(f"- [{title[1] if title else path.stem}]({path.stem}.md)")
        yield f"notebooks/{path.stem}.md", text
    pages = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    yield "notebooks/index.md", "# Notebooks\n\n" + "\n".join(links) + f"\n\n{_contents(pages)}"


def _data_uri(name: str, data: bytes) -> str:
    kind = {"png": "image/png", "svg": "image/svg+xml", "jpeg": "image/jpeg"}[name.rpartition(".")[2]]
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _benchmark_pages() -> Iterator[tuple[str, str]]:
    links = []
    for path in sorted((ROOT / "benchmarks").glob("*.md")):
        text = path.read_text()
        if not text.startswith("# "):
            text = f"# {path.stem.capitalize()}\n\n{text}"
        links.append(f"- [{text[2:].splitlines()[0]}]({path.name})")
        yield f"benchmarks/{path.name}", _with_links(text, path.parent)
    pages = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.md"))
    text = "# Benchmarks\n\nEach page states the command, the machine and the versions.\n\n" + "\n".join(links)
    yield "benchmarks/index.md", f"{text}\n\n{_contents(pages)}"


def _contents(pages: Iterable[str]) -> str:
    """The hidden table of contents of a section."""
    return "```{toctree}\n:hidden:\n\n" + "\n".join(pages) + "\n```\n"
