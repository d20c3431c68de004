"""The house rules that a test can hold: which way the arrows point, who commits, what the web process loads."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from app.settings import PROJECT

HEAVY = ("torch", "transformers", "peft", "accelerate")
WEB_MEMORY_LIMIT_BYTES = 150 * 10**6
WEB_IMPORT_LIMIT = 1.4  # times the import of the libraries alone
"""Of the processor: on a machine that is busy with other things the clock on the wall says nothing."""

APP = """
settings, languages · errors · events · shapes · kit · metrics, answer_syntax, trackers · tables · pg_connection, ownership · db · queue, migrate · leases · limits · machines · objectives · graders · saved_graders · formats, strategies, optimizers, chat_templates, export_formats, older_settings, new_tokens ·
run_settings · config_formats · spec · storage · planning · models · datasets · naming · webhooks, tracking · jobs · inference · evaluation · prompts, distillations, searches · batches, evals · retention, personal_data · web · views · learn · schemas · routes ·
relay · ops · main · cli
"""
WORKER = """
kernels.gpu · runtime · supervision · kernels.cpu · modeling · data · scoring · training · conversion · exporters · inference · evaluation · launchers, train ·
run · tasks · main, selftest
"""
"""Which way the arrows point: what stands left may be imported by all to its right. Packages between two dots know nothing of each other."""
WITH_HTTP = {"web", "routes", "schemas", "main", "cli", "ops", "db"}


def sources(folder: str) -> list[Path]:
    return sorted((PROJECT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, module_level: bool = False) -> Iterator[str]:
    """Full names of what a file imports, also inside functions unless `module_level`."""
    tree = ast.parse(path.read_text())
    package = module_of(path).split(".") if path.name == "__init__.py" else module_of(path).split(".")[:-1]
    for node in outside_functions(tree) if module_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module or "") if part)
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def outside_functions(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported; what stands under `if TYPE_CHECKING` does not."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from outside_functions(node)


def places(line: str) -> dict[str, int]:
    return {name.strip(): place for place, names in enumerate(line.split("·")) for name in names.split(",")}


def module_files() -> dict[str, Path]:
    return {module_of(path): path for folder in ("app", "worker") for path in sources(folder)}


def graph(files: dict[str, Path]) -> dict[str, set[str]]:
    """Modules of ours that each module imports anywhere: at its top, in functions and under TYPE_CHECKING."""
    found = {}
    for module, path in files.items():
        names = {name if name in files else name.rpartition(".")[0] for name in imports(path)}
        found[module] = {name for name in names if name in files and name != module}
    return found


def place_of(module: str) -> tuple[str, int] | None:
    """(the package that an arrow line names, its place in the line); None for `app` and `worker` themselves."""
    top, *rest = module.split(".")
    if not rest or rest == ["kernels"]:
        return None
    package = ".".join(rest[:2]) if rest[0] == "kernels" else rest[0]
    return package, places(APP if top == "app" else WORKER)[package]


def wrong_arrows(arrows: dict[str, set[str]]) -> list[str]:
    found = []
    for module, others in arrows.items():
        for other in sorted(others):
            here, there = place_of(module), place_of(other)
            if here is None or there is None or module.split(".")[0] != other.split(".")[0]:
                continue
            if there[1] > here[1] or (there[1] == here[1] and there[0] != here[0]):
                found.append(f"{module} imports {other}")
    return found


def cycles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that lead to each other (Tarjan's strongly connected components of more than one)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for other in arrows[module]:
            if other not in order:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == order[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in arrows:
        if module not in order:
            visit(module)
    return found


def test_every_package_has_its_place():
    for folder, line in (("app", APP), ("worker", WORKER)):
        here = {path.relative_to(PROJECT / folder).with_suffix("").parts[0] for path in sources(folder)} - {"__init__"}
        assert here <= {name.split(".")[0] for name in places(line)}, folder


def test_arrows_point_one_way():
    assert wrong_arrows(graph(module_files())) == []


def test_no_module_leads_back_to_itself():
    assert cycles(graph(module_files())) == []


def test_wrong_arrows_and_cycles_are_seen():
    """The two tests above would pass on an empty graph too."""
    arrows = graph(module_files())
    assert len(arrows) > 300 and sum(map(len, arrows.values())) > 1500
    arrows["app.kit.ids"] = {"app.jobs.service"}
    assert wrong_arrows(arrows) == ["app.kit.ids imports app.jobs.service"]
    assert any({"app.kit.ids", "app.jobs.service"} <= set(group) for group in cycles(arrows))


REGISTRIES = (
    "app.formats",
    "app.objectives",
    "app.strategies",
    "app.graders",
    "app.export_formats",
    "worker.training.objectives",
    "app.datasets.rules",
)
"""A kind is called the same in each of them: the format, the objective and the computation of one name."""


def names_used_twice(classes: list[tuple[str, str]]) -> dict[str, list[str]]:
    """Public classes of one name in several modules. What the API sends (`app.schemas`) is called as what it describes, and a kind
    in one registry as its counterpart in another."""
    found: dict[str, list[str]] = {}
    for module, name in classes:
        kind = module.startswith(REGISTRIES) and not module.rpartition(".")[2].startswith("_")
        if not (name.startswith("_") or module.startswith("app.schemas.") or kind):
            found.setdefault(name, []).append(module)
    return {name: modules for name, modules in found.items() if len(modules) > 1}


def test_a_class_has_a_name_of_its_own():
    classes = [
        (module, node.name)
        for module, path in module_files().items()
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
    ]
    assert len(classes) > 500
    assert names_used_twice(classes) == {}


def test_a_name_that_is_used_twice_is_seen():
    classes = [
        ("app.views.rows", "Line"),
        ("app.limits", "Line"),
        ("app.schemas.rows", "Line"),
        ("app.formats.chat", "Chat"),
        ("app.chat", "Chat"),
    ]
    assert names_used_twice(classes) == {"Line": ["app.views.rows", "app.limits"]}
    assert names_used_twice([("app.formats._base", "Finding"), ("app.tables", "Finding")]) == {
        "Finding": ["app.formats._base", "app.tables"]
    }


def test_services_know_no_http():
    services = [path for path in sources("app") if path.relative_to(PROJECT / "app").with_suffix("").parts[0] not in WITH_HTTP]
    found = [
        f"{path.relative_to(PROJECT)} imports {name}"
        for path in services
        for name in imports(path)
        if name.split(".")[0] in ("fastapi", "starlette") and name != "starlette.concurrency.run_in_threadpool"
    ]
    assert found == []


def test_nothing_imports_the_worker():
    found = [
        f"{path.relative_to(PROJECT)} imports {name}" for path in sources("app") for name in imports(path) if name.split(".")[0] == "worker"
    ]
    assert found == []


def test_the_worker_knows_no_web():
    found = [
        f"{path.relative_to(PROJECT)} imports {name}"
        for path in sources("worker")
        for name in imports(path)
        if name.split(".")[0] in ("fastapi", "starlette")
        or name.startswith(("app.routes", "app.main", "app.web.templates", "app.cli", "app.ops.embedded"))
    ]
    assert found == []


DEVICE_FILES = ("worker/runtime/devices/", "worker/kernels/gpu/")
"""What is different on each kind of device is here; the rest of the worker asks `worker.runtime.devices`."""


def names_of_gpus(source: str) -> Iterator[str]:
    """Where a source names one kind of GPU to torch: `torch.cuda`, `is_cuda`, or "cuda" other than as a folder's name."""
    tree = ast.parse(source)
    folders = {id(node.right) for node in ast.walk(tree) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            named = node.attr in ("is_cuda", "is_xpu") or ast.unparse(node) in ("torch.cuda", "torch.xpu", "torch.backends.cuda")
        else:
            named = isinstance(node, ast.Constant) and str(node.value).partition(":")[0] in ("cuda", "xpu") and id(node) not in folders
        if named:
            yield f"{node.lineno}: {ast.unparse(node)}"  # type: ignore[attr-defined]


def test_kinds_of_gpus_are_named_in_one_place():
    """A new kind is one file there."""
    sources_ = {path.relative_to(PROJECT).as_posix(): path.read_text() for path in sources("worker")}
    assert any(name.startswith(DEVICE_FILES[0]) and list(names_of_gpus(text)) for name, text in sources_.items()), "nothing is seen"
    found = [f"{name}:{where}" for name, text in sources_.items() if not name.startswith(DEVICE_FILES) for where in names_of_gpus(text)]
    assert found == []
    wrong = 'import torch\nif x.is_cuda or device.type == "cuda":\n    torch.cuda.synchronize()\n    model.to("cuda:1")\npath / "cuda"\n'
    assert sorted(one.partition(":")[0] for one in names_of_gpus(wrong)) == ["2", "2", "3", "4"]


def test_app_imports_nothing_heavy_at_module_level():
    found = [
        f"{path.relative_to(PROJECT)} imports {name}"
        for path in sources("app")
        for name in imports(path, module_level=True)
        if name.split(".")[0] in HEAVY
    ]
    assert found == []


def test_only_db_commits():
    """`session.commit()` anywhere else in app/ would end a transaction that is not its own."""
    found = [
        f"{path.relative_to(PROJECT)}:{node.lineno}"
        for path in [*sources("app"), *sources("worker")]
        if path != PROJECT / "app" / "db.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "commit"
    ]
    assert found == []


def test_the_finder_finds(tmp_path):
    """The tests above would pass on an empty list too; this one shows that an arrow pointing up is seen."""
    wrong = PROJECT / "app" / "settings.py"
    tree = "from app.routes import jobs\ndef f():\n    import torch\nfrom . import cli\nfrom app import main"
    names = []

    class Fake(type(wrong)):  # the file's place, with other words in it
        def read_text(self, *args, **kwargs):
            return tree

    names = list(imports(Fake(wrong)))
    assert names == ["app.routes.jobs", "app.cli", "app.main", "torch"]
    assert "torch" not in list(imports(Fake(wrong), module_level=True))


BLOCKED_IMPORT = """
import json, resource, sys, time
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {heavy!r}:
            raise ImportError(f"{{name}} is blocked in the web process")
sys.meta_path.insert(0, Blocked())
start = time.process_time()
from app.main import create_app
seconds = time.process_time() - start
create_app()
with open("/proc/self/statm") as file:
    pages = int(file.read().split()[1])
print(json.dumps({{"seconds": seconds, "bytes": pages * resource.getpagesize(), "modules": len(sys.modules)}}))
"""


def import_the_web_process() -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED_IMPORT.format(heavy=HEAVY)],
        cwd=PROJECT,
        env={
            **os.environ,
            "LUTHIER_DATABASE_URL": "postgresql+psycopg://nobody@127.0.0.1:1/none",
            "LUTHIER_REDIS_URL": "redis://127.0.0.1:1/0",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


LIBRARIES = """
import time
start = time.process_time()
import fastapi, sqlalchemy.orm, sqlalchemy.dialects.postgresql, psycopg, pydantic_settings, redis, celery, jinja2, httpx, structlog
import prometheus_client
print(time.process_time() - start)
"""


def import_the_libraries() -> float:
    return float(subprocess.run([sys.executable, "-c", LIBRARIES], capture_output=True, text=True, timeout=120, check=True).stdout)


def test_the_web_process_needs_no_torch_and_little_memory(data_dir, capsys):
    figures = import_the_web_process()
    with capsys.disabled():
        print(
            f"\nweb process: imports in {figures['seconds']:.2f} s of a processor, {figures['bytes'] / 1e6:.0f} MB, {figures['modules']} modules"
        )
    assert figures["bytes"] < WEB_MEMORY_LIMIT_BYTES
    # In turn with the libraries it stands on, in the same run: machines differ, and the same one from hour to hour.
    # A neighbor takes the caches away now and then, so a few more turns are taken before it is called slow.
    took: list[tuple[float, float]] = []
    web, libraries = 1.0, 0.0
    while web >= WEB_IMPORT_LIMIT * libraries and len(took) < 6:
        took.append((import_the_web_process()["seconds"], import_the_libraries()))
        web, libraries = (min(seconds) for seconds in zip(*took, strict=True))
    assert web < WEB_IMPORT_LIMIT * libraries, f"the web process imports in {web:.2f} s, its libraries in {libraries:.2f} s"


def test_compose_runs_what_luthier_up_runs(data_dir):
    import yaml

    from app.ops.embedded.up import commands
    from app.settings import get_settings

    compose = yaml.safe_load((PROJECT / "docker-compose.yml").read_text())
    services = compose["services"]
    ours = {name: ["python", "-m", *command] for name, command in commands(get_settings()).items()}
    ours["web"] = [{"127.0.0.1": "0.0.0.0"}.get(part, part) for part in ours["web"]]
    optional = {name for name, service in services.items() if "profiles" in service}
    assert set(services) - optional == {*ours, "postgres", "valkey", "migrate"} and optional == {"vllm"}
    assert not services["vllm"].get("ports"), "it is reached by the studio alone"
    for name, command in ours.items():
        assert [str(part) for part in services[name]["command"]] == command, name
        assert services[name]["environment"]["LUTHIER_DATABASE_URL"].endswith("@postgres/luthier")
    assert services["postgres"]["image"] == "postgres:18"
    assert all("healthcheck" in services[name] for name in ("postgres", "valkey", "web"))
    volumes = {volume.partition(":")[0] for service in services.values() for volume in service.get("volumes", [])}
    assert volumes == set(compose["volumes"])


def test_compose_holds_no_secret():
    """Every password in it is a reference to .env."""
    import re

    text = (PROJECT / "docker-compose.yml").read_text()
    for line in text.splitlines():
        found = re.search(r"PASSWORD: (\S+)", line)
        assert not found or found.group(1).startswith("${"), line
    assert "luthier:${POSTGRES_PASSWORD" in text


def test_the_images_start_what_compose_starts():
    import yaml

    text = (PROJECT / "Dockerfile").read_text()
    services = yaml.safe_load((PROJECT / "docker-compose.yml").read_text())["services"]
    started = [json.loads(line.removeprefix("CMD ")) for line in text.splitlines() if line.startswith("CMD ")]
    assert started == [[str(part) for part in services[name]["command"]] for name in ("web", "train")]
    for line in text.splitlines():
        if line.startswith("COPY "):
            for name in line.split()[1:-1]:
                assert (PROJECT / name).exists(), name
